"""The command ``vsa-jit bench``, on a CPU with tiny sizes."""

import csv
import functools
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from support.problems import ON_HOPPER

from vsa_jit.backends import coarse
from vsa_jit.backends.torch import launches as torch_backend
from vsa_jit.bench import extras, stages
from vsa_jit.bench.attention import all_blocks, flash_results, sparse
from vsa_jit.bench.cases import DEFAULTS, DIRECTIONS, GATES, Case, Inputs, Selection, Shape, sample_lengths
from vsa_jit.bench.check import check, metrics
from vsa_jit.bench.measure import HOST_ROUNDS, host_times_us, times_ms
from vsa_jit.bench.report import print_header
from vsa_jit.checks import CONTEXTS
from vsa_jit.cli import bench as command
from vsa_jit.cli.main import main

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--backend", "torch", "--heads", "2", "--head-dim", "16", "--seconds", "0.001"]
SMALL = [*TINY, "--seq-len", "200", "--block-size", "64", "--sparsity", "0.5"]


def bench(*arguments: str) -> int:
    return main(["bench", *arguments])


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_table_and_header(capsys):
    assert bench(*SMALL) == 0
    printed = capsys.readouterr()
    assert "device: cpu" in printed.out
    assert f"torch {torch.__version__}" in printed.out
    assert "runs: torch" in printed.out
    rows = [line.split() for line in printed.out.splitlines() if " 200 " in line]
    assert [row[8] for row in rows] == list(DIRECTIONS)
    for row in rows:
        assert row[4:7] == ["64", "2/4", "0.500"]
        assert row[9] == "ok"
        assert row[12].endswith("x")
    assert "same keys" in printed.out
    assert printed.err == "", "progress is for terminals only"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_shape_without_memory_does_not_end_the_sweep(monkeypatch, tmp_path, error):
    path, random = tmp_path / "rows.json", Inputs.random

    def short_of_memory(shape, device, seed):
        if shape.seq_len == 256:
            raise error
        return random(shape, device, seed)

    monkeypatch.setattr(Inputs, "random", short_of_memory)
    assert bench(*TINY, "--seq-len", "256", "200", "--block-size", "64", "--topk", "1", "--json", str(path)) == 1
    assert [row["status"] for row in records(path)] == ["out of memory"] * 2 + ["ok"] * 2


def test_sweep_is_every_combination(tmp_path):
    path = tmp_path / "rows.json"
    arguments = [
        "--seq-len",
        "130",
        "256",
        "--grid",
        "3x5x9",
        "--sparsity",
        "0.5",
        "0.9",
        "--block-size",
        "64",
        "2x8x8",
    ]
    assert bench(*TINY, *arguments, "--dtype", "fp32", "bf16", "--layout", "bshd", "--json", str(path)) == 0
    rows = records(path)
    assert len(rows) == 3 * 2 * 2 * 2 * 2
    for row in rows:
        assert row["status"] == "ok"
        assert row["check_error"] <= row["check_bound"]
        assert row["topk"] == max(
            1, math.ceil(round((1 - float(row["selection"].split()[1])) * row["num_kv_blocks"], 6))
        )
        factor = 1.0 if row["direction"] == "forward" else 2.5
        keys = row["topk"] * row["block_tokens"]
        flops = factor * 4 * row["batch"] * row["heads"] * row["seq_len"] * keys * row["head_dim"]
        assert row["tflops"] == pytest.approx(flops / row["ms"] * 1e-9)
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ms"])
        assert row["precision_against"] == "flash"
        assert row["same_keys_cosine"] > 0.9999
        assert row["peak_mib"] is None, "a CPU's memory is not measured"
    pairs = {(row["seq_len"], row["dtype"], row["direction"]): row["dense_ms"] for row in rows}
    assert all(row["dense_ms"] == pairs[row["seq_len"], row["dtype"], row["direction"]] for row in rows)


def test_json_and_csv_agree(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert bench(*SMALL, "--profile", "--json", "-", "--csv", str(path)) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert "speed-up" in printed.err, "the tables give way to the program that reads standard output"
    assert document["environment"]["torch"] == torch.__version__
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(lines) == len(document["rows"]) == 2
    for line, row in zip(lines, document["rows"], strict=True):
        assert line["torch"] == torch.__version__
        assert float(line["ms"]) == row["ms"]
        assert line["dense_name"] == row["dense_name"]
        for stage in row["stages"]:
            assert line[f"stage_{stage['name']}_ms"] == ("" if stage["ms"] is None else str(stage["ms"]))


def test_profile_and_trace(tmp_path, capsys):
    path, trace = tmp_path / "rows.json", tmp_path / "trace.json"
    # On a busy machine it may be that no stage of a call is told from noise.
    for _ in range(6):
        assert bench(*SMALL, "--profile", "--json", str(path), "--trace", str(trace)) == 0
        forward, backward = records(path)
        are_resolved = [any(stage["ms"] is not None for stage in row["stages"]) for row in (forward, backward)]
        if all(are_resolved):
            break
    assert all(are_resolved)
    names = [stage["name"] for stage in forward["stages"]]
    assert names == ["pooling", "scores, top-k", "coarse attention", "fine attention", "combine (fused)", "rest"]
    assert [stage["name"] for stage in backward["stages"]] == [
        "fine attention",
        "coarse attention",
        "means (fused)",
        "rest",
    ]
    for row in (forward, backward):
        # What cannot be told from noise has no time; nothing is negative, and nothing is more than the whole.
        for stage in row["stages"]:
            assert stage["noise_ms"] >= 0.0
            assert stage["ms"] is None or stage["noise_ms"] < stage["ms"] < 1.5 * row["ms"]
    printed = capsys.readouterr().out
    assert "whole call" in printed
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"vsa_jit::video_sparse_attn", "vsa_jit::video_sparse_attn_backward"} <= events


def test_profile_without_coarse_branch(tmp_path):
    path = tmp_path / "rows.json"
    assert bench(*SMALL, "--gate", "off", "--profile", "--json", str(path)) == 0
    forward, backward = records(path)
    assert [stage["name"] for stage in forward["stages"]] == ["pooling", "scores, top-k", "fine attention", "rest"]
    assert [stage["name"] for stage in backward["stages"]] == ["fine attention", "rest"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seq-len", "130", "256", "--grid", "3x5x9", "--sparsity", "0.5", "0.9"],
        ["--seq-len", "130", "--topk", "1"],
        ["--segments", "9+4x4x4", "--grid", "4x4x8", "--topk", "1"],
    ],
    ids=["sweep", "one point", "segments"],
)
def test_plot(tmp_path, arguments):
    path = tmp_path / "plot.png"
    assert bench(*TINY, *arguments, "--plot", str(path)) == 0
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert height > 300
    assert width > 600
    assert image[..., :3].std() > 0.05, "the picture is empty"


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "has_matplotlib", lambda: False)
    assert bench(*SMALL, "--plot", str(tmp_path / "plot.png")) == 2
    assert extras.INSTALL in one_line(capsys)


def one_line(capsys) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], ["--dtype", "bf16, fp16, fp32", "'int8'"]),
        (["--block-size", "48"], ["--block-size", "multiple of 64", "'48'"]),
        (["--block-size", "4x4"], ["--block-size", "three positive ints", "'4x4'"]),
        (["--block-size", "192", "--grid", "4x8x8"], ["block_size", "(64, 128, 256)", "192"]),
        (["--grid", "21x30"], ["--grid", "21x30x52", "'21x30'"]),
        (["--segments", "77+21x30"], ["--segments", "77+21x30x52", "a comma between packed samples", "'77+21x30'"]),
        (["--segments", "77+"], ["--segments", "77+21x30x52", "'77+'"]),
        (["--segments", "77;4x4x4"], ["--segments", "77+21x30x52", "'77;4x4x4'"]),
        (["--segments", "0+4x4x4"], ["--segments", "77+21x30x52", "'0+4x4x4'"]),
        (["--segments", "4x4x4", "--context", "none"], ["--context", "attend, compete", "'none'"]),
        (["--context", "attend", "--grid", "4x4x4"], ["--context", "expected argument --segments beside it"]),
        (["--seq-len", "0"], ["--seq-len", "positive", "'0'"]),
        (["--sparsity", "1.0"], ["--sparsity", "[0, 1)", "'1.0'"]),
        (["--sparsity", "90"], ["--sparsity", "[0, 1)", "'90'", "did you mean 0.9?"]),
        (["--block-size", "4"], ["--block-size", "got '4'; did you mean 4x4x4?"]),
        (["--block-size", "32"], ["--block-size", "multiple of 64 tokens, got '32'"]),
        (["--block-size", "4,4"], ["--block-size", "three positive ints", "'4,4'"]),
        (["--dtype", "float8"], ["--dtype", "bf16, fp16, fp32", "'float8'"]),
        (["--sparsity", "most"], ["--sparsity", "[0, 1)", "'most'"]),
        (["--sparsity", "0.5", "--topk", "3"], ["--topk", "--sparsity"]),
        (["--recipe", "quality", "--block-size", "64"], ["--recipe", "--block-size"]),
        (["--head-dim", "512"], ["--head-dim", "16 to 256", "'512'"]),
        (["--shape", "W2"], ["--shape", "W1", "'W2'"]),
        (["--backend", "cudnn"], ["--backend", "torch", "'cudnn'"]),
        (["--device", "tpu"], ["--device", "cuda", "'tpu'"]),
        (["--device", "cuda:99"], ["--device", "of type cuda", "'cuda:99'"]),
        (["--seconds", "-1"], ["--seconds", "positive", "'-1'"]),
        (["--json", "-", "--csv", "-"], ["--csv", "'-'"]),
        (["--json", "no/such/folder/rows.json"], ["--json", "that can be written to", "no/such/folder"]),
        (["--json", "."], ["--json", "expected a file"]),
        (["--csv", ""], ["--csv", "expected a file"]),
        (["--trace", "-"], ["--trace", "expected a file", "'-'"]),
        (["--json", "rows", "--csv", "rows"], ["--csv", "another file than --json's", "'rows'"]),
        (["--seed", "x"], ["--seed", "expected an int", "'x'"]),
        (["--heads", "99999999999999"], ["--heads", "positive int", "'99999999999999'"]),
        (["--plot", "plot.txt"], ["--plot", ".png", "plot.txt"]),
        (["--speed"], ["--speed"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(capsys, arguments, words):
    assert bench("--direction", "forward", *arguments) == 2
    message = one_line(capsys)
    for word in words:
        assert word in message


def test_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench("--device", "cpu", "--backend", "triton") == 2
    assert "Triton needs a CUDA device" in one_line(capsys)


def test_unknown_command(capsys):
    assert main(["benchmark"]) == 2
    assert "benchmark" in one_line(capsys)


PACKED = ((70, (5, 9, 7), 30), ((4, 4, 8), (2, 5, 6)), (100,))


def of_segments(segments, block_size=64, dtype="fp32", layout="bhsd", gate="tensor", context="attend", batch=1) -> Case:
    shape = Shape(sum(sample_lengths(segments)), None, batch, 2, 32, dtype, layout, segments)
    return Case(shape, block_size, Selection(topk=2), gate, "torch", context)


def test_segments_in_tables_and_files(tmp_path, capsys):
    """77 tokens are 2 blocks of context; the video of 5x9x7 is 2x3x2 tiles, and that of 4x4x8 is 2."""
    json_file, csv_file = tmp_path / "rows.json", tmp_path / "rows.csv"
    arguments = ["--segments", "77+5x9x7", "4x4x8,5x9x7+77", "--grid", "4x4x8", "--sparsity", "0.6", "--context"]
    files = ["--json", str(json_file), "--csv", str(csv_file)]
    assert bench(*TINY, *arguments, "compete", "--block-size", "64", *files) == 0
    rows = records(json_file)
    lines = list(csv.DictReader(io.StringIO(csv_file.read_text())))
    table = [line for line in capsys.readouterr().out.splitlines() if " fp32 " in line]
    expected = [
        ("4x4x8", None, None, 128, 2, 1, "1/2"),
        ("77+5x9x7 (compete)", "77+5x9x7", "compete", 392, 14, 5, "5/12"),
        ("4x4x8,5x9x7+77 (compete)", "4x4x8,5x9x7+77", "compete", 520, 16, "1,5", "1/2,5/12"),
    ]
    for number, (tokens, segments, context, seq_len, blocks, topk, selected) in enumerate(expected):
        for direction in range(2):
            row, line, cells = (x[2 * number + direction] for x in (rows, lines, table))
            assert (row["segments"], row["context"], row["seq_len"]) == (segments, context, seq_len)
            assert (row["num_kv_blocks"], row["topk"], row["status"]) == (blocks, topk, "ok")
            assert (line["segments"], line["context"]) == (segments or "", context or "")
            assert (line["seq_len"], line["topk"]) == (str(seq_len), str(topk))
            assert cells.startswith(f"{2 * number + direction + 1} {tokens:>25} ")
            assert f" 64  {selected:>8} " in cells
            assert row["same_keys_cosine"] > 0.9999, "dense attention is that of each sample by itself"
            assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ms"])
    assert [row["sparsity"] for row in rows[::2]] == pytest.approx([1 / 2, 7 / 12, 1 - 6 / 14])
    # Samples do not attend each other.
    for row in rows[4:]:
        factor = 1.0 if row["direction"] == "forward" else 2.5
        assert row["dense_tflops"] * row["dense_ms"] == pytest.approx(factor * 4 * 2 * 16 * (128**2 + 392**2) * 1e-9)


def test_products_of_segments_are_counted_as_they_are(tmp_path):
    """One tile of four is selected in 4x4x16, and the only one of 4x4x4, beside 10 tokens of context in each sample.

    Queries of context attend their whole sample.
    """
    path = tmp_path / "rows.json"
    arguments = ["--segments", "10+4x4x16,4x4x4+10", "--topk", "1", "--block-size", "64", "--json", str(path)]
    assert bench(*TINY, *arguments) == 0
    pairs = (256 * (64 + 10) + 10 * 266) + (64 * (64 + 10) + 10 * 74)
    for row in records(path):
        factor = 1.0 if row["direction"] == "forward" else 2.5
        assert row["tflops"] * row["ms"] == pytest.approx(factor * 4 * 2 * 16 * pairs * 1e-9)


def test_products_of_cut_tiles_are_counted_as_they_are():
    """Of a video of 4x4x6 one tile has 64 tokens and one has 32; each of its queries attends one of them."""
    case = of_segments(((5, (4, 4, 6)),))
    case = replace(case, selection=Selection(topk=1))
    idx, num = torch.tensor([[[[0, 0], [0, 2], [0, 1]]] * 2]).int(), torch.tensor([[[-3, 2, 2]] * 2]).int()
    pairs = 5 * 101 + 64 * (5 + 32) + 32 * (5 + 64)
    assert case.flops_of(idx, num) == 4 * 2 * 32 * pairs
    assert case.shape.dense_flops == 4 * 2 * 32 * 101**2


@pytest.mark.parametrize("context", CONTEXTS)
def test_profile_of_segments(tmp_path, context):
    path = tmp_path / "rows.json"
    arguments = ["--segments", "77+5x9x7,4x4x8", "--block-size", "64", "--sparsity", "0.6", "--context", context]
    assert bench(*TINY, *arguments, "--profile", "--json", str(path)) == 0
    forward, backward = ([stage["name"] for stage in row["stages"]] for row in records(path))
    assert forward == ["pooling", "scores, top-k", "coarse attention", "fine attention", "combine (fused)", "rest"]
    assert backward == ["fine attention", "coarse attention", "means (fused)", "rest"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("segments", "others"),
    [
        (((77, (5, 9, 7)),), {}),
        (PACKED, {"dtype": "bf16", "layout": "bshd", "batch": 2}),
        (PACKED, {"block_size": 128, "gate": "one"}),
        ((((5, 9, 7),),), {"gate": "off"}),
    ],
    ids=["one sample", "packed", "packed, 128", "one video"],
)
def test_check_accepts_segments(segments, others, context, direction):
    case = of_segments(segments, context=context, **others)
    inputs = Inputs.random(case.shape, CPU, seed=int(torch.randint(2**62, ())))
    checked = check(case, inputs, sparse(case, inputs).results(direction), direction, seed=0)
    assert checked.ok, checked.errors
    _, dense = flash_results(inputs, direction)
    found = metrics(all_blocks(case, inputs).results(direction), dense)
    assert found.l1 < (1e-2 if case.shape.dtype == "bf16" else 1e-5)


def select_instead(monkeypatch, **functions):
    """Lets the coarse branch select by other functions."""
    kernels = torch_backend._COARSE_KERNELS._replace(**functions)
    monkeypatch.setattr(torch_backend, "coarse_attend", functools.partial(coarse.coarse_attend, kernels))


def without_context(scores, rows, width, softmax, original):
    """Key blocks of context compete, which is the other kind of context."""
    rows = rows.clone()
    rows[:, 3] = 0
    return original(scores, rows, width, softmax)


def one_less(scores, rows, width, softmax, original):
    idx, num = original(scores, rows, width, softmax)
    return idx, torch.where(num > 1, num - 1, num)


def context_is_sparse(scores, rows, width, softmax, original):
    rows = rows.clone()
    rows[:, 2] = rows[:, 2].clamp(min=2)
    return original(scores, rows, width, softmax)


def over_all_samples(scores, rows, width, softmax, original):
    idx, num = original(scores, rows, width, softmax)
    return torch.where(num[..., None] > 0, idx.roll(5, 1), idx), num


@pytest.mark.parametrize("wrong", [without_context, one_less, context_is_sparse, over_all_samples])
def test_check_finds_wrong_selections_of_segments(monkeypatch, wrong):
    original = torch_backend.select_in_samples
    select_instead(monkeypatch, select_in_samples=lambda *arguments: wrong(*arguments, original))
    case = of_segments(PACKED)
    inputs = Inputs.random(case.shape, CPU, seed=1)
    checked = check(case, inputs, sparse(case, inputs).results("forward"), "forward", seed=0)
    assert checked.worst == "selection"
    assert not checked.ok


def test_coarse_output_of_segments_is_checked(monkeypatch):
    """Probabilities of block means of which another sample has a part."""

    def select_in_samples(scores, *arguments):
        result = torch_backend.select_in_samples(scores, *arguments)
        scores.mul_(0.9)
        return result

    select_instead(monkeypatch, select_in_samples=select_in_samples)
    case = of_segments(PACKED, gate="one")
    inputs = Inputs.random(case.shape, CPU, seed=1)
    checked = check(case, inputs, sparse(case, inputs).results("forward"), "forward", seed=0)
    assert checked.worst == "out"
    assert not checked.ok


def test_plan_of_segments():
    cases = plan("--segments", "77+21x30x52", "512,9x30x52+1", "--topk", "64", "--block-size", "64", "4x8x8")
    assert [case.shape.segments for case in cases[::2]] == [((77, (21, 30, 52)),), ((512,), ((9, 30, 52), 1))]
    assert [case.shape.seq_len for case in cases[::2]] == [77 + 21 * 30 * 52, 512 + 9 * 30 * 52 + 1]
    assert [case.shape.sample_lengths for case in cases[1::2]] == [[32_837], [512, 14_041]]
    assert [case.selected for case in cases] == ["64/624", "64/168", "0/0,64/312", "0/0,64/84"]
    assert {case.context for case in cases} == {"attend"}
    assert str(cases[2]).startswith("512,9x30x52+1 tokens, B=1 H=12 D=128 bf16, block 64, topk 0/0,64/312")


def wrong_forward(original):
    def forward(*arguments):
        out, lse, out_s = original(*arguments)
        out.view(-1)[-40:] += 0.05
        return out, lse, out_s

    return forward


def wrong_backward(original):
    def backward(*arguments, **options):
        dq, dk, dv, dgate, dout_c = original(*arguments, **options)
        return dq, dk * 1.02, dv, dgate, dout_c

    return backward


def wrong_select(original):
    def select(scores, kv_sizes, topk, softmax=None):
        result = original(-scores, kv_sizes, topk)
        original(scores, kv_sizes, topk, softmax)
        return result

    return select


def nan_forward(original):
    def forward(*arguments):
        out, lse, out_s = original(*arguments)
        return out.fill_(math.nan), lse, out_s

    return forward


@pytest.mark.parametrize(
    ("name", "wrong", "direction", "checked"),
    [
        ("attend", wrong_forward, "forward", "out"),
        ("attend", nan_forward, "forward", "out"),
        ("select", wrong_select, "forward", "selection"),
        ("attend_backward", wrong_backward, "backward", "dk"),
    ],
    ids=["wrong tokens", "nan", "selection", "gradient"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_outputs_have_no_speed(tmp_path, capsys, monkeypatch, name, wrong, direction, checked, dtype):
    function = wrong(getattr(torch_backend, name))
    if name == "select":
        select_instead(monkeypatch, select=function)
    else:
        monkeypatch.setattr(torch_backend, name, function)
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    outputs = ["--profile", "--json", str(path), "--plot", str(plot)]
    assert bench(*SMALL, "--dtype", dtype, "--direction", direction, *outputs) == 1
    (row,) = records(path)
    assert row["status"] == "FAILED"
    assert row["checked"] == checked
    assert row["ms"] is row["tflops"] is row["speedup"] is None
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "FAILED" in line)
    assert line.split()[-7:] == ["-"] * 7
    assert plot.exists()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("grid", [None, (5, 9, 7)], ids=["plain", "raster"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_check_accepts_what_is_right(gate, layout, grid, direction):
    shape = Shape(5 * 9 * 7, grid, 2, 2, 32, "bf16", layout)
    case = Case(shape, 64, Selection(topk=2), gate, "torch")
    inputs = Inputs.random(shape, CPU, seed=int(torch.randint(2**62, ())))
    checked = check(case, inputs, sparse(case, inputs).results(direction), direction, seed=0)
    assert checked.ok, checked.errors


def test_metrics():
    reference = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)
    same = metrics([reference], [reference])
    assert (same.cosine, same.l1, same.rmse) == pytest.approx((1.0, 0.0, 0.0))
    other = metrics([torch.zeros(1, 1, 1, 2), reference], [reference, reference])
    assert (other.cosine, other.l1, other.rmse) == pytest.approx((25 / math.sqrt(25 * 50), 0.5, math.sqrt(25 / 4)))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_block_selected_is_the_same_function(direction):
    shape = Shape(200, None, 1, 2, 32, "fp32", "bshd")
    inputs = Inputs.random(shape, CPU, seed=0)
    case = Case(shape, 64, Selection(sparsity=0.9), "tensor", "torch")
    name, flash = flash_results(inputs, direction)
    assert name == "flash"
    found = metrics(all_blocks(case, inputs).results(direction), flash)
    assert found.cosine > 1 - 1e-9
    assert found.l1 < 1e-5


def plan(*arguments: str) -> list[Case]:
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.plan(parser.parse_args(arguments), DEFAULTS["cuda"])


def test_presets_and_recipes():
    small, large = plan("--shape", "W1", "W14", "--block-size", "64")
    assert (small.shape.heads, small.problem.keys.num_blocks, small.topk) == (12, 624, 64)
    assert (large.shape.heads, large.problem.keys.num_blocks, large.topk) == (40, 1440, 144)
    (raster,) = plan("--shape", "W14-raster", "--block-size", "4x8x8", "--sparsity", "0.9")
    assert (raster.shape.seq_len, raster.problem.keys.num_blocks) == (21 * 45 * 80, 6 * 6 * 10)
    recipes = plan("--shape", "W1", "--recipe", "memory", "performance", "quality")
    assert [(case.topk, case.block_size) for case in recipes] == [(8, 64), (16, (4, 8, 8)), (32, (2, 8, 8))]


def test_test_file_is_the_benchmark():
    script = Path(__file__).parents[1] / "test_block_sparse.py"
    folders = [str(script.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run(
        [sys.executable, str(script), *SMALL, "--json", "-"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 2


@pytest.mark.parametrize(
    ("given", "same_as"),
    [
        (("--block-size", "4,4,4", "--grid", "8,8,8"), ("--block-size", "4x4x4", "--grid", "8x8x8")),
        (("--dtype", "bfloat16", "float16", "float32"), ("--dtype", "bf16", "fp16", "fp32")),
        (("--dtype", "torch.bfloat16", "half", "float"), ("--dtype", "bf16", "fp16", "fp32")),
        (("--dtype", "BFloat16", "FP32"), ("--dtype", "bf16", "fp32")),
        (("--block-size", "(4, 4, 4)"), ("--block-size", "4x4x4")),
    ],
)
def test_other_names_of_the_same(given, same_as):
    assert plan(*given) == plan(*same_as)


def test_stages_that_cannot_be_told_from_noise():
    assert stages._stage("all", [2.0, 2.0, 2.1, 1.9, 2.0]).ms == 2.0
    for times in ([-19.6] * 5, [0.0] * 5, [0.1, -0.2, 0.15, -0.1, 0.01]):
        stage = stages._stage("difference", times, flops=1e9)
        assert stage.ms is None
        assert stage.tflops is None
        assert stage.noise_ms >= abs(statistics.median(times))


def test_times_of_several_calls_are_taken_in_turn():
    made = []
    times = times_ms([lambda: made.append("a"), lambda: made.append("b")], torch.device("cpu"), 1e-6)
    assert [len(of_call) for of_call in times] == [len(made) // 2 - 1] * 2
    assert made == ["a", "b"] * (len(made) // 2)


def test_host_times_are_of_one_call():
    made = []

    def call():
        made.append(1)
        time.sleep(1e-3)

    rounds = host_times_us(call, CPU, 3)
    assert len(rounds) == HOST_ROUNDS
    assert len(made) == 3 * HOST_ROUNDS
    assert all(us >= 1000 for us in rounds)


@pytest.mark.parametrize(("count", "text"), [(1, "1 thread"), (2, "2 threads")])
def test_numbers_of_things(count, text):
    """As of threads in the header, and of kernels."""
    environment = dict.fromkeys(("vsa_jit", "torch", "triton", "cuda", "compute_capability"))
    file = io.StringIO()
    print_header({**environment, "device": "cpu", "device_name": "x86", "cpu_threads": count}, [], file)
    assert file.getvalue().splitlines()[0] == f"device: cpu, x86, {text}"


LONG = ("--seq-len", "16384", "--heads", "12", "--head-dim", "128", "--dtype", "bf16", "--sparsity", "0.8")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "blocks"), [("triton", ["64", "4x8x8"]), pytest.param("sm90", ["64"], marks=ON_HOPPER)]
)
def test_profile_of_a_backward_in_passes(tmp_path, backend, blocks):
    path = tmp_path / "rows.json"
    arguments = (*LONG, "--block-size", *blocks, "--backend", backend, "--direction", "backward", "--profile")
    assert bench(*arguments, "--json", str(path)) == 0
    for row in records(path):
        names = [stage["name"] for stage in row["stages"]]
        assert names == ["preparation", "inversion", "dq", "dk, dv", "coarse attention", "means (fused)", "rest"]
        by_name = {stage["name"]: stage["ms"] for stage in row["stages"]}
        assert 0.0 < by_name["dq"] < by_name["dk, dv"] < row["ms"]


@pytest.mark.parametrize("block", [pytest.param("128", marks=ON_HOPPER), pytest.param("256", marks=ON_HOPPER)])
def test_profile_of_a_backward_in_one_pass(tmp_path, block):
    """No work counts twice: the stages and the rest are no more than the whole call."""
    path = tmp_path / "rows.json"
    arguments = (*LONG, "--block-size", block, "--backend", "sm90", "--direction", "backward", "--profile")
    assert bench(*arguments, "--json", str(path)) == 0
    (row,) = records(path)
    names = [stage["name"] for stage in row["stages"]]
    assert names == ["preparation", "inversion", "dq, dk, dv", "coarse attention", "means (fused)", "rest"]
    by_name = {stage["name"]: stage["ms"] or 0.0 for stage in row["stages"]}
    assert by_name["dq, dk, dv"] > 0.5 * row["ms"]
    assert sum(by_name.values()) == pytest.approx(row["ms"], rel=0.1)

"""The command ``vsa-jit bench``, on a CPU with tiny sizes."""

import csv
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from support.problems import ON_HOPPER

from vsa_jit.backends.torch import launches as torch_backend
from vsa_jit.bench import extras, stages
from vsa_jit.bench.attention import all_blocks, flash_results, sparse
from vsa_jit.bench.cases import DEFAULTS, DIRECTIONS, GATES, Case, Inputs, Selection, Shape
from vsa_jit.bench.check import check, metrics
from vsa_jit.bench.measure import HOST_ROUNDS, host_times_us, times_ms
from vsa_jit.bench.report import print_header
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
    assert names == ["pooling", "scores", "top-k", "coarse attention", "fine attention", "combine (fused)", "rest"]
    assert [stage["name"] for stage in backward["stages"]] == ["fine attention", "coarse attention", "means", "rest"]
    for row in (forward, backward):
        # What cannot be told from noise has no time; nothing is negative, and nothing is more than the whole.
        for stage in row["stages"]:
            assert stage["noise_ms"] >= 0.0
            assert stage["ms"] is None or stage["noise_ms"] < stage["ms"] < 1.5 * row["ms"]
    printed = capsys.readouterr().out
    assert "whole call" in printed
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"vsa_jit::attend", "vsa_jit::attend_backward"} <= events


def test_profile_without_coarse_branch(tmp_path):
    path = tmp_path / "rows.json"
    assert bench(*SMALL, "--gate", "off", "--profile", "--json", str(path)) == 0
    forward, backward = records(path)
    assert [stage["name"] for stage in forward["stages"]] == ["pooling", "scores", "top-k", "fine attention", "rest"]
    assert [stage["name"] for stage in backward["stages"]] == ["fine attention", "rest"]


@pytest.mark.parametrize(
    "arguments",
    [["--seq-len", "130", "256", "--grid", "3x5x9", "--sparsity", "0.5", "0.9"], ["--seq-len", "130", "--topk", "1"]],
    ids=["sweep", "one point"],
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


def wrong_forward(original):
    def forward(*arguments):
        out, lse, out_s = original(*arguments)
        out.view(-1)[-40:] += 0.05
        return out, lse, out_s

    return forward


def wrong_backward(original):
    def backward(*arguments):
        dq, dk, dv, dgate, dout_c = original(*arguments)
        return dq, dk * 1.02, dv, dgate, dout_c

    return backward


def wrong_select(original):
    def select(scores, *arguments):
        return original(-scores, *arguments)

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
    monkeypatch.setattr(torch_backend, name, wrong(getattr(torch_backend, name)))
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("sm90", marks=ON_HOPPER)])
def test_profile_of_a_backward_in_passes(tmp_path, backend):
    path = tmp_path / "rows.json"
    sizes = ("--seq-len", "8192", "--heads", "4", "--head-dim", "128", "--dtype", "bf16", "--sparsity", "0.8")
    arguments = (*sizes, "--backend", backend, "--direction", "backward", "--profile", "--json", str(path))
    assert bench(*arguments) == 0
    for row in records(path):
        names = [stage["name"] for stage in row["stages"]]
        assert names == ["preparation", "inversion", "dq", "dk, dv", "coarse attention", "means", "rest"]
        by_name = {stage["name"]: stage["ms"] for stage in row["stages"]}
        assert 0.0 < by_name["dq"] < by_name["dk, dv"] < row["ms"]

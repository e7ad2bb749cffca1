"""``vsa-jit bench --peer``, with another package's operator in plain PyTorch."""

import csv
import importlib
import io
import json
import math
import sys
import types

import pytest
import torch

from vsa_jit.bench.attention import sparse
from vsa_jit.bench.cases import DIRECTIONS, Case, Inputs, Selection, Shape
from vsa_jit.bench.check import check
from vsa_jit.bench.peers import FastVideo, check_peer
from vsa_jit.cli import bench as command
from vsa_jit.cli.main import main

CPU = torch.device("cpu")
COMMAND = ["bench", "--peer", "fastvideo"]
TINY = ["--device", "cpu", "--backend", "torch", "--heads", "2", "--head-dim", "64", "--seconds", "0.001"]
SMALL = [*TINY, "--dtype", "bf16", "--grid", "5x6x7", "--block-size", "4x4x4", "--topk", "3"]


def video_sparse_attn(q, k, v, kv_sizes, q_sizes, topk, block_size=64, compress_attn_weight=None):
    """FastVideo's operator of [B, H, S, D], which needs all that its callers promise, with a mask of all tokens."""
    block = math.prod(block_size)
    tensors = [q, k, v] if compress_attn_weight is None else [q, k, v, compress_attn_weight]
    is_token = (torch.arange(block) < kv_sizes[:, None]).flatten()
    assert torch.equal(kv_sizes, q_sizes)
    for x in tensors:
        assert x.is_contiguous()
        assert x.shape[2] == len(is_token)
        assert not x[:, :, ~is_token].any()

    def means(x):
        return (x.float().unflatten(2, (-1, block)).sum(3) / kv_sizes[:, None]).to(x.dtype)

    scores = means(q) @ means(k).mT / q.shape[-1] ** 0.5
    out_c = (scores.softmax(-1) @ means(v)).repeat_interleave(block, 2)
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    block_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    mask = block_map.repeat_interleave(block, 2).repeat_interleave(block, 3) & is_token
    out = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    return out + (out_c if compress_attn_weight is None else out_c * compress_attn_weight)


def video_sparse_attn_bshd(q, k, v, kv_sizes, q_sizes, topk, block_size=64, compress_attn_weight=None):
    tensors = (None if x is None else x.transpose(1, 2).contiguous() for x in (q, k, v, compress_attn_weight))
    q, k, v, gate = tensors
    return video_sparse_attn(q, k, v, kv_sizes, q_sizes, topk, block_size, gate).transpose(1, 2)


def install(monkeypatch, operator=video_sparse_attn):
    module = types.ModuleType("fastvideo_kernel")
    module.__version__ = "9.8.7"
    module.video_sparse_attn = operator
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", module)


def compared(case, direction, operator=video_sparse_attn, bshd=None):
    inputs = Inputs.random(case.shape, CPU, seed=int(torch.randint(2**62, ())))
    checked = check(case, inputs, sparse(case, inputs).results(direction), direction, seed=0)
    assert checked.ok
    return check_peer(FastVideo("", operator, bshd), case, inputs, checked, direction)


def case_of(grid, block_size=64, gate="tensor", topk=2):
    return Case(Shape(math.prod(grid), grid, 2, 2, 64, "bf16", "bshd"), block_size, Selection(topk=topk), gate, "torch")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gate", ["tensor", "one"])
@pytest.mark.parametrize(
    ("grid", "block_size"),
    [((5, 6, 7), 64), ((4, 4, 8), (4, 4, 4)), ((3, 9, 10), (2, 8, 8)), ((5, 9, 7), (4, 8, 8)), ((1, 9, 10), 64)],
)
def test_tiling_of_its_callers(grid, block_size, gate, direction):
    result, call = compared(case_of(grid, block_size, gate), direction, bshd=video_sparse_attn_bshd)
    assert result.why_not is None
    gradients = ["dq", "dk", "dv", "dgate"][: 4 if gate == "tensor" else 3]
    assert list(result.checked.errors) == (["out"] if direction == "forward" else gradients)
    call()


def test_without_an_operator_of_the_other_layout():
    assert compared(case_of((5, 9, 7), (4, 8, 8)), "forward")[0].why_not is None


def test_a_call_leaves_nothing_to_the_next():
    """Inference writes into the padding of the call before it."""
    case = case_of((5, 6, 7))
    attention = FastVideo("", video_sparse_attn, None).attention(case, CPU)
    for seed in range(2):
        inputs = Inputs.random(case.shape, CPU, seed)
        tensors = inputs.q, inputs.k, inputs.v, inputs.gate
        with torch.no_grad():
            out = attention(*tensors)
        assert out.shape == inputs.q.shape
        assert torch.equal(out, FastVideo("", video_sparse_attn, None).attention(case, CPU)(*tensors))


def test_tables_and_files(monkeypatch, tmp_path, capsys):
    install(monkeypatch)
    path = tmp_path / "rows.csv"
    arguments = [*SMALL, "--head-dim", "32", "--seq-len", "200", "--json", "-", "--csv", str(path)]
    assert main([*COMMAND, *arguments]) == 0
    printed = capsys.readouterr()
    about = "fastvideo-kernel 9.8.7, without its compiled extension"
    assert f"fastvideo: {about}" in printed.err
    document = json.loads(printed.out)
    assert document["environment"]["fastvideo"] == about
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(lines) == len(document["rows"]) == 8
    for line, row in zip(lines, document["rows"], strict=True):
        (peer,) = row["peers"]
        assert row["layout"] == "bshd"
        assert peer["name"] == "fastvideo"
        if row["grid"] is None or row["head_dim"] == 32:
            assert peer["ms"] is peer["ratio"] is peer["check_error"] is None
            reason = "expected a grid" if row["grid"] is None else "heads of 64 or 128, got 32"
            assert reason in peer["why_not"]
            assert f"  {peer['why_not']}\n" in printed.err
            assert line["peer_fastvideo_ms"] == ""
        else:
            assert peer["why_not"] is None
            assert peer["check_error"] <= peer["check_bound"]
            assert peer["ratio"] == pytest.approx(peer["ms"] / row["ms"])
            figures = [f"{row['ms']:.3f}", f"{peer['ms']:.3f}", f"{peer['ratio']:.2f}x", "-"]
            assert figures in [printed_line.split()[-4:] for printed_line in printed.err.splitlines()]
            assert float(line["peer_fastvideo_ms"]) == peer["ms"]
            assert float(line["peer_fastvideo_ratio"]) == peer["ratio"]
        assert line["peer_fastvideo_why_not"] == (peer["why_not"] or "")
    assert "peer/ours" in printed.err


def test_profile_beside_a_peer(monkeypatch, capsys):
    install(monkeypatch)
    assert main([*COMMAND, *SMALL, "--direction", "forward", "--profile", "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["stages"]
    assert row["peers"][0]["ratio"] == pytest.approx(row["peers"][0]["ms"] / row["ms"])


def test_nothing_of_peers_where_there_are_none(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert main(["bench", *SMALL, "--direction", "forward", "--json", "-", "--csv", str(path)]) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert row["peers"] == []
    assert row["layout"] == "bhsd"
    assert "peer" not in printed.err
    assert "peer" not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--segments", "9+4x4x4"], "its callers tile one video: expected a grid"),
        (["--grid", "4x4x8", "--layout", "bhsd"], "expected layout bshd, got bhsd"),
        (["--grid", "4x4x8", "--gate", "off"], "expected gate tensor or one"),
        (["--grid", "4x4x8", "--dtype", "fp32"], "its kernels compute in bf16, got fp32"),
        (["--grid", "4x4x8", "--block-size", "4x8x16"], "blocks of 64, 128 or 256 tokens, got 512"),
    ],
)
def test_cases_that_it_cannot_run(monkeypatch, capsys, arguments, reason):
    install(monkeypatch)
    defaults = ["--dtype", "bf16"] * ("--dtype" not in arguments) + ["--block-size", "64"] * (
        "--block-size" not in arguments
    )
    assert main([*COMMAND, *TINY, "--topk", "1", "--direction", "forward", *defaults, *arguments]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith(reason))
    assert line.split()[:9] == ["1", "forward", "fastvideo", *["-"] * 6]


def unaware_of_cut_tiles(q, k, v, kv_sizes, q_sizes, *others, **options):
    out = video_sparse_attn(q, k, v, kv_sizes, q_sizes, *others, **options)
    return out * (kv_sizes / 64).repeat_interleave(64)[:, None].to(out.dtype)


def without_gate(*arguments, compress_attn_weight, **options):
    return video_sparse_attn(*arguments, **options)


def one_block_less(q, k, v, kv_sizes, q_sizes, topk, **options):
    return video_sparse_attn(q, k, v, kv_sizes, q_sizes, topk - 1, **options)


def nan_in_one_token(*arguments, **options):
    out = video_sparse_attn(*arguments, **options)
    out[0, 0, 0, 0] = math.nan
    return out


def of_other_shape(*arguments, **options):
    return video_sparse_attn(*arguments, **options).float()[..., :32]


@pytest.mark.parametrize(
    "wrong", [unaware_of_cut_tiles, without_gate, one_block_less, nan_in_one_token, of_other_shape]
)
def test_wrong_outputs_have_no_time(monkeypatch, capsys, wrong):
    install(monkeypatch, wrong)
    assert main([*COMMAND, *SMALL, "--direction", "forward", "--json", "-"]) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert row["ms"] is not None
    (peer,) = row["peers"]
    assert peer["ms"] is peer["ratio"] is None
    assert peer["why_not"] == "its results differ from ours"
    assert "its results differ from ours" in printed.err


def test_wrong_gradients_have_no_time():
    def wrong(q, k, *others, **options):
        return video_sparse_attn(q, k + 0.1 * (k - k.detach()), *others, **options)

    case = case_of((5, 6, 7))
    assert compared(case, "forward", wrong)[0].why_not is None
    result, call = compared(case, "backward", wrong)
    assert result.why_not == "its results differ from ours"
    assert result.checked.worst == "dk"
    assert call is None


@pytest.mark.parametrize(("blocks", "is_ok"), [(1, True), (2, False)])
def test_one_block_of_a_hundred_may_differ(blocks, is_ok):
    def near_ties(*arguments, **options):
        out = video_sparse_attn(*arguments, **options)
        out[0, 0, : 64 * blocks] += 0.1
        return out

    result, _ = compared(case_of((8, 16, 16), topk=4), "forward", near_ties)
    assert (result.why_not is None) == is_ok


def test_an_operator_that_raises(monkeypatch, capsys):
    def fails(*arguments, **options):
        raise AssertionError("no kernel\nfor this")

    install(monkeypatch, fails)
    assert main([*COMMAND, *SMALL, "--direction", "forward"]) == 0
    assert "  AssertionError: no kernel\n" in capsys.readouterr().out


def test_an_operator_without_gradients():
    def detached(*arguments, **options):
        return video_sparse_attn(*arguments, **options).detach()

    case = case_of((4, 4, 8))
    assert compared(case, "forward", detached)[0].why_not is None
    assert "does not require grad" in compared(case, "backward", detached)[0].why_not


def refused(monkeypatch, capsys, *arguments):
    """The message of a command that ends before anything is measured."""
    monkeypatch.setattr(command, "sweep", None)
    assert main([*COMMAND, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_missing_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", None)
    message = refused(monkeypatch, capsys, *SMALL)
    expected = "--peer fastvideo: the package fastvideo-kernel is not installed (pip install fastvideo-kernel)"
    assert expected in message


def test_package_without_the_operator(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", types.ModuleType("fastvideo_kernel"))
    assert "has no video_sparse_attn" in refused(monkeypatch, capsys, *SMALL)


@pytest.mark.parametrize(
    ("code", "reason"),
    [("import no_such_package", "No module named 'no_such_package'"), ("raise RuntimeError('no GPU')", "no GPU")],
)
def test_package_that_cannot_be_imported(monkeypatch, tmp_path, capsys, code, reason):
    (tmp_path / "fastvideo_kernel.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fastvideo_kernel", raising=False)
    assert f"cannot be imported: {reason}" in refused(monkeypatch, capsys, *SMALL)


def test_the_stand_in_is_no_peer(monkeypatch, capsys):
    assert importlib.import_module("fastvideo_kernel").video_sparse_attn.__doc__.startswith("``vsa_jit.")
    message = refused(monkeypatch, capsys, *SMALL)
    assert "--peer fastvideo" in message
    assert "it would be compared with itself" in message


@pytest.mark.parametrize("other", [["--model", "wan-1.3b"], ["--kernels", "W1"], ["--first-call"]])
def test_not_beside_other_measurements(monkeypatch, capsys, other):
    message = refused(monkeypatch, capsys, *other)
    assert f"argument --peer: not allowed with argument {other[0]}" in message


def test_unknown_peer(capsys):
    assert main(["bench", "--peer", "diffusers"]) == 2
    assert "argument --peer: expected one of fastvideo, got 'diffusers'" in capsys.readouterr().err

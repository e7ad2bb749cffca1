"""``vsa-jit bench --kernels``: its arguments, its works with small sizes on a CPU, and a run on a Hopper GPU."""

import json
from dataclasses import replace

import pytest
import torch
from support.problems import ON_HOPPER
from torch.nn.attention import SDPBackend

from vsa_jit.backends.torch import launches as torch_backend
from vsa_jit.bench import attention, kernels
from vsa_jit.bench.cases import Case, Selection, Shape, sample_lengths
from vsa_jit.cli.main import main

CPU = torch.device("cpu")
SETTING = kernels.Setting(CPU, 1e-4, seed=1)
HOST = [
    "host time of a call with 16 segments",
    "host time of inference",
    "host time of a training step",
    "host time of a training step in one thread",
    "host time of a call",
    "host time of a launch of the block means",
]
CONTEXT, PACKED = (((4, 8, 16), 70),), (((4, 4, 16),), ((8, 4, 8),))


def bench(*arguments: str) -> int:
    return main(["bench", "--kernels", *arguments])


@pytest.fixture
def on_cpu(monkeypatch):
    """Plain PyTorch in place of both backends and of cuDNN."""
    monkeypatch.setattr(kernels, "OURS", "torch")
    monkeypatch.setattr(kernels, "THEIRS", "torch")
    monkeypatch.setattr(kernels, "DENSE", SDPBackend.MATH)
    monkeypatch.setattr(kernels, "W1_TOKENS", 256)
    monkeypatch.setattr(kernels, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "check_device", lambda device: None)
    works = (
        kernels.Dense(32, SDPBackend.MATH),
        kernels.Forward("small, random", case(2, 512, 3)),
        kernels.Forward("small, neighbouring", case(2, 512, 3), (2, 2, 2)),
        kernels.Backward("backward, hot", case(2, 512, 3), hot=0.3),
        kernels.Backward("backward, deterministic", case(2, 512, 3), deterministic=True),
        beside_video(kernels.Forward, "segments, context", CONTEXT),
        beside_video(kernels.Backward, "backward, segments, packed", PACKED),
        kernels.Copy(),
        kernels.Means("block means, tiled", case(2, 512, 1), tiled=True),
        kernels.Means("block means, raster", case(2, 4 * 5 * 6, 1, grid=(4, 5, 6), layout="bshd"), tiled=False),
        kernels.HostBesideVideo(
            kernels.HostOfWhole(HOST[0], of_segments(PACKED), calls=2),
            kernels.HostOfWhole(HOST[0], case(2, 512, 3, (4, 8, 16)), calls=2),
        ),
        kernels.HostOfWhole(HOST[1], with_gate(), calls=2),
        kernels.HostOfWhole(HOST[2], with_gate(), with_backward=True, calls=2),
        kernels.HostOfWhole(HOST[3], with_gate(), with_backward=True, in_one_thread=True, calls=2),
        kernels.HostCall(HOST[4], case(2, 256, 2), calls=2),
        kernels.HostLaunch(HOST[5], case(2, 256, 1), calls=2),
    )
    monkeypatch.setattr(kernels, "works", lambda: works)
    return works


def case(heads: int, tokens: int, topk: int, grid=None, layout="bhsd") -> Case:
    return Case(Shape(tokens, grid, 1, heads, 32, "bf16", layout), 64, Selection(topk=topk), "off", "torch")


def with_gate() -> Case:
    return replace(case(2, 512, 3, (4, 8, 16), "bshd"), gate="tensor")


def of_segments(segments) -> Case:
    shape = Shape(sum(sample_lengths(segments)), None, 1, 2, 32, "bf16", "bshd", segments)
    return replace(case(2, 512, 3), shape=shape)


def beside_video(kind, name: str, segments) -> kernels.BesideVideo:
    return kernels.BesideVideo(kind(name, of_segments(segments)), kind(name, case(2, 512, 3, (4, 8, 16), "bshd")))


def test_works_have_the_sizes_that_their_names_say():
    works = {work.name: work for work in kernels.works()}
    assert len(works) == len(kernels.works()) == 4 + 13 + 13 + 1 + 16 + 9 + 5
    for name, heads, tokens, head_dim, block, topk in (
        ("W1, random", 12, 39_936, 128, 64, 64),
        ("W1, D=64, neighbouring", 12, 39_936, 64, 64, 64),
        ("W1, raster, bshd", 12, 24 * 32 * 52, 128, 64, 64),
        ("W1, blocks of 192", 12, 39_936, 128, 192, 21),
        ("W14, random", 40, 92_160, 128, 64, 144),
        ("small, random", 8, 8192, 128, 64, 16),
    ):
        work = works[name].case
        queries = work.problem.queries
        assert (queries.heads, queries.length, work.problem.head_dim) == (heads, tokens, head_dim)
        assert (work.problem.block, work.topk) == (block, topk)
        assert work.flops == 4 * heads * tokens * topk * block * head_dim
    assert works["W1, raster, bshd"].case.shape.size == (1, 39_936, 12, 128)
    for name, *kind in ((HOST[1], False, False), (HOST[2], True, False), (HOST[3], True, True)):
        work = works[name]
        assert [work.with_backward, work.in_one_thread] == kind
        assert (work.case.shape.size, work.case.topk, work.case.gate) == ((1, 6400, 12, 64), 10, "tensor")
    assert works["block means, D=64, bhsd, raster, cut tiles"].case.problem.keys.num_blocks == 6 * 8 * 13
    assert works["block means, D=128, bshd, raster, blocks of 256"].case.problem.keys.tile == (4, 8, 8)


def test_works_of_segments_have_the_sizes_that_their_names_say():
    works = kernels.named(["segments"])
    assert len(works) == 9
    *attention, host = works
    for work in attention:
        block, topk = (128, 32) if "128" in work.name else (64, 64)
        case, video = work.work.case, work.video.case
        assert type(work.work) is type(work.video) is (kernels.Backward if "backward" in work.name else kernels.Forward)
        assert (video.shape.size, video.shape.grid) == ((1, 39_936, 12, 128), (24, 32, 52))
        assert (video.problem.block, video.topk, video.problem.keys.num_blocks) == (block, topk, 39_936 // block)
        assert (case.problem.block, case.topk_of_samples) == (block, [topk] * len(case.shape.segments))
        assert (case.shape.heads, case.shape.head_dim) == (12, 128)
        # With whole tiles packed samples have as many products as the video.
        assert not case.problem.keys.is_partial
        assert not video.problem.keys.is_partial
        if "packed" in work.name:
            assert (case.shape.seq_len, len(case.shape.segments)) == (39_936, 8)
        else:
            assert (case.shape.seq_len, case.shape.segments) == (39_936 + 512, (((24, 32, 52), 512),))
    assert host.work.case.shape.seq_len == host.video.case.shape.seq_len == 6400
    assert len(host.work.case.shape.segment_lengths) == 16
    assert host.work.case.gate == host.video.case.gate == "one"


def test_products_of_works_of_segments(on_cpu):
    """128 keys of video and 70 tokens of context for each query of a video, and all for those of context."""
    work = kernels.Forward("context", replace(of_segments(CONTEXT), selection=Selection(topk=2)))
    q2k_idx, q2k_num = work.selection(SETTING)
    assert q2k_num.tolist() == [[[2 + 2] * 8 + [-10] * 2] * 2]
    assert q2k_idx.shape == (1, 2, 10, 4)
    assert (q2k_idx[:, :, :8, 2:] == torch.tensor([8, 9])).all()
    assert len(q2k_idx[:, :, :8, :2].flatten(0, 2).unique(dim=0)) > 1
    flops = 4 * 2 * 32 * (512 * (128 + 70) + 70 * 582)
    assert work.checked_calls(SETTING).flops == flops
    backward = kernels.Backward("context", work.case)
    assert backward.checked_calls(SETTING).flops == 2.5 * flops


def test_products_at_full_size():
    """Packed samples have as many as the video alone; context is attended by all and attends all."""
    for work in kernels.named(["segments, "]):
        segments, video = (
            replace(of_work.case, backend="torch", shape=replace(of_work.case.shape, heads=1))
            for of_work in (work.work, work.video)
        )
        of_segments, of_video = (
            case.flops_of(*kernels.Forward("", case).selection(SETTING)) for case in (segments, video)
        )
        of_context = 4 * 128 * (39_936 * 512 + 512 * (39_936 + 512))
        assert of_video == 4 * 128 * 39_936 * 4096
        assert of_segments == of_video + (of_context if "context" in work.name else 0)


def test_names_are_chosen_by_their_parts():
    small = ["small, random", "backward, small, random"]
    assert [work.name for work in kernels.named(["small", "copy"])] == [*small, "copy"]
    assert kernels.named([]) == kernels.works()
    assert kernels.named(["nothing"]) == ()


def test_a_random_map_draws_other_blocks_for_each_row():
    index = kernels.Forward("random", case(3, 640, 4)).selection(SETTING)[0]
    assert index.shape == (1, 3, 10, 4)
    assert index.dtype == torch.int32
    rows = index.flatten(0, 2).sort(-1).values
    assert rows.min() >= 0
    assert rows.max() < 10
    assert (rows.diff() > 0).all()
    assert len(rows.unique(dim=0)) > 1


def test_hot_blocks_are_in_every_row():
    index = kernels.Forward("hot", case(3, 640, 4), hot=0.2).selection(SETTING)[0]
    named = torch.zeros(1, 3, 10, 10, dtype=torch.bool).scatter_(-1, index.long(), True)
    in_all = named.all((0, 1, 2))
    assert in_all.sum() == 2
    assert (named[..., ~in_all].sum(-1) == 2).all()


def test_a_neighbouring_map_takes_blocks_that_are_near():
    """A block is its own nearest; one that is beyond two more than others are cannot come before them."""
    sides = (4, 5, 6)
    work = kernels.Forward("neighbouring", case(2, 64 * 120, 8), sides)
    index = work.selection(SETTING)[0][0].long()
    places = torch.cartesian_prod(*(torch.arange(side) for side in sides)).float()
    distances = torch.cdist(places, places).expand(2, -1, -1)
    taken = distances.gather(-1, index)
    assert (taken.max(-1).values <= distances.sort(-1).values[..., 7] + 2).all()
    random = distances.gather(-1, replace(work, neighbouring=None).selection(SETTING)[0][0].long())
    assert taken.mean() < 0.75 * random.mean()


def test_all_works_on_a_cpu(on_cpu, capsys, tmp_path):
    path = tmp_path / "kernels.json"
    assert bench("--device", "cpu", "--seconds", "0.0001", "--json", str(path)) == 0
    content = json.loads(path.read_text())
    assert content["environment"]["seconds_per_measurement"] == 0.0001
    rows = {row.pop("name"): row for row in content["rows"]}
    assert list(rows) == [work.name for work in on_cpu]
    lines = capsys.readouterr().out.splitlines()
    for name, row in rows.items():
        assert all(figure > 0 for figure in row.values())
        assert any(line.startswith(f"{name}: ") for line in lines)
    for name in ("small, random", "small, neighbouring"):
        row = rows[name]
        assert row["of_dense_min"] <= row["of_dense"] <= row["of_dense_max"]
        assert row["tflops"] == pytest.approx(4 * 2 * 512 * 3 * 64 * 32 / row["ms"] * 1e-9)
    for name, products in (
        ("segments, context", 4 * 2 * 32 * (512 * (192 + 70) + 70 * 582)),
        ("backward, segments, packed", 2.5 * 4 * 2 * 512 * 3 * 64 * 32),
    ):
        row = rows[name]
        assert row["of_video_min"] <= row["of_video"] <= row["of_video_max"]
        assert row["tflops"] == pytest.approx(products / row["ms"] * 1e-9)
    assert row["video_tflops"] == pytest.approx(products / row["video_ms"] * 1e-9)
    row = rows[HOST[0]]
    assert row["times_video"] == pytest.approx(row["us"] / row["video_us"])
    row = rows["backward, hot"]
    assert row["tflops"] == pytest.approx(2.5 * 4 * 2 * 512 * 3 * 64 * 32 / row["ms"] * 1e-9)
    assert rows["copy"]["tb_per_s"] == pytest.approx(2 * (1 << 16) / rows["copy"]["ms"] * 1e-9)
    means = rows["block means, tiled"]
    assert means["of_copy"] / means["triton_of_copy"] == pytest.approx(means["triton_ms"] / means["ms"])
    rate = 3 * 2 * 512 * 32 * 2 / means["ms"] / (2 * (1 << 16) / rows["copy"]["ms"])
    assert means["of_copy"] == pytest.approx(rate)
    for name in HOST:
        assert rows[name]["us_min"] <= rows[name]["us"] <= rows[name]["us_max"]


@pytest.mark.parametrize(("with_backward", "in_one_thread"), [(False, False), (True, False), (True, True)])
def test_a_video_on_the_host_is_a_whole_call(on_cpu, monkeypatch, with_backward, in_one_thread):
    def host_time(setting, name, call, calls):
        assert torch._C._is_multithreading_enabled() != in_one_thread
        return call()

    monkeypatch.setattr(kernels.Setting, "host_time", host_time)
    work = kernels.HostOfWhole("video", with_gate(), with_backward, in_one_thread)
    run = attention.sparse(work.case, SETTING.inputs(work.case.shape))
    expected = run.forward_backward() if with_backward else run.forward()
    assert len(expected) == (4 if with_backward else 1)
    for x, y in zip(work.measure(SETTING), expected, strict=True):
        assert torch.equal(x, y)
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("function", ["attend", "block_means"])
def test_wrong_results_have_no_time(on_cpu, monkeypatch, capsys, tmp_path, function):
    right, calls = getattr(torch_backend, function), []

    def wrong(*arguments):
        calls.append(1)
        first, *others = right(*arguments)
        return (first + 1 if len(calls) == 1 else first, *others)

    monkeypatch.setattr(torch_backend, function, wrong)
    path = tmp_path / "kernels.json"
    name = "small, random" if function == "attend" else "block means, raster"
    assert bench(name, "--device", "cpu", "--json", str(path)) == 1
    assert json.loads(path.read_text())["rows"] == [{"name": name, "status": "FAILED"}]
    assert f"{name}: FAILED, other results than Triton's kernels" in capsys.readouterr().out


def test_gradients_of_context_are_compared_by_themselves():
    """An error that is lost in the norm of the video's gradients."""
    work = kernels.Backward("context", of_segments(CONTEXT))
    shape = work.case.shape.size
    wrong, right = torch.ones(shape), torch.ones(shape)
    right[:, 512:] = 1e-3
    wrong[:, 512:] = 2e-3
    assert not work.agree((wrong,), (right,))
    assert (wrong - right).norm() < 1e-2 * right.norm()
    assert work.agree((right,), (right,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--segments", "77+4x4x4"), "argument --segments: not allowed with argument --kernels"),
        (("--seq-len", "128"), "argument --seq-len: not allowed with argument --kernels"),
        (("--batch", "1"), "argument --batch: not allowed with argument --kernels"),
        (("--direction", "both"), "argument --direction: not allowed with argument --kernels"),
        (("--profile",), "argument --profile: not allowed with argument --kernels"),
        (("--model", "wan-1.3b"), "argument --model: not allowed with argument --kernels"),
        (("--first-call",), "argument --first-call: not allowed with argument --kernels"),
        (("--json", "/nowhere/kernels.json"), "argument --json: expected a file in a folder that can be written to"),
        (("--device", "cpu"), "argument --kernels: expected a Hopper GPU: backend='sm90' cannot run this call"),
    ],
)
def test_wrong_arguments_beside_kernels(capsys, arguments, message):
    assert bench("small", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_name_of_no_work(capsys):
    assert bench("small", "large") == 2
    assert "argument --kernels: expected a part of a work's name, such as" in capsys.readouterr().err


@pytest.mark.parametrize("name", [pytest.param("small", marks=ON_HOPPER)])
def test_kernels_on_a_hopper_gpu(capsys, tmp_path, name):
    path = tmp_path / "kernels.json"
    names = [name, "D=128, bshd, raster, cut tiles", "host time"]
    assert bench(*names, "--json", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(path.read_text())["rows"]
    small = ["small, random", "backward, small, random"]
    assert [row["name"] for row in rows] == [*small, "block means, D=128, bshd, raster, cut tiles", *HOST]
    for row in rows:
        assert any(line.startswith(f"{row['name']}: ") for line in lines)
        assert all(figure > 0 for figure in list(row.values())[1:])
    *attention, means = rows[:3]
    for row in attention:
        # What else runs on the GPU meanwhile moves the largest by any factor.
        assert row["of_dense_min"] <= row["of_dense"] <= row["of_dense_max"]
    assert means["of_copy"] < 1.5

"""Sequences of several segments, of one sample or of several packed ones, against the dense reference."""

import itertools
import math
import os
import random
from dataclasses import replace

import pytest
import torch
from support import reference as ref
from support.problems import ON_HOPPER
from support.segments import Inputs, Setting, Tokens, length_of, random_segments, samples_of
from support.wrong_arguments import WRONG_SEGMENTS, WRONG_TOPK_OF_SEGMENTS, B, D, H, S, qkv
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import vsa_jit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# On a CPU fp16 differs from bf16 by its rounding alone.
CPU_RUNS = [("torch", "cpu", dtype) for dtype in (torch.bfloat16, torch.float32)]
HALF_ON_CPU = CPU_RUNS[0]
GPU_RUNS = [
    pytest.param((backend, "cuda", dtype), marks=pytest.mark.gpu) for backend in ("triton", "torch") for dtype in DTYPES
]
SM90_RUNS = [pytest.param(("sm90", "cuda", dtype), marks=ON_HOPPER) for dtype in (torch.bfloat16, torch.float16)]
# Triton's interpreter takes seconds for a list: tests/backends/test_triton_segments.py has some.
RUNS = [*CPU_RUNS, *GPU_RUNS, *SM90_RUNS]
# How many random lists a test takes.
LISTS = int(os.environ.get("VSA_JIT_TEST_LISTS", "1"))
# The gradient of a query with one key is 0: a difference of two sums, each rounded to fp32.
FLOOR = 2e-6
# Of the norm, where the same products are summed in another order.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}

SETTINGS = [
    Setting("cubes", gate="full"),
    Setting("grouped heads, bshd", batch=2, heads=4, kv_heads=2, layout="bshd", gate="full"),
    Setting("fused qkv", fused_qkv=True, layout="bshd", head_dim=64),
    Setting("fused qkv, bhsd, grouped gate", fused_qkv=True, gate="per channel", context="compete"),
    Setting("competing", gate="full", context="compete", softmax_scale=0.3),
    Setting("no coarse output", gate=0.0, head_dim=64),
    Setting("128", block_size=128, gate=0.5),
    Setting("128, competing, bshd", block_size=128, gate="full", layout="bshd", context="compete", head_dim=64),
    Setting("256", block_size=256, gate="full", head_dim=64),
    Setting("256, grouped heads", block_size=(4, 8, 8), heads=4, kv_heads=1, context="compete"),
    Setting("tiles that are no powers of two", block_size=(4, 6, 8), gate="full", batch=2, layout="bshd"),
    Setting("tall tiles", block_size=(16, 2, 2), gate="per channel", kv_heads=1, layout="bshd"),
    Setting("flat tiles", block_size=(1, 8, 8), context="compete"),
]


def run_name(run) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in run)


@pytest.fixture(params=RUNS, ids=run_name)
def run(request):
    return request.param


@pytest.fixture(params=[run for run in RUNS if run != HALF_ON_CPU], ids=run_name)
def quick_run(request):
    """For what no dtype changes: one is enough on a CPU."""
    return request.param


@pytest.fixture
def rng() -> random.Random:
    """Of the seed that a failing test prints."""
    return random.Random(int(torch.randint(2**62, ())))


def make_inputs(setting: Setting, segments, run, topk=2, sparsity=None) -> Inputs:
    """Inputs with heads of a size that the backend has."""
    backend, device, dtype = run
    if backend == "sm90" and setting.head_dim not in (64, 128):
        setting = replace(setting, head_dim=64)
    return Inputs(setting, segments, device, dtype, topk, sparsity)


def attend(inputs: Inputs, run, **changes) -> dict[str, torch.Tensor]:
    """Output and gradients of a call, in its layout."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves.items()}
    arguments = {**inputs.arguments, **changes}
    if "gate" in leaves:
        arguments["compress_attn_weight"] = leaves["gate"]
    out = vsa_jit.video_sparse_attn(*(leaves[name] for name in "qkv"), backend=run[0], **arguments)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(inputs: Inputs, run) -> None:
    """A call against the dense reference."""
    results = attend(inputs, run)
    expected, plain = inputs.dense(torch.float64), inputs.dense(inputs.dtype)
    assert results.keys() == expected.keys()
    assert results["out"].dtype == inputs.dtype
    for name, result in results.items():
        case = f"{name} of {inputs.segments}, topk {inputs.topk}, sparsity {inputs.sparsity}"
        ref.assert_close(case, inputs.bhsd(result), expected[name], plain[name], floor=FLOOR)


def assert_same(results: dict, expected: dict, run) -> None:
    """The same bits, but for sums of PyTorch's on a GPU and of sm90's, which may be of another order."""
    backend, device, dtype = run
    for name in expected:
        if backend == "triton" or device == "cpu":
            assert torch.equal(results[name], expected[name]), name
        else:
            assert ref.error(results[name], expected[name]) <= ROUNDING[dtype], name


def one_or_several(rng: random.Random, segments) -> int | list[int]:
    """A number of blocks for all samples or, where they are packed, perhaps one for each."""
    if isinstance(segments[0], list) and rng.random() < 0.6:
        return [rng.choice([1, 1, 2, 3, 99]) for _ in segments]
    return rng.choice([1, 2, 2, 3, 99])


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_random_lists(setting, run, rng):
    # Larger blocks of longer sequences, so that there is something to select.
    most = min(240 + math.prod(setting.tile), 420)
    for _ in range(LISTS):
        segments = random_segments(rng, most=most)
        check(make_inputs(setting, segments, run, one_or_several(rng, segments)), run)


LISTS_TO_KNOW = {
    "text before a video": [77, (5, 6, 7)],
    "text after a video": [(5, 6, 7), 77],
    "text before, between and after videos": [70, (3, 5, 6), 20, (5, 4, 9), 130],
    "several videos": [(3, 5, 6), (5, 4, 9), (1, 1, 30)],
    "several runs of text, a block each and less": [64, 1, (5, 6, 7), 65, 128],
    "no video": [70, 64, 3],
    "no text": [(5, 6, 7)],
    "packed": [[77, (5, 6, 7)], [0, (3, 5, 6)], [(4, 4, 9), 30, (2, 9, 3)]],
    "packed, one token each": [[1], [(1, 1, 1)], [64, (4, 4, 4)], [1], [1]],
    "packed, without a video or text": [[100], [(5, 6, 7)], [20, 20], [(9, 2, 2), (2, 2, 9)]],
    "packed, a sample of nothing": [[0], [70, (3, 5, 6)], [0, (0, 3, 3)], [(4, 5, 6)]],
    "packed, one sample": [[77, (5, 6, 7)]],
}


@pytest.mark.parametrize("context", ["attend", "compete"])
@pytest.mark.parametrize("name", LISTS_TO_KNOW)
def test_lists_to_know(name, context, run):
    segments = LISTS_TO_KNOW[name]
    setting = Setting(name, context=context, gate="full")
    for topk in (2,) if run == HALF_ON_CPU else (1, 2):
        check(make_inputs(setting, segments, run, topk), run)


@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_of_one_token(packed, run):
    """It attends itself: its value twice, with a coarse output of weight 1; no score has a gradient."""
    for segment in (1, (1, 1, 1)):
        segments = [[segment], [0]] if packed else [segment]
        inputs = make_inputs(Setting("one"), segments, run, 1)
        results = attend(inputs, run)
        torch.testing.assert_close(results["out"], 2 * inputs.v.detach())
        torch.testing.assert_close(results["dv"], 2 * inputs.dout)
        for name in ("dq", "dk"):
            assert results[name].abs().max() <= 1e-2


PACKED = [[77, (5, 6, 7)], [(4, 4, 9), 30, (2, 9, 3)], [100], [(3, 5, 6)], [0], [1]]


def slices_of(segments) -> list[slice]:
    """Which tokens each sample has."""
    ends = [0]
    for sample in segments:
        ends.append(ends[-1] + sum(length_of(segment) for segment in sample))
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("context", ["attend", "compete"])
def test_nan_of_a_sample_reaches_no_other(context, layout, run):
    """Where everything of it is NaN, the gradient of its output too."""
    inputs = make_inputs(Setting("nan", gate="full", context=context, layout=layout), PACKED, run, [2, 1, 1, 1, 1, 1])
    clean = attend(inputs, run)
    for poisoned, tokens in enumerate(slices_of(PACKED)):
        if tokens.start == tokens.stop:
            continue
        others = replace_inputs(inputs)
        for x in (others.q, others.k, others.v, others.gate, others.dout):
            others.bhsd(x.detach())[:, :, tokens] = float("nan")
        results = attend(others, run)
        others_of = torch.ones(others.tokens.length, dtype=torch.bool, device=run[1])
        others_of[tokens] = False
        for name in clean:
            result, expected = (inputs.bhsd(x[name])[:, :, others_of] for x in (results, clean))
            assert result.isfinite().all(), f"{name} of another sample than {poisoned}"
            assert_same({name: result}, {name: expected}, run)
        assert inputs.bhsd(results["out"])[:, :, tokens].isnan().all()


def replace_inputs(inputs: Inputs) -> Inputs:
    """The same inputs in tensors of their own."""
    copy = Inputs.__new__(Inputs)
    copy.__dict__.update(inputs.__dict__)
    for name, x in {**inputs.leaves, "dout": inputs.dout}.items():
        setattr(copy, name, x.detach().clone().requires_grad_(name != "dout"))
    return copy


@pytest.mark.parametrize("context", ["attend", "compete"])
def test_a_packed_row_is_its_samples_one_by_one(context, run):
    """Each with a number of blocks of its own."""
    topk = [2, 3, 1, 1, 7, 2]
    inputs = make_inputs(Setting("packed", gate="full", context=context, batch=2), PACKED, run, topk)
    together = attend(inputs, run)
    for sample, count, tokens in zip(PACKED, topk, slices_of(PACKED), strict=True):
        if tokens.start == tokens.stop:
            continue
        alone = replace_inputs(inputs)
        for name in (*inputs.leaves, "dout"):
            setattr(alone, name, getattr(inputs, name).detach()[:, :, tokens].clone())
        results = attend(alone, run, segments=sample, topk=count)
        for name, result in results.items():
            part = together[name][:, :, tokens]
            # A sample of one token has no gradient of scores but what rounding leaves of it.
            if part.shape[2] > 1 or name in ("out", "dv", "dgate"):
                assert ref.error(part, result) <= ROUNDING[run[2]], f"{name} of {sample}"


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("block_size", [64, 128, (4, 8, 8), (4, 6, 8)])
def test_a_grid_is_a_list_of_one_video(block_size, layout, quick_run):
    grid = (5, 9, 10)
    setting = Setting("grid", block_size=block_size, layout=layout, gate="full", heads=2, kv_heads=1)
    inputs = make_inputs(setting, [grid], quick_run, 2)
    by_grid = attend(inputs, quick_run, segments=None, grid=grid)
    forms = [[grid], [[grid]], [0, grid], [grid, 0, (0, 4, 4)], (grid,)]
    for segments in forms:
        assert_same(attend(inputs, quick_run, segments=segments), by_grid, quick_run)
        assert_same(attend(inputs, quick_run, segments=segments, context="compete"), by_grid, quick_run)
    if block_size == (4, 8, 8):
        assert_same(attend(inputs, quick_run, block_size=256), by_grid, quick_run)


@pytest.mark.parametrize("context", ["attend", "compete"])
def test_segments_of_no_tokens_change_nothing(context, quick_run):
    pairs = [
        ([77, (5, 6, 7), 30], [0, 77, (0, 3, 4), (5, 6, 7), (2, 0, 9), 30, 0, (7, 7, 0)]),
        ([[77, (5, 6, 7)], [30, (3, 4, 5)]], [[0, 77, 0, (5, 6, 7)], [30, (0, 0, 0), (3, 4, 5), 0]]),
    ]
    for segments, with_nothing in pairs:
        inputs = make_inputs(Setting("nothing", gate="full", context=context), segments, quick_run, 2)
        expected = attend(inputs, quick_run)
        assert_same(attend(inputs, quick_run, segments=with_nothing), expected, quick_run)
    # A sample without tokens has a number of blocks in the list of them, which nobody asks for.
    expected = attend(inputs, quick_run, topk=[1, 2])
    samples = [[], *pairs[1][0][:1], [0, (3, 0, 1)], *pairs[1][0][1:], [0]]
    assert_same(attend(inputs, quick_run, segments=samples, topk=[9, 1, 8, 2, 7]), expected, quick_run)


def test_kinds_of_numbers_and_lists(quick_run):
    """Tuples of samples are not told from videos; all else that is a sequence of ints is what it says."""
    np = pytest.importorskip("numpy")
    inputs = make_inputs(Setting("kinds"), [77, (5, 6, 7)], quick_run, 2)
    expected = attend(inputs, quick_run)
    for segments in (
        (77, (5, 6, 7)),
        [77, [5, 6, 7]],
        [np.int64(77), np.array([5, 6, 7])],
        [torch.Size([77])[0], torch.Size([5, 6, 7])],
        [[77, (5, 6, 7)]],
        [[77, [5, 6, 7]]],
        ([77, (5, 6, 7)],),
    ):
        assert_same(attend(inputs, quick_run, segments=segments), expected, quick_run)


def test_sparsity_counts_blocks_of_video(quick_run):
    """Of each sample: the first has 8 blocks of video and 2 of text, the second 6 and 1, the third no video."""
    segments = [[77, (5, 6, 7)], [(9, 3, 5), 5], [70]]
    inputs = make_inputs(Setting("sparsity"), segments, quick_run, sparsity=0.7)
    assert inputs.tokens.num_video_blocks == [8, 6, 0]
    assert inputs.tokens.topk_of(None, 0.7) == [3, 2, 0]
    for context in ("attend", "compete"):
        for sparsity, topk in ((0.7, [3, 2, 1]), ([0.5, 0.9, 0.5], [4, 1, 1]), ([0.0, 0.99, 0.0], [8, 1, 5])):
            expected = attend(inputs, quick_run, sparsity=None, topk=topk, context=context)
            assert_same(attend(inputs, quick_run, sparsity=sparsity, context=context), expected, quick_run)


@pytest.mark.parametrize("context", ["attend", "compete"])
def test_random_lists_of_sparsities(context, quick_run, rng):
    for _ in range(LISTS):
        segments = random_segments(rng)
        sparsity = rng.choice([0.0, 0.3, 0.7, 0.9])
        if isinstance(segments[0], list):
            sparsity = [rng.choice([0.0, 0.3, 0.7, 0.9]) for _ in segments]
        check(
            make_inputs(Setting("sparsity", context=context, gate=None), segments, quick_run, sparsity=sparsity),
            quick_run,
        )


@pytest.mark.parametrize("context", ["attend", "compete"])
@pytest.mark.parametrize("segments", [[(5, 6, 7), 70], [70, (5, 6, 7)], [[5, (5, 6, 7), 64], [(5, 6, 7), 3]]], ids=str)
def test_ties_go_to_the_lower_block(segments, context, run):
    """All keys are alike, so that all blocks are."""
    inputs = make_inputs(Setting("ties", context=context), segments, run, 3)
    with torch.no_grad():
        inputs.q.fill_(1.0)
        inputs.k.fill_(1.0)
    # What the reference divides by is not exact.
    scores = inputs.tokens.scores(inputs.q, inputs.k, inputs.scale).round(decimals=9)
    inputs.block_map, gap = inputs.tokens.block_map(scores, inputs.tokens.topk_of(3), context)
    assert gap == 0
    result = attend(inputs, run)["out"]
    ref.assert_close("out", result, inputs.dense(torch.float64)["out"], inputs.dense(inputs.dtype)["out"], floor=1e-6)


# A length, then a video, in each of two samples.
LENGTHS = [(77, 5, 6, 7), (30, 3, 8, 9), (65, 4, 5, 9), (128, 2, 6, 11), (200, 7, 4, 4), (9, 6, 9, 4)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("context", ["attend", "compete"])
def test_compiled(packed, context):
    """In one graph, gradients too, the same as call by call."""
    segments = [[77, (5, 6, 7)], [0, (3, 5, 6)]] if packed else [77, (5, 6, 7), 30]
    inputs = Inputs(Setting("compiled", gate="full", context=context), segments, "cpu", torch.float32, 2)
    run = ("torch", "cpu", torch.float32)
    topk = [1, 2] if packed else 2
    expected = attend(inputs, run, topk=topk)

    def call(q, k, v, gate):
        arguments = {**inputs.arguments, "topk": topk, "compress_attn_weight": gate}
        return vsa_jit.video_sparse_attn(q, k, v, **arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(inputs.q, inputs.k, inputs.v, inputs.gate)
    out.backward(inputs.dout)
    for name, x in {"out": out, **{f"d{name}": x.grad for name, x in inputs.leaves.items()}}.items():
        torch.testing.assert_close(x.detach(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("packed", "number"),
    [
        (False, "topk"),
        (False, "sparsity"),
        (True, "topk"),
        (True, "sparsity"),
    ],
)
def test_compiled_lengths_that_come_from_outside(packed, number):
    """Whatever the lengths, they compile at most twice more: their sizes are symbolic from the second call on."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, text, t, h, w):
        segments = [[text, (t, h, w)], [(t, w, h), 3]] if packed else [text, (t, h, w), 3]
        how_many = {"topk": 2} if number == "topk" else {"sparsity": 0.6}
        return vsa_jit.video_sparse_attn(q, q, q, segments=segments, **how_many)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for text, t, h, w in LENGTHS:
        q = torch.randn(1, 2, text + (1 + packed) * t * h * w + 3, 16)
        torch.testing.assert_close(compiled(q, text, t, h, w), call(q, text, t, h, w), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("context", ["attend", "compete"])
def test_operations_are_counted(context, quick_run):
    """The pairs that the reference attends, and the products of the means within each sample."""
    inputs = make_inputs(
        Setting("flops", batch=2, heads=4, kv_heads=2, context=context), PACKED, quick_run, [1, 2, 1, 1, 1, 1]
    )
    dim, tokens = inputs.setting.head_dim, inputs.tokens
    pairs = int(tokens.mask(inputs.block_map).sum())
    same_sample = tokens.sample_of_block[:, None] == tokens.sample_of_block
    coarse = 2 * 4 * 2 * dim * int(same_sample.sum())

    def call():
        return vsa_jit.video_sparse_attn(inputs.q, inputs.k, inputs.v, backend=quick_run[0], **inputs.arguments)

    def count(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    with torch.no_grad():
        assert count(call) == 4 * dim * pairs + 2 * coarse
    assert count(lambda: call().sum().backward()) == 14 * dim * pairs + 7 * coarse


def shares(inputs: Inputs, topk) -> torch.Tensor:
    """[B, H]: the mean over queries of videos of the probability, in their sample, of the selected keys."""
    tokens, (q, k) = inputs.tokens, (inputs.bhsd(x).detach().double() for x in (inputs.q, inputs.k))
    block_map, _ = tokens.block_map(tokens.scores(q, k, inputs.scale), tokens.topk_of(topk), inputs.setting.context)
    same_sample = tokens.sample[:, None] == tokens.sample
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * inputs.scale
    p = scores.masked_fill(~same_sample.to(q.device), float("-inf")).softmax(-1)
    return (p * tokens.mask(block_map)).sum(-1)[:, :, ~tokens.is_context.to(q.device)].mean(-1)


@pytest.mark.parametrize("context", ["attend", "compete"])
@pytest.mark.parametrize("name", ["text before, between and after videos", "packed", "packed, without a video or text"])
def test_recall(name, context, quick_run):
    setting = Setting(name, context=context, heads=4, kv_heads=2, batch=2, layout="bshd")
    inputs = make_inputs(setting, LISTS_TO_KNOW[name], quick_run, 1)
    call = {"context": context, "backend": quick_run[0], **inputs.order}
    found = vsa_jit.recall(inputs.q, inputs.k, topk=[1, 2, 99], **call)
    assert found.shape == (2, 4, 3)
    assert (found >= 0).all()
    assert (found <= 1).all()
    # The second selection is not looked at for scores that nearly tie: it moves a block of a few keys at most.
    torch.testing.assert_close(found[..., 0].double(), shares(inputs, 1), rtol=2e-4, atol=2e-5)
    assert (found[..., 0] < found[..., 1]).all()
    torch.testing.assert_close(found[..., 2], torch.ones_like(found[..., 2]), rtol=2e-4, atol=0)
    by_share = vsa_jit.recall(inputs.q, inputs.k, sparsity=[0.0, 0.99], **call)
    torch.testing.assert_close(by_share[..., 0], torch.ones(2, 4, device=quick_run[1]), rtol=2e-4, atol=0)
    torch.testing.assert_close(by_share[..., 1], found[..., 0])


def check_blocks(inputs: Inputs, out, lse, block_map) -> None:
    """Output, statistics and gradients of a map, where the gradient of lse counts too."""
    dlse = torch.randn(lse.shape, device=lse.device)
    finite = lse.isfinite()
    leaves = [inputs.q, inputs.k, inputs.v]
    grads = torch.autograd.grad([out, lse.masked_fill(~finite, 0.0)], leaves, [inputs.dout, dlse])
    results = {"out": inputs.bhsd(out), "lse": lse}
    results |= {f"d{name}": inputs.bhsd(grad) for name, grad in zip("qkv", grads, strict=True)}
    mask = inputs.tokens.mask(block_map.to(inputs.device))

    def dense(dtype):
        q, k, v = (inputs.bhsd(x).detach().to(dtype).requires_grad_() for x in leaves)
        out, lse = ref.attention(q, k, v, mask, inputs.scale)
        total = (out * inputs.bhsd(inputs.dout).to(dtype)).sum() + (lse.masked_fill(~finite, 0.0) * dlse).sum()
        grads = torch.autograd.grad(total, (q, k, v))
        return {"out": out, "lse": lse, **{f"d{name}": grad for name, grad in zip("qkv", grads, strict=True)}}

    expected, plain = dense(torch.float64), dense(inputs.dtype)
    assert torch.equal(lse.isneginf(), expected["lse"].isneginf())
    for name, result in results.items():
        ref.assert_close(f"{name} of {inputs.segments}", result, expected[name], plain[name], floor=FLOOR)


BLOCK_SETTINGS = [
    Setting("cubes", batch=2, kv_heads=1),
    Setting("cubes, bshd", layout="bshd", fused_qkv=True, head_dim=64),
    Setting("128", block_size=128),
    Setting("tiles that are no powers of two", block_size=(4, 6, 8), layout="bshd"),
]


@pytest.mark.parametrize("setting", BLOCK_SETTINGS, ids=lambda setting: setting.name)
def test_any_map(setting, run, rng):
    """Of blocks of other samples too, and none at all."""
    for _ in range(LISTS):
        inputs = make_inputs(setting, random_segments(rng), run)
        rows = (setting.batch, setting.heads, inputs.tokens.num_blocks)
        block_map = torch.rand(*rows, rows[2]) < rng.choice([0.2, 0.5, 0.9])
        block_map[0, 0, 0] = False
        out, lse = vsa_jit.block_sparse_attn(
            inputs.q, inputs.k, inputs.v, block_map.to(run[1]), backend=run[0], **inputs.order
        )
        check_blocks(inputs, out, lse, block_map)


@pytest.mark.parametrize("setting", BLOCK_SETTINGS, ids=lambda setting: setting.name)
def test_any_indices(setting, run, rng):
    """Rows of less than 0 to n blocks in any order, with junk behind them."""
    for _ in range(LISTS):
        inputs = make_inputs(setting, random_segments(rng), run)
        blocks = inputs.tokens.num_blocks
        rows = (setting.batch, setting.heads, blocks)
        idx = torch.rand(*rows, blocks).argsort(-1).int()
        # Less than none is none.
        num = torch.randint(-2, blocks + 1, rows, dtype=torch.int32)
        block_map = torch.zeros(idx.shape, dtype=torch.bool)
        block_map.scatter_(-1, idx.long(), torch.arange(blocks) < num[..., None])
        used = torch.arange(blocks) < num[..., None]
        idx.masked_fill_(~used, 2**31 - 1)
        out, lse = vsa_jit.block_sparse_attn_from_indices(
            inputs.q, inputs.k, inputs.v, idx.to(run[1]), num.to(run[1]), backend=run[0], **inputs.order
        )
        check_blocks(inputs, out, lse, block_map)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_calls_of_other_segments_are_told_apart(dtype, quick_run):
    """Calls that look like an earlier one are not checked again: the segments are a part of how they look."""
    inputs = make_inputs(Setting("told apart"), [64, (4, 4, 4), (4, 8, 4)], quick_run)
    idx = torch.tensor([1, 0], device=quick_run[1], dtype=dtype).expand(1, 2, 4, 2).contiguous()
    num = torch.tensor([2, 1, 2, -2], device=quick_run[1], dtype=dtype).expand(1, 2, 4).contiguous()
    results = {}
    with torch.no_grad():
        for _ in range(3):
            for segments in ([64, (4, 4, 4), (4, 8, 4)], [64, 64, 128], [(16, 4, 4)], None):
                order = {**inputs.order, "segments": segments}
                arguments = (inputs.q, inputs.k, inputs.v, idx, num)
                out, _ = vsa_jit.block_sparse_attn_from_indices(*arguments, backend=quick_run[0], **order)
                assert torch.equal(results.setdefault(str(segments), out), out)
    assert torch.equal(results["[64, 64, 128]"][:, :, :128], results["None"][:, :, :128])
    # Blocks of the last video are columns of the raster, which are not consecutive tokens.
    assert not torch.equal(results["[64, 64, 128]"], results["[64, (4, 4, 4), (4, 8, 4)]"])


TORCH = ("torch", "cpu", torch.float32)


@pytest.mark.parametrize("name", ["text before, between and after videos", "packed"])
def test_vmap_and_grad(name):
    """As many calls at once, and gradients by transformation, are the same as call by call."""
    calls = [Inputs(Setting(name, gate="full"), LISTS_TO_KNOW[name], "cpu", torch.float32, 2) for _ in range(3)]
    arguments = {**calls[0].arguments, "backend": "torch"}

    def call(q, k, v, gate):
        return vsa_jit.video_sparse_attn(q, k, v, **{**arguments, "compress_attn_weight": gate})

    def loss(q, k, v, gate, dout):
        return (call(q, k, v, gate) * dout).sum()

    apart = [attend(inputs, TORCH) for inputs in calls]
    stacked = [torch.stack([inputs.leaves[name].detach() for inputs in calls]) for name in ("q", "k", "v", "gate")]
    douts = torch.stack([inputs.dout for inputs in calls])
    together = [torch.vmap(call)(*stacked)]
    together += torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*stacked, douts)
    alone = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*[x[0] for x in stacked], douts[0])
    for result, key in zip(together, ("out", "dq", "dk", "dv", "dgate"), strict=True):
        assert ref.error(result, torch.stack([results[key] for results in apart])) <= 1e-5, key
    for result, key in zip(alone, ("dq", "dk", "dv", "dgate"), strict=True):
        assert ref.error(result, apart[0][key]) <= 1e-5, key


def test_the_reference_by_hand():
    """Four cubes of one video after three tokens of text: who attends whom, counted on fingers."""
    tokens = Tokens([3, (4, 8, 8)], (4, 4, 4))
    assert tokens.num_blocks == 5
    assert tokens.block.tolist()[:15] == [0] * 3 + [1] * 4 + [2] * 4 + [1] * 4
    scores = torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0]).expand(1, 1, 5, 5)
    attending, _ = tokens.block_map(scores, [2], "attend")
    assert attending[0, 0].int().tolist() == [[1, 1, 1, 1, 1]] + [[1, 1, 0, 1, 0]] * 4
    competing, _ = tokens.block_map(scores, [2], "compete")
    assert competing[0, 0].int().tolist() == [[1, 1, 1, 1, 1]] + [[0, 1, 0, 1, 1]] * 4


def test_random_lists_have_every_kind_of_sample():
    rng = random.Random(0)
    lists = [random_segments(rng) for _ in range(300)]
    samples = [sample for segments in lists for sample in samples_of(segments)]
    has_text = [any(isinstance(segment, int) and segment > 0 for segment in sample) for sample in samples]
    has_video = [any(isinstance(segment, tuple) and length_of(segment) > 0 for segment in sample) for sample in samples]
    kinds = set(zip(has_text, has_video, strict=True))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    assert any(sum(length_of(segment) for segment in sample) == 1 for sample in samples)
    assert any(
        sum(isinstance(segment, tuple) and length_of(segment) > 0 for segment in sample) > 2 for sample in samples
    )
    assert sum(isinstance(segments[0], list) and len(segments) > 2 for segments in lists) > 20


def call_all(arguments):
    yield lambda: vsa_jit.video_sparse_attn(**arguments, topk=2)
    yield lambda: vsa_jit.explain(**arguments)
    yield lambda: vsa_jit.recall(**{name: x for name, x in arguments.items() if name != "v"}, topk=[2])
    blocks = torch.ones(H, 1, 1, dtype=torch.bool)
    yield lambda: vsa_jit.block_sparse_attn(**arguments, block_map=blocks)
    idx, num = torch.zeros(B, H, 1, 1, dtype=torch.int32), torch.ones(B, H, 1, dtype=torch.int32)
    yield lambda: vsa_jit.block_sparse_attn_from_indices(**arguments, q2k_idx=idx, q2k_num=num)


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_SEGMENTS)
def test_wrong_segments_are_named(changes, error, message):
    for call in call_all(qkv(**changes)):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_TOPK_OF_SEGMENTS)
@pytest.mark.parametrize("function", [vsa_jit.video_sparse_attn, vsa_jit.explain])
def test_wrong_topk_of_segments(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**qkv(), **arguments)


def test_what_recall_takes_of_segments():
    tensors = qkv()
    with pytest.raises(ValueError, match=r"context: expected one of \('attend', 'compete'\), got 'ignore'"):
        vsa_jit.recall(tensors["q"], tensors["k"], topk=[1], segments=[S], context="ignore")
    with pytest.raises(ValueError, match="topk: expected at least 1, got 0"):
        vsa_jit.recall(tensors["q"], tensors["k"], topk=[1, 0], segments=[S])


def test_a_list_that_is_wrong_is_found_after_one_that_was_right():
    """A call that looks like an earlier one is not checked again: one with other segments must not look like it."""
    tensors = qkv()
    idx, num = torch.zeros(B, H, 4, 1, dtype=torch.int32), torch.ones(B, H, 4, dtype=torch.int32)
    for _ in range(3):
        vsa_jit.block_sparse_attn_from_indices(**tensors, q2k_idx=idx, q2k_num=num, segments=[(16, 4, 4)])
    with pytest.raises(ValueError, match=r"segments: .*256, got 192"):
        vsa_jit.block_sparse_attn_from_indices(**tensors, q2k_idx=idx, q2k_num=num, segments=[(12, 4, 4)])
    with pytest.raises(ValueError, match="grid, segments"):
        vsa_jit.block_sparse_attn_from_indices(
            **tensors, q2k_idx=idx, q2k_num=num, segments=[(16, 4, 4)], grid=(16, 4, 4)
        )


def test_backends_that_are_asked_for_run_or_say_why():
    """Never a silent substitute."""
    q = torch.randn(1, 2, S, D)
    call = {"segments": [0, (16, 4, 4)], "topk": 1}
    assert vsa_jit.explain(q, q, q, backend="torch", **call).backend == "torch"
    with pytest.raises(RuntimeError, match="sm90"):
        vsa_jit.video_sparse_attn(q, q, q, backend="sm90", **call)

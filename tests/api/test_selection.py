"""Selection, softmax, indices of maps and indices transposed by themselves: ties, zeros of both signs, empty blocks,
sizes of every kind; and the dtype in which is selected."""

import importlib
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support import hopper
from support import reference as ref
from support.problems import BACKENDS as RUNS
from support.problems import HALF, INTERPRETED, Case, Inputs

import vsa_jit
from vsa_jit.backends.coarse import Softmax
from vsa_jit.backends.torch import launches as torch_backend
from vsa_jit.backends.triton import launches as triton_backend
from vsa_jit.problem import Coarse

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"torch": (torch_backend, "cpu"), "triton": (triton_backend, TRITON_DEVICE)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@contextmanager
def poisoned_memory():
    """New tensors of integers hold the largest one, so that what is not written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, dtype=torch.int32) == torch.iinfo(torch.int32).max
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_select(backend, scores, topk, sizes=None):
    module, device = backend
    with poisoned_memory():
        idx, num = module.select(scores.to(device), None if sizes is None else sizes.to(device), topk)
    return idx.cpu(), num.cpu()


def expected_indices(scores, topk, nonempty):
    chosen = ref.select(scores, topk, nonempty)
    num = chosen.sum(-1, dtype=torch.int32)
    idx = torch.where(chosen, torch.arange(scores.shape[-1]), scores.shape[-1]).sort(-1).values[..., :topk]
    return torch.where(idx < scores.shape[-1], idx, 0).int(), num


@pytest.mark.parametrize(("columns", "topk"), [(1, 1), (3, 2), (37, 5), (64, 64), (100, 1), (257, 100), (2500, 300)])
def test_select(backend, columns, topk):
    scores = torch.randn(2, 7, columns)
    everywhere = torch.ones(columns, dtype=torch.bool)
    for result, expected in zip(
        run_select(backend, scores, topk), expected_indices(scores, topk, everywhere), strict=True
    ):
        assert torch.equal(result, expected)


def test_ties_go_to_the_lower_index(backend):
    scores = torch.randint(-2, 3, (2, 20, 40)).float()
    for topk in (1, 7, 20, 39):
        idx, num = run_select(backend, scores, topk)
        expected, _ = expected_indices(scores, topk, torch.ones(40, dtype=torch.bool))
        assert torch.equal(idx, expected)
        assert (num == topk).all()


def test_zeros_of_both_signs_are_equal(backend):
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0, 1e-38]]])
    idx, _ = run_select(backend, scores, 3)
    assert idx.tolist() == [[[0, 1, 5]]]


def test_extreme_scores(backend):
    inf = float("inf")
    scores = torch.tensor([[[-inf, 3.4e38, -3.4e38, inf, -1e-45, 1e-45, -inf, 0.0]]])
    assert run_select(backend, scores, 3)[0].tolist() == [[[1, 3, 5]]]
    assert run_select(backend, scores, 7)[0].tolist() == [[[0, 1, 2, 3, 4, 5, 7]]]


def test_nan_scores_still_give_indices_in_range(backend):
    idx, num = run_select(backend, torch.full((1, 4, 10), float("nan")), 3)
    assert ((idx >= 0) & (idx < 10)).all()
    assert (num == 3).all()
    assert (idx.diff(dim=-1) > 0).all()


def test_empty_blocks_are_never_selected(backend):
    sizes = torch.tensor([0, 5, -3, 64, 0, 1])
    scores = torch.randn(2, 9, 6)
    scores[..., 0] = 100.0
    scores[0, 0] = -float("inf")
    for topk in (1, 3, 5):
        idx, num = run_select(backend, scores, topk, sizes)
        expected, expected_num = expected_indices(scores, topk, sizes > 0)
        assert torch.equal(num, expected_num)
        assert torch.equal(idx, expected)
    idx, num = run_select(backend, scores, 2, torch.zeros(6, dtype=torch.int32))
    assert num.count_nonzero() == 0
    assert idx.count_nonzero() == 0


@pytest.mark.parametrize("empty", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("columns", "topk"), [(1, 1), (37, 37), (600, 40)])
def test_probabilities(backend, columns, topk, dtype, empty):
    """Those that a selection leaves, and those for derivatives."""
    module, device = backend
    settings = Softmax(0.1, dtype)
    products = torch.randn(2, 3, columns) * 30
    nonempty = torch.rand(columns) > {"none": -1.0, "some": 0.3, "all": 1.0}[empty]
    sizes = None if empty == "none" else torch.where(nonempty, 64, -torch.randint(0, 2, (columns,))).to(device)
    p = products.to(device, copy=True)
    idx, num = module.select(p, sizes, topk, settings)
    scores = products if dtype == torch.float32 else ref.scaled(products, 0.1, dtype)
    expected, expected_num = expected_indices(scores, topk, nonempty)
    assert torch.equal(idx.cpu(), expected)
    assert torch.equal(num.cpu(), expected_num)
    takes_part = nonempty | ~nonempty.any()
    ref.assert_probabilities(p.cpu(), ref.probabilities(products, takes_part, 0.1, dtype), dtype)

    module.softmax(again := products.to(device, copy=True), sizes, None, settings)
    assert torch.equal(again, p)


@pytest.mark.parametrize("columns", [1, 37, 600])
def test_softmax_backward(backend, columns):
    module, device = backend
    scale = 0.3
    products = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    p = (products * scale).softmax(-1)
    dp = torch.randn(p.shape).to(device)
    (expected,) = torch.autograd.grad(p, products, dp.cpu().double())
    module.softmax_backward(p.detach().float().to(device), dp, None, scale)
    torch.testing.assert_close(dp.cpu().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [1, 5, 64, 100])
def test_compact(backend, columns):
    module, device = backend
    block_map = torch.rand(2, 3, 11, columns) < torch.rand(2, 3, 11, 1)
    with poisoned_memory():
        idx, num = module.map_to_indices(block_map.to(device))
    assert (idx.dtype, num.dtype, num.shape) == (torch.int32, torch.int32, block_map.shape[:3])
    for row_map, row_idx, row_num in zip(
        block_map.flatten(0, 2), idx.cpu().flatten(0, 2), num.cpu().flatten(), strict=True
    ):
        listed = row_map.nonzero().flatten().tolist()
        assert row_idx.tolist() == listed + [0] * (columns - len(listed))
        assert row_num == len(listed)


def inverse(idx, num, num_kv_blocks):
    """For each (head, key block), the query blocks that name it, in order and as often as they do."""
    heads, rows, _ = idx.shape
    lists = [[[] for _ in range(num_kv_blocks)] for _ in range(heads)]
    for head in range(heads):
        for row in range(rows):
            for kv_block in idx[head, row, : max(int(num[head, row]), 0)].tolist():
                if 0 <= kv_block < num_kv_blocks:
                    lists[head][kv_block].append(row)
    return lists


@pytest.mark.parametrize(
    ("num_q_blocks", "num_kv_blocks", "width"),
    [(1, 1, 1), (5, 9, 4), (40, 7, 7), (130, 20, 3), (3, 50, 33), (2, 400, 400), (2, 700, 650)],
)
def test_invert(num_q_blocks, num_kv_blocks, width):
    heads = 3
    idx = torch.rand(heads, num_q_blocks, num_kv_blocks).argsort(-1)[..., :width].int()
    if width > 2:
        idx[0, 0, :2] = idx[0, 0, 2]
        idx[1, -1, 1] = num_kv_blocks
        idx[1, -1, 0] = -1
    num = torch.randint(-1, width + 3, (heads, num_q_blocks), dtype=torch.int32)
    ends, k2q_idx, chunks = triton_backend.invert_map(
        idx.to(TRITON_DEVICE)[None], num.to(TRITON_DEVICE)[None], num_kv_blocks
    )
    last = ends.view(heads * num_kv_blocks, chunks)[:, -1].cpu()
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), last[:-1]])
    lists = [k2q_idx[begin:end].tolist() for begin, end in zip(begins, last, strict=True)]
    assert lists == [kv_list for head in inverse(idx, num, num_kv_blocks) for kv_list in head]


def test_selection_in_parts_is_the_same(monkeypatch):
    """Forward, gradients and tangent, in fp32 and rounded."""
    q, k, v = (torch.randn(2, heads, 300, 32, requires_grad=True) for heads in (4, 2, 2))
    directions = tuple(torch.randn_like(x) for x in (q, k, v))

    def results(selection_dtype):
        def call(*qkv):
            return vsa_jit.video_sparse_attn(*qkv, topk=2, selection_dtype=selection_dtype, backend="torch")

        out = call(q, k, v)
        tangent = torch.func.jvp(call, tuple(x.detach() for x in (q, k, v)), directions)[1]
        return out, tangent, *torch.autograd.grad(out.square().sum(), (q, k, v))

    dtypes = (torch.float32, torch.bfloat16)
    whole = [results(dtype) for dtype in dtypes]
    monkeypatch.setattr("vsa_jit.backends.coarse.SCORES_AT_A_TIME", 60)
    for dtype, expected in zip(dtypes, whole, strict=True):
        torch.testing.assert_close(results(dtype), expected)


@pytest.mark.gpu
def test_many_blocks():
    """4,096 key blocks: more than one warp's row."""
    scores = torch.randn(1, 300, 4096)
    result = run_select(BACKENDS["triton"], scores, 410)
    expected = expected_indices(scores, 410, torch.ones(4096, dtype=torch.bool))
    assert torch.equal(result[0], expected[0])


def test_interpreter_is_what_runs_without_a_gpu():
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"


def quarters(*shape, most=64):
    """Random multiples of 1/4, whose products and sums fp32 holds exactly, and narrower dtypes do not."""
    return torch.randint(-most, most + 1, shape) / 4


def near_ties(*shape):
    """Means of query blocks and of key blocks, of which every second one scores almost as the one before."""
    q_c, k_c = quarters(*shape), quarters(*shape)
    k_c[:, :, 1::2] = k_c[:, :, : shape[2] // 2 * 2 : 2]
    k_c[:, :, 1::2, 0] += 0.25
    q_c[..., 0] = 0.25 - 0.5 * torch.randint(0, 2, q_c.shape[:3])
    return q_c, k_c


def rounded_scores(q_c, k_c, scale, dtype):
    """The scaled scores of block means, every step in a dtype."""
    q_c, k_c = q_c.to(dtype), k_c.to(dtype)
    return ((q_c.double() @ k_c.double().mT).to(dtype).float() * scale).to(dtype)


def rounded_coarse(q_c, k_c, v_c, scale, nonempty, dtype):
    scores = rounded_scores(q_c, k_c, scale, dtype).float().masked_fill(~nonempty, float("-inf"))
    p = scores.softmax(-1).to(dtype)
    return (p.double() @ v_c.to(dtype).double()).to(dtype)


@pytest.mark.parametrize("run", [*RUNS, *INTERPRETED], ids=lambda run: "-".join(run))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [128**-0.5, 0.002])
def test_selection_in_a_narrower_dtype(run, dtype, scale):
    backend, device = run
    blocks, topk = 64, 9
    # Too near to the quarters for a narrower dtype, so that the means round to them.
    q_c, k_c = (x * (1 + 1e-5 * torch.rand(x.shape)) for x in near_ties(1, 2, blocks, 128))
    v_c = torch.randn(1, 2, blocks, 128)
    sizes = torch.full((blocks,), 64)
    sizes[torch.randperm(blocks)[:3]] = 0
    means = [x.to(device) for x in (q_c, k_c, v_c)]
    launches = importlib.import_module(f"vsa_jit.backends.{backend}.launches")
    if backend == "sm90":
        hopper.load_kernels()
    out_c, idx, num = launches.coarse_attend(Coarse(None, scale, dtype), *means, sizes.to(device), [topk], False)
    expected, expected_num = expected_indices(rounded_scores(q_c, k_c, scale, dtype), topk, sizes > 0)
    assert torch.equal(idx.cpu(), expected)
    assert torch.equal(num.cpu(), expected_num)
    assert (expected != expected_indices(q_c.double() @ k_c.double().mT, topk, sizes > 0)[0]).any()

    assert torch.equal(out_c, out_c.to(dtype).float())
    # Another order of summing moves a probability or an output to the value beside it, here and there.
    assert ref.error(out_c, rounded_coarse(q_c, k_c, v_c, scale, sizes > 0, dtype)) < torch.finfo(dtype).eps / 4


SELECTION_CASES = [
    Case("tiled", q_len=576, sizes=(64,) * 4 + (0,) + (64,) * 4, head_dim=64, heads=4, kv_heads=2, topk=3, gate="full"),
    Case("raster, bshd", grid=(8, 4, 16), layout="bshd", head_dim=64, batch=2, topk=3, gate=0.5),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(run))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", SELECTION_CASES, ids=lambda case: case.name)
def test_output_and_gradients_in_a_narrower_selection_dtype(run, dtype, case):
    backend, device = run
    # A scale as small as the values are large.
    inputs = Inputs(replace(case, softmax_scale=0.002), device, torch.float16 if device == "cpu" else dtype)
    set_block_means(inputs)
    q_c, k_c, _ = (x.detach().cpu() for x in inputs.means(inputs.clean(torch.float64)))
    k_c = k_c.repeat_interleave(q_c.shape[1] // k_c.shape[1], 1)
    block_map = ref.select(rounded_scores(q_c, k_c, inputs.scale, dtype), case.topk, inputs.kv_nonempty)

    out = vsa_jit.video_sparse_attn(
        inputs.q,
        inputs.k,
        inputs.v,
        topk=case.topk,
        compress_attn_weight=inputs.gate,
        selection_dtype=dtype,
        backend=backend,
        **inputs.order,
    )
    out.backward(inputs.dout)
    reference, plain = inputs.expected(torch.float64, block_map), inputs.expected(dtype, block_map)
    results = {"out": out, "dq": inputs.q.grad, "dk": inputs.k.grad, "dv": inputs.v.grad}
    if isinstance(inputs.gate, torch.Tensor):
        results["dgate"] = inputs.gate.grad
    for name, x in results.items():
        ref.assert_close(name, inputs.bhsd(x), reference[name], plain[name])


def set_block_means(inputs):
    """Fills the valid queries and keys so that the means of their blocks are exactly those of ``near_ties``."""
    case = inputs.case
    q_c, k_c = near_ties(case.batch, case.heads, inputs.num_q_blocks, case.head_dim)
    sides = ((inputs.q, q_c, inputs.q_block), (inputs.k, k_c[:, : case.kv_heads], inputs.kv_block))
    for x, means, block_of in sides:
        view = inputs.bhsd(x.detach())
        for block in range(means.shape[2]):
            tokens = (block_of == block).nonzero().flatten()
            noise = quarters(*means.shape[:2], len(tokens) // 2, case.head_dim, most=8)
            filled = means[:, :, block, None] + torch.cat([noise, -noise], 2)
            view[:, :, tokens] = torch.where(view[:, :, tokens].isnan(), float("nan"), filled.to(view))


def test_selection_in_fp32_is_the_default():
    q, k, v = (torch.randn(1, 2, 320, 32, dtype=torch.bfloat16) for _ in range(3))
    expected = vsa_jit.video_sparse_attn(q, k, v, topk=2)
    assert torch.equal(vsa_jit.video_sparse_attn(q, k, v, topk=2, selection_dtype=torch.float32), expected)
    assert not torch.equal(vsa_jit.video_sparse_attn(q, k, v, topk=2, selection_dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_derivatives_are_those_at_the_rounded_values(dtype):
    """Closely: the rounding of any one of the means, the scores or the probabilities makes far more than the bound."""
    heads, kv_heads, blocks, scale = 4, 2, 9, 0.002
    q_c, k_c = near_ties(1, heads, blocks, 64)
    rounded = q_c, k_c[:, :kv_heads], torch.randn(1, kv_heads, blocks, 64).to(dtype).float()
    # Moved by less than what rounds to another value. Products of the rounded ones are exact in any order of summing.
    means = [x * (1 + (torch.rand(x.shape) - 0.5) * 0.4 * torch.finfo(dtype).eps) for x in rounded]
    for mean, x in zip(means, rounded, strict=True):
        assert torch.equal(mean.to(dtype).float(), x)
    along = [torch.randn(x.shape) for x in means]
    dout = torch.randn(q_c.shape)
    sizes = torch.full((blocks,), 64)
    sizes[4] = 0

    coarse = Coarse(None, scale, dtype)
    grads = torch_backend.coarse_attend_backward(coarse, *means, sizes, dout)
    tangent = torch_backend.coarse_attend_tangent(coarse, *means, *along, sizes)

    group = heads // kv_heads
    scores = rounded_scores(q_c, rounded[1].repeat_interleave(group, 1), scale, dtype).float()
    p = scores.masked_fill(sizes == 0, float("-inf")).softmax(-1).to(dtype).double()
    (q_c, k_c, v_c), (q_t, k_t, v_t) = ([x.double() for x in xs] for xs in (rounded, along))
    k_c, v_c, k_t, v_t = (x.repeat_interleave(group, 1) for x in (k_c, v_c, k_t, v_t))

    def through_softmax(x):
        return p * (x - (p * x).sum(-1, keepdim=True)) * scale

    def of_group(x):
        return x.unflatten(1, (kv_heads, group)).sum(2)

    dout = dout.double()
    dscores = through_softmax(dout @ v_c.mT)
    expected = dscores @ k_c, of_group(dscores.mT @ q_c), of_group(p.mT @ dout)
    for grad, x in zip(grads, expected, strict=True):
        assert ref.error(grad, x) < 1e-5
    assert ref.error(tangent, through_softmax(q_t @ k_c.mT + q_c @ k_t.mT) @ v_c + p @ v_t) < 1e-5

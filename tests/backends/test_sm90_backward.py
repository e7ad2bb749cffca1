"""The Hopper backward on a Hopper GPU, at sizes where thread blocks take several items and their rings wrap around."""

from dataclasses import replace

import pytest
import torch
from support import reference as ref
from support.added import MeanGradients, outputs_of_few_bits
from support.hopper import check_gradients, dense_gradients, operands_of, problem_of
from support.problems import ON_HOPPER, Case, Inputs, steep
from torch import Tensor

import vsa_jit
from vsa_jit.backends.choose import backend_for
from vsa_jit.problem import Operands, Problem

pytestmark = ON_HOPPER

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128])
CASES = [
    Case("64, plain", q_len=6390),
    Case("64, tiled", q_len=6400, sizes=tuple(37 * i % 65 for i in range(100))),
    Case("64, tiled, other sizes", q_len=3200, kv_len=6400, sizes=(64, 1, 0, 33) * 25, q_sizes=(33, 0, 64, 1, 63) * 10),
    Case("64, raster, bshd", grid=(13, 22, 21), block_size=(4, 4, 4), layout="bshd"),
    Case("64, other keys, grouped heads", q_len=6400, kv_len=2500, kv_heads=2),
    Case("64, batch, grouped heads, bshd", q_len=2500, batch=2, kv_heads=4, layout="bshd"),
    Case("128, raster, bshd", grid=(13, 22, 21), block_size=(2, 8, 8), layout="bshd"),
    Case("128, tiled", q_len=6400, block_size=128, sizes=tuple(range(0, 150, 3))),
    Case("192, plain, batch", q_len=3000, block_size=192, batch=2),
    Case("128, other keys, batch, grouped heads", q_len=2500, kv_len=1900, block_size=128, batch=2, kv_heads=2),
    Case("256, raster", grid=(13, 22, 21), block_size=(4, 8, 8)),
    Case("1728, raster cut on all three axes", grid=(13, 25, 13), block_size=(12, 12, 12)),
]


def gradients(
    inputs: Inputs, idx: Tensor, num: Tensor, *, with_lse: bool = True, deterministic: bool = False
) -> tuple[Tensor, ...]:
    call = vsa_jit.block_sparse_attn_from_indices
    out, lse = call(inputs.q, inputs.k, inputs.v, idx, num, backend="sm90", **inputs.order_of_blocks)
    outputs, of_outputs = ((out, lse), (inputs.dout, inputs.dlse)) if with_lse else (out, inputs.dout)
    # What the caching allocator gives next holds NaN.
    torch.full((1 << 28,), float("nan"), device="cuda")
    torch.use_deterministic_algorithms(deterministic)
    try:
        return torch.autograd.grad(outputs, (inputs.q, inputs.k, inputs.v), of_outputs)
    finally:
        torch.use_deterministic_algorithms(False)


def check(inputs: Inputs, found: tuple[Tensor, ...], block_map: Tensor) -> None:
    dtypes = torch.float32, inputs.dtype
    exact, plain = (dense_gradients(inputs, block_map, dtype, with_dlse=True)[2:] for dtype in dtypes)
    check_gradients(inputs, block_map, found, exact, plain)


@HALF
@HEAD_DIMS
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_uneven_rows(case: Case, head_dim: int, dtype: torch.dtype):
    inputs = Inputs(replace(case, heads=8, head_dim=head_dim), "cuda", dtype)
    idx, num, block_map = inputs.uneven_indices()
    check(inputs, gradients(inputs, idx, num), block_map)


@HALF
@HEAD_DIMS
@pytest.mark.parametrize("case", CASES[6:], ids=lambda case: case.name)
def test_two_passes_of_larger_blocks(case: Case, head_dim: int, dtype: torch.dtype):
    inputs = Inputs(replace(case, heads=8, head_dim=head_dim), "cuda", dtype)
    idx, num, block_map = inputs.uneven_indices()
    check(inputs, gradients(inputs, idx, num, deterministic=True), block_map)


@HALF
@HEAD_DIMS
@pytest.mark.parametrize(
    ("case", "deterministic"),
    [*((case, False) for case in CASES), *((case, True) for case in CASES[6:])],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_gradients_of_block_means_are_added(
    monkeypatch: pytest.MonkeyPatch, case: Case, deterministic: bool, head_dim: int, dtype: torch.dtype
):
    """To gradients that are the same whether the coarse output is part of the output or not."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    inputs = Inputs(replace(case, heads=8, head_dim=head_dim), "cuda", dtype)
    idx, num, _ = inputs.uneven_indices()
    problem = problem_of(inputs)
    operands, out_s, out = outputs_of_few_bits(problem, operands_of(inputs, idx, num)._replace(q_sizes=inputs.q_sizes))
    backend = backend_for("attend_backward", problem, "sm90", inputs.q, inputs.k, inputs.v)
    _, lse, _ = backend.attend(problem, operands, False)
    rest = lse, inputs.dout, inputs.dlse, True, True
    without = backend.attend_backward(problem, operands, out_s, *rest)
    of_means = MeanGradients(problem, "cuda")
    found = backend.attend_backward(problem, operands, out, *rest, True, of_means)
    of_means.check(operands, found, without)


@HALF
@HEAD_DIMS
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("block", [64, 128])
def test_scores_that_differ_by_hundreds(block: int, order: str, head_dim: int, dtype: torch.dtype):
    case = Case("steep", q_len=6390, heads=8, head_dim=head_dim, block_size=block)
    inputs = Inputs(case, "cuda", dtype)
    inputs.stretch_keys(steep(order, inputs.num_kv_blocks))
    idx, num, block_map = inputs.uneven_indices()
    check(inputs, gradients(inputs, idx, num), block_map)


@HEAD_DIMS
def test_4096_blocks(head_dim: int):
    """Rows and columns of several words and slices; blocks that all name, and blocks that nobody names."""
    inputs = Inputs(Case("long", q_len=4096 * 64, heads=2, kv_heads=1, head_dim=head_dim), "cuda", torch.bfloat16)
    idx = torch.rand(1, 2, 4096, 4000, device="cuda").topk(24).indices + 1
    idx[..., 0], idx[..., 1] = 0, 4001
    num = torch.full((1, 2, 4096), 24, dtype=torch.int32, device="cuda")
    num[:, :, ::5] = 2
    found = {}
    for backend in ("sm90", "triton"):
        call = vsa_jit.block_sparse_attn_from_indices
        out, _ = call(inputs.q, inputs.k, inputs.v, idx.int(), num, backend=backend, **inputs.order_of_blocks)
        found[backend] = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)
    for x, y in zip(found["sm90"], found["triton"], strict=True):
        assert ref.error(x, y) < 6e-3
    for x in found["sm90"][1:]:
        assert torch.equal(x[:, :, 4002 * 64 :], torch.zeros_like(x[:, :, 4002 * 64 :]))


@pytest.mark.parametrize(("block", "deterministic"), [(64, False), (128, True), (256, True)])
@HEAD_DIMS
def test_the_same_bits_every_time(block: int, deterministic: bool, head_dim: int):
    inputs = Inputs(Case("bits", q_len=12000, heads=8, head_dim=head_dim, block_size=block), "cuda", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    first = gradients(inputs, idx, num, deterministic=deterministic)
    for _ in range(10):
        for x, y in zip(gradients(inputs, idx, num, deterministic=deterministic), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("block", "tensors"), [(64, 0), (128, 1), (256, 1)])
@HEAD_DIMS
def test_memory_beyond_the_gradients(block: int, tensors: int, head_dim: int):
    """None where there are two passes, and one fp32 tensor of q's size where there is one, on odd grids, too."""
    inputs = Inputs(
        Case("memory", grid=(13, 45, 41), heads=8, head_dim=head_dim, block_size=block), "cuda", torch.bfloat16
    )
    idx, num, _ = inputs.uneven_indices()
    call = vsa_jit.block_sparse_attn_from_indices
    out, _ = call(inputs.q, inputs.k, inputs.v, idx, num, backend="sm90", **inputs.order_of_blocks)
    operands = inputs.q, inputs.k, inputs.v
    torch.autograd.grad(out, operands, inputs.dout, retain_graph=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(out, operands, inputs.dout)
    taken = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in found)
    # There are two numbers for each query, lists of tiles, and the inverse of the map, too.
    assert taken <= (tensors + 0.2) * 4 * inputs.q.numel()


@pytest.mark.parametrize("block", [64, 128])
def test_a_graph_of_forward_and_backward(block: int):
    inputs = Inputs(Case("graph", grid=(9, 17, 18), block_size=block, heads=4, head_dim=128), "cuda", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    expected = gradients(inputs, idx, num, with_lse=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(inputs, idx, num, with_lse=False)
    for _ in range(3):
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
        # One pass adds up dq in an order that varies.
        assert torch.equal(found[0], expected[0]) or (block > 64 and ref.error(found[0], expected[0]) < 2.0**-9)
        for x, y in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(x, y)


@HEAD_DIMS
def test_a_key_block_that_does_not_exist_spoils_its_rows(head_dim: int):
    inputs = Inputs(Case("outside", q_len=12 * 128, block_size=128, head_dim=head_dim), "cuda", torch.bfloat16)
    idx = torch.arange(12, dtype=torch.int32, device="cuda").expand(1, 2, 12, 12).contiguous()
    num = torch.full((1, 2, 12), 3, dtype=torch.int32, device="cuda")
    idx[0, 0, 3, 0], idx[0, 1, 7, 0] = -1, 12
    num[0, 0, 3] = 1
    spoiled = torch.zeros(1, 2, 12, dtype=torch.bool, device="cuda")
    spoiled[0, 0, 3] = spoiled[0, 1, 7] = True
    dq, dk, dv = gradients(inputs, idx, num, with_lse=False)
    assert torch.equal(dq.isnan().all(-1), spoiled.repeat_interleave(128, -1))
    assert torch.equal(dq.isnan().any(-1), spoiled.repeat_interleave(128, -1))
    # A query that names other blocks, too, spoils theirs.
    named = torch.zeros(1, 2, 12, dtype=torch.bool, device="cuda")
    named[0, 1, 1:3] = True
    for x in (dk, dv):
        assert torch.equal(x.isnan().any(-1), named.repeat_interleave(128, -1))


def test_strided_gradients_of_the_output():
    """What TMA cannot read is copied, and what it can is read where it lies."""
    inputs = Inputs(Case("strides", q_len=700, heads=4, head_dim=64), "cuda", torch.float16)
    idx, num, _ = inputs.uneven_indices()
    expected = gradients(inputs, idx, num, with_lse=False)
    dout = inputs.dout
    wide = torch.full((*dout.shape[:3], 68), float("nan"), dtype=dout.dtype, device="cuda")
    padded = torch.full((*dout.shape[:3], 72), float("nan"), dtype=dout.dtype, device="cuda")
    for strided in (wide[..., 2:66], padded[..., 8:], torch.empty_like(dout.mT).mT):
        inputs.dout = strided.copy_(dout)
        for x, y in zip(gradients(inputs, idx, num, with_lse=False), expected, strict=True):
            assert torch.equal(x, y)


def test_the_inverse_on_the_gpu_is_that_of_the_cpu():
    idx = torch.rand(2, 3, 700, 1000, device="cuda").argsort(-1).int()[..., :50].contiguous()
    num = torch.randint(0, 51, (2, 3, 700), dtype=torch.int32, device="cuda")
    q, k = (torch.empty(2, 3, blocks * 64, 64, dtype=torch.float16, device="cuda") for blocks in (700, 1000))
    problem = Problem.of(q, k, (1, 1, 64), None, "bhsd", 0.125)
    backend = backend_for("attend_backward", problem, "sm90", q, k, k)
    assert backend.transpose_index is not None
    bits, order = backend.transpose_index(problem, Operands(q, k, k, idx, num, None, None, None, None, 0.0))
    used = torch.arange(50, device="cuda") < num[..., None]
    selected = torch.zeros(2, 3, 704, 1001, dtype=torch.int64, device="cuda")
    selected[:, :, :700].scatter_(-1, torch.where(used, idx, 1000).long(), 1)
    selected = selected[..., :1000]
    words = (selected.unflatten(2, (22, 32)) << torch.arange(32, device="cuda")[:, None]).sum(3)
    assert torch.equal(bits.long() & 0xFFFFFFFF, words)
    classes = selected.sum(2).float().view(torch.int32) >> 20
    assert torch.equal(order.long(), classes.argsort(dim=-1, descending=True, stable=True))


def test_a_model_trained_on_both_backends_follows_the_same_loss():
    """A few hundred steps of a small attention layer, on the same blocks."""
    heads, head_dim, grid = 2, 64, (8, 8, 8)
    length, channels = 512, heads * head_dim
    torch.manual_seed(int(torch.randint(2**31, ())))
    target, x = (torch.randn(1, length, channels, device="cuda") for _ in range(2))
    start = torch.randn(3, channels, channels, device="cuda") * channels**-0.5
    idx = torch.rand(1, heads, 8, 8, device="cuda").argsort(-1).int()[..., :4].contiguous()
    num = torch.full((1, heads, 8), 4, dtype=torch.int32, device="cuda")

    def losses(backend: str, dtype: torch.dtype) -> Tensor:
        weights = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([weights], lr=3e-3)
        found = []
        for _ in range(300):
            q, k, v = ((x @ weight).view(1, length, heads, head_dim).to(dtype) for weight in weights)
            call = vsa_jit.block_sparse_attn_from_indices
            out, _ = call(q, k, v, idx, num, grid=grid, layout="bshd", block_size=64, backend=backend)
            loss = (out.float().flatten(2) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.detach())
        return torch.stack(found)

    exact, plain = (losses("torch", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact[-1] < 0.9 * exact[0]
    ref.assert_close("losses", losses("sm90", torch.bfloat16), exact, plain)

"""Block-sparse attention at every block size, beside a dense masked reference and beside FlashAttention.

As a script this file is the benchmark: ``python tests/test_block_sparse.py`` takes the arguments of ``vsa-jit bench``.
"""

import sys

if __name__ == "__main__":
    # Before the imports that only tests need: the benchmark runs without them.
    from vsa_jit.cli.main import main

    sys.exit(main(["bench", *sys.argv[1:]]))

import math

import pytest
import torch
import torch.nn.functional as F
from support import reference as ref
from support.problems import Case, Inputs

import vsa_jit
from vsa_jit.bench.attention import sparse
from vsa_jit.bench.cases import Case as BenchCase
from vsa_jit.bench.cases import Inputs as BenchInputs
from vsa_jit.bench.cases import Selection, Shape
from vsa_jit.bench.check import check, metrics

GRIDS = {"cpu": (5, 9, 18), "cuda": (9, 30, 31)}
HEAD_DIMS = {"cpu": 32, "cuda": 128}
RUNS = [("torch", "cpu"), pytest.param(("triton", "cuda"), marks=pytest.mark.gpu)]

by_run = pytest.mark.parametrize("run", RUNS, ids=["torch-cpu", "triton-cuda"])
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
by_sparsity = pytest.mark.parametrize("sparsity", [0.5, 0.9])
by_order = pytest.mark.parametrize("order", ["plain", "raster"])
by_block_size = pytest.mark.parametrize(
    "block_size", [64, (4, 4, 4), (2, 8, 8), (4, 8, 8)], ids=["64", "4x4x4", "2x8x8", "4x8x8"]
)


def make_inputs(run, block_size, order, dtype, **options) -> Inputs:
    """Of a size that suits the device, with blocks cut by the end of the sequence or by the border of the video."""
    grid = GRIDS[run[1]]
    case = Case(
        order,
        q_len=math.prod(grid),
        grid=grid if order == "raster" else None,
        block_size=block_size,
        head_dim=HEAD_DIMS[run[1]],
        **options,
    )
    return Inputs(case, run[1], dtype)


def check_all(inputs: Inputs, results: dict, expected: dict, plain: dict) -> None:
    for name, result in results.items():
        ref.assert_close(name, inputs.bhsd(result) if name != "lse" else result, expected[name], plain[name])


@by_run
@by_dtype
@by_sparsity
@by_order
@by_block_size
def test_video_sparse_attn(run, block_size, order, sparsity, dtype):
    """Selection, fine and coarse branch with a gate, forward and backward."""
    blocks = make_inputs(run, block_size, order, dtype).num_kv_blocks
    topk = math.ceil(round((1 - sparsity) * blocks, 6))
    inputs = make_inputs(run, block_size, order, dtype, topk=topk, gate="full")
    out = vsa_jit.video_sparse_attn(
        inputs.q,
        inputs.k,
        inputs.v,
        sparsity=sparsity,
        compress_attn_weight=inputs.gate,
        backend=run[0],
        **inputs.order,
    )
    out.backward(inputs.dout)
    results = {"out": out, "dq": inputs.q.grad, "dk": inputs.k.grad, "dv": inputs.v.grad, "dgate": inputs.gate.grad}
    block_map = inputs.block_map()
    check_all(inputs, results, inputs.expected(torch.float64, block_map), inputs.expected(dtype, block_map))


@by_run
@by_dtype
@by_sparsity
@by_order
@by_block_size
def test_block_sparse_attn(run, block_size, order, sparsity, dtype):
    """A random map with rows of uneven length, forward and backward."""
    backend, device = run
    inputs = make_inputs(run, block_size, order, dtype)
    shape = (inputs.case.batch, inputs.case.heads, inputs.num_q_blocks, inputs.num_kv_blocks)
    block_map = (torch.rand(shape, generator=inputs.generator) > sparsity).to(device)
    out, lse = vsa_jit.block_sparse_attn(inputs.q, inputs.k, inputs.v, block_map, backend=backend, **inputs.order)
    out.backward(inputs.dout)
    results = {"out": out, "lse": lse, "dq": inputs.q.grad, "dk": inputs.k.grad, "dv": inputs.v.grad}

    def densely(wanted: torch.dtype) -> dict:
        tensors = inputs.clean(wanted)
        out, lse = ref.attention(*(tensors[name] for name in "qkv"), inputs.mask(block_map), inputs.scale)
        out.backward(inputs.clean_dout(wanted))
        return {"out": out, "lse": lse, **{f"d{name}": tensors[name].grad for name in "qkv"}}

    check_all(inputs, results, densely(torch.float64), densely(dtype))


@by_run
@by_dtype
@by_order
@by_block_size
def test_every_block_selected_is_dense_attention(run, block_size, order, dtype):
    """The three metrics against torch's dense attention (flash on a GPU): no worse than twice plain PyTorch's."""
    backend, device = run
    inputs = make_inputs(run, block_size, order, dtype)
    block_map = torch.ones(
        (inputs.case.heads, inputs.num_q_blocks, inputs.num_kv_blocks), dtype=torch.bool, device=device
    )
    with torch.no_grad():
        out, _ = vsa_jit.block_sparse_attn(inputs.q, inputs.k, inputs.v, block_map, backend=backend, **inputs.order)
        flash = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
        plain, _ = ref.attention(inputs.q, inputs.k, inputs.v, inputs.mask(block_map[None]), inputs.scale)
    ours, yardstick = metrics([out], [flash]), metrics([plain], [flash])
    floor = 1e-6 if dtype == torch.float32 else 0.0
    assert ours.l1 <= 2 * yardstick.l1 + floor
    assert ours.rmse <= 2 * yardstick.rmse + floor
    # The cosine falls with the square of the error.
    assert 1 - ours.cosine <= 4 * (1 - yardstick.cosine) + floor


@pytest.mark.gpu
@by_block_size
@pytest.mark.parametrize("grid", [None, (21, 30, 52)], ids=["plain", "raster"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_video_sized(block_size, grid, direction):
    """The sizes of Wan2.1-1.3B at 480p: a sample of the output, and all gradients of two heads."""
    shape = Shape(math.prod(grid) if grid else 39_936, grid, 1, 12, 128, "bf16", "bshd")
    case = BenchCase(shape, block_size, Selection(sparsity=0.9), "tensor", "auto")
    inputs = BenchInputs.random(shape, torch.device("cuda"), int(torch.randint(2**62, ())))
    results = sparse(case, inputs).results(direction)
    checked = check(case, inputs, results, direction, seed=0)
    assert checked.ok, checked.errors

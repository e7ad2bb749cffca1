"""Measures the forward on a Hopper GPU: ``python tests/measure_forward.py``.

Every line is checked against Triton's kernels on the same map before it is timed. Its ratio is to PyTorch's dense
attention by cuDNN of the same head dimension. All three are timed in turn, in several rounds, and medians count: such
work runs at the GPU's limit of power, so that its clock changes from one second to the next. "Random" means that
every query block selects key blocks drawn uniformly, "neighbouring" the nearest blocks of a video of 6x8x13 blocks by
Euclidean distance less twice a uniform number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure_jit import host_time
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

import vsa_jit

DEVICE = torch.device("cuda")


class Work(NamedTuple):
    name: str
    tokens: int
    heads: int
    head_dim: int
    block: int | tuple[int, int, int]
    topk: int
    neighbouring: tuple[int, int, int] | None = None
    grid: tuple[int, int, int] | None = None
    layout: str = "bhsd"


ROUNDS = 6
# Fewer than the GPU's queue holds.
CALLS = 200
W1 = 39936
WORKS = [
    Work("W1, random", W1, 12, 128, 64, 64),
    Work("W1, neighbouring", W1, 12, 128, 64, 64, neighbouring=(6, 8, 13)),
    Work("W1, D=64, random", W1, 12, 64, 64, 64),
    Work("W1, D=64, neighbouring", W1, 12, 64, 64, 64, neighbouring=(6, 8, 13)),
    Work("W1, raster, bhsd", W1, 12, 128, (4, 4, 4), 64, grid=(24, 32, 52)),
    Work("W1, raster, bshd", W1, 12, 128, (4, 4, 4), 64, grid=(24, 32, 52), layout="bshd"),
    Work("W1, blocks of 128", W1, 12, 128, 128, 32),
    Work("W1, blocks of 192", W1, 12, 128, 192, 21),
    Work("W1, blocks of 256", W1, 12, 128, 256, 16),
    Work("W14, random", 92160, 40, 128, 64, 144),
    Work("small, random", 8192, 8, 128, 64, 16),
]


def random_map(heads: int, blocks: int, topk: int) -> Tensor:
    return torch.rand(1, heads, blocks, blocks, device=DEVICE).topk(topk, -1).indices.int()


def neighbouring_map(heads: int, grid: tuple[int, int, int], topk: int) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(side, device=DEVICE).float() for side in grid), indexing="ij")
    at = torch.stack(axes, -1).flatten(0, 2)
    scores = 2 * torch.rand(1, heads, len(at), len(at), device=DEVICE) - torch.cdist(at, at)
    return scores.topk(topk, -1).indices.int()


def inputs_of(work: Work) -> tuple[list[Tensor], Tensor, Tensor, dict]:
    """q, k and v, the map, and the arguments that say where the tokens are."""
    shape = (1, work.heads, work.tokens, work.head_dim)
    if work.layout == "bshd":
        shape = (1, work.tokens, work.heads, work.head_dim)
    qkv = [torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3)]
    block = work.block if isinstance(work.block, int) else math.prod(work.block)
    if work.neighbouring is None:
        q2k_idx = random_map(work.heads, work.tokens // block, work.topk)
    else:
        q2k_idx = neighbouring_map(work.heads, work.neighbouring, work.topk)
    q2k_num = torch.full(q2k_idx.shape[:3], work.topk, dtype=torch.int32, device=DEVICE)
    return qkv, q2k_idx, q2k_num, {"block_size": work.block, "grid": work.grid, "layout": work.layout}


def median_ms(call: Callable) -> float:
    return do_bench(call, warmup=20, rep=60, return_mode="median")


def dense_call(head_dim: int, backend: SDPBackend) -> Callable:
    q, k, v = torch.randn(3, 1, 12, W1, head_dim, device=DEVICE).bfloat16()

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def dense_tflops(head_dim: int, ms: float) -> float:
    return 4 * 12 * W1 * W1 * head_dim / ms * 1e-9


def measure(work: Work) -> None:
    qkv, q2k_idx, q2k_num, order = inputs_of(work)

    def sparse_call(backend: str) -> Callable:
        arguments = {**order, "backend": backend}
        return lambda: vsa_jit.block_sparse_attn_from_indices(*qkv, q2k_idx, q2k_num, **arguments)

    calls = {name: sparse_call(name) for name in ("triton", "sm90")}
    for ours, theirs, tolerance in zip(calls["sm90"](), calls["triton"](), (2e-2, 1e-5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)
    calls["dense"] = dense_call(work.head_dim, SDPBackend.CUDNN_ATTENTION)
    names = list(calls)
    # There and back: what runs before warms the GPU, by how much differs.
    rounds = [{name: median_ms(calls[name]) for name in (names, names[::-1])[i % 2]} for i in range(ROUNDS)]
    block = work.block if isinstance(work.block, int) else math.prod(work.block)
    flops = 4 * work.heads * work.tokens * work.topk * block * work.head_dim
    tflops = [flops / times["sm90"] * 1e-9 for times in rounds]
    of_dense = [ours / dense_tflops(work.head_dim, times["dense"]) for ours, times in zip(tflops, rounds, strict=True)]
    print(
        f"{work.name}: {median([times['sm90'] for times in rounds]):.3f} ms, {median(tflops):.0f} TFLOP/s, "
        f"{median(of_dense):.3f} of dense ({min(of_dense):.3f} to {max(of_dense):.3f}), "
        f"{median([times['triton'] / times['sm90'] for times in rounds]):.2f} times Triton",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only works whose name has one of these")
    names = parser.parse_args().names
    for head_dim in (128, 64):
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            tflops = dense_tflops(head_dim, median_ms(dense_call(head_dim, backend)))
            print(f"dense, D={head_dim}, {backend.name}: {tflops:.0f} TFLOP/s", flush=True)
    for work in WORKS:
        if not names or any(name in work.name for name in names):
            measure(work)
    measure_host_time()


def measure_host_time() -> None:
    q, k, v = torch.randn(3, 1, 2, 1024, 128, device=DEVICE).bfloat16()
    q2k_idx = random_map(2, 16, 4)
    q2k_num = torch.full((1, 2, 16), 4, dtype=torch.int32, device=DEVICE)
    of_a_call = host_time(lambda: vsa_jit.block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num), CALLS)
    print(f"host time of a call: {of_a_call}")


if __name__ == "__main__":
    main()

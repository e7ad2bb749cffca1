"""The Hopper forward on a Hopper GPU, at sizes where thread blocks take several items and their rings wrap around."""

import math
from dataclasses import replace

import pytest
import torch
from support import reference as ref
from support.problems import ON_HOPPER, Case, Inputs, steep
from torch import Tensor

import vsa_jit

pytestmark = ON_HOPPER

CASES = [
    Case("64, plain", q_len=6390),
    Case("64, tiled", q_len=6400, sizes=tuple(37 * i % 65 for i in range(100))),
    Case("64, raster, bshd", grid=(13, 22, 21), block_size=(4, 4, 4), layout="bshd"),
    Case("64, other keys, grouped heads", q_len=6400, kv_len=2500, kv_heads=4),
    Case("128, raster, bshd", grid=(13, 22, 21), block_size=(2, 8, 8), layout="bshd"),
    Case("128, tiled", q_len=6400, block_size=128, sizes=tuple(range(0, 150, 3))),
    Case("192, plain, batch", q_len=3000, block_size=192, batch=2),
    Case("256, raster", grid=(13, 22, 21), block_size=(4, 8, 8)),
    Case("320, plain", q_len=6400, block_size=320),
    Case("1728, raster cut on all three axes", grid=(13, 25, 13), block_size=(12, 12, 12)),
]


def attend(inputs: Inputs, idx: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    call = vsa_jit.block_sparse_attn_from_indices
    with torch.no_grad():
        out, lse = call(inputs.q, inputs.k, inputs.v, idx, num, backend="sm90", **inputs.order_of_blocks)
    return inputs.bhsd(out), lse


def poison_free_memory() -> None:
    """What the caching allocator gives next holds NaN."""
    torch.full((1 << 28,), float("nan"), device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_uneven_rows(case: Case, head_dim: int, dtype: torch.dtype):
    inputs = Inputs(replace(case, heads=8, head_dim=head_dim), "cuda", dtype)
    idx, num, block_map = inputs.uneven_indices()
    poison_free_memory()
    out, lse = attend(inputs, idx, num)
    inputs.check_forward(out, lse, block_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_scores_that_differ_by_hundreds(order: str, head_dim: int, dtype: torch.dtype):
    inputs = Inputs(Case("steep", q_len=6390, heads=8, head_dim=head_dim), "cuda", dtype)
    inputs.stretch_keys(steep(order, inputs.num_kv_blocks))
    idx, num, block_map = inputs.uneven_indices()
    out, lse = attend(inputs, idx, num)
    inputs.check_forward(out, lse, block_map)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128, 192])
def test_same_bits_on_every_run(block: int, head_dim: int):
    """Also where the last group of a chunk is not full, and thread blocks end at other times."""
    inputs = Inputs(
        Case("bits", q_len=128 * block, block_size=block, heads=8, head_dim=head_dim), "cuda", torch.bfloat16
    )
    idx, num, _ = inputs.uneven_indices()
    out, lse = attend(inputs, idx, num)
    for _ in range(50):
        again, lse_again = attend(inputs, idx, num)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("topk", [1, 7, 4096])
def test_4096_blocks(topk: int):
    """Against fp64 for some of the query blocks."""
    blocks, head_dim = 4096, 64
    q, k, v = torch.randn(3, 1, 2, blocks * 64, head_dim, device="cuda").bfloat16()
    idx = torch.rand(1, 2, blocks, blocks, device="cuda").topk(min(topk, 64), -1).indices.int()
    num = torch.full((1, 2, blocks), idx.shape[-1], dtype=torch.int32, device="cuda")
    if topk > 64:
        # One row in a hundred selects everything, and one nothing.
        idx = torch.nn.functional.pad(idx, (0, blocks - 64))
        idx[:, :, ::100] = torch.arange(blocks, dtype=torch.int32, device="cuda")
        num[:, :, ::100] = blocks
        num[:, :, 1::100] = 0
    out, lse = vsa_jit.block_sparse_attn_from_indices(q, k, v, idx, num, backend="sm90")
    for block in (0, 1, 2, 100, 101, 1717, blocks - 1):
        for head in range(2):
            rows = slice(block * 64, block * 64 + 64)
            selected = idx[0, head, block, : num[0, head, block]].long()
            if len(selected) == 0:
                assert out[0, head, rows].count_nonzero() == 0
                assert lse[0, head, rows].isneginf().all()
                continue
            keys, values = (x[0, head].view(blocks, 64, head_dim)[selected].flatten(0, 1).double() for x in (k, v))
            scores = q[0, head, rows].double() @ keys.mT / math.sqrt(head_dim)
            exact = scores.softmax(-1) @ values
            plain = scores.bfloat16().softmax(-1) @ values.bfloat16()
            ref.assert_close("out", out[0, head, rows], exact, plain)
            torch.testing.assert_close(lse[0, head, rows].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_second_output_changes_no_bit_of_the_first():
    """With gradients, the output without the coarse part is a second result of the same launch."""
    inputs = Inputs(Case("gate", q_len=6400, heads=8, head_dim=128, topk=9, gate="full"), "cuda", torch.bfloat16)
    with_gradients = inputs.video_sparse_attn("sm90")
    with torch.no_grad():
        assert torch.equal(with_gradients, inputs.video_sparse_attn("sm90"))


def test_never_waits_for_the_gpu():
    inputs = Inputs(Case("sync", q_len=640, head_dim=64), "cuda", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    attend(inputs, idx, num)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(inputs, idx, num)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_and_graphs_side_by_side():
    """What deals out the work of a launch is not shared with another that runs at the same time."""
    inputs = Inputs(Case("streams", q_len=6400, heads=8, head_dim=64), "cuda", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    expected = attend(inputs, idx, num)
    streams = [torch.cuda.Stream() for _ in range(3)]
    graphs = []
    for stream in streams[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = attend(inputs, idx, num)
        graphs.append((graph, captured))
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream, (graph, _) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(attend(inputs, idx, num))
    torch.cuda.synchronize()
    for out, lse in (*results, *(captured for _, captured in graphs)):
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_a_graph_in_whose_capture_other_tensors_are_made():
    """The gate in fp32 and the coarse output in order, between what the launch needs and the launch."""
    inputs = Inputs(Case("captured", q_len=6400, heads=8, head_dim=64, topk=9), "cuda", torch.bfloat16)
    gate = -torch.rand_like(inputs.q, dtype=torch.float64)

    def call() -> Tensor:
        with torch.no_grad():
            return vsa_jit.video_sparse_attn(
                inputs.q, inputs.k, inputs.v, topk=9, compress_attn_weight=gate, backend="sm90"
            )

    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_graphs_that_the_compiler_captures():
    inputs = Inputs(Case("compiled", q_len=6400, heads=8, head_dim=64, topk=9), "cuda", torch.bfloat16)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vsa_jit.video_sparse_attn(q, k, v, topk=9, backend="sm90") * 2

    tensors = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
    expected = call(*tensors)
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(*tensors), expected, rtol=2**-7, atol=2**-9)


def test_rows_that_can_select_nothing():
    inputs = Inputs(Case("empty", q_len=640, head_dim=64), "cuda", torch.bfloat16)
    idx = torch.empty(1, 2, 10, 0, dtype=torch.int32, device="cuda")
    out, lse = attend(inputs, idx, torch.zeros(1, 2, 10, dtype=torch.int32, device="cuda"))
    assert out.count_nonzero() == 0
    assert lse.isneginf().all()

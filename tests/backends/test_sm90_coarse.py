"""The coarse branch's kernels on a Hopper GPU, against its composition of the Triton backend's functions."""

from itertools import product

import pytest
import torch
from support.coarse import PACKED, TEXT_AND_VIDEO, Case
from support.hopper import load_kernels
from support.problems import ON_HOPPER

from vsa_jit.backends.sm90 import coarse, structs
from vsa_jit.backends.triton import launches as triton_backend

pytestmark = ON_HOPPER


@pytest.fixture(autouse=True)
def loaded():
    load_kernels()


LENGTHS = (5, 100, 624, 1440, 2500)
# Selections are compared where scores are exact: else backends may order close ones in another way.
CASES = [
    *(
        Case(f"{n}", n, n, head_dim, heads=12, kv_heads=12, exact=True, topk=(n // 8 + 1,))
        for n, head_dim in product(LENGTHS, (64, 128))
    ),
    Case("other keys, grouped heads", 700, 1300, 128, heads=8, kv_heads=2, batch=2, exact=True, topk=(130,)),
    Case("sizes", 300, 650, 128, heads=12, kv_heads=12, sizes="some", exact=True, topk=(65,)),
    Case("more than there are", 70, 100, sizes="some", exact=True, topk=(1000,)),
    Case("all empty", 70, 100, sizes="none", topk=(5,)),
    Case("one", 300, 650, exact=True, topk=(1,)),
    Case("not attended", 300, 650, exact=True, attended=False),
    Case("rounded to bf16", 300, 650, 128, dtype=torch.bfloat16, exact=True, topk=(65,)),
    Case("rounded to fp16", 300, 650, 128, dtype=torch.float16, exact=True, topk=(65,)),
    Case("context", 92, 92, 128, exact=True, topk=(6,), segments=TEXT_AND_VIDEO),
    Case("packed", 119, 119, 128, kv_heads=1, batch=2, exact=True, topk=(3, 20, 0, 2), segments=PACKED),
    Case("packed, competing", 119, 119, topk=(3, 20, 0, 2), exact=True, segments=PACKED, compete=True),
    Case("as wide as can be", 70, structs.MAX_COARSE_COLS, exact=True, topk=(1600,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, D={case.head_dim}")
def test_attend(case: Case):
    case.check_forward("cuda", "triton")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, D={case.head_dim}")
def test_backward(case: Case):
    case.check_backward("cuda", "triton")


@pytest.mark.parametrize("num_blocks", LENGTHS)
def test_drawn_scores(num_blocks: int):
    """What is selected scores at least as high, in fp64, as what is not, and the output is as exact as Triton's."""
    case = Case("drawn", num_blocks, num_blocks, 128, heads=12, kv_heads=12, topk=(num_blocks // 8 + 1,))
    q, k, v, _ = case.means("cuda")
    out, idx, num = coarse.coarse_attend(case.coarse, q, k, v, None, case.topk, False)
    scores = q.double() @ k.double().mT
    assert (num == case.topk[0]).all()
    assert (idx.diff(dim=-1) > 0).all()
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, idx.long(), True)
    lowest = scores.masked_fill(~selected, float("inf")).amin(-1)
    highest = scores.masked_fill(selected, float("-inf")).amax(-1)
    assert (lowest >= highest - 1e-4).all()
    exact = (scores * case.scale).softmax(-1) @ v.double()
    of_triton = triton_backend.coarse_attend(case.coarse, q, k, v, None, case.topk, False)[0]
    error, allowed = ((x - exact).abs().max().item() for x in (out, of_triton))
    assert error <= 2 * allowed + 1e-6 * exact.abs().max().item()
    again = coarse.coarse_attend(case.coarse, q, k, v, None, case.topk, False)
    assert all(torch.equal(x, y) for x, y in zip((out, idx, num), again, strict=True))


def test_in_a_cuda_graph():
    case = Case("graph", 624, 624, 128, heads=4, kv_heads=4, exact=True, topk=(62,))
    q, k, v, _ = case.means("cuda")

    def run():
        return coarse.coarse_attend(case.coarse, q, k, v, None, case.topk, False)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for result in results:
        result.zero_()
    graph.replay()
    for result, of_call in zip(results, expected, strict=True):
        assert torch.equal(result, of_call)

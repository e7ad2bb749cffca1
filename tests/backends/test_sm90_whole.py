"""The launches of the whole operator on a Hopper GPU, of which each starts while the one before it still runs."""

import pytest
import torch
from support.hopper import problem_of
from support.problems import ON_HOPPER, Case, Inputs
from torch import Tensor

from vsa_jit.backends.sm90 import launches
from vsa_jit.problem import Coarse, Operands

pytestmark = ON_HOPPER

GRID, TOPK = (24, 32, 26), 20
# Several row tiles for each thread block of the coarse attention, one, and fewer than there are multiprocessors.
HEADS = [48, 12, 2]


def one_by_one(inputs: Inputs) -> Tensor:
    """The same launches, but each waits for the end of the one before."""
    q, k, v, gate = inputs.q, inputs.k, inputs.v, inputs.gate
    problem = problem_of(inputs)
    coarse = Coarse(None, problem.softmax_scale, torch.float32)
    means = launches.block_means(problem, q, k, v, None, None)
    torch.cuda.synchronize()
    out_c, idx, num = launches.coarse_attend(coarse, *means, None, [TOPK], False)
    torch.cuda.synchronize()
    out, _, _ = launches.attend(problem, Operands(q, k, v, idx, num, None, None, out_c, gate, 0.0), False)
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_launches_that_overlap(heads: int, head_dim: int):
    """Each time with other inputs, in memory that calls before have used: what is read too early shows."""
    case = Case(
        "whole", grid=GRID, block_size=(4, 4, 4), layout="bshd", heads=heads, head_dim=head_dim, topk=TOPK, gate="full"
    )
    inputs = Inputs(case, "cuda", torch.bfloat16)
    tensors = inputs.q, inputs.k, inputs.v, inputs.gate
    with torch.no_grad():
        # Its kernels are loaded before the capture.
        inputs.video_sparse_attn("sm90")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = inputs.video_sparse_attn("sm90")
        for _ in range(10):
            for x in tensors:
                x.normal_()
            expected = one_by_one(inputs)
            results = [inputs.video_sparse_attn("sm90") for _ in range(3)]
            graph.replay()
            for result in (*results, captured):
                assert torch.equal(result, expected)

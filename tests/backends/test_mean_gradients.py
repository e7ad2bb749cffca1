"""Gradients of block means are added to those of the tokens by the backends that run without a GPU."""

import pytest
import torch
from support.added import MeanGradients, outputs_of_few_bits
from support.hopper import operands_of, problem_of
from support.problems import INTERPRETED, Case, Inputs

from vsa_jit.backends.torch import launches as plain
from vsa_jit.backends.triton import launches as interpreted

LAUNCHES = {"torch": plain, "triton": interpreted}
CASES = [
    (Case("raster", grid=(5, 3, 7), block_size=(4, 4, 4), batch=2), torch.float16),
    (Case("raster 128, bshd", grid=(3, 9, 7), block_size=(2, 8, 8), layout="bshd"), torch.float32),
    (
        Case("sizes, grouped heads", q_len=256, sizes=(64, 17, 0, 40), q_sizes=(3, 0, 64, 64), heads=4, kv_heads=2),
        torch.float32,
    ),
    (Case("plain, other keys", q_len=130, kv_len=300, head_dim=24), torch.float32),
    (Case("whole blocks", q_len=128, head_dim=64), torch.float16),
]


@pytest.mark.parametrize("backend", ["torch", *(name for name, _ in INTERPRETED)])
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_sum(case, dtype, backend):
    inputs = Inputs(case, "cpu", dtype)
    idx, num, _ = inputs.uneven_indices()
    problem = problem_of(inputs)
    operands, out_s, out = outputs_of_few_bits(problem, operands_of(inputs, idx, num)._replace(q_sizes=inputs.q_sizes))
    _, lse, _ = plain.attend(problem, operands, False)
    rest = lse, inputs.dout, inputs.dlse, True, True
    # Backends differ by less than fp32 is compared to, and by more than one rounding of fp16.
    run = plain if dtype == torch.float32 else LAUNCHES[backend]
    without = run.attend_backward(problem, operands, out_s, *rest)
    of_means = MeanGradients(problem)
    found = LAUNCHES[backend].attend_backward(problem, operands, out, *rest, True, of_means)
    of_means.check(operands, found, without)
    assert torch.allclose(found.dout_c, without.dout_c, rtol=1e-5, atol=1e-5)

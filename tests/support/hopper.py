"""What tests of the Hopper kernels share: a call, its operands, exact means, where groups of rows start."""

import torch
from torch import Tensor

from support.problems import Inputs
from vsa_jit.checks import check_problem
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Operands, Problem, Side, bhsd


def problem_of(inputs: Inputs, **others) -> Problem:
    return check_problem(inputs.q, inputs.k, inputs.v, **{**inputs.order, **others})


def reference_means(side: Side, x: Tensor, sizes: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = bhsd(x, side.layout).detach().to(dtype)
    tokens = block_tokens(side, sizes, x.device)
    rows = x[:, :, tokens.clamp(min=0)].masked_fill((tokens < 0)[..., None], 0.0)
    return rows.sum(-2) / (tokens >= 0).sum(-1).clamp(min=1)[:, None]


def operands_of(inputs: Inputs, idx: Tensor, num: Tensor) -> Operands:
    q_sizes = inputs.sizes if inputs.q.shape == inputs.k.shape else None
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    return Operands(q, k, v, idx, num, q_sizes, inputs.sizes, None, None, 0.0)


def check_means(problem: Problem, inputs: Inputs, results) -> None:
    q_sizes = inputs.given_q_sizes if inputs.given_q_sizes is not None else inputs.sizes
    sides = (problem.queries, q_sizes), (problem.keys, inputs.sizes), (problem.keys, inputs.sizes)
    for name, result, (side, sizes) in zip("qkv", results, sides, strict=True):
        x = getattr(inputs, name)
        exact = reference_means(side, x, sizes, torch.float64)
        plain = reference_means(side, x, sizes, torch.float32)
        assert result.dtype == torch.float32
        error, allowed = (result - exact).abs().max(), (plain - exact).abs().max()
        # An error of fp32 in another order of the sum, and never nothing: one rounding of the largest mean.
        assert error <= 2 * allowed + 2.0**-23 * exact.abs().max(), (name, float(error), float(allowed))


def starts_of(partition, num_rows: int, boxes: int) -> tuple[list[int], list[int]]:
    """The first row of each row group and the first row group of each window, and their ends, as ``vsa/scheduler.cuh``
    has them."""
    groups = partition.query_groups.value // boxes
    rows = [min(i * partition.group_rows + min(i, partition.longer_groups), num_rows) for i in range(groups + 1)]
    windows = range(partition.windows.value + 1)
    return rows, [i * partition.window_groups + min(i, partition.longer_windows) for i in windows]

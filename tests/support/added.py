"""Gradients of block means that ``attend_backward`` adds to those of tokens, and what the sums must be."""

import torch
from torch import Tensor

from vsa_jit.backends.torch import launches as plain
from vsa_jit.backends.torch.chunks import put
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Gradients, Operands, Problem, bhsd


class MeanGradients:
    """Random ones, and what they were asked with."""

    def __init__(self, problem: Problem, device: str = "cpu"):
        rows = ((side.heads, side.num_blocks) for side in (problem.queries, problem.keys, problem.keys))
        self.problem, self.asked = problem, list[Tensor | None]()
        # Of the size of what they are added to, after they are divided by the number of tokens.
        self.of_means = [
            problem.block * torch.randn(problem.batch, *shape, problem.head_dim, device=device) for shape in rows
        ]

    def __call__(self, dout_c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self.asked.append(dout_c)
        dq_c, dk_c, dv_c = self.of_means
        return dq_c, dk_c, dv_c

    def check(self, operands: Operands, found: Gradients, without: Gradients) -> None:
        """Checks that what was found is what was without them and the shares of the tokens, both rounded once."""
        (dout_c,) = self.asked
        assert dout_c is found.dout_c
        queries, keys = (self.problem.queries, operands.q_sizes), (self.problem.keys, operands.kv_sizes)
        for name, (side, sizes), dmean in zip("qkv", (queries, keys, keys), self.of_means, strict=True):
            x, before = getattr(found, f"d{name}"), getattr(without, f"d{name}")
            share = plain.block_mean_backward(side, dmean, before.float(), sizes)
            assert share.any()
            total = before.float() + share
            rounding = torch.finfo(x.dtype).eps / 2 * (before.float().abs() + total.abs())
            # Where one pass adds up dq the order of its sums varies.
            excess = ((x.float() - total).abs() - 1.01 * rounding).max()
            assert excess <= 1e-5 * total.abs().max(), (name, float(excess))


def outputs_of_few_bits(problem: Problem, operands: Operands) -> tuple[Operands, Tensor, Tensor]:
    """Operands with a coarse output and a number for a weight; the output before it is added, and after it: all three
    of so few bits that nothing is rounded."""
    queries = problem.queries

    def few_bits(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, device=operands.q.device) / 4

    out_c = few_bits(problem.batch, queries.heads, queries.num_blocks, problem.head_dim)
    tokens = block_tokens(queries, operands.q_sizes, operands.q.device)
    out_s, out = torch.empty_like(operands.q), torch.empty_like(operands.q)
    for b in range(problem.batch):
        for h in range(queries.heads):
            fine, coarse = few_bits(*tokens.shape, problem.head_dim), out_c[b, h, :, None, :]
            put(bhsd(out_s, queries.layout)[b, h], tokens, fine)
            put(bhsd(out, queries.layout)[b, h], tokens, fine + 0.5 * coarse)
    return operands._replace(out_c=out_c, gate=None, gate_value=0.5), out_s, out

"""Whether outputs are right, and how far they are from dense attention.

The check recomputes outputs and gradients of a few heads in fp64 from the definition of the operator, on exactly the
key blocks that were selected, and allows twice the error that plain PyTorch makes in the input's dtype on those keys.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa_jit.bench.attention import select
from vsa_jit.bench.cases import Case, Inputs
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Problem, bhsd

# Where plain PyTorch happens to be exact to the last bits, rounding in another order is no mistake.
FLOOR = {torch.bfloat16: 0.0, torch.float16: 0.0, torch.float32: 1e-6}
# Scores of a product in fp32 against those of fp64.
SCORE_TOLERANCE = 1e-5
CHECKED_BLOCKS = 16
# Elements of the keys that are gathered at a time.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Checked:
    """For each tensor its error, the norm of the difference over the norm of the reference, and what is allowed."""

    errors: dict[str, tuple[float, float]]

    @property
    def ok(self) -> bool:
        # Not "no error above its bound": a NaN must fail.
        return all(error <= bound for error, bound in self.errors.values())

    @property
    def worst(self) -> str:
        """The tensor that comes closest to its bound or is furthest beyond it."""

        def badness(name: str) -> float:
            error, bound = self.errors[name]
            return math.inf if math.isnan(error) else error / bound if bound else error

        return max(self.errors, key=badness)


@dataclass(frozen=True)
class Metrics:
    """The three metrics of one result against another: cosine similarity, Σ|x−y| / Σ|y|, root mean square error."""

    cosine: float
    l1: float
    rmse: float


def metrics(results: Iterable[Tensor], references: Iterable[Tensor]) -> Metrics:
    """Over all elements of all pairs of tensors ([B, ...] each), accumulated in fp64."""
    sums: Tensor | float = 0.0
    count = 0
    for result, reference in zip(results, references, strict=True):
        count += reference.numel()
        for x, y in zip(_slices(result), _slices(reference), strict=True):
            x, y = x.double(), y.double()
            difference = x - y
            terms = (x * y, x * x, y * y, difference.abs(), y.abs(), difference * difference)
            sums = sums + torch.stack([term.sum() for term in terms])
    assert isinstance(sums, Tensor)
    dot, xx, yy, absolute, y_absolute, square = sums.tolist()
    tiny = torch.finfo(torch.float64).tiny
    return Metrics(dot / max(math.sqrt(xx * yy), tiny), absolute / max(y_absolute, tiny), math.sqrt(square / count))


def _slices(x: Tensor) -> Iterable[Tensor]:
    """Parts of [B, ., ., D] that fit memory a second time in fp64."""
    return (part for one in x for part in one.split(1 + CHUNK_ELEMENTS // one[0].numel()))


def check(case: Case, inputs: Inputs, results: Sequence[Tensor], direction: str, seed: int) -> Checked:
    """Checks the output, or the gradients, of the case's call on a sample.

    Of the output: some query blocks of a few heads, the last (partial) one of each segment among them. Of the
    gradients in q, k, v and the gate: all of a random head and of the last one.
    """
    q2k_idx, q2k_num, _ = select(case, inputs)
    rule = _Rule.of(case, inputs.device)
    rng = random.Random(seed)
    comparison = _Comparison(inputs.q.dtype)
    last = (case.shape.batch - 1, case.shape.heads - 1)
    count = 4 if direction == "forward" else 1
    sampled = [(rng.randrange(case.shape.batch), rng.randrange(case.shape.heads)) for _ in range(count)]
    for b, h in sorted({last, *sampled}):
        attended = _attended(q2k_idx[b, h], q2k_num[b, h])
        reference, plain = (
            _Head.of(case, inputs, attended, rule.same_sample, b, h, dtype) for dtype in (torch.float64, inputs.q.dtype)
        )
        actual = [bhsd(x, case.shape.layout)[b, h] for x in results]
        if direction == "forward":
            others = [block for block in range(reference.num_blocks) if block not in rule.last_blocks]
            blocks = [*rng.sample(others, min(CHECKED_BLOCKS, len(others))), *rule.last_blocks]
            chosen = torch.tensor(blocks, device=inputs.device)
            comparison.add_selection(reference, chosen, rule)
            for part in reference.chunks(chosen):
                valid = reference.tokens[part] >= 0
                comparison.add(
                    "out",
                    actual[0][reference.tokens[part][valid]],
                    reference.attend(part)[valid],
                    plain.attend(part)[valid],
                )
        else:
            dout = bhsd(inputs.dout, case.shape.layout)[b, h]
            triples = zip(actual, reference.gradients(dout), plain.gradients(dout), strict=True)
            for name, (x, wanted, by_plain) in zip(("dq", "dk", "dv", "dgate"), triples, strict=False):
                comparison.add(name, x, wanted, by_plain)
    return comparison.checked()


def _attended(q2k_idx: Tensor, q2k_num: Tensor) -> Tensor:
    """Which key block each query block attends, bool [n, n], from the indices of one head."""
    n, width = q2k_idx.shape
    named = torch.arange(width, device=q2k_idx.device) < q2k_num[:, None]
    attended = torch.zeros((n, n + 1), dtype=torch.bool, device=q2k_idx.device)
    attended.scatter_(1, q2k_idx.long().masked_fill(~named, n), True)
    # A number below 0 is that of a run of blocks, of which the first one is named.
    block, first = torch.arange(n, device=q2k_idx.device), q2k_idx[:, :1]
    return attended[:, :n] | ((block >= first) & (block < first - q2k_num[:, None]))


@dataclass(frozen=True)
class _Rule:
    """What each query block has to attend by the definition: bool [n, n] each, and int [n].

    Attributes:
        same_sample: what the coarse branch attends.
        required: the key blocks that scores do not choose.
        candidates: those that they choose among.
        count: how many are chosen.
        last_blocks: the last one of each segment.
    """

    same_sample: Tensor
    required: Tensor
    candidates: Tensor
    count: Tensor
    last_blocks: tuple[int, ...]

    @classmethod
    def of(cls, case: Case, device: torch.device) -> _Rule:
        keys, same_sample = case.problem.keys, case.same_sample(device)
        is_context = torch.zeros(keys.num_blocks, dtype=torch.bool, device=device)
        count = torch.full((keys.num_blocks,), case.topk_of_samples[0], device=device)
        last_blocks = [keys.num_blocks - 1]
        if keys.segments is not None:
            for segment in keys.segments.segments:
                is_context[segment.first_block : segment.first_block + segment.num_blocks] = segment.grid is None
            for sample, topk in zip(keys.segments.samples, case.topk_of_samples, strict=True):
                count[sample.first_block : sample.first_block + sample.num_blocks] = topk
            last_blocks = [segment.first_block + segment.num_blocks - 1 for segment in keys.segments.segments]
        required = same_sample & is_context[:, None]
        if case.compete:
            count += (same_sample & is_context).sum(1)
        else:
            required |= same_sample & is_context
        count.masked_fill_(is_context, 0)
        return cls(same_sample, required, same_sample & ~required, count, tuple(last_blocks))


@dataclass(frozen=True)
class _Head:
    """The operator on one head, from its definition, with autograd.

    ``q, k, v, gate`` are [S, D] in fp64 or fp32. The fine branch and the gate are computed in ``dtype``; block means
    and sums of gradients over blocks stay in the tensors' own, so that plain PyTorch's error is that of its attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | float
    tokens: Tensor  # [n, block], -1 where a slot has no token
    attended: Tensor  # bool [n, n], which key block each query block attends
    same_sample: Tensor  # bool [n, n], which block means
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls, case: Case, inputs: Inputs, attended: Tensor, same_sample: Tensor, b: int, h: int, dtype: torch.dtype
    ) -> _Head:
        problem: Problem = case.problem
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v, gate = (
            bhsd(x, problem.queries.layout)[b, h].to(wide, copy=True)
            for x in (inputs.q, inputs.k, inputs.v, inputs.gate)
        )
        weights: dict[str, Tensor | float] = {"tensor": gate, "one": 1.0, "off": 0.0}
        tokens = block_tokens(problem.queries, None, q.device)
        return cls(q, k, v, weights[case.gate], tokens, attended, same_sample, problem.softmax_scale, dtype)

    @property
    def num_blocks(self) -> int:
        return self.tokens.shape[0]

    def chunks(self, blocks: Tensor) -> Iterator[Tensor]:
        """Some of these query blocks at a time, which attend equally many key blocks: so their keys are a tensor."""
        block = self.tokens.shape[1]
        widths = self.attended[blocks].sum(1)
        for width in widths.unique().tolist():
            per_block = max(1, width) * block * max(block, self.q.shape[1])
            yield from blocks[widths == width].split(max(1, CHUNK_ELEMENTS // per_block))

    def means(self, x: Tensor) -> Tensor:
        """Means of the valid tokens of each block, [n, D]."""
        valid = (self.tokens >= 0)[..., None]
        return (x[self.tokens.clamp(min=0)] * valid).sum(1) / valid.sum(1)

    def coarse_scores(self, blocks: Tensor) -> Tensor:
        return self.means(self.q)[blocks] @ self.means(self.k).mT * self.scale

    def attend(self, blocks: Tensor) -> Tensor:
        """The output of query blocks of a chunk, [c, block, D]; rows without a token mean nothing."""
        rows = self.tokens[blocks].clamp(min=0)
        keys = torch.stack([self.tokens[attended].flatten() for attended in self.attended[blocks]])
        q, k, v = (x[i.clamp(min=0)].to(self.dtype) for x, i in ((self.q, rows), (self.k, keys), (self.v, keys)))
        scores = (q @ k.mT * self.scale).masked_fill(keys[:, None, :] < 0, -math.inf)
        out = scores.softmax(-1) @ v
        if isinstance(self.gate, float) and self.gate == 0.0:
            return out
        coarse_scores = self.coarse_scores(blocks).masked_fill(~self.same_sample[blocks], -math.inf)
        out_c = (coarse_scores.softmax(-1) @ self.means(self.v)).to(self.dtype)[:, None, :]
        weight = self.gate[rows].to(self.dtype) if isinstance(self.gate, Tensor) else self.gate
        return out + weight * out_c

    def gradients(self, dout: Tensor) -> tuple[Tensor, ...]:
        """Gradients in q, k, v and, where it is a tensor, the gate, each rounded to ``dtype`` once."""
        leaves = [x.requires_grad_() for x in (self.q, self.k, self.v, self.gate) if isinstance(x, Tensor)]
        totals = [torch.zeros_like(x) for x in leaves]
        for part in self.chunks(torch.arange(self.num_blocks, device=dout.device)):
            rows = self.tokens[part]
            dout_rows = dout[rows.clamp(min=0)].masked_fill((rows < 0)[..., None], 0.0).to(self.dtype)
            for total, grad in zip(totals, torch.autograd.grad(self.attend(part), leaves, dout_rows), strict=True):
                total += grad
        return tuple(total.to(self.dtype) for total in totals)


class _Comparison:
    """Gathers squared norms of each tensor's error, plain PyTorch's error and the reference."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._floor = FLOOR[dtype]
        self._squares: dict[str, Tensor] = {}
        self._errors: dict[str, tuple[float, float]] = {}

    def add(self, name: str, actual: Tensor, reference: Tensor, plain: Tensor) -> None:
        squares = torch.stack(
            [(x.double() ** 2).sum() for x in (actual.double() - reference, plain.double() - reference, reference)]
        )
        self._squares[name] = self._squares.get(name, torch.zeros_like(squares)) + squares

    def add_selection(self, head: _Head, blocks: Tensor, rule: _Rule) -> None:
        """Each query block attends what it must, as many others, and none left out has a clearly higher score."""
        scores, kept, candidates = head.coarse_scores(blocks), head.attended[blocks], rule.candidates[blocks]
        chosen = kept & candidates
        lowest = scores.masked_fill(~chosen, math.inf).amin(1)
        highest = scores.masked_fill(kept | ~candidates, -math.inf).amax(1)
        missed = (highest - lowest).clamp(min=0.0).max() / scores.abs().max()
        has_required = ((kept & ~candidates) == rule.required[blocks]).all()
        complete = has_required & (chosen.sum(1) == rule.count[blocks]).all()
        error = torch.where(complete, missed, math.inf).item()
        previous, bound = self._errors.get("selection", (0.0, SCORE_TOLERANCE))
        self._errors["selection"] = (max(previous, error), bound)

    def checked(self) -> Checked:
        errors = dict(self._errors)
        for name, squares in self._squares.items():
            error, plain, reference = squares.sqrt().tolist()
            norm = max(reference, torch.finfo(torch.float64).tiny)
            errors[name] = (error / norm, 2.0 * plain / norm + self._floor)
        return Checked(errors)

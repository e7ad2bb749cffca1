"""The selected key blocks of a few query blocks at a time, gathered, and the arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa_jit.problem import Problem

# Elements of one gathered chunk of keys, and of one chunk of scores.
CHUNK_ELEMENTS = 1 << 20
# Devices that compute in fp64.
_FP64_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Chunk:
    """Some query blocks of one head, the keys that they selected and their scores."""

    b: int
    h: int
    h_kv: int
    rows: slice
    q: Tensor  # [c, block, D]
    k: Tensor  # [c, m·block, D]
    v: Tensor  # [c, m·block, D]
    kv_tokens: Tensor  # [c, m·block]
    scores: Tensor  # [c, block, m·block], scaled, -inf where the key is not valid
    poisoned: Tensor  # [c, 1, 1]: the map names a block that does not exist


def chunks(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    q_tokens: Tensor,
    kv_tokens: Tensor,
) -> Iterator[Chunk]:
    num_blocks = problem.keys.num_blocks
    for b in range(problem.batch):
        for h in range(problem.queries.heads):
            h_kv = h // problem.group
            for rows, width in _row_slices(problem, q2k_idx.shape[-1], q2k_num[b, h]):
                named, used = _entries(problem, q2k_idx[b, h, rows], q2k_num[b, h, rows], width)
                exists = (named >= 0) & (named < num_blocks)
                tokens = kv_tokens[named.clamp(0, num_blocks - 1)]
                tokens = torch.where((used & exists)[..., None], tokens, -1).flatten(1)
                q_rows = take(q[b, h], q_tokens[rows])
                k_rows = take(k[b, h_kv], tokens)
                v_rows = take(v[b, h_kv], tokens)
                scores = product(q_rows, k_rows.mT).mul_(problem.softmax_scale)
                scores.masked_fill_((tokens < 0)[:, None, :], float("-inf"))
                poisoned = (used & ~exists).any(-1)[:, None, None]
                yield Chunk(b, h, h_kv, rows, q_rows, k_rows, v_rows, tokens, scores, poisoned)


def _row_slices(problem: Problem, width: int, q2k_num: Tensor) -> Iterator[tuple[slice, int]]:
    """Query blocks of one head that are taken at a time, and the most entries that one of them has."""
    per_entry = problem.block * max(problem.head_dim, problem.block)
    if problem.keys.segments is not None:
        widths = [problem.keys.num_blocks] * len(q2k_num)
        if q2k_num.device.type == "cpu":
            widths = _counts(problem, q2k_num, width).tolist()
    elif q2k_num.device.type == "cpu":
        widths = [min(width, max(int(q2k_num.max()), 0))] * len(q2k_num)
    else:
        widths = [width] * len(q2k_num)
    start = 0
    while start < len(widths):
        stop, widest = start, 0
        while stop < len(widths):
            wider = max(widest, widths[stop], 1)
            if stop > start and (stop + 1 - start) * wider * per_entry > CHUNK_ELEMENTS:
                break
            stop, widest = stop + 1, wider
        yield slice(start, stop), widest
        start = stop


def _counts(problem: Problem, q2k_num: Tensor, width: int) -> Tensor:
    """How many key blocks rows name: of a run at most one more than there are, which names one that is none."""
    return torch.where(q2k_num < 0, -q2k_num.clamp(min=-problem.keys.num_blocks - 1), q2k_num.clamp(max=width))


def _entries(problem: Problem, q2k_idx: Tensor, q2k_num: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The key blocks that some rows name, int64 [c, width], and which of the entries count."""
    slot = torch.arange(width, device=q2k_idx.device)
    if problem.keys.segments is None:
        return q2k_idx[:, :width].long(), slot < q2k_num[:, None]
    in_table = q2k_idx.shape[1]
    listed = q2k_idx[:, slot.clamp(max=in_table - 1)].long()
    is_run = (q2k_num < 0)[:, None]
    length = _counts(problem, q2k_num, in_table)
    return torch.where(is_run, q2k_idx[:, :1].long() + slot, listed), slot < length[:, None]


def softmax_and_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the last dimension, and the log-sum-exp."""
    lse = scores.logsumexp(-1, keepdim=True)
    # A row without keys has -inf everywhere: its probabilities are 0, not NaN.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)), lse


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a · b of fp32 tensors in fp64, so that it has the same bits whatever PyTorch is allowed."""
    return _in_fp64(a, b) if a.device.type in _FP64_DEVICES else a @ b


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in fp32. PyTorch may be allowed TF32 or bf16 inside of such products, and that by settings of the whole
    process, which are not ours to change: then in fp64."""
    if a.device.type not in _FP64_DEVICES:
        return a @ b
    settings = torch.backends.cuda if a.is_cuda else torch.backends.mkldnn
    return a @ b if settings.matmul.fp32_precision in ("none", "ieee") else _in_fp64(a, b)


def _in_fp64(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()


def take(x: Tensor, tokens: Tensor, fill: float = 0.0) -> Tensor:
    """Rows of ``x`` [S, C] by token, in fp32; ``fill`` where the token is -1."""
    rows = x[tokens.clamp(min=0)].float()
    return rows.masked_fill((tokens < 0)[..., None], fill)


def put(x: Tensor, tokens: Tensor, rows: Tensor, fill: float = 0.0) -> None:
    """Writes rows [n, block, C] to their tokens in ``x`` [S, C]; a token of ``x`` that no slot holds gets ``fill``."""
    # One spare row takes what belongs to no token.
    spare = x.shape[0]
    target = rows.new_full((spare + 1, x.shape[1]), fill)
    target[torch.where(tokens >= 0, tokens, spare)] = rows.float()
    x.copy_(target[:spare])

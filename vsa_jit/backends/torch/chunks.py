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
    width = q2k_idx.shape[-1]
    if q2k_num.device.type == "cpu":
        width = min(width, max(int(q2k_num.max()), 0))
    per_block = max(width, 1) * problem.block * max(problem.head_dim, problem.block)
    step = max(1, CHUNK_ELEMENTS // per_block)
    slot = torch.arange(width, device=q.device)
    for b in range(problem.batch):
        for h in range(problem.queries.heads):
            h_kv = h // problem.group
            for start in range(0, problem.queries.num_blocks, step):
                rows = slice(start, min(start + step, problem.queries.num_blocks))
                named = q2k_idx[b, h, rows, :width].long()
                used = slot < q2k_num[b, h, rows, None]
                exists = (named >= 0) & (named < problem.keys.num_blocks)
                tokens = kv_tokens[named.clamp(0, problem.keys.num_blocks - 1)]
                tokens = torch.where((used & exists)[..., None], tokens, -1).flatten(1)
                q_rows = take(q[b, h], q_tokens[rows])
                k_rows = take(k[b, h_kv], tokens)
                v_rows = take(v[b, h_kv], tokens)
                scores = product(q_rows, k_rows.mT).mul_(problem.softmax_scale)
                scores.masked_fill_((tokens < 0)[:, None, :], float("-inf"))
                poisoned = (used & ~exists).any(-1)[:, None, None]
                yield Chunk(b, h, h_kv, rows, q_rows, k_rows, v_rows, tokens, scores, poisoned)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
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

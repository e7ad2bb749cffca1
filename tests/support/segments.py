"""Sequences of several segments computed densely, token by token, and random lists of segments.

Nothing here uses the package: every token gets its sample, its block and whether it is context from the list alone, and
all else are masks over these.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from support import reference as ref

# Selections that fp32 could see otherwise than fp64 are not drawn: two scores are at least so far apart.
SMALLEST_GAP = 2e-6


def samples_of(segments) -> list[list]:
    """The list of each sample, whether the segments are packed or those of one sample."""
    return list(segments) if all(isinstance(entry, list) for entry in segments) and segments else [segments]


def length_of(segment) -> int:
    return math.prod(segment) if isinstance(segment, tuple) else segment


class Tokens:
    """Sample, block and kind of each token, and sample and kind of each block."""

    def __init__(self, segments, tile: tuple[int, int, int]):
        self.samples = samples_of(segments)
        block, sample, is_context, num_blocks = [], [], [], 0
        for number, of_sample in enumerate(self.samples):
            for segment in of_sample:
                length = length_of(segment)
                if length == 0:
                    continue
                grid = segment if isinstance(segment, tuple) else None
                blocks = ref.block_of_tokens(length, tile, grid) + num_blocks
                num_blocks = int(blocks.max()) + 1
                block.append(blocks)
                sample += [number] * length
                is_context += [grid is None] * length
        self.block = torch.cat(block)
        self.sample = torch.tensor(sample)
        self.is_context = torch.tensor(is_context)
        self.length, self.num_blocks = len(self.block), num_blocks
        self.sample_of_block = torch.zeros(num_blocks, dtype=torch.long).index_put((self.block,), self.sample)
        self.block_is_context = torch.zeros(num_blocks, dtype=torch.bool).index_put((self.block,), self.is_context)

    @property
    def num_video_blocks(self) -> list[int]:
        """Of each sample."""
        return [int(self.video_of(number).sum()) for number in range(len(self.samples))]

    def video_of(self, sample: int) -> Tensor:
        """Which blocks are of a video of this sample."""
        return (self.sample_of_block == sample) & ~self.block_is_context

    def topk_of(self, topk, sparsity=None) -> list[int]:
        """Blocks to select in each sample, of its video: from one number for all, or from a list."""
        if sparsity is not None:
            shares = sparsity if isinstance(sparsity, list) else [sparsity] * len(self.samples)
            counts = [
                max(1, math.ceil((1 - Fraction(str(share))) * count))
                for share, count in zip(shares, self.num_video_blocks, strict=True)
            ]
        else:
            counts = topk if isinstance(topk, list) else [topk] * len(self.samples)
        return [min(count, most) for count, most in zip(counts, self.num_video_blocks, strict=True)]

    def block_map(self, scores: Tensor, topk: list[int], context: str) -> tuple[Tensor, float]:
        """Which block attends which, bool [B, H, n, n], and how close the closest decision between two scores was."""
        block_map = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        gap = math.inf
        for number, count in enumerate(topk):
            member = self.sample_of_block == number
            video, text = member & ~self.block_is_context, member & self.block_is_context
            block_map |= pairs(text, member).to(scores.device)
            if not video.any():
                continue
            candidates, chosen = (video, count) if context == "attend" else (member, count + int(text.sum()))
            rows = ref.select(scores, chosen, candidates)
            if context == "attend":
                rows = rows | text.to(scores.device)
            block_map |= rows & pairs(video, member).to(scores.device)
            if chosen < candidates.sum():
                order = scores[:, :, video.to(scores.device)][..., candidates.to(scores.device)].sort(-1).values
                gap = min(gap, (order[..., -chosen] - order[..., -chosen - 1]).min().item())
        return block_map, gap

    def mask(self, block_map: Tensor) -> Tensor:
        """Which key each query attends, bool [B, H, S, S]."""
        block = self.block.to(block_map.device)
        return block_map[:, :, block][..., block]

    def dense(self, tensors: dict[str, Tensor], weight, block_map: Tensor, scale: float) -> Tensor:
        """The output of ``video_sparse_attn`` with this map in the dtype of q, k, v, all [B, H, S, D]."""
        q, k, v = (tensors[name] for name in "qkv")
        out, _ = ref.attention(q, k, v, self.mask(block_map), scale)
        q_c, k_c, v_c = self.means(q, k, v)
        same_sample = self.sample_of_block[:, None] == self.sample_of_block
        seen = same_sample.to(q.device).expand(*q_c.shape[:3], -1)
        out_c, _ = ref.attention(q_c, k_c, v_c, seen, scale)
        return out + weight * out_c[:, :, self.block.to(q.device)]

    def means(self, *tensors: Tensor) -> list[Tensor]:
        everything = torch.ones(self.length, dtype=torch.bool)
        return [ref.block_means(x, self.block, everything) for x in tensors]

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Of the means in fp64, [B, H, n, n]."""
        q_c, k_c = self.means(q.detach().double(), k.detach().double())
        return q_c @ k_c.repeat_interleave(q_c.shape[1] // k_c.shape[1], 1).mT * scale


def pairs(queries: Tensor, keys: Tensor) -> Tensor:
    return queries[:, None] & keys


def random_segments(rng: random.Random, least: int = 70, most: int = 360):
    """Segments of one sample or of several, ``least`` … ``most`` tokens in all.

    Not fewer, since the error of a result that is almost nothing is compared with almost nothing.
    """
    while True:
        if rng.random() < 0.5:
            segments = random_sample(rng)
        else:
            segments = [random_sample(rng) for _ in range(rng.randint(1, 4))]
        if least <= sum(length_of(segment) for sample in samples_of(segments) for segment in sample) <= most:
            return segments


def random_sample(rng: random.Random) -> list:
    kind = rng.choice(["any", "any", "any", "context first", "video alone", "no video", "one token", "nothing"])
    if kind == "context first":
        return [random_length(rng), random_grid(rng)]
    if kind == "video alone":
        return [random_grid(rng) for _ in range(rng.randint(1, 2))]
    if kind == "no video":
        return [random_length(rng) for _ in range(rng.randint(1, 3))]
    if kind == "one token":
        return [rng.choice([1, (1, 1, 1)])]
    if kind == "nothing":
        return [rng.choice([0, (0, 3, 2)])]
    return [rng.choice([random_length, random_grid])(rng) for _ in range(rng.randint(1, 5))]


def random_length(rng: random.Random) -> int:
    return rng.choice([0, 1, 63, 64, 65, 128, 129, rng.randint(1, 200), rng.randint(1, 40)])


def random_grid(rng: random.Random) -> tuple[int, int, int]:
    if rng.random() < 0.1:
        return rng.choice([(0, 5, 6), (3, 0, 7), (2, 4, 0)])
    return rng.choice(
        [
            (rng.randint(1, 6), rng.randint(1, 9), rng.randint(1, 9)),
            (rng.randint(1, 3), rng.randint(1, 12), rng.randint(1, 12)),
            (1, 1, rng.randint(1, 150)),
            (rng.randint(1, 100), 1, 2),
            (4, 4, 4 * rng.randint(1, 3)),
        ]
    )


@dataclass(frozen=True)
class Setting:
    """What a call has beside its segments."""

    name: str
    block_size: int | tuple[int, int, int] = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int = 32
    layout: str = "bhsd"
    gate: str | float | None = None
    context: str = "attend"
    fused_qkv: bool = False
    softmax_scale: float | None = None

    @property
    def tile(self) -> tuple[int, int, int]:
        of_tokens = {64: (4, 4, 4), 128: (2, 8, 8), 256: (4, 8, 8)}
        return of_tokens[self.block_size] if isinstance(self.block_size, int) else self.block_size


class Inputs:
    """Tensors of a setting for a list of segments, and the results that they should give."""

    def __init__(self, setting: Setting, segments, device: str, dtype: torch.dtype, topk=2, sparsity=None):
        self.setting, self.segments, self.device, self.dtype = setting, segments, device, dtype
        self.topk, self.sparsity = topk, sparsity
        self.tokens = Tokens(segments, setting.tile)
        self.scale = setting.head_dim**-0.5 if setting.softmax_scale is None else setting.softmax_scale
        counts = self.tokens.topk_of(topk, sparsity)
        gap = 0.0
        while gap < SMALLEST_GAP * self.scale:
            self._draw()
            scores = self.tokens.scores(self.bhsd(self.q), self.bhsd(self.k), self.scale)
            self.block_map, gap = self.tokens.block_map(scores, counts, setting.context)

    def _draw(self) -> None:
        setting = self.setting
        shape = (setting.batch, setting.heads, self.tokens.length, setting.head_dim)
        kv_shape = (setting.batch, setting.kv_heads or setting.heads, *shape[2:])
        self.q, self.k, self.v = self._tensor(shape), self._tensor(kv_shape), self._tensor(kv_shape)
        if setting.fused_qkv:
            qkv = torch.stack([x.detach() for x in (self.q, self.k, self.v)], dim=-2)
            self.q, self.k, self.v = (x.requires_grad_() for x in qkv.unbind(-2))
            assert not self.q.is_contiguous()
        self.gate = setting.gate
        if setting.gate == "full":
            self.gate = self._tensor(shape)
        elif setting.gate == "per channel":
            self.gate = self._tensor((1, setting.heads, 1, setting.head_dim))
        self.dout = self._tensor(shape).detach()

    def _tensor(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape)
        x = x.transpose(1, 2).contiguous() if self.setting.layout == "bshd" else x
        return x.to(self.device, self.dtype).requires_grad_()

    def bhsd(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.setting.layout == "bshd" else x

    @property
    def leaves(self) -> dict[str, Tensor]:
        gate = {"gate": self.gate} if isinstance(self.gate, Tensor) else {}
        return {"q": self.q, "k": self.k, "v": self.v, **gate}

    @property
    def order(self) -> dict:
        """The arguments that say where the tokens are."""
        setting = self.setting
        return {
            "segments": self.segments,
            "block_size": setting.block_size,
            "layout": setting.layout,
            "softmax_scale": setting.softmax_scale,
        }

    @property
    def arguments(self) -> dict:
        """Those of ``video_sparse_attn`` beside q, k, v and the backend."""
        return {
            "topk": None if self.sparsity is not None else self.topk,
            "sparsity": self.sparsity,
            "compress_attn_weight": self.gate,
            "context": self.setting.context,
            **self.order,
        }

    def dense(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients in a dtype, [B, H, S, D], with the selection of fp64."""
        tensors = {name: self.bhsd(x).detach().to(dtype).requires_grad_() for name, x in self.leaves.items()}
        weight = tensors.get("gate", 1.0 if self.gate is None else self.gate)
        out = self.tokens.dense(tensors, weight, self.block_map, self.scale)
        out.backward(self.bhsd(self.dout).to(dtype))
        return {"out": out, **{f"d{name}": x.grad for name, x in tensors.items()}}

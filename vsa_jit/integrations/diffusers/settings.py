"""What ``enable_vsa`` was told about one transformer."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsa_jit
from vsa_jit.problem import BackendName


class Settings(NamedTuple):
    """The arguments of ``enable_vsa``, checked; ``dense_layers`` counts from the front, ``tile`` is the block.

    ``pipeline`` is only kept where it is asked for its step, and not owned: it owns the transformer.
    """

    topk: int | None
    sparsity: float | None
    tile: tuple[int, int, int]
    selection_dtype: torch.dtype | None
    dense_layers: frozenset[int]
    dense_steps: int
    pipeline: weakref.ref[Any] | None
    backend: BackendName

    @classmethod
    def all_dense(cls, tile: tuple[int, int, int], layers: int) -> Settings:
        """Of a model that attends all keys in all layers."""
        return cls(1, None, tile, None, frozenset(range(layers)), 0, None, "auto")

    @property
    def is_dense_step(self) -> bool:
        """Whether the step of denoising under way attends all keys."""
        pipeline = None if self.pipeline is None else self.pipeline()
        # None before the first step has ended.
        return pipeline is not None and (pipeline.scheduler.step_index or 0) < self.dense_steps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, grid: tuple[int, int, int]) -> Tensor:
        """Video Sparse Attention of [B, T·H·W, heads, D]; without a gate the coarse output is dropped."""
        return vsa_jit.video_sparse_attn(
            q,
            k,
            v,
            topk=self.topk,
            sparsity=self.sparsity,
            block_size=self.tile,
            compress_attn_weight=0.0 if gate is None else gate,
            grid=grid,
            layout="bshd",
            selection_dtype=self.selection_dtype,
            backend=self.backend,
        )

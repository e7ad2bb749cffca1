"""What ``enable_vsa`` was told about one transformer."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vsa_jit
from vsa_jit.problem import BackendName, SegmentList


class Settings(NamedTuple):
    """The arguments of ``enable_vsa``, checked; ``dense_layers`` counts from the front, ``tile`` is the block."""

    topk: int | None
    sparsity: float | None
    tile: tuple[int, int, int]
    selection_dtype: torch.dtype | None
    dense_layers: frozenset[int]
    dense_steps: DenseSteps | None
    backend: BackendName

    @classmethod
    def all_dense(cls, tile: tuple[int, int, int], layers: int) -> Settings:
        """Of a model that attends all keys in all layers."""
        return cls(1, None, tile, None, frozenset(range(layers)), None, "auto")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        gate: Tensor | None = None,
        grid: tuple[int, int, int] | None = None,
        segments: SegmentList | None = None,
    ) -> Tensor:
        """Video Sparse Attention of [B, S, heads, D], a video or segments; without a gate no coarse output."""
        return vsa_jit.video_sparse_attn(
            q,
            k,
            v,
            topk=self.topk,
            sparsity=self.sparsity,
            block_size=self.tile,
            compress_attn_weight=0.0 if gate is None else gate,
            grid=grid,
            segments=segments,
            layout="bshd",
            selection_dtype=self.selection_dtype,
            backend=self.backend,
        )


class DenseSteps:
    """The first steps of each run of a pipeline, as its scheduler counts them."""

    def __init__(self, count: int, pipeline: Any) -> None:
        self.count = count
        # The pipeline owns the transformer, and is not owned. Its scheduler may be replaced while it lives, and serves
        # another pipeline after it.
        self._pipeline = weakref.ref(pipeline)
        self._scheduler = pipeline.scheduler

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_scheduler": self._find_scheduler()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pipeline=lambda: None)

    def is_under_way(self) -> bool:
        """Whether the step that the pipeline is at is one of them.

        Raises:
            RuntimeError: the pipeline has not begun to denoise, or the whole model is compiled.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "dense_steps: expected compile_repeated_blocks, got a model that is compiled as a whole: it would be "
                "compiled again at every step"
            )
        scheduler = self._find_scheduler()
        if getattr(scheduler, "num_inference_steps", None) is None:
            raise RuntimeError(
                "dense_steps: expected a step of the pipeline that enable_vsa was given, got a call of its transformer "
                "before its scheduler had timesteps"
            )
        # None until the first step has ended.
        index, begin = scheduler.step_index, getattr(scheduler, "begin_index", None) or 0
        return index is None or index - begin < self.count

    def _find_scheduler(self) -> Any:
        pipeline = self._pipeline()
        if pipeline is not None:
            self._scheduler = pipeline.scheduler
        return self._scheduler

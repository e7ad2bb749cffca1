"""What a backend is: the facts by which one is chosen for a call, and the functions that run operators.

A backend is a package with two rooms of the same names: ``support``, whose ``SPEC`` is imported wherever a backend is
chosen, on machines without what the backend needs too, and ``launches``, which has the functions of ``Backend`` that it
runs and is imported when a call first runs on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vsa_jit.problem import Coarse, Gradients, MeanGradients, Operands, Problem, Side

# What a call is made of, by its part; the steps that are public by themselves, with their gradients; and forward mode.
STAGES = {
    "pooling": ("block_means",),
    "selection": ("coarse_attend", "coarse_attend_backward"),
    "attention": ("attend",),
    "backward": ("attend_backward",),
    "single steps": ("select", "map_to_indices", "block_mean_backward"),
}
TANGENTS = ("coarse_attend_tangent", "attend_tangent")
OPERATORS = (*itertools.chain(*STAGES.values()), *TANGENTS)


@dataclass(frozen=True)
class BackendSpec:
    """What is known of a backend before anything of it runs.

    Attributes:
        is_native_on: whether it was made for a device; on another it runs only when asked for by name.
        why_not_on: why it runs nothing on a device, or None.
        why_not: why it cannot run a call on a device where it runs others, or None; the tensors are those of q, k and v
            that are at hand, in the call's layout: none where a whole kind of call is asked about.
        engine_of: what compiles its kernels for a call that it can run, or has compiled those that are loaded; None
            where nothing has to be made ready. A ``JitError`` or ``OSError`` that it raises is why the backend cannot
            run the call; a ``SettingError`` reaches the user.
        runners: the backend that runs each operator of a call for which this one was chosen. An operator that is not
            here cannot run.
        runners_of: the same for a call; None where it is the same for all.
        prepare: makes all kernels that a call may launch ready, compiled by the engine of that name; it is called once
            for each kind of call, and not where ``engine_of`` gave None. Where it raises a ``JitError``, the next
            backend runs this and all later calls of that dtype and head dimension, unless this one was asked for by
            name; a ``NotWarmError`` reaches the user. None where there is nothing to make ready.
    """

    name: str
    is_native_on: Callable[[torch.device], bool]
    why_not_on: Callable[[torch.device], str | None]
    why_not: Callable[[Problem, torch.dtype, Sequence[Tensor]], str | None]
    engine_of: Callable[[Problem, torch.device, torch.dtype], str | None]
    runners: Mapping[str, str]
    prepare: Callable[[Problem, torch.device, torch.dtype, str], None] | None = None
    runners_of: Callable[[Problem], Mapping[str, str]] | None = None


class Whole(Protocol):
    """Calls of ``video_sparse_attn`` that differ in their tensors alone."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """``(out, out_s, memory)``: the output; before the coarse one was added, where the backward needs that; all
        else that it needs."""
        ...

    def backward(
        self, tensors: Sequence[Any], out: Tensor, memory: Tensor, dout: Tensor, need_dq: bool, need_dkv: bool
    ) -> Gradients:
        """Gradients in q, k, v and the gate.

        Args:
            tensors: those of the forward; ``out``: ``out_s``, or else ``out``.
        """
        ...

    def can_read(self, *tensors: Tensor) -> bool:
        """Whether tensors like those of the forward, and the memory, lie where kernels can read them."""
        ...

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        """Views of what is in the memory: lse, q2k_idx, q2k_num, out_c, q_c, k_c and v_c; None for what is not."""
        ...


class Backend(Protocol):
    """The functions of a backend's ``launches``; it has those of the operators that it runs.

    Sizes are B (batch), H and H_kv (heads of queries and of keys), S_q and S_k (tokens), n_q and n_k (blocks), D (head
    dimension). q, k, v and tensors like them are in the layout of their ``Side``, bf16, fp16 or fp32, with a contiguous
    last dimension and other dimensions of any stride. ``q_sizes`` and ``kv_sizes`` are int32 or int64 [n_q] and [n_k],
    contiguous: the valid tokens of each block, which are clamped to 0 … block; None where all are valid. ``q2k_idx``
    and ``q2k_num`` are int32 of any strides; entries past the number are ignored, and a query block that names a key
    block outside 0 … n_k - 1 gets NaN. Where the tokens are segments, a number -c stands for c consecutive key blocks,
    of which the first is named; else it counts as 0. A gate is of any floating dtype.

    Batches are not empty. Functions return new tensors, contiguous or in the memory order of the tensor that they are
    like, and launch on PyTorch's current stream of the tensors' device, which need not be the current device; they
    never wait for it.
    """

    def block_means(
        self, problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Means of the valid tokens of each block, for the operator of that name.

        Args:
            v: None where its means are not needed.

        Returns:
            ``(q_c, k_c, v_c)``: fp32 [B, H, n_q, D] and [B, H_kv, n_k, D], 0 for an empty block; v_c None without v.
        """
        ...

    def block_mean_backward(self, side: Side, dmean: Tensor, x: Tensor, sizes: Tensor | None) -> Tensor:
        """Gradient of block means in what they are the means of, for the operator of that name.

        Args:
            side: of ``x``.
            dmean: fp32 [B, heads, blocks, D], of any strides.

        Returns:
            Like x: the share of each valid token in its block's gradient, 0 for the others.
        """
        ...

    def coarse_attend(
        self,
        coarse: Coarse,
        q_c: Tensor,
        k_c: Tensor,
        v_c: Tensor | None,
        kv_sizes: Tensor | None,
        topk: Sequence[int],
        compete: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The selection by block means and the attention among them, for the operator of that name, which says what
        they are.

        Args:
            q_c: fp32 [B, H, n_q, D], contiguous.
            k_c, v_c: fp32 [B, H_kv, n_k, D], contiguous; v_c None where there is no coarse output.
            topk: may be larger than n_k.

        Returns:
            ``(out_c, q2k_idx, q2k_num)``: fp32 [B, H, n_q, D], or None without v_c; int32 [B, H, n_q, m] and
            [B, H, n_q].
        """
        ...

    def coarse_attend_backward(
        self,
        coarse: Coarse,
        q_c: Tensor,
        k_c: Tensor,
        v_c: Tensor,
        kv_sizes: Tensor | None,
        dout_c: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the output of ``coarse_attend`` in q_c, k_c and v_c, contiguous."""
        ...

    def coarse_attend_tangent(
        self,
        coarse: Coarse,
        q_c: Tensor,
        k_c: Tensor,
        v_c: Tensor,
        q_c_t: Tensor,
        k_c_t: Tensor,
        v_c_t: Tensor,
        kv_sizes: Tensor | None,
    ) -> Tensor:
        """The tangent of the output of ``coarse_attend`` along those of q_c, k_c and v_c."""
        ...

    def select(self, scores: Tensor, kv_sizes: Tensor | None, topk: int) -> tuple[Tensor, Tensor]:
        """The key blocks of highest score, for the operator ``select_blocks``.

        Args:
            scores: fp32 [R, M, n_k], contiguous. Ties go to the lower block, and 0 equals -0.
            topk: 1 … n_k; a block without valid tokens is never selected.

        Returns:
            ``(q2k_idx, q2k_num)``: int32 [R, M, topk], ascending, 0 past the number selected; int32 [R, M], that
            number.
        """
        ...

    def select_in_samples(self, scores: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The same where the blocks are those of segments.

        Args:
            scores: fp32 [R, M, n] for a multiple M of n: block i in all rows m with m % n == i.
            rows: int32 [n, 4], of ``selection_rows``; ``width``: of ``selection_width``.

        Returns:
            ``(q2k_idx, q2k_num)``: int32 [R, M, width] and [R, M]. A block that attends all of its sample has the first
            of its blocks as its first entry, and less than 0 for a number.
        """
        ...

    def map_to_indices(self, block_map: Tensor) -> tuple[Tensor, Tensor]:
        """The set columns of each row of a bool map [B, H, n_q, n_k] of any strides, for the operator of that name.

        Returns:
            ``(q2k_idx, q2k_num)``: int32 [B, H, n_q, n_k], ascending, 0 past the number set; int32 [B, H, n_q], that
            number.
        """
        ...

    def attend(self, problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The fine branch and the coarse output added to it, for the operator of that name, which says what it is of.

        Args:
            operands: its gate is of q's shape and any strides, or None where the number ``gate_value`` counts.

        Returns:
            ``(out, lse, out_s)``: like q; fp32 [B, H, S_q]; like q, the output before the coarse one was added, or None
            where it is not kept.
        """
        ...

    def attend_backward(
        self,
        problem: Problem,
        operands: Operands,
        out_s: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        need_dq: bool,
        need_dkv: bool,
        is_combined: bool = False,
        mean_gradients: MeanGradients | None = None,
    ) -> Gradients:
        """Gradients of ``attend``, for the operator of that name.

        Args:
            out_s, lse: results of ``attend``.
            dout: like q, of any strides.
            dlse: fp32 [B, H, S_q], of any strides, or None for 0.
            is_combined: ``out_s`` is the output with the coarse one added, whose weight is the number ``gate_value``.
            mean_gradients: gives fp32 [B, H, n_q, D] for q and [B, H_kv, n_k, D] for k and v, contiguous. They are
                spread to dq, dk and dv as by ``block_mean_backward``, before these are rounded, and to queries without
                any key, too. It is called once, when the gradient of the coarse output is computed. None: nothing is
                added.

        Returns:
            dq, dk and dv like q, k and v where they are needed; where there is a coarse output, also its gradient and
            that of the gate, each of its tensor's shape, contiguous.
        """
        ...

    def attend_tangent(
        self,
        problem: Problem,
        operands: Operands,
        q_t: Tensor,
        k_t: Tensor,
        v_t: Tensor,
        out_c_t: Tensor | None,
        gate_t: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Tangents of ``attend``'s out and lse along those of q, k, v, the coarse output and the gate, each of its
        tensor's shape; for the operator of that name."""
        ...

    @property
    def whole(self) -> Callable[..., Whole | None] | None:
        """Past PyTorch's dispatcher, the launches of ``video_sparse_attn`` one after the other without a tensor for
        each result; None where the operator's body does. A name of the module ``launches``.

        Args:
            problem, topk, compete, selection_dtype, gate_value: of the call.
            has_gate: whether the gate is a tensor.
            is_recorded: whether a backward follows.
            device: its index.
        """
        ...

    @property
    def transpose_index(self) -> Callable[[Problem, Operands], object] | None:
        """The query blocks of each key block, which ``attend_backward`` makes for dk and dv, in a form of the backend's
        own; None where it needs no such thing. A name of the module ``launches`` like the functions above. The
        benchmark times it by itself."""
        ...

    @property
    def takes_one_pass(self) -> Callable[[Problem], bool] | None:
        """Of a backend with ``transpose_index``, whether ``attend_backward`` computes all three gradients in one pass
        over the keys where they are all needed, for the benchmark; None: it never does. A name of the same module."""
        ...

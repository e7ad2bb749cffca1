"""The whole operator past PyTorch's dispatcher: the same launches, but what they leave to each other are no tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90 import coarse as coarse_launches
from vsa_jit.backends.sm90.backward import attend_backward
from vsa_jit.backends.sm90.forward import launch_attend, launch_block_means, means_shapes
from vsa_jit.backends.sm90.memory import WORD_BYTES, Part, Parts
from vsa_jit.backends.sm90.structs import MAX_COARSE_COLS
from vsa_jit.backends.sm90.tma import ALIGNMENT_BYTES
from vsa_jit.jit import driver
from vsa_jit.problem import Coarse, Gradients, Operands, Problem, keeps_out_s


class Kept(NamedTuple):
    """What the forward leaves to the backward besides its output; block means without a backward are not kept."""

    lse: Part
    q2k_idx: Part
    q2k_num: Part
    out_c: Part | None = None
    q_c: Part | None = None
    k_c: Part | None = None
    v_c: Part | None = None


class Whole(NamedTuple):
    """What calls have in common that differ in their tensors alone.

    Attributes:
        scratch: of scores, and before them of the block means that are not kept.
        kept: of ``Kept``, behind two counters: of the block means, and of the work tiles.
        gradients: of those in block means.
    """

    problem: Problem
    coarse: Coarse
    topk: tuple[int, ...]
    compete: bool
    gate_value: float
    with_out_s: bool
    scratch: Parts
    kept: Parts
    gradients: Parts

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output, that before the coarse one was added where the backward needs it, and the memory of ``kept``."""
        memory = q.new_empty(self.kept.num_bytes, dtype=torch.uint8)
        scratch = q.new_empty(self.scratch.num_bytes, dtype=torch.uint8)
        counters, kept = self._kept_at(memory.data_ptr())
        *others, scores = self.scratch.at(scratch.data_ptr())
        q_c, k_c, v_c = kept[-3:] if kept.q_c is not None else (*others, None)[:3]
        of_means, of_work_tiles = counters.address, counters.address + WORD_BYTES
        driver.fill(q.get_device(), counters.address, 0, words=2)
        means = q_c, k_c, v_c
        arrivals = launch_block_means(
            self.problem, (q, k, None if v_c is None else v), q_sizes, kv_sizes, means, of_means
        )
        selected = kept.out_c, kept.q2k_idx, kept.q2k_num
        settings = self.topk, self.compete
        coarse_launches.launch_attend(
            self.coarse, q.device, means, kv_sizes, *settings, *selected, scores, means_done=(of_means, arrivals)
        )
        # Its memory is free again before the output needs some.
        del scratch
        operands = self._operands(kept, q, k, v, gate, q_sizes, kv_sizes)
        out, out_s = launch_attend(self.problem, operands, self.with_out_s, kept.lse, of_work_tiles)
        return out, out_s, memory

    def backward(
        self, tensors: Sequence[Any], out: Tensor, memory: Tensor, dout: Tensor, need_dq: bool, need_dkv: bool
    ) -> Gradients:
        """Gradients in q, k, v and the gate.

        Args:
            tensors: those of the forward.
            out: with ``with_out_s`` the output before the coarse one was added.
            memory: of ``kept``.
        """
        (_, kept), kv_sizes = self._kept_at(memory.data_ptr()), tensors[5]
        gradients = dout.new_empty(self.gradients.num_bytes, dtype=torch.uint8)
        of_means: Any = self.gradients.at(gradients.data_ptr())

        def mean_gradients(dout_c: Any) -> Any:
            coarse_launches.launch_backward(self.coarse, kept[-3:], kv_sizes, dout_c, *of_means)
            return of_means

        has_coarse_output = kept.out_c is not None
        return attend_backward(
            self.problem,
            self._operands(kept, *tensors),
            out,
            kept.lse,  # type: ignore[arg-type]
            dout,
            None,
            need_dq,
            need_dkv,
            has_coarse_output and not self.with_out_s,
            mean_gradients if has_coarse_output else None,
        )

    def _kept_at(self, address: int) -> tuple[Part, Kept]:
        """The two counters, and what follows them."""
        counters, *kept = self.kept.at(address)
        return counters, Kept(*kept)

    def _operands(self, kept: Any, *tensors: Any) -> Operands:
        q, k, v, gate, q_sizes, kv_sizes = tensors
        return Operands(q, k, v, kept.q2k_idx, kept.q2k_num, q_sizes, kv_sizes, kept.out_c, gate, self.gate_value)

    def can_read(self, *tensors: Tensor) -> bool:
        """Their strides are those of the forward."""
        return all([x.data_ptr() % ALIGNMENT_BYTES == 0 for x in tensors])

    def tensors(self, memory: Tensor) -> list[Tensor | None]:
        """``Kept`` as tensors, which share the memory."""
        _, kept = self._kept_at(memory.data_ptr())
        dtypes = torch.float32, torch.int32, torch.int32, *(torch.float32,) * 4
        return [part and part.tensor(memory, dtype) for part, dtype in zip(kept, dtypes, strict=True)]


@functools.lru_cache(maxsize=1024)
def whole(
    problem: Problem,
    topk: tuple[int, ...],
    compete: bool,
    selection_dtype: torch.dtype,
    gate_value: float,
    has_gate: bool,
    is_recorded: bool,
    device: int,
) -> Whole | None:
    """That of a call; None where it is another one: rounded means, and the selection of very many blocks, are tensors.

    Args:
        is_recorded: whether a backward follows.
    """
    num_kv_blocks = problem.keys.num_blocks
    if selection_dtype != torch.float32 or num_kv_blocks > MAX_COARSE_COLS:
        return None
    coarse = Coarse(problem.keys.segments, problem.softmax_scale, selection_dtype)
    topk, width = coarse_launches.clamped(coarse, topk, num_kv_blocks)
    of_q, of_k = means_shapes(problem)
    has_coarse_output = has_gate or gate_value != 0.0
    means = [of_q, of_k, of_k][: 3 if has_coarse_output else 2]
    scores = (coarse_launches.num_scores(coarse, of_q, of_k, device, width),)
    rows = of_q[:3]
    kept = [(*rows[:2], problem.queries.length), (*rows, width), rows, *([of_q] if has_coarse_output else [])]
    keeps_means = is_recorded and has_coarse_output
    return Whole(
        problem,
        coarse,
        topk,
        compete,
        gate_value,
        is_recorded and (has_gate or keeps_out_s(None, gate_value)),
        Parts.of(*([] if keeps_means else means), scores),
        Parts.of((2,), *kept, *(means if keeps_means else [])),
        Parts.of(*(means if keeps_means else [])),
    )

"""How many floating-point operations each operator does, for PyTorch's ``FlopCounterMode``.

As PyTorch counts its own attention: two for each multiply-add of a matrix product, and nothing else. Only key blocks
that were selected count: those of the indices where their values are known, else as many as the indices have room for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vsa_jit.fastpath import PLAIN_TYPES, dispatch_modes, num_dispatch_modes
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Problem, has_coarse_output
from vsa_jit.segments import Segments, order_of

# Products: scores and output; in a backward scores and their gradient, then dq, then dk and dv.
PRODUCTS_FORWARD, PRODUCTS_SHARED_BACKWARD, PRODUCTS_DQ, PRODUCTS_DKV, PRODUCTS_TANGENT = 2, 2, 1, 2, 5

# By operator, as ``torch.ops`` has it.
_formulas: dict[Any, Callable[..., int]] = {}


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Makes an operator's formula known."""
    _formulas[operator] = formula
    tell_counters()


def tell_counters_at_work() -> None:
    if num_dispatch_modes() > 0:
        tell_counters()


def tell_counters() -> None:
    """Makes the formulas known to ``FlopCounterMode``, and to those of its kind that are counting now.

    A counter knows of an operator what its module knew when the counter was made, and that module is not imported here:
    it imports Triton.
    """
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = [getattr(mode, "counter", None) for mode in dispatch_modes()]
    registries = [counter.flop_registry for counter in counters if isinstance(counter, module.FlopCounterMode)]
    for registry in (module.flop_registry, *registries):
        for packet, formula in _formulas.items():
            registry.setdefault(packet, formula)


def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None) -> int:
    return PRODUCTS_FORWARD * _product(q, k, args[:4], args[4:])


def attend_backward(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None) -> int:
    return _products_backward(args[8], args[9]) * _product(q, k, args[:4], args[10:])


def attend_tangent(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None) -> int:
    return PRODUCTS_TANGENT * _product(q, k, args[:4], args[12:])


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    gate_value: float,
    *args: Any,
    out_val: Any = None,
) -> int:
    static, (q2k_idx, q2k_num) = args[4:], out_val[2:4]
    problem = Problem.of(q, k, *static[:-1])
    coarse_products = PRODUCTS_FORWARD if has_coarse_output(gate, gate_value) else 1
    fine = _product(q, k, (q2k_idx, q2k_num, q_sizes, kv_sizes), static)
    return PRODUCTS_FORWARD * fine + coarse_products * _product_of_blocks(problem)


def video_sparse_attn_backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *args: Any, out_val: Any = None
) -> int:
    q_sizes, kv_sizes, _, _, q2k_idx, q2k_num, q_c = args[:7]
    need_dq, need_dkv, *static = args[14:]
    problem = Problem.of(q, k, *static[:-1])
    products = _products_backward(need_dq, need_dkv) * _product(q, k, (q2k_idx, q2k_num, q_sizes, kv_sizes), static)
    of_blocks = 0 if q_c is None else _products_backward(True, True) * _product_of_blocks(problem)
    return products + of_blocks


def _products_backward(need_dq: bool, need_dkv: bool) -> int:
    products = PRODUCTS_DQ * need_dq + PRODUCTS_DKV * need_dkv
    return products + (PRODUCTS_SHARED_BACKWARD if products else 0)


def _product(q: Tensor, k: Tensor, selection: tuple, static: Sequence[Any]) -> int:
    """Of one product of all queries with the keys that they attend."""
    return 2 * q.shape[3] * pairs(Problem.of(q, k, *static[-5:-1]), *selection)


def pairs(problem: Problem, q2k_idx: Tensor, q2k_num: Tensor, q_sizes: Tensor | None, kv_sizes: Tensor | None) -> int:
    """Valid queries, each as often as there are valid keys that it attends."""
    width = q2k_idx.shape[3]
    if not all(_is_known(x) for x in (q2k_idx, q2k_num, q_sizes, kv_sizes)):
        keys = min(width * problem.block, problem.keys.length)
        return problem.batch * problem.queries.heads * problem.queries.length * keys
    queries, keys_of = (
        (block_tokens(side, sizes, q2k_idx.device) >= 0).sum(1)
        for side, sizes in ((problem.queries, q_sizes), (problem.keys, kv_sizes))
    )
    exists = (q2k_idx >= 0) & (q2k_idx < problem.keys.num_blocks)
    used = (torch.arange(width, device=q2k_idx.device) < q2k_num[..., None]) & exists
    selected = keys_of[q2k_idx.long().clamp(0, problem.keys.num_blocks - 1)].masked_fill(~used, 0).sum(-1)
    if problem.keys.segments is not None:
        # Keys of all blocks before each, and of runs of blocks from the first one that is named.
        before = torch.nn.functional.pad(keys_of.cumsum(0), (1, 0))
        first = q2k_idx[..., 0].long().clamp(0, problem.keys.num_blocks)
        end = (first - q2k_num).clamp(0, problem.keys.num_blocks)
        selected = torch.where(q2k_num < 0, before[end] - before[first], selected)
    return int((selected * queries).sum())


def _is_known(x: Tensor | None) -> bool:
    if x is None:
        return True
    waits = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) in PLAIN_TYPES and not x.is_meta and not waits


def coarse_attend_tangent(q_c: Tensor, k_c: Tensor, *args: Any, out_val: Any = None) -> int:
    tile, numbers = args[-4:-2]
    pairs_of_blocks = _block_pairs(order_of(numbers, tuple(tile)).segments, q_c.shape[2], k_c.shape[2])
    return PRODUCTS_TANGENT * 2 * q_c.shape[0] * q_c.shape[1] * q_c.shape[3] * pairs_of_blocks


def select_key_blocks(q: Tensor, k: Tensor, *args: Any, out_val: Any = None) -> int:
    return _product_of_blocks(Problem.of(q, k, *args[-5:-1]))


def _product_of_blocks(problem: Problem) -> int:
    """Of one product of block means."""
    queries, keys = problem.queries, problem.keys
    of_head = _block_pairs(keys.segments, queries.num_blocks, keys.num_blocks)
    return 2 * problem.batch * queries.heads * problem.head_dim * of_head


def _block_pairs(segments: Segments | None, num_q_blocks: int, num_kv_blocks: int) -> int:
    if segments is None:
        return num_q_blocks * num_kv_blocks
    return sum(sample.num_blocks**2 for sample in segments.samples)

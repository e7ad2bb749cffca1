"""Sequences of several lengths, packed one after the other, each with blocks and indices of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

import vsa_jit
from fastvideo_kernel.block_sparse_attn import BLOCK


def block_sparse_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q2k_idx_list: Sequence[Tensor],
    q2k_num_list: Sequence[Tensor],
    variable_block_sizes_list: Sequence[Tensor],
    q_variable_block_sizes_list: Sequence[Tensor] | None = None,
    block_size: int = BLOCK,
) -> Tensor:
    """Attention of each sequence over its own keys, one call for each; reads the lengths, and so waits for the GPU.

    Args:
        q, k, v: [tokens, H, D], without padding.
        cu_seqlens_q, cu_seqlens_kv: int [N + 1], where each sequence begins, and where the last one ends.
        q2k_idx_list, q2k_num_list: for each sequence key blocks [1, H, n_q, m] and how many of them count [1, H, n_q].
        variable_block_sizes_list: for each sequence the tokens of each of its key blocks, [n_k].
        q_variable_block_sizes_list: the same of queries, [n_q]; None where all blocks but the last are full.
        block_size: the most tokens of a block.

    Returns:
        Like q; 0 in a sequence without keys.

    Raises:
        ValueError: blocks do not hold exactly the tokens of their sequence.
    """
    per_sequence = zip(
        _split("q", q, cu_seqlens_q),
        _split("k", k, cu_seqlens_kv),
        _split("v", v, cu_seqlens_kv),
        q2k_idx_list,
        q2k_num_list,
        variable_block_sizes_list,
        q_variable_block_sizes_list or _full_blocks(cu_seqlens_q, block_size),
        strict=True,
    )
    outs = []
    for q_i, k_i, v_i, idx, num, sizes, q_sizes in per_sequence:
        q_slots = _slots("q_variable_block_sizes_list", q_sizes, block_size, q_i)
        kv_slots = _slots("variable_block_sizes_list", sizes, block_size, k_i)
        if len(q_i) == 0 or len(k_i) == 0:
            # No queries, or none with a key: nothing to compute. Filled, so that the output still has a gradient.
            outs.append(q_i.masked_fill(torch.ones_like(q_i, dtype=torch.bool), 0.0))
            continue
        q_len, kv_len = len(q_sizes) * block_size, len(sizes) * block_size
        out, _ = vsa_jit.block_sparse_attn_from_indices(
            _padded(q_i, q_slots, q_len),
            _padded(k_i, kv_slots, kv_len),
            _padded(v_i, kv_slots, kv_len),
            idx,
            num,
            sizes,
            block_size=block_size,
            layout="bshd",
        )
        outs.append(out[0, q_slots])
    return torch.cat(outs)


def _split(name: str, x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    begin, *_, end = cu_seqlens.tolist()
    if (begin, end) != (0, len(x)):
        raise ValueError(f"{name}: expected sequences that cover its {len(x)} tokens, got {begin} to {end}")
    return x.split(cu_seqlens.diff().tolist())


def _full_blocks(cu_seqlens: Tensor, block: int) -> list[Tensor]:
    lengths = cu_seqlens.diff().tolist()
    return [(length - torch.arange(0, length, block)).clamp(max=block) for length in lengths]


def _slots(name: str, sizes: Tensor, block: int, x: Tensor) -> Tensor:
    """Where the tokens of a sequence lie once its blocks are padded."""
    valid = torch.arange(block, device=x.device) < sizes.to(x.device)[:, None]
    slots = valid.flatten().nonzero().flatten()
    if len(slots) != len(x):
        raise ValueError(f"{name}: expected sizes that add up to {len(x)} tokens, got {len(slots)}")
    return slots


def _padded(x: Tensor, slots: Tensor, length: int) -> Tensor:
    return x.new_zeros((length, *x.shape[1:])).index_copy(0, slots, x)[None]

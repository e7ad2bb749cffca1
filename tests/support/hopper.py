"""What tests of the Hopper kernels share: a call, its operands, exact means, where groups of rows start."""

from collections.abc import Sequence

import torch
from torch import Tensor

from support import reference as ref
from support.problems import Inputs
from vsa_jit.backends.sm90 import specialise
from vsa_jit.checks import check_problem
from vsa_jit.grid import block_tokens
from vsa_jit.jit import engines, module
from vsa_jit.jit.kernel import Kernel
from vsa_jit.problem import Operands, Problem, Side, bhsd


def load(kernels: Sequence[Kernel], device: int) -> None:
    """For tests that launch without a call that does it."""
    module.load(kernels, device, engines.choose(kernels, specialise.ARCH).name)


def load_kernels() -> None:
    """Those of blocks of any size."""
    load(
        [kernel for head_dim in specialise.HEAD_DIMS for kernel in specialise.kernels_of(torch.bfloat16, head_dim)],
        torch.cuda.current_device(),
    )


def problem_of(inputs: Inputs, **others) -> Problem:
    return check_problem(inputs.q, inputs.k, inputs.v, **{**inputs.order, **others})


def reference_means(side: Side, x: Tensor, sizes: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = bhsd(x, side.layout).detach().to(dtype)
    tokens = block_tokens(side, sizes, x.device)
    rows = x[:, :, tokens.clamp(min=0)].masked_fill((tokens < 0)[..., None], 0.0)
    return rows.sum(-2) / (tokens >= 0).sum(-1).clamp(min=1)[:, None]


def operands_of(inputs: Inputs, idx: Tensor, num: Tensor) -> Operands:
    q_sizes = inputs.sizes if inputs.q.shape == inputs.k.shape else None
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    return Operands(q, k, v, idx, num, q_sizes, inputs.sizes, None, None, 0.0)


# Gates of ``Case``, and how they lie in memory.
GATES = [
    ("full", "as it is"),
    ("per channel", "as it is"),
    ("full", "in fp32"),
    ("full", "every second channel"),
    ("full", "not aligned"),
    (0.5, "as it is"),
]


def weight_of(inputs: Inputs, order: str) -> Tensor | None:
    """The gate of a call as the kernels read it; None where it is a number."""
    if not isinstance(inputs.gate, Tensor):
        return None
    gate = inputs.gate.detach().expand(inputs.q.shape)
    if order == "in fp32":
        return gate.float()
    if order == "every second channel":
        return torch.stack([gate, gate], -1).flatten(-2)[..., ::2]
    if order == "not aligned":
        return torch.nn.functional.pad(gate, (1, 0))[..., 1:]
    return gate


def check_means(problem: Problem, inputs: Inputs, results) -> None:
    q_sizes = inputs.given_q_sizes if inputs.given_q_sizes is not None else inputs.sizes
    sides = (problem.queries, q_sizes), (problem.keys, inputs.sizes), (problem.keys, inputs.sizes)
    for name, result, (side, sizes) in zip("qkv", results, sides, strict=True):
        x = getattr(inputs, name)
        exact = reference_means(side, x, sizes, torch.float64)
        plain = reference_means(side, x, sizes, torch.float32)
        assert result.dtype == torch.float32
        error, allowed = (result - exact).abs().max(), (plain - exact).abs().max()
        # An error of fp32 in another order of the sum, and never nothing: one rounding of the largest mean.
        assert error <= 2 * allowed + 2.0**-23 * exact.abs().max(), (name, float(error), float(allowed))


def starts_of(partition, num_rows: int, boxes: int) -> tuple[list[int], list[int]]:
    """The first row of each row group and the first row group of each window, and their ends, as ``vsa/scheduler.cuh``
    has them."""
    groups = partition.query_groups.value // boxes
    rows = [min(i * partition.group_rows + min(i, partition.longer_groups), num_rows) for i in range(groups + 1)]
    windows = range(partition.windows.value + 1)
    return rows, [i * partition.window_groups + min(i, partition.longer_windows) for i in windows]


def dense_gradients(inputs: Inputs, block_map: Tensor, dtype: torch.dtype, with_dlse: bool) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and gradients of q, k and v, computed densely in a dtype; one key head at a time, since
    scores take much memory."""
    tensors, dout = inputs.clean(dtype), inputs.clean_dout(dtype)
    group = tensors["q"].shape[1] // tensors["k"].shape[1]
    found = []
    for kv_head in range(tensors["k"].shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        of_heads = {"q": heads, "k": slice(kv_head, kv_head + 1), "v": slice(kv_head, kv_head + 1)}
        leaves = [tensors[name].detach()[:, of].requires_grad_() for name, of in of_heads.items()]
        out, lse = ref.attention(*leaves, inputs.mask(block_map[:, heads]), inputs.scale)
        loss = (out * dout[:, heads]).sum()
        if with_dlse:
            dlse = inputs.dlse[:, heads].nan_to_num(0.0).to(lse.dtype)
            loss = loss + (lse.masked_fill(lse.isneginf(), 0.0) * dlse).sum()
        found.append((out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)))
    return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))


def check_gradients(
    inputs: Inputs, block_map: Tensor, found: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor]
) -> None:
    """Checks dq, dk and dv against dense ones, and that what is not valid, and keys that no query selected, get 0."""
    valid = inputs.q_valid, inputs.kv_valid, inputs.kv_valid
    group = inputs.case.heads // (inputs.case.kv_heads or inputs.case.heads)
    named = block_map.unflatten(1, (-1, group)).any(2).any(-2)[..., inputs.kv_block]
    for name, x, of_x, exact_x, plain_x in zip("qkv", found, valid, exact, plain, strict=True):
        x = inputs.bhsd(x)
        ref.assert_close(f"d{name}", x, exact_x, plain_x)
        zeros = [x[:, :, ~of_x.to(x.device)]]
        if name != "q":
            zeros.append(x[~named.to(x.device)])
        for part in zeros:
            assert torch.equal(part, torch.zeros_like(part))

"""What the Hopper kernels cover, and what they are compiled with."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vsa_jit.backends.base import BackendSpec
from vsa_jit.backends.sm90 import segments
from vsa_jit.backends.sm90.schedule import why_too_many_blocks
from vsa_jit.backends.sm90.specialise import ARCH, DTYPES, HEAD_DIMS, kernels_of
from vsa_jit.backends.sm90.structs import MAX_COARSE_COLS
from vsa_jit.backends.sm90.tma import largest_grid, why_not_tma
from vsa_jit.backends.triton import support as triton
from vsa_jit.jit import engines, module, toolchain
from vsa_jit.jit.errors import Unavailable
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.toolchain import dotted
from vsa_jit.problem import Problem, bhsd

CAPABILITY = (9, 0)
# What has no CUDA kernel yet, Triton's kernels do.
COARSE_BRANCH = ("coarse_attend", "coarse_attend_backward")
RUNNERS = triton.RUNNERS | dict.fromkeys(("block_means", *COARSE_BRANCH, "attend", "attend_backward"), "sm90")


def runners_of(problem: Problem) -> dict[str, str]:
    """Of more key blocks than the kernels take, Triton computes the coarse branch."""
    if problem.keys.num_blocks <= MAX_COARSE_COLS:
        return RUNNERS
    return RUNNERS | dict.fromkeys(COARSE_BRANCH, "triton")


def prepare(problem: Problem, device: torch.device, dtype: torch.dtype, engine: str) -> None:
    """Loads the kernels of a call on its device, compiling those that the cache does not hold."""
    module.load(_kernels_of(problem, dtype), device.index, engine)


def _kernels_of(problem: Problem, dtype: torch.dtype) -> list[Kernel]:
    return kernels_of(dtype, problem.head_dim, problem.block, problem.queries.segments is not None)


def is_native_on(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == CAPABILITY


def why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the kernels are for Hopper GPUs, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        needed = dotted(CAPABILITY)
        return f"the kernels are for compute capability {needed}, and {device} has {dotted(capability)}"
    reason = triton.why_not_on(device)
    return None if reason is None else f"Triton runs what has no Hopper kernel yet, and {reason}"


def why_not(problem: Problem, dtype: torch.dtype, tensors: Sequence[Tensor]) -> str | None:
    """Why these kernels cannot run a call on a Hopper GPU. None: they can.

    Args:
        tensors: q, k and v, or those of them that the call has, in its layout.
    """
    if dtype not in DTYPES:
        return f"the kernels are for bf16 and fp16, and q is {dtype}"
    if problem.head_dim not in HEAD_DIMS:
        return f"the kernels are for head dimensions {' and '.join(map(str, HEAD_DIMS))}, and q's is {problem.head_dim}"
    reason = why_too_many_blocks(problem) or why_no_engine(engines.requested())
    if reason is not None:
        return reason
    side = problem.queries
    if side.segments is not None:
        reason = segments.why_not(side.segments)
        if reason is not None:
            return reason
    grid = largest_grid(side)
    reasons = (why_not_tma(bhsd(x, side.layout), grid) for x in tensors)
    return next((reason for reason in reasons if reason is not None), None)


@functools.cache
def why_no_engine(name: str) -> str | None:
    """Why the kernels cannot be compiled on this machine with an engine, or with any ("auto"). None: they can."""
    try:
        toolchain.check_driver()
        engines.choose((), ARCH, name)
    except (Unavailable, OSError) as error:
        return str(error)
    return None


def engine_of(problem: Problem, device: torch.device, dtype: torch.dtype) -> str:
    """The engine whose kernels run a call: the one that has loaded them already, or the one to compile them with."""
    kernels = _kernels_of(problem, dtype)
    return module.loaded_engine(kernels, device.index) or engines.choose(kernels, ARCH).name


SPEC = BackendSpec(
    name="sm90",
    is_native_on=is_native_on,
    why_not_on=why_not_on,
    why_not=why_not,
    engine_of=engine_of,
    runners=RUNNERS,
    prepare=prepare,
    runners_of=runners_of,
)

"""Where Triton's kernels run."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from vsa_jit.backends.base import OPERATORS, BackendSpec
from vsa_jit.jit.toolchain import dotted

OLDEST_CAPABILITY = (8, 0)
# Forward mode has no kernel.
RUNNERS = {operator: "triton" for operator in OPERATORS if operator != "attend_tangent"}


def is_native_on(device: torch.device) -> bool:
    return device.type == "cuda"


def why_not_on(device: torch.device) -> str | None:
    if not _is_installed():
        return "the package triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"Triton needs compute capability {dotted(OLDEST_CAPABILITY)}, and {device} has {dotted(capability)}"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


SPEC = BackendSpec(
    name="triton",
    is_native_on=is_native_on,
    why_not_on=why_not_on,
    why_not=lambda problem, dtype, tensors: None,
    engine_of=lambda problem, device, dtype: "triton",
    runners=RUNNERS,
)

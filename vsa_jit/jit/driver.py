"""The few functions of the CUDA driver that launches need, by ctypes: tensor maps, and a kernel with one parameter."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from vsa_jit import fastpath
from vsa_jit.jit.toolchain import libcuda

# Numbers of the driver's enumerations.
_ELEMENT_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_ERROR_INVALID_CONTEXT = 201
_L2_PROMOTION_256B = 3
SWIZZLE_NONE, SWIZZLE_128B = 0, 3
_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_ALIGNMENT = 64
_OnePointer = ctypes.c_void_p * 1


class TensorMap(ctypes.Array[ctypes.c_uint64]):
    _type_ = ctypes.c_uint64
    _length_ = _TENSOR_MAP_BYTES // 8


def check(status: int, what: str) -> None:
    """Raises ``RuntimeError`` with the driver's name of an error."""
    if status == 0:
        return
    name = ctypes.c_char_p()
    libcuda().cuGetErrorName(status, ctypes.byref(name))
    raise RuntimeError(f"{what}: {name.value.decode() if name.value else f'CUDA error {status}'}")


def call(device: int, what: str, function: Callable[..., int], *arguments: object) -> None:
    """Calls a function of the driver that needs a current context: that of PyTorch on a device.

    A thread that has not used CUDA yet has none.

    Raises:
        RuntimeError: it failed; the message says what, and the driver's name of the error.
    """
    status = function(*arguments)
    if status == _ERROR_INVALID_CONTEXT:
        make_context_current(device)
        status = function(*arguments)
    check(status, what)


@functools.lru_cache(maxsize=1024)
def encode_tensor_map(
    device: int,
    address: int,
    dtype: torch.dtype,
    extents: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int = SWIZZLE_NONE,
) -> TensorMap:
    """What TMA must know of a tensor to copy boxes of it; elements outside it are read as zeros.

    Args:
        device: where the tensor is.
        address: of the first element, a multiple of 16 bytes.
        extents: innermost dimension first.
        strides: of all dimensions but the innermost, in elements; multiples of 16 bytes.
        box: elements copied at a time, along each dimension at most 256.
        swizzle: how rows of a box lie in shared memory; with ``SWIZZLE_128B`` they are 128 bytes long.

    Raises:
        RuntimeError: the driver refuses it.
    """
    rank = len(extents)
    space = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT)
    start = -ctypes.addressof(space) % _TENSOR_MAP_ALIGNMENT
    encoded = TensorMap.from_buffer(space, start)
    call(
        device,
        f"tensor map of extents {tuple(extents)}, strides {tuple(strides)}, box {tuple(box)}",
        libcuda().cuTensorMapEncodeTiled,
        ctypes.byref(encoded),
        _ELEMENT_TYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*extents),
        (ctypes.c_uint64 * (rank - 1))(*(stride * dtype.itemsize for stride in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        0,
        swizzle,
        _L2_PROMOTION_256B,
        0,
    )
    return encoded


def fill(device: int, address: int, value: int) -> None:
    """Sets 32 bits on PyTorch's current stream of a device, and returns at once."""
    if fastpath.current_device() != device:
        with torch.cuda.device(device):
            return fill(device, address, value)
    stream = ctypes.c_void_p(fastpath.current_raw_stream(device))
    memset = libcuda().cuMemsetD32Async
    call(device, "a fill of 32 bits", memset, ctypes.c_void_p(address), value, ctypes.c_size_t(1), stream)


def allow_shared_memory(function: int, smem_bytes: int) -> None:
    """Lets a function be launched with this much dynamic shared memory."""
    status = libcuda().cuFuncSetAttribute(ctypes.c_void_p(function), _MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)
    check(status, f"{smem_bytes} bytes of shared memory")


def make_context_current(device: int) -> None:
    """Makes the context that PyTorch uses on a device current in this thread, which may not have used CUDA yet."""
    context = ctypes.c_void_p()
    check(libcuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f"device {device}")
    check(libcuda().cuCtxSetCurrent(context), f"device {device}")


class Launcher:
    """A loaded function with its launch configuration."""

    def __init__(self, label: str, function: int, device: int, threads: int, smem_bytes: int) -> None:
        self._label = label
        self._device = device
        self._function = ctypes.c_void_p(function)
        self._threads = threads
        self._smem_bytes = smem_bytes
        self._launch = libcuda().cuLaunchKernel
        allow_shared_memory(function, smem_bytes)

    def __call__(self, blocks: int, params: ctypes.Structure) -> None:
        """Launches on PyTorch's current stream of the device, and returns at once.

        Args:
            blocks: thread blocks.
            params: the kernel's parameters, copied.
        """
        if fastpath.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(blocks, params)
        stream = ctypes.c_void_p(fastpath.current_raw_stream(self._device))
        pointers = _OnePointer(ctypes.addressof(params))
        configuration = (self._function, blocks, 1, 1, self._threads, 1, 1, self._smem_bytes, stream)
        status = self._launch(*configuration, pointers, None)
        if status == _ERROR_INVALID_CONTEXT:
            return call(self._device, self._label, self._launch, *configuration, pointers, None)
        check(status, self._label)

"""The few functions of the CUDA driver that launches need, by ctypes: tensor maps, and a kernel with one parameter."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from vsa_jit import fastpath
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.toolchain import libcuda

# Numbers of the driver's enumerations.
_ELEMENT_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT = 8, 9
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_ERROR_INVALID_CONTEXT = 201
_L2_PROMOTION_256B = 3
SWIZZLE_NONE, SWIZZLE_128B = 0, 3
_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_ALIGNMENT = 64
# Dynamic shared memory that a function has without asking.
_DEFAULT_SHARED_BYTES = 48 * 1024
_OnePointer = ctypes.c_void_p * 1


class TensorMap(ctypes.Array[ctypes.c_uint64]):
    _type_ = ctypes.c_uint64
    _length_ = _TENSOR_MAP_BYTES // 8


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``, whose value is a number."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_uint8 * 60))


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("blocks", ctypes.c_uint),
        ("blocks_y", ctypes.c_uint),
        ("blocks_z", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("threads_y", ctypes.c_uint),
        ("threads_z", ctypes.c_uint),
        ("smem_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


# A kernel with it may start while the launch before it in the stream still runs.
_STARTS_EARLY = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)


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


def fill(device: int, address: int, value: int, words: int = 1) -> None:
    """Sets words of 32 bits on PyTorch's current stream of a device, and returns at once."""
    if fastpath.current_device() != device:
        with torch.cuda.device(device):
            return fill(device, address, value, words)
    stream = ctypes.c_void_p(fastpath.current_raw_stream(device))
    memset = libcuda().cuMemsetD32Async
    call(device, "a fill of memory", memset, ctypes.c_void_p(address), value, ctypes.c_size_t(words), stream)


def allow_shared_memory(function: int, smem_bytes: int) -> None:
    """Lets a function be launched with this much dynamic shared memory."""
    attributes = {_MAX_DYNAMIC_SHARED_SIZE_BYTES: smem_bytes}
    if smem_bytes > _DEFAULT_SHARED_BYTES:
        # In percent. Else a multiprocessor may have just enough for this function, and none for one that starts beside.
        attributes[_PREFERRED_SHARED_MEMORY_CARVEOUT] = 100
    for attribute, value in attributes.items():
        status = libcuda().cuFuncSetAttribute(ctypes.c_void_p(function), attribute, value)
        check(status, f"attribute {attribute} for {smem_bytes} bytes of shared memory")


def make_context_current(device: int) -> None:
    """Makes the context that PyTorch uses on a device current in this thread, which may not have used CUDA yet."""
    context = ctypes.c_void_p()
    check(libcuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f"device {device}")
    check(libcuda().cuCtxSetCurrent(context), f"device {device}")


class Launcher:
    """A loaded function with its launch configuration."""

    def __init__(self, kernel: Kernel, function: int, device: int) -> None:
        self._label = kernel.label
        self._device = device
        self._function = ctypes.c_void_p(function)
        self._config = _LaunchConfig(1, 1, 1, kernel.threads, 1, 1, kernel.smem_bytes)
        self._config.attributes = ctypes.addressof(_STARTS_EARLY)
        self._config.num_attributes = kernel.starts_early
        self._launch = libcuda().cuLaunchKernelEx
        allow_shared_memory(function, kernel.smem_bytes)

    def __call__(self, blocks: int, params: ctypes.Structure) -> None:
        """Launches on PyTorch's current stream of the device, and returns at once.

        Args:
            blocks: thread blocks.
            params: the kernel's parameters, copied.
        """
        if fastpath.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(blocks, params)
        # Another thread may launch the same kernel now.
        config = _LaunchConfig.from_buffer_copy(self._config)
        config.blocks, config.stream = blocks, fastpath.current_raw_stream(self._device)
        pointers = _OnePointer(ctypes.addressof(params))
        call(self._device, self._label, self._launch, ctypes.byref(config), self._function, pointers, None)

"""Runs the CUDA kernels on the CPU, from their own sources: threads are fibers under random schedules, and the folder
``emulator`` has what stands for PTX. It shows wrong results, deadlocks and what is overwritten too early; it knows
neither a GPU's memory order nor its speed."""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vsa_jit.backends.sm90 import backward, coarse, forward, tma, whole
from vsa_jit.jit import driver, module
from vsa_jit.jit.driver import SWIZZLE_128B, TensorMap
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.source import kernels_dir

EMULATOR = Path(__file__).parent / "emulator"
OPTIONS = (
    "-std=c++20",
    "-O2",
    "-w",
    "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fno-semantic-interposition",
    "-shared",
)

ENTRY = """
#include "cuda.h"
#include "{source}"
extern "C" const char* run(int blocks, int threads, uint64_t seed, const void* params) {{
    return emulator::run(blocks, threads, seed, [=] {{ {entry}(*static_cast<const Params*>(params)); }});
}}
"""


def can_compile() -> bool:
    if shutil.which("g++") is None:
        return False
    return (
        subprocess.run(["g++", *OPTIONS[:1], "-fsyntax-only", "-x", "c++", "/dev/null"], capture_output=True).returncode
        == 0
    )


NEEDS_COMPILER = pytest.mark.skipif(not can_compile(), reason="needs a g++ that knows C++20")


class EmulationError(Exception):
    """A kernel got stuck, or did what it must not; the message says where."""


@functools.cache
def _compiled(kernel: Kernel, sources: Path) -> ctypes.CDLL:
    content = [(str(path.relative_to(sources)), path.read_bytes()) for path in sorted(sources.rglob("*.*"))]
    name = hashlib.sha256(repr((kernel, content)).encode()).hexdigest()[:16]
    folder = Path(os.environ["VSA_JIT_TEST_CACHE"]) / "emulated"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}.so"
    # Another worker may need the same kernel now: it waits, and then finds the library.
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(kernel, sources, library)
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    loaded.run.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p)
    return loaded


def _compile(kernel: Kernel, sources: Path, library: Path) -> None:
    text, unfinished = library.with_suffix(".cpp"), library.with_suffix(".unfinished")
    text.write_text(ENTRY.format(source=kernel.source, entry=kernel.entry))
    command = ["g++", *OPTIONS, f"-I{EMULATOR}", f"-I{sources}", *kernel.macros, "-o", unfinished, text]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    unfinished.rename(library)


def launcher(kernel: Kernel, device: int, sources: Path | None = None, mistake: int = 0):
    """Instead of ``module.launcher``: launches wait for the end, and each has a schedule of its own."""
    compiled = _compiled(kernel, sources or kernels_dir())

    def launch(blocks: int, params: ctypes.Structure) -> None:
        alignment = 64
        space = ctypes.create_string_buffer(ctypes.sizeof(params) + alignment)
        address = ctypes.addressof(space) + -ctypes.addressof(space) % alignment
        ctypes.memmove(address, ctypes.addressof(params), ctypes.sizeof(params))
        ctypes.c_int.in_dll(compiled, "mistake").value = mistake
        error = compiled.run(blocks, kernel.threads, int(torch.randint(2**62, ())), address)
        if error is not None:
            raise EmulationError(f"{kernel.label}: {error.decode()}")
        if hasattr(params, "schedule") and params.schedule.taken:
            # Every thread block has a work tile at first, and takes others until there are no more.
            assert ctypes.c_int.from_address(params.schedule.taken).value == params.schedule.num_work_tiles
        if getattr(params, "means_done", None):
            # Neither too few, for which a GPU would wait for ever, nor more than it waits for.
            assert ctypes.c_int.from_address(params.means_done).value == params.means_arrivals

    return launch


def fill(device: int, address: int, value: int, words: int = 1) -> None:
    """Instead of the driver's."""
    (ctypes.c_uint32 * words).from_address(address)[:] = [value] * words


def encode_tensor_map(
    device: int,
    address: int,
    dtype: torch.dtype,
    extents: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
) -> TensorMap:
    """Instead of the driver's: the ``tensor_map`` of ``emulator/kittens/tma.cuh``."""
    assert dtype.itemsize == 2
    assert address % 16 == 0
    assert all(stride % 8 == 0 for stride in strides)
    encoded = struct.pack("=Q5i5i4qi", address, *extents, *box, *(2 * x for x in strides), swizzle == SWIZZLE_128B)
    return TensorMap.from_buffer_copy(encoded.ljust(ctypes.sizeof(TensorMap), b"\0"))


def emulate(monkeypatch: pytest.MonkeyPatch, processors: int, sources: Path | None = None, mistake: int = 0) -> None:
    """Lets the ``sm90`` backend's launches run on this machine, as on a GPU with so many multiprocessors; with other
    sources than the package's, and the number of the planted error to activate."""
    # What is kept of earlier launches knows their launcher.
    whole.whole.cache_clear()
    forward._attend_launch.cache_clear()
    forward._block_means_launch.cache_clear()
    backward._prepare_launch.cache_clear()
    backward._order_rows_launch.cache_clear()
    backward._backward_q_launch.cache_clear()
    backward._backward_kv_launch.cache_clear()
    backward._store_dq_launch.cache_clear()
    coarse._attend_launch.cache_clear()
    coarse._backward_launches.cache_clear()
    monkeypatch.setattr(module, "launcher", functools.partial(launcher, sources=sources, mistake=mistake))
    monkeypatch.setattr(driver, "fill", fill)
    monkeypatch.setattr(tma, "encode_tensor_map", encode_tensor_map)
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def with_mistakes(mistakes: Mapping[str, Sequence[str]], folder: Path) -> Path:
    """A copy of the sources with planted errors, all compiled together and activated by their number, from 1 on.

    Args:
        mistakes: under their names, a file of ``vsa``, and texts of it without its comments, each with what takes its
            place. ``MISTAKE`` there says whether the error is made.
    """
    sources = folder / "src"
    shutil.copytree(kernels_dir(), sources)
    for number, (file_name, *texts) in enumerate(mistakes.values(), 1):
        file = sources / "vsa" / file_name
        source = re.sub(r"^ *//.*\n", "", file.read_text(), flags=re.MULTILINE)
        for text, wrong in zip(texts[::2], texts[1::2], strict=True):
            assert source.count(text) == 1, text
            source = source.replace(text, wrong.replace("MISTAKE", f"(mistake == {number})"))
        file.write_text(source)
    return sources


def expect_to_find(run: Callable[[int], Sequence[Tensor]], mistake: int) -> None:
    """Fails unless an error shows in some runs: ``run`` takes its number, or 0 for none, and returns what is
    computed."""

    def same(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))

    expected = run(0)
    assert same(run(0), expected)
    for _ in range(60):
        try:
            if not same(run(mistake), expected):
                return
        except EmulationError:
            return
    pytest.fail("the emulator found nothing in 60 runs")

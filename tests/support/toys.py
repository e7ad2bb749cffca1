"""A small kernel of two files, in a folder of its own, for tests of the compiler and its cache."""

import ctypes
from pathlib import Path

from vsa_jit.jit.engines.nvrtc import NvrtcEngine
from vsa_jit.jit.kernel import Kernel

ARCH = "9.0a"
NVRTC = NvrtcEngine()

MAIN = """
#include "parts/value.cuh"
struct Params { int* out; int n; };
static_assert(sizeof(Params) == VSA_PARAMS_BYTES, "");
extern "C" __global__ void toy(const __grid_constant__ Params params) {
    if (threadIdx.x < params.n) params.out[threadIdx.x] = value() + TOY_ADDEND;
}
"""
HEADER = "#pragma once\n__device__ inline int value() { return 40; }\n"


class Params(ctypes.Structure):
    _fields_ = (("out", ctypes.c_void_p), ("n", ctypes.c_int))


def write_sources(root: Path, main: str = MAIN, header: str = HEADER) -> Path:
    (root / "parts").mkdir(parents=True, exist_ok=True)
    (root / "toy.cu").write_text(main)
    (root / "parts" / "value.cuh").write_text(header)
    return root


def toy(addend: int = 2, label: str = "toy") -> Kernel:
    return Kernel("toy.cu", "toy", label, (("TOY_ADDEND", str(addend)),), Params, threads=32, smem_bytes=0)


def use_sources(monkeypatch, root: Path) -> None:
    monkeypatch.setattr("vsa_jit.jit.engines.base.kernels_dir", lambda: root)

"""nvcc through ``torch.utils.cpp_extension``: for machines that have a CUDA toolkit and no CuPy."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

from vsa_jit.jit import toolchain
from vsa_jit.jit.cache.entry import CompileSpec, Entry
from vsa_jit.jit.engines.base import source_of, write_job
from vsa_jit.jit.errors import Unavailable
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.source import Source, read
from vsa_jit.jit.toolchain import ARCHS, check_runs, check_version, find_nvcc

# The same optimisation as NVRTC's default; ptxas tells registers and spills.
OPTIONS = ("-std=c++20", "-O3", "-Xptxas=-v")
# PyTorch's build adds its own libraries, and the launcher needs the CUDA runtime alone.
LINK_OPTIONS = ("-Wl,--as-needed",)
NOT_IN_PATHS = "$:\"'\\"
ENTRY_FILE = Path(__file__).parent.parent / "worker" / "nvcc_entry.cu"


def with_entry_file(source: Source) -> Source:
    entry = read(ENTRY_FILE, f"{ENTRY_FILE} expected")
    return Source({**source.files, ENTRY_FILE.name: entry}, source.needs_cuda_headers)


class NvccEngine:
    name = "nvcc"
    seconds = 10
    gigabytes = 2.0

    def check(self) -> None:
        nvcc = find_nvcc()
        fix = "install a newer CUDA toolkit and set CUDA_HOME to it"
        check_version("nvcc", nvcc.version, fix)
        check_runs("nvcc", nvcc.version)
        built_for = torch.version.cuda
        if built_for is None:
            raise Unavailable("this PyTorch is built without CUDA", "install a PyTorch that is built for CUDA")
        if int(built_for.partition(".")[0]) != nvcc.version[0]:
            raise Unavailable(
                f"nvcc is of CUDA {toolchain.dotted(nvcc.version)}, and PyTorch is built for CUDA {built_for}",
                f"install a CUDA {built_for} toolkit and set CUDA_HOME to it",
            )

    def compiler(self) -> str:
        return f"nvcc {find_nvcc().build}"

    def spec(self, kernel: Kernel, arch: str) -> CompileSpec:
        real = ARCHS[arch]
        virtual = real.replace("sm_", "compute_")
        return CompileSpec(
            label=kernel.label,
            engine=self.name,
            # PyTorch adds options of its own, and the artefact holds code for the host.
            compiler=f"{self.compiler()}, PyTorch {torch.__version__}, {platform.machine()}",
            arch=real,
            flags=(
                f"-gencode=arch={virtual},code={real}",
                *OPTIONS,
                *LINK_OPTIONS,
                f"-DVSA_SOURCE={kernel.source}",
                f"-DVSA_ENTRY={kernel.entry}",
                *kernel.macros,
            ),
            source=kernel.source,
            source_digest=with_entry_file(source_of(kernel)).digest,
            artefact="kernel.so",
        )

    def write_job(self, folder: Path, kernel: Kernel, spec: CompileSpec) -> None:
        nvcc = find_nvcc()
        if set(str(folder)) & set(NOT_IN_PATHS):
            raise Unavailable(
                f"ninja and nvcc cannot build in {folder}, whose name has one of {' '.join(NOT_IN_PATHS)}",
                "name another folder by VSA_JIT_CACHE_DIR",
            )
        job = {
            "engine": self.name,
            "environment": {"CUDA_HOME": nvcc.home, "PATH": toolchain.tool_path()},
            "main": ENTRY_FILE.name,
            "options": [flag for flag in spec.flags if flag not in LINK_OPTIONS],
            "link_options": LINK_OPTIONS,
            "artefact": spec.artefact,
        }
        write_job(folder, with_entry_file(source_of(kernel)).files, job)

    def function(self, entry: Entry, kernel: Kernel) -> int:
        handle = ctypes.c_void_p()
        status = ctypes.CDLL(str(entry.artefact)).vsa_jit_get_function(ctypes.byref(handle))
        if status != 0 or handle.value is None:
            raise RuntimeError(f"{kernel.label}: the CUDA runtime could not load {entry.artefact} (error {status})")
        return handle.value

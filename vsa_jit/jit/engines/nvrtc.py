"""NVRTC through CuPy: needs neither a CUDA toolkit nor a host compiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vsa_jit.jit import toolchain
from vsa_jit.jit.cache.entry import CompileSpec, Entry
from vsa_jit.jit.cache.location import private_cache
from vsa_jit.jit.engines.base import source_of, write_job
from vsa_jit.jit.errors import Unavailable
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.toolchain import ARCHS, check_runs, check_version, cuda_extra, find_nvrtc

OPTIONS = ("-std=c++20", "-default-device", "--ptxas-options=-v")


def import_cupy() -> Any:
    """CuPy, which makes its own cache folder when it is imported: a private one where its usual one cannot be made."""
    if "CUPY_CACHE_DIR" not in os.environ:
        try:
            os.makedirs(os.path.expanduser("~/.cupy/kernel_cache"), exist_ok=True)
        except OSError:
            os.environ["CUPY_CACHE_DIR"] = str(private_cache().root / "cupy")
    import cupy

    return cupy


class NvrtcEngine:
    name = "nvrtc"
    seconds = 4
    gigabytes = 1.0

    def __init__(self) -> None:
        # CuPy unloads a module's code when the module goes.
        self._modules: list[Any] = []

    def check(self) -> None:
        nvrtc = find_nvrtc()
        check_version("NVRTC", nvrtc.version, cuda_extra())
        check_runs("NVRTC", nvrtc.version)

    def compiler(self) -> str:
        return f"NVRTC {toolchain.dotted(find_nvrtc().version)}"

    def spec(self, kernel: Kernel, arch: str) -> CompileSpec:
        source = source_of(kernel)
        return CompileSpec(
            label=kernel.label,
            engine=self.name,
            compiler=f"NVRTC {find_nvrtc().build}",
            arch=ARCHS[arch],
            flags=(f"--gpu-architecture={ARCHS[arch]}", *OPTIONS, *kernel.macros),
            source=kernel.source,
            source_digest=source.digest,
            artefact="kernel.cubin",
        )

    def write_job(self, folder: Path, kernel: Kernel, spec: CompileSpec) -> None:
        nvrtc, source = find_nvrtc(), source_of(kernel)
        include: list[str] = []
        if source.needs_cuda_headers:
            if nvrtc.include is None:
                raise Unavailable(
                    f"{kernel.source} needs CUDA's headers: {nvrtc.without_include}",
                    f"install the headers of CUDA {toolchain.dotted(nvrtc.version)}",
                )
            include = [f"--include-path={nvrtc.include}"]
        job = {
            "engine": self.name,
            "library": nvrtc.path,
            "version": nvrtc.version,
            "main": kernel.source,
            "options": [*spec.flags, *include],
            "artefact": spec.artefact,
        }
        write_job(folder, source.files, job)

    def function(self, entry: Entry, kernel: Kernel) -> int:
        module = import_cupy().RawModule(path=str(entry.artefact))
        self._modules.append(module)
        return int(module.get_function(kernel.entry).kernel.ptr)

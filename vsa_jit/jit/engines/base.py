"""What an engine is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from vsa_jit.jit.cache.entry import CompileSpec, Entry
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.source import Source, kernels_dir, read_source


class Engine(Protocol):
    """Compiles kernels and loads what was compiled.

    Attributes:
        seconds: about how long a kernel takes.
        gigabytes: about how much memory that needs.
    """

    name: str
    seconds: int
    gigabytes: float

    def check(self) -> None:
        """Raises ``Unavailable`` where it cannot compile, or what it compiles does not load here."""

    def compiler(self) -> str:
        """The compiler's name and version, for people."""

    def spec(self, kernel: Kernel, arch: str) -> CompileSpec:
        """What determines the compiled kernel."""

    def write_job(self, folder: Path, kernel: Kernel, spec: CompileSpec) -> None:
        """Writes sources and job for ``worker/compile.py``."""

    def function(self, entry: Entry, kernel: Kernel) -> int:
        """Loads a compiled kernel on the current device: its CUfunction handle, valid as long as the process."""


def source_of(kernel: Kernel) -> Source:
    return read_source(kernel.source, kernels_dir())


def write_job(folder: Path, files: dict[str, str], job: dict[str, Any]) -> None:
    for name, text in files.items():
        path = folder / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    packages = [os.path.abspath(path) for path in sys.path if path]
    (folder / "job.json").write_text(json.dumps({**job, "packages": packages}, indent=1))

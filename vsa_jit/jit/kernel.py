"""What a kernel is: its source, its specialisation, its parameters and its launch, said once for both engines."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """One specialised kernel, with a single parameter: a structure passed by value.

    Attributes:
        source: its file below ``kernels_src``, which defines the entry as ``extern "C" __global__``.
        label: a name for people, with what it is specialised for.
        defines: macros as (name, value); the size of the parameters and of the shared memory come on top.
        params: the structure, laid out as the source's.
        threads: of a thread block.
        smem_bytes: dynamic shared memory of a thread block.
    """

    source: str
    entry: str
    label: str
    defines: tuple[tuple[str, str], ...]
    params: type[ctypes.Structure]
    threads: int
    smem_bytes: int

    @property
    def macros(self) -> tuple[str, ...]:
        """Compiler options that specialise the source."""
        sizes = (("VSA_PARAMS_BYTES", ctypes.sizeof(self.params)), ("VSA_SMEM_BYTES", self.smem_bytes))
        return tuple(f"-D{name}={value}" for name, value in (*self.defines, *sizes))

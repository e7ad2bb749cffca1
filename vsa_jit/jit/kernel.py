"""What a kernel is: its source, its specialisation, its parameters and its launch, said once for both engines."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """One specialised kernel, with a single parameter: a structure passed by value.

    Attributes:
        source: its file below ``kernels_src``, which defines the entry as ``extern "C" __global__``.
        label: a name for people, with what it is specialised for.
        defines: macros as (name, value); on top come the sizes of the parameters and of the shared memory, and the
            offset of every field, which ``VSA_CHECK_PARAMS`` of ``vsa/params.cuh`` compares.
        params: the structure, laid out as the source's; what fills it up is called ``padding``.
        threads: of a thread block.
        smem_bytes: dynamic shared memory of a thread block.
        starts_early: it may start while the launch before it in the stream still runs, and itself waits for what it
            needs of that. Every thread block calls ``wait_for_launch_before`` of ``kittens/grid.cuh`` before it ends.
    """

    source: str
    entry: str
    label: str
    defines: tuple[tuple[str, str], ...]
    params: type[ctypes.Structure]
    threads: int
    smem_bytes: int
    starts_early: bool = False

    @property
    def macros(self) -> tuple[str, ...]:
        """Compiler options that specialise the source."""
        # Without commas, at which nvcc cuts an option.
        fields = "".join(f"VSA_AT({offset})VSA_FIELD({path})" for path, offset in _fields_of(self.params))
        host = {"VSA_PARAMS_BYTES": ctypes.sizeof(self.params), "VSA_SMEM_BYTES": self.smem_bytes, "VSA_FIELDS": fields}
        return tuple(f"-D{name}={value}" for name, value in (*self.defines, *host.items()))


def _fields_of(kind: Any, path: str = "", offset: int = 0) -> Iterator[tuple[str, int]]:
    """Every field of a structure and of those in it: its path in C++ and its offset in bytes."""
    if issubclass(kind, ctypes.Structure):
        for name, of_field, *_ in kind._fields_:
            if name != "padding":
                at = offset + getattr(kind, name).offset
                yield from _fields_of(of_field, f"{path}.{name}" if path else name, at)
    elif issubclass(kind, ctypes.Array) and issubclass(kind._type_, ctypes.Structure):
        for i in range(kind._length_):
            yield from _fields_of(kind._type_, f"{path}[{i}]", offset + i * ctypes.sizeof(kind._type_))
    else:
        yield path, offset

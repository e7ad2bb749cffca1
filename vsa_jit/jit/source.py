"""The CUDA sources: where they are, and one of them with all that it includes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vsa_jit.jit.errors import Unavailable

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
# Only nvcc sees it: NVRTC has no C++ standard library.
_HOST_ONLY = ("cstdint",)


@dataclass(frozen=True)
class Source:
    """A source file with all that it includes, by path below the folder of sources; no other path is part of it."""

    files: dict[str, str]
    needs_cuda_headers: bool

    @property
    def digest(self) -> str:
        """SHA-256 of names and texts."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            for part in (name, self.files[name]):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


def kernels_dir() -> Path:
    """The folder ``kernels_src``: inside the installed package, or beside it in a checkout.

    Raises:
        Unavailable: it is in neither place; the reason names both.
    """
    package = Path(__file__).resolve().parent.parent
    places = (package / "kernels_src", package.parent / "kernels_src")
    for place in places:
        if place.is_dir():
            return place
    raise Unavailable(
        f"the CUDA sources were expected at {places[0]} or {places[1]}, and are at neither", "install vsa-jit again"
    )


def read(file: Path, expected: str) -> str:
    """The text of a file of this package.

    Raises:
        Unavailable: it cannot be read; the reason starts with what was expected.
    """
    try:
        # Whatever locale the process, or a library in it, has set.
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"{expected}: {error.strerror}", "install vsa-jit again") from None


def read_source(main: str, root: Path) -> Source:
    """Reads a file below ``root`` and, in turn, all that it includes in quotes, each named from ``root``.

    Raises:
        Unavailable: a file is missing; the reason names it and who includes it.
    """
    files: dict[str, str] = {}
    needs_cuda_headers = False
    pending = [(main, "")]
    while pending:
        name, includer = pending.pop()
        if name in files:
            continue
        files[name] = read(root / name, f"{name}: expected below {root}{includer and f', included by {includer}'}")
        for quoted, angled in _INCLUDE.findall(files[name]):
            if quoted:
                pending.append((quoted, name))
            elif angled not in _HOST_ONLY:
                needs_cuda_headers = True
    return Source(files, needs_cuda_headers)

"""An entry of the cache: what it is compiled from, its manifest, and the check that it is whole."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class CompileSpec:
    """All that determines the compiled code, so that its hash is the key. No path and no time is part of it."""

    label: str
    engine: str
    compiler: str
    arch: str
    flags: tuple[str, ...]
    source: str
    source_digest: str
    artefact: str

    @functools.cached_property
    def key(self) -> str:
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "label"}
        return hashlib.sha256(json.dumps([FORMAT, fields], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """An entry on disk that passed its check."""

    folder: Path
    spec: CompileSpec
    size: int

    @property
    def artefact(self) -> Path:
        return self.folder / self.spec.artefact


class BadEntry(Exception):
    """An entry fails its check; the message says how."""


def manifest_of(spec: CompileSpec, artefact: bytes) -> str:
    record = {
        "format": FORMAT,
        "key": spec.key,
        # On disk a spec is called a recipe.
        "recipe": dataclasses.asdict(spec),
        "size": len(artefact),
        "sha256": hashlib.sha256(artefact).hexdigest(),
    }
    return json.dumps(record, indent=1)


def check_entry(key: str, manifest: bytes, artefact_of: Callable[[str], bytes]) -> tuple[CompileSpec, int]:
    """Checks that an entry's files are complete and belong to this key.

    Args:
        artefact_of: reads the artefact by its name.

    Returns:
        The spec and the artefact's size in bytes.

    Raises:
        BadEntry: they are not.
    """
    try:
        record = json.loads(manifest)
        fields = record["recipe"]
        flags = tuple(fields["flags"])
        texts = [*flags, *(value for name, value in fields.items() if name != "flags")]
        spec = CompileSpec(**{**fields, "flags": flags})
        size, digest = record["size"], record["sha256"]
        said_format, said_key = record["format"], record["key"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadEntry(f"{MANIFEST} is not a manifest") from None
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise BadEntry("its recipe is not of printable text")
    if said_format != FORMAT:
        raise BadEntry(f"its format is {said_format!r}, not {FORMAT}")
    if not (said_key == key == spec.key):
        raise BadEntry("it belongs to another key")
    if spec.artefact not in ("kernel.cubin", "kernel.so"):
        raise BadEntry(f"{spec.artefact!r} is no artefact's name")
    artefact = artefact_of(spec.artefact)
    if len(artefact) != size or hashlib.sha256(artefact).hexdigest() != digest:
        raise BadEntry(f"{spec.artefact} is not what was compiled")
    if not artefact.startswith(b"\x7fELF"):
        raise BadEntry(f"{spec.artefact} is no compiled code")
    return spec, size

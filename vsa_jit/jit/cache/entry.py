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
class Recipe:
    """All that determines an artefact, and nothing else: no path, no time."""

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
    """A checked entry."""

    folder: Path
    recipe: Recipe
    size: int

    @property
    def artefact(self) -> Path:
        return self.folder / self.recipe.artefact


class BadEntry(Exception):
    """What is wrong with an entry."""


def manifest_of(recipe: Recipe, artefact: bytes) -> str:
    record = {
        "format": FORMAT,
        "key": recipe.key,
        "recipe": dataclasses.asdict(recipe),
        "size": len(artefact),
        "sha256": hashlib.sha256(artefact).hexdigest(),
    }
    return json.dumps(record, indent=1)


def check_entry(key: str, manifest: bytes, artefact_of: Callable[[str], bytes]) -> tuple[Recipe, int]:
    """Checks an entry's contents: that they are whole, and those of this key.

    Args:
        artefact_of: reads the artefact by its name.

    Raises:
        BadEntry: they are not.
    """
    try:
        record = json.loads(manifest)
        fields = record["recipe"]
        flags = tuple(fields["flags"])
        texts = [*flags, *(value for name, value in fields.items() if name != "flags")]
        recipe = Recipe(**{**fields, "flags": flags})
        size, digest = record["size"], record["sha256"]
        said_format, said_key = record["format"], record["key"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadEntry(f"{MANIFEST} is not a manifest") from None
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise BadEntry("its recipe is not of printable text")
    if said_format != FORMAT:
        raise BadEntry(f"its format is {said_format!r}, not {FORMAT}")
    if not (said_key == key == recipe.key):
        raise BadEntry("it belongs to another key")
    if recipe.artefact not in ("kernel.cubin", "kernel.so"):
        raise BadEntry(f"{recipe.artefact!r} is no artefact's name")
    artefact = artefact_of(recipe.artefact)
    if len(artefact) != size or hashlib.sha256(artefact).hexdigest() != digest:
        raise BadEntry(f"{recipe.artefact} is not what was compiled")
    if not artefact.startswith(b"\x7fELF"):
        raise BadEntry(f"{recipe.artefact} is no compiled code")
    return recipe, size

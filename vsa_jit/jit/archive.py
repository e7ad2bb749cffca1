"""Compiled kernels as one file, to take from a machine that compiles to machines that run."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import tempfile
import threading
import zlib
from functools import partial
from pathlib import Path

from vsa_jit.jit.cache.entry import MANIFEST, BadEntry, CompileSpec, Entry, check_entry
from vsa_jit.jit.cache.store import KernelCache
from vsa_jit.jit.errors import CacheError
from vsa_jit.jit.toolchain import ARCHS

LARGEST_ARCHIVE = 1 << 28
_NAME = re.compile(r"(sm_[0-9a-z]+)/([0-9a-f]{64})/(manifest\.json|kernel\.cubin|kernel\.so)")


def export_entries(cache: KernelCache, file: Path) -> int:
    """Writes every good entry of a cache to an archive, which appears whole or not at all; returns how many.

    Raises:
        CacheError: the archive cannot be written.
    """
    target = file.resolve()
    if target.exists() and not target.is_file():
        raise CacheError(f"{file}: expected the name of a file, and it is something else")
    try:
        return _export(cache, target)
    except OSError as error:
        raise CacheError(f"{file}: cannot be written: {error.strerror}") from None


def _export(cache: KernelCache, file: Path) -> int:
    entries = [entry for _, entry in cache.entries() if isinstance(entry, Entry)]
    with tempfile.NamedTemporaryFile(dir=file.absolute().parent, prefix=f".{file.name}-", delete=False) as unfinished:
        try:
            with tarfile.open(fileobj=unfinished, mode="w:gz") as archive:
                for entry in entries:
                    for name in (MANIFEST, entry.spec.artefact):
                        content = (entry.folder / name).read_bytes()
                        member = tarfile.TarInfo(f"{entry.spec.arch}/{entry.spec.key}/{name}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            os.chmod(unfinished.name, 0o644)
            os.replace(unfinished.name, file)
        except BaseException:
            os.unlink(unfinished.name)
            raise
    return len(entries)


def import_entries(cache: KernelCache, file: Path) -> tuple[int, int]:
    """Takes every entry of an archive into a cache, or none of them if one is not what it should be.

    Returns:
        How many were new, and how many were there already.

    Raises:
        CacheError: the file is no archive, or an entry in it is bad, or the cache cannot be written to.
    """
    if not (cache.writable and cache.persistent):
        raise CacheError(f"{cache.root} cannot be written to, or ends with this process")
    new = present = 0
    for spec, artefact in _read(file):
        made = False

        def make(folder: Path, artefact: bytes = artefact) -> bytes:
            nonlocal made
            made = True
            return artefact

        try:
            cache.build(spec, make, threading.Event())
        except OSError as error:
            raise CacheError(f"{cache.root} cannot be written to: {error.strerror}") from None
        new, present = (new + 1, present) if made else (new, present + 1)
    return new, present


def _read(file: Path) -> list[tuple[CompileSpec, bytes]]:
    """The checked contents of an archive. Nothing is unpacked: members are read by name."""
    expected = f"{file}: expected an archive of `vsa-jit cache export`"
    contents: dict[tuple[str, str], dict[str, bytes]] = {}
    try:
        with gzip.open(file) as compressed:
            unpacked = compressed.read(LARGEST_ARCHIVE + 1)
        if len(unpacked) > LARGEST_ARCHIVE:
            raise CacheError(f"{expected}, of at most {LARGEST_ARCHIVE >> 20} MiB when unpacked")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                name = _NAME.fullmatch(member.name)
                if name is None or not member.isreg() or member.issparse() or name[1] not in ARCHS.values():
                    raise CacheError(f"{expected}, and {member.name!r} is not part of one")
                entry = contents.setdefault((name[1], name[2]), {})
                opened = archive.extractfile(member)
                if name[3] in entry or opened is None:
                    raise CacheError(f"{expected}, and {member.name!r} is in it twice")
                entry[name[3]] = opened.read()
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, OSError) as error:
        raise CacheError(f"{expected}: {getattr(error, 'strerror', None) or error}") from None
    checked = []
    for (arch, key), files in contents.items():
        try:
            spec, _ = check_entry(key, files.get(MANIFEST, b""), partial(_named, files))
            if spec.arch != arch:
                raise BadEntry(f"it is for {spec.arch}")
            if set(files) != {MANIFEST, spec.artefact}:
                raise BadEntry(f"it holds {', '.join(sorted(files))}")
        except BadEntry as error:
            raise CacheError(f"{expected}, and its entry {arch}/{key} is bad: {error}") from None
        checked.append((spec, files[spec.artefact]))
    return checked


def _named(files: dict[str, bytes], name: str) -> bytes:
    return files.get(name, b"")

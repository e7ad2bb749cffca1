"""Finding or compiling a kernel where the cache cannot be written, or another host is faster."""

import contextlib
import errno
import subprocess
import tempfile
from pathlib import Path

import pytest
from support.caches import get, mounted, only_warning
from support.toys import toy

from vsa_jit.jit import compile as compiling
from vsa_jit.jit.cache.store import KernelCache
from vsa_jit.jit.errors import CompileError

pytestmark = pytest.mark.usefixtures("sources", "forgotten")


def test_a_cache_that_can_only_be_read_is_read(folder, monkeypatch, compiles, caplog, forgotten):
    with mounted(folder):
        entry = get()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        forgotten()
        assert get() == entry
        assert compiles() == 1
        assert not caplog.records
        other = get(toy(7))
        assert not other.folder.is_relative_to(folder)
    assert f"{folder} cannot be written to" in only_warning(caplog)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk(folder, caplog):
    with mounted(folder, "size=400k"):
        get(toy(7))
        fill(folder)
        entry = get()
        assert entry.artefact.read_bytes().startswith(b"\x7fELF")
        assert not entry.folder.is_relative_to(folder)
        assert "No space left on device" in only_warning(caplog)
        (folder / "filler").unlink()


def test_a_disk_that_fills_up_while_compiling(folder, caplog, monkeypatch):
    run = compiling.run_worker
    with mounted(folder, "size=400k"):

        def full(label, private, *others):
            if private.is_relative_to(folder):
                fill(folder)
            run(label, private, *others)

        monkeypatch.setattr(compiling, "run_worker", full)
        assert not get().folder.is_relative_to(folder)
        assert "No space left on device" in only_warning(caplog)


def test_every_disk_full(folder, monkeypatch):
    with mounted(folder, "size=400k"):
        (folder / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        get(toy(7))
        fill(folder)
        with pytest.raises(CompileError, match="toy could not be compiled: No space left on device"):
            get()


def misses(monkeypatch) -> list[None]:
    """The first two looks into the cache find nothing; gives those that are left."""
    load = KernelCache.load
    answers = [None, None]
    monkeypatch.setattr(KernelCache, "load", lambda cache, spec: answers.pop() if answers else load(cache, spec))
    return answers


def test_another_host_that_published_first(folder, monkeypatch):
    """Locks that do not reach it: both compile, and the second finds the entry in its place."""
    entry = get()
    answers = misses(monkeypatch)
    assert get() == entry
    assert not answers


def test_another_host_that_published_while_this_one_could_not(folder, monkeypatch, caplog):
    entry = get()
    misses(monkeypatch)

    def swept(*arguments):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "kernel.cubin")

    monkeypatch.setattr(compiling, "run_worker", swept)
    assert get() == entry
    assert not caplog.records

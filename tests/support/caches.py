"""The cache of compiled kernels under test: a kernel in it, child processes, file systems, what a process remembers."""

import contextlib
import logging
import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.toys import ARCH, NVRTC, toy
from vsa_jit.jit.cache import location, lookup
from vsa_jit.jit.cache.entry import Entry
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.kernel import Kernel

fork = multiprocessing.get_context("fork")
SANDBOXED = "mounting a file system is not allowed here"


def forget() -> None:
    """Makes this process look for its cache again, and warn again."""
    for remembered in (location._open_cache, location.warn_not_persistent, lookup._warn_bad):
        remembered.cache_clear()
    location._private_caches.clear()


def get(kernel: Kernel | None = None) -> Entry:
    """The entry of a small kernel, compiled where the cache does not hold it."""
    (entry,) = entries_of([kernel or toy()], ARCH, NVRTC, target="a test")
    return entry


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a child that does some work; -9 where it was killed."""
    child = fork.Process(target=work)
    child.start()
    child.join()
    return child.exitcode


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[Path]:
    """A file system of its own in a new folder; skips the test where none can be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(("mode=755", *options)), "tmpfs", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip(f"{SANDBOXED}: {run.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The text of the one warning that was logged."""
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return record.getMessage()

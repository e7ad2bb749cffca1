"""Compiles kernels that the cache does not hold, each in a process of its own, several at once."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vsa_jit.jit import cache, progress
from vsa_jit.jit.cache import Entry, Recipe
from vsa_jit.jit.engines.base import Engine
from vsa_jit.jit.errors import CompileError, Unavailable
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.toolchain import ARCHS

WORKER = Path(__file__).parent / "worker" / "compile.py"
LOG = "log.txt"
TIME_LIMIT_S = 300.0
ROOM_BYTES = 1 << 20
# "a.cu(3): error: ...", "ptxas fatal : ...", "OSError: ..."; not PyTorch's "Error building extension".
_ERROR = re.compile(r"(error|fatal)\s*:", re.IGNORECASE)


def entries_of(kernels: Sequence[Kernel], arch: str, engine: Engine, *, target: str) -> list[Entry]:
    """The cache entries of kernels, in their order; those that are missing are compiled.

    Args:
        target: for which GPU, in words.

    Raises:
        CompileError: one does not compile.
    """
    recipes = [engine.recipe(kernel, arch) for kernel in kernels]
    found = {recipe: cache.find(recipe) for recipe in recipes}
    missing = {recipe: kernel for recipe, kernel in zip(recipes, kernels, strict=True) if found[recipe] is None}
    if missing:
        where = cache.open_store().root / ARCHS[arch]
        labels = [recipe.label for recipe in missing]
        with (
            progress.Compiling(labels, f"{target} ({ARCHS[arch]})", engine.compiler(), engine.seconds, where) as shown,
            ThreadPoolExecutor(at_once(len(missing), engine.gigabytes)) as pool,
        ):
            pending = {pool.submit(_entry_of, kernel, recipe, engine): recipe for recipe, kernel in missing.items()}
            try:
                for done in as_completed(pending):
                    found[pending[done]] = done.result()
                    shown.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [entry for recipe in recipes if (entry := found[recipe]) is not None]


def at_once(wanted: int, gigabytes: float) -> int:
    """How many compilers may run at a time: as many as there are cores, and as memory allows."""
    memory = available_gigabytes()
    by_memory = wanted if memory is None else int(memory / gigabytes)
    return max(1, min(wanted, len(os.sched_getaffinity(0)), by_memory))


def available_gigabytes() -> float | None:
    try:
        line = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(line[1]) / 2**20 if line else None


def _entry_of(kernel: Kernel, recipe: Recipe, engine: Engine) -> Entry:
    def make(folder: Path) -> bytes:
        try:
            engine.write_job(folder, kernel, recipe)
        except Unavailable as error:
            raise CompileError(kernel.label, str(error)) from None
        run_worker(kernel.label, folder)
        return (folder / recipe.artefact).read_bytes()

    return cache.find_or_build(recipe, make)


def run_worker(label: str, folder: Path) -> None:
    """Runs the compiler on the job in a folder, in a process that ends with this one, or after ``TIME_LIMIT_S``.

    Raises:
        CompileError: it failed.
        OSError: the folder has no room.
    """
    command = [sys.executable, str(WORKER), str(folder)]
    # The packages of this process, wherever they came from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    log = folder / LOG
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [*command, "--with-parent"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = worker.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
            if worker.stdin is not None:
                worker.stdin.close()
    if code == 0:
        return
    # A compiler that could not write its output is not to blame.
    probe = folder / "probe"
    probe.write_bytes(bytes(ROOM_BYTES))
    probe.unlink()
    if code is None:
        first_error = f"the compiler did not finish within {TIME_LIMIT_S:g} s"
    elif code < 0:
        first_error = f"the compiler crashed ({signal.Signals(-code).name})"
    else:
        first_error = first_error_of(log.read_text(errors="replace"))
    raise CompileError(label, first_error, shlex.join(command), log)


def first_error_of(log: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "the compiler said nothing")

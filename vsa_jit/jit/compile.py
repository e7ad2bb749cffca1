"""Compiles kernels that the cache does not hold, each in a process of its own, several at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vsa_jit.jit import progress
from vsa_jit.jit.cache.entry import CompileSpec, Entry
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.lookup import find, find_or_build
from vsa_jit.jit.engines.base import Engine
from vsa_jit.jit.errors import CompileError, Unavailable
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.toolchain import ARCHS
from vsa_jit.jit.worker.compile import kill_session

WORKER = Path(__file__).parent / "worker" / "compile.py"
TIME_LIMIT_S = 300.0
POLL_S = 0.01
ROOM_BYTES = 1 << 20
_SIGNALS = frozenset(signal.Signals)
# "a.cu(3): error: ...", "ptxas fatal : ...", "OSError: ..."; not PyTorch's "Error building extension".
_ERROR = re.compile(r"(error|fatal)\s*:", re.IGNORECASE)


def entries_of(kernels: Sequence[Kernel], arch: str, engine: Engine, *, target: str) -> list[Entry]:
    """The cache entries of kernels, in their order; those that are missing are compiled.

    Args:
        target: for which GPU, in words.

    Raises:
        CompileError: one does not compile.
    """
    specs = [engine.spec(kernel, arch) for kernel in kernels]
    found = {spec: find(spec) for spec in specs}
    missing = {spec: kernel for spec, kernel in zip(specs, kernels, strict=True) if found[spec] is None}
    if missing:
        cache = open_cache()
        where = cache.root / ARCHS[arch] if cache.persistent and cache.writable else None
        cancelled = threading.Event()
        labels = [spec.label for spec in missing]
        with (
            progress.Compiling(labels, f"{target} ({ARCHS[arch]})", engine.compiler(), engine.seconds, where) as shown,
            ThreadPoolExecutor(at_once(len(missing), engine.gigabytes)) as pool,
        ):
            try:
                pending = {
                    pool.submit(_entry_of, kernel, spec, engine, cancelled): spec for spec, kernel in missing.items()
                }
                for done in as_completed(pending):
                    found[pending[done]] = done.result()
                    shown.advance()
            except BaseException:
                # An error of one, or Ctrl-C: the pool ends when its compilers have.
                cancelled.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [entry for spec in specs if (entry := found[spec]) is not None]


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


def _entry_of(kernel: Kernel, spec: CompileSpec, engine: Engine, cancelled: threading.Event) -> Entry:
    def make(folder: Path) -> bytes:
        try:
            engine.write_job(folder, kernel, spec)
        except Unavailable as error:
            raise CompileError(kernel.label, str(error)) from None
        artefact = folder / spec.artefact
        run_worker(kernel.label, folder, artefact, cancelled)
        return artefact.read_bytes()

    return find_or_build(spec, make, cancelled)


def run_worker(label: str, folder: Path, artefact: Path, cancelled: threading.Event) -> None:
    """Makes the artefact of the job in a folder, in a process that ends with this one, or after ``TIME_LIMIT_S``.

    Raises:
        CompileError: it failed, did not end in time, does not start, or was cancelled.
        OSError: the folder has no room.
    """
    # Where Python is part of another program, that program would start itself.
    if "python" not in Path(sys.executable or "").name.lower():
        raise CompileError(label, f"this Python does not know its own program (sys.executable is {sys.executable!r})")
    # Without Python's own variables, which can make an interpreter do anything.
    program = [sys.executable, "-E", str(WORKER)]
    with (folder / CompileError.LOG).open("wb") as output:
        try:
            worker = subprocess.Popen(
                [*program, str(folder), "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            raise CompileError(label, f"{sys.executable} does not start: {error}") from None
        code = None
        try:
            code = _exit_code(worker, cancelled)
        finally:
            if code != 0:
                # One that crashed leaves those that it started; its number is its own until it is waited for.
                kill_session(worker.pid)
                worker.kill()
            worker.wait()
            if worker.stdin is not None:
                worker.stdin.close()
    if code == 0 and artefact.exists():
        return
    if cancelled.is_set():
        raise CompileError(label, "cancelled")
    # A compiler that could not write its output is not to blame.
    probe = folder / "probe"
    probe.write_bytes(bytes(ROOM_BYTES))
    probe.unlink()
    if code is None:
        first_error = f"the compiler did not finish within {TIME_LIMIT_S:g} s"
    elif code < 0:
        first_error = f"the compiler crashed ({signal.Signals(-code).name if -code in _SIGNALS else f'signal {-code}'})"
    else:
        first_error = first_error_of((folder / CompileError.LOG).read_text(errors="replace"))
    raise CompileError(label, first_error, program, folder)


def _exit_code(worker: subprocess.Popen, cancelled: threading.Event) -> int | None:
    """The exit code of a worker, still to be waited for, or None where it took too long or was cancelled."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while time.monotonic() < deadline and not cancelled.wait(POLL_S):
        try:
            ended = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            # Somebody else in this process waits for every child: whether there is an artefact will tell.
            return 0
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    return None


def first_error_of(log: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "the compiler said nothing")

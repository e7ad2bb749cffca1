"""The lock of a key: one compile for many processes, and nothing that blocks after a kill."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest
from support.caches import fork, get, only_warning
from support.toys import ARCH, NVRTC, toy

from vsa_jit.jit import compile as compiling
from vsa_jit.jit.cache.lock import locked
from vsa_jit.jit.errors import CompileError

pytestmark = pytest.mark.usefixtures("sources", "forgotten")


def test_sixteen_processes_compile_once(folder, compiles, tmp_path):
    start = fork.Barrier(16)
    keys = fork.Queue()

    def work():
        start.wait()
        keys.put(get().spec.key)

    children = [fork.Process(target=work) for _ in range(16)]
    for child in children:
        child.start()
    got = {keys.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 16
    assert got == {get().spec.key}
    assert compiles() == 1


def test_a_linked_lock_is_not_followed(folder, tmp_path, caplog):
    locks = folder / "sm_90a" / "locks"
    locks.mkdir(parents=True)
    (locks / f"{NVRTC.spec(toy(), ARCH).key}.lock").symlink_to(tmp_path / "made")
    assert not get().folder.is_relative_to(folder)
    assert "Too many levels of symbolic links" in only_warning(caplog)
    assert not (tmp_path / "made").exists()


def test_a_process_that_holds_the_lock_and_does_not_go_on(folder, monkeypatch, caplog):
    get(toy(7))
    held = fork.Event()

    def work():
        lock = folder / "sm_90a" / "locks" / f"{NVRTC.spec(toy(), ARCH).key}.lock"
        with locked(lock, threading.Event()):
            held.set()
            time.sleep(60)

    child = fork.Process(target=work)
    child.start()
    assert held.wait(30)
    monkeypatch.setattr("vsa_jit.jit.cache.lock.LOCK_LIMIT_S", 0.2)
    assert not get().folder.is_relative_to(folder)
    assert "another process holds the lock" in only_warning(caplog)
    child.kill()
    child.join()


def test_a_fork_during_a_failed_compile_leaves_no_lock(folder, monkeypatch, tmp_path):
    """A child that another thread forks meanwhile has the lock's file open."""
    children = []

    def fork_and_fail(label, *others):
        child = fork.Process(target=time.sleep, args=(60,))
        child.start()
        children.append(child)
        raise CompileError(label, "no")

    with monkeypatch.context() as patched:
        patched.setattr(compiling, "run_worker", fork_and_fail)
        with pytest.raises(CompileError):
            get()
    start = time.monotonic()
    assert get().folder.is_relative_to(folder)
    assert time.monotonic() - start < 20
    assert children[0].is_alive()
    children[0].kill()


def test_a_file_system_without_locks(folder, monkeypatch, caplog):
    import fcntl

    flock = fcntl.flock

    def refuse(file, operation):
        if str(folder) in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not get().folder.is_relative_to(folder)
    assert "No locks available" in only_warning(caplog)


def test_who_took_a_lock_may_fork_from_several_threads(tmp_path):
    """The lock leaves nothing behind that forks have to wait for."""
    code = f"""
import os, threading
from pathlib import Path
from vsa_jit.jit.cache.lock import locked
with locked(Path({str(tmp_path / "lock")!r}), threading.Event()):
    pass
forked = []
def fork():
    for _ in range(25):
        child = os.fork()
        if child == 0:
            os._exit(7)
        forked.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
threads = [threading.Thread(target=fork) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert forked == [7] * 100
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""

"""A folder of entries: compiled once, nothing that misleads after a kill, and cleared of what is ours alone."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.caches import fork, get, in_child, mounted
from support.processes import alive, pid_in, wait_until
from support.toys import ARCH, NVRTC, toy

from vsa_jit.jit import compile as compiling
from vsa_jit.jit.cache import store
from vsa_jit.jit.cache.entry import BadEntry, Entry
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.lock import LOCK_LIMIT_S, locked
from vsa_jit.jit.cache.lookup import find
from vsa_jit.jit.cache.store import KernelCache
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.errors import CacheError

pytestmark = pytest.mark.usefixtures("sources", "forgotten")


def test_second_call_compiles_nothing(folder, compiles):
    entry = get()
    assert entry.artefact.read_bytes().startswith(b"\x7fELF")
    assert entry.folder.parent == folder / "sm_90a"
    assert get() == entry
    assert compiles() == 1
    assert list((folder / "sm_90a" / "build").iterdir()) == []


def test_kernels_compile_together(folder, compiles):
    kernels = [toy(addend) for addend in range(4)]
    entries = entries_of(kernels, ARCH, NVRTC, target="a test")
    assert len({entry.spec.key for entry in entries}) == compiles() == 4
    assert [entry.spec.key for entry in entries] == [NVRTC.spec(kernel, ARCH).key for kernel in kernels]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name):
    """Makes a function kill its process when it is called."""

    def arrange(monkeypatch):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: kill())

    return arrange


def after(owner, name):
    """Makes a function kill its process when it has done its work."""
    function = getattr(owner, name)

    def killing(*args, **kwargs):
        function(*args, **kwargs)
        kill()

    def arrange(monkeypatch):
        monkeypatch.setattr(owner, name, killing)

    return arrange


STAGES = {
    "with the lock": before(KernelCache, "_compile"),
    "with the private folder": before(NVRTC.__class__, "write_job"),
    "with the job": after(NVRTC.__class__, "write_job"),
    "with the compiler started": before(compiling, "_exit_code"),
    "with the artefact": before(KernelCache, "publish"),
    "with the entry written": before(store, "check_entry"),
    "before the rename": before(os, "rename"),
    "after the rename": after(os, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_process_leaves_nothing_in_the_way(folder, monkeypatch, stage):
    get(toy(7))  # the folders are there, as after any first use

    def work():
        with monkeypatch.context() as patched:
            STAGES[stage](patched)
            get()

    assert in_child(work) == -signal.SIGKILL
    start = time.monotonic()
    entry = get()
    assert time.monotonic() - start < 20
    assert find(entry.spec) == entry
    assert [type(found) for _, found in open_cache().entries()] == [Entry, Entry]
    if stage != "after the rename":
        assert list((folder / "sm_90a" / "build").iterdir()) == []


def test_the_compiler_ends_with_the_process_that_wanted_it(folder, sources, monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    worker = tmp_path / "worker.py"
    worker.write_text(
        compiling.WORKER.read_text()
        .replace("    job = json", f"    Path({str(pid_file)!r}).write_text(str(os.getpid()))\n    job = json")
        .replace("program = ", "import time; time.sleep(60); program = ")
    )
    monkeypatch.setattr(compiling, "WORKER", worker)
    child = fork.Process(target=get)
    child.start()
    pid = pid_in(pid_file)
    child.kill()
    child.join()
    assert wait_until(lambda: not alive(pid))


def test_what_another_host_is_compiling_is_left_alone(folder, monkeypatch):
    """Its locks do not reach this one, and only time tells that its process was killed."""
    get(toy(7))
    key = NVRTC.spec(toy(), ARCH).key
    running, ended, ours = (folder / "sm_90a" / "build" / f"{key}-{name}-x" for name in ("a", "b", store._host()))
    for private in (running, ended, ours):
        private.mkdir()
    make_old(ended)
    get()
    assert [private.exists() for private in (running, ended, ours)] == [True, False, False]


def test_clear_removes_only_what_the_cache_made(folder, tmp_path):
    entry = get()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (folder / "notes.txt").write_text("mine")
    (folder / "sm_90a" / "mine").mkdir()
    (folder / "sm_90a" / ("0" * 64)).symlink_to(outside)
    cache = open_cache()
    assert {type(found) for _, found in cache.entries()} == {Entry, BadEntry}
    assert cache.clear() == 2
    assert not entry.folder.exists()
    assert (outside / "kept").exists()
    assert (folder / "notes.txt").exists()
    assert (folder / "sm_90a" / "mine").exists()
    assert cache.clear() == 0


def test_clear_leaves_running_compiles_alone(folder):
    get(toy(7))
    key = NVRTC.spec(toy(), ARCH).key
    build = folder / "sm_90a" / "build"
    running, ended, elsewhere = (
        build / f"{name}-x" for name in (f"{key}-{store._host()}", f"{'f' * 64}-{store._host()}", f"{'e' * 64}-another")
    )
    for private in (running, ended, elsewhere):
        private.mkdir()
    with locked(folder / "sm_90a" / "locks" / f"{key}.lock", threading.Event()):
        assert open_cache().clear() == 1
        assert [private.exists() for private in (running, ended, elsewhere)] == [True, False, True]
    make_old(elsewhere)
    open_cache().clear()
    assert [private.exists() for private in (running, elsewhere)] == [False, False]


def make_old(private: Path) -> None:
    """Older than any compile that could still run."""
    then = time.time() - LOCK_LIMIT_S - 60
    os.utime(private, (then, then))


def test_clear_where_no_lock_was_ever_made(folder):
    left = folder / "sm_90a" / "build" / f"{'f' * 64}-{store._host()}-x"
    left.mkdir(parents=True)
    open_cache().clear()
    assert not left.exists()


def test_clear_of_a_cache_that_can_only_be_read(folder, forgotten):
    with mounted(folder):
        get()
        (folder / "sm_file").write_text("")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        forgotten()
        with pytest.raises(CacheError, match=f"{folder} cannot be written to"):
            open_cache().clear()
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        forgotten()
        assert open_cache().clear() == 1

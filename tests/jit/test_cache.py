"""The cache of compiled kernels: one compile for many processes, nothing that blocks or misleads after a kill, no code
that somebody else could have written, and no folder that must be writable."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.caches import forget
from support.processes import alive, pid_in, wait_until
from support.toys import ARCH, HEADER, MAIN, NVRTC, toy, use_sources, write_sources

from vsa_jit.jit import compile as compiling
from vsa_jit.jit import toolchain
from vsa_jit.jit.cache import store
from vsa_jit.jit.cache.entry import BadEntry, Entry, manifest_of
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.lock import LOCK_LIMIT_S, locked
from vsa_jit.jit.cache.lookup import find
from vsa_jit.jit.cache.permissions import why_replaceable
from vsa_jit.jit.cache.store import KernelCache
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.engines.nvcc import NvccEngine
from vsa_jit.jit.errors import CacheError, CompileError

ROOT = Path(__file__).parents[2]
fork = multiprocessing.get_context("fork")
SANDBOXED = "mounting a file system is not allowed here"


pytestmark = pytest.mark.usefixtures("sources")


@pytest.fixture(autouse=True)
def forgotten():
    """What one process remembers is not what the next test's would."""

    forget()
    yield forget
    forget()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(path))
    return path


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """How many compilers ran, in this process and in its children."""
    log = tmp_path / "compiles"
    log.touch()
    run = compiling.run_worker

    def counted(*arguments):
        with log.open("a") as file:
            file.write("x")
        run(*arguments)

    monkeypatch.setattr(compiling, "run_worker", counted)
    return lambda: len(log.read_text())


def get(kernel=None) -> Entry:
    (entry,) = entries_of([kernel or toy()], ARCH, NVRTC, target="a test")
    return entry


def in_child(work) -> int:
    """The exit code of a child that does some work; -9 where it was killed."""
    child = fork.Process(target=work)
    child.start()
    child.join()
    return child.exitcode


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


def truncated(entry, other):
    content = entry.artefact.read_bytes()
    entry.artefact.write_bytes(content[: len(content) // 2])


def empty(entry, other):
    entry.artefact.write_bytes(b"")


def altered(entry, other):
    content = bytearray(entry.artefact.read_bytes())
    content[-1] ^= 1
    entry.artefact.write_bytes(bytes(content))


def without_artefact(entry, other):
    entry.artefact.unlink()


def without_manifest(entry, other):
    (entry.folder / "manifest.json").unlink()


def with_empty_manifest(entry, other):
    (entry.folder / "manifest.json").write_text("")


def of_another_format(entry, other):
    record = json.loads((entry.folder / "manifest.json").read_text())
    (entry.folder / "manifest.json").write_text(json.dumps({**record, "format": 0}))


def swapped(entry, other):
    shutil.rmtree(entry.folder)
    shutil.copytree(other.folder, entry.folder)


def renamed_recipe(entry, other):
    """Another kernel's files under this key's name, with a manifest that claims the key."""
    swapped(entry, other)
    record = json.loads((entry.folder / "manifest.json").read_text())
    (entry.folder / "manifest.json").write_text(json.dumps({**record, "key": entry.spec.key}))


def no_folder(entry, other):
    shutil.rmtree(entry.folder)
    entry.folder.write_text("not a folder")


def linked(entry, other):
    moved = entry.folder.parent.parent / "elsewhere"
    entry.folder.rename(moved)
    entry.folder.symlink_to(moved)


def writable_by_others(entry, other):
    entry.artefact.chmod(0o666)


def no_code(entry, other):
    artefact = b"a text"
    entry.artefact.write_bytes(artefact)
    (entry.folder / "manifest.json").write_text(manifest_of(entry.spec, artefact))


@pytest.mark.parametrize(
    "spoil",
    [
        truncated, empty, altered, without_artefact, without_manifest, with_empty_manifest, of_another_format, swapped,
        renamed_recipe, no_folder, linked, writable_by_others, no_code,
    ],
)  # fmt: skip
def test_a_bad_entry_is_dropped_and_rebuilt_with_one_warning(folder, compiles, caplog, spoil):
    entry, other = get(), get(toy(7))
    spoil(entry, other)
    for _ in range(3):
        rebuilt = get()
        assert rebuilt == entry
        assert find(entry.spec) == entry
    assert compiles() == 3
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(f"dropped the compiled kernel at {entry.folder}: ")
    if spoil is linked:
        assert (folder / "elsewhere" / "kernel.cubin").exists()


def test_what_an_entry_depends_on(sources, monkeypatch):
    spec = NVRTC.spec(toy(), ARCH)
    keys = {spec.key}
    keys.add(NVRTC.spec(toy(3), ARCH).key)
    keys.add(replace(spec, flags=(*spec.flags, "-G")).key)
    keys.add(replace(spec, compiler="NVRTC 12.9").key)
    keys.add(replace(spec, engine="nvcc").key)
    keys.add(replace(spec, arch="sm_100a").key)
    write_sources(sources, header=HEADER.replace("40", "41"))
    keys.add(NVRTC.spec(toy(), ARCH).key)
    write_sources(sources, main=MAIN + "// changed\n")
    keys.add(NVRTC.spec(toy(), ARCH).key)
    assert len(keys) == 8
    write_sources(sources)
    assert NVRTC.spec(toy(label="another name"), ARCH).key == spec.key
    found = toolchain.find_nvrtc()
    newer = replace(found, version=(13, 9), build="13.9")
    monkeypatch.setattr("vsa_jit.jit.engines.nvrtc.find_nvrtc", lambda: newer)
    assert NVRTC.spec(toy(), ARCH).key not in keys


def test_two_checkouts_share_an_entry(folder, compiles, monkeypatch, tmp_path):
    first = get()
    use_sources(monkeypatch, write_sources(tmp_path / "another" / "place"))
    assert get() == first
    assert compiles() == 1
    assert str(tmp_path).encode() not in first.artefact.read_bytes()


def test_nvcc_recipes_hold_no_path_either(monkeypatch, tmp_path):
    nvcc = toolchain.Nvcc("/cuda/bin/nvcc", "/cuda", (13, 0), "13.0.88")
    monkeypatch.setattr("vsa_jit.jit.engines.nvcc.find_nvcc", lambda: nvcc)
    spec = NvccEngine().spec(toy(), ARCH)
    use_sources(monkeypatch, write_sources(tmp_path / "another" / "place"))
    elsewhere = replace(nvcc, path="/opt/cuda/bin/nvcc", home="/opt/cuda")
    monkeypatch.setattr("vsa_jit.jit.engines.nvcc.find_nvcc", lambda: elsewhere)
    assert NvccEngine().spec(toy(), ARCH) == spec
    keys = {spec.key}
    newer = replace(nvcc, build="13.0.99")
    monkeypatch.setattr("vsa_jit.jit.engines.nvcc.find_nvcc", lambda: newer)
    keys.add(NvccEngine().spec(toy(), ARCH).key)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    keys.add(NvccEngine().spec(toy(), ARCH).key)
    assert len(keys) == 3


@contextlib.contextmanager
def mounted(path: Path, *options: str):
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(("mode=755", *options)), "tmpfs", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip(f"{SANDBOXED}: {run.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def only_warning(caplog) -> str:
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return record.getMessage()


def test_a_home_that_cannot_be_written_to(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("VSA_JIT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with mounted(tmp_path / "home", "ro") as home:
        monkeypatch.setenv("HOME", str(home))
        entry = get()
        assert get() == entry
        assert not entry.folder.is_relative_to(home)
        assert stat.S_IMODE(entry.folder.parent.parent.stat().st_mode) == 0o700
    assert only_warning(caplog) == (
        f"compiled kernels are not kept for the next process: {home}/.cache/vsa_jit cannot be written to "
        "(VSA_JIT_CACHE_DIR names a folder to keep them in)"
    )


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


def test_cupy_is_imported_in_a_home_that_cannot_be_written_to(monkeypatch, tmp_path):
    with mounted(tmp_path / "home", "ro") as home:
        environment = {**os.environ, "HOME": str(home)}
        environment.pop("CUPY_CACHE_DIR", None)
        code = "from vsa_jit.jit.engines.nvrtc import import_cupy; print(import_cupy().__name__)"
        run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "cupy"), run.stderr


def refusing(monkeypatch, folder: Path) -> None:
    """Looking into a folder is refused, as by a home whose ticket has expired."""
    stat_of = os.stat

    def refuse(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat_of(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "lstat", refuse)


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "VSA_JIT_CACHE_DIR"])
def test_a_folder_that_cannot_be_reached(monkeypatch, tmp_path, caplog, variable):
    for other in ("XDG_CACHE_HOME", "VSA_JIT_CACHE_DIR"):
        monkeypatch.delenv(other, raising=False)
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setenv(variable, str(locked / "mine"))
    with monkeypatch.context() as patched:
        refusing(patched, locked)
        cache = open_cache()
    assert not cache.persistent
    assert re.search(r"cannot be reached", only_warning(caplog))
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("home", [None, "nowhere", "relative"])
def test_no_home(monkeypatch, tmp_path, caplog, home):
    monkeypatch.delenv("VSA_JIT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    if home is None:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "relative").mkdir()
        monkeypatch.setenv("HOME", home if home == "relative" else str(tmp_path / home))
    entry = get()
    assert entry.artefact.exists()
    assert not (tmp_path / "nowhere").exists()
    assert "not kept for the next process" in only_warning(caplog)


def test_the_private_folder_ends_with_its_process(lose_home):
    lose_home()
    code = "from vsa_jit.jit.cache.location import open_cache; print(open_cache().root)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    path = Path(run.stdout.strip())
    assert path.name.startswith("vsa_jit-")
    assert not path.exists()


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


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_can_write_to_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    message = f"VSA_JIT_CACHE_DIR: expected a folder that nobody else can write to, but {folder} can be written to by"
    with pytest.raises(CacheError, match=message):
        get()
    assert list(folder.iterdir()) == []


def test_a_default_folder_that_others_can_write_to_is_not_used(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("VSA_JIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vsa_jit").mkdir(mode=0o777)
    (tmp_path / "vsa_jit").chmod(0o777)
    assert not get().folder.is_relative_to(tmp_path / "vsa_jit")
    assert "can be written to by others" in only_warning(caplog)
    assert list((tmp_path / "vsa_jit").iterdir()) == []


def test_a_folder_that_others_could_replace_is_refused(monkeypatch, tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(open_to_all / "cache"))
    with pytest.raises(CacheError, match=f"but {open_to_all} can be written to by others"):
        get()


def test_a_folder_of_somebody_else_is_refused(folder):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(CacheError, match="belongs to user 12345"):
        get()


def test_a_link_in_the_place_of_the_folder_is_refused(folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    folder.symlink_to(target)
    with pytest.raises(CacheError, match="is a symbolic link"):
        get()
    assert list(target.iterdir()) == []


def precious(target: Path) -> Path:
    """A folder that is not ours, with what has the name of an entry of ours in it."""
    key = NVRTC.spec(toy(), ARCH).key
    for place in (target / key, target / f"{key}-abc", target / "build" / f"{key}-abc", target / "failed" / key):
        place.mkdir(parents=True)
        (place / "precious").write_text("")
    return target


def files_of(target: Path) -> list[Path]:
    return sorted(path for path in target.rglob("*"))


@pytest.mark.parametrize("name", ["sm_90a", "sm_90a/locks", "sm_90a/build"])
def test_a_link_inside_the_folder_is_not_followed(folder, tmp_path, caplog, name):
    target = precious(tmp_path / "target")
    before = files_of(target)
    link = folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert not get().folder.is_relative_to(folder)
    assert "is a symbolic link" in only_warning(caplog)
    assert files_of(target) == before
    open_cache().clear()
    assert files_of(target) == before


def test_a_linked_lock_is_not_followed(folder, tmp_path, caplog):
    locks = folder / "sm_90a" / "locks"
    locks.mkdir(parents=True)
    (locks / f"{NVRTC.spec(toy(), ARCH).key}.lock").symlink_to(tmp_path / "made")
    assert not get().folder.is_relative_to(folder)
    assert "Too many levels of symbolic links" in only_warning(caplog)
    assert not (tmp_path / "made").exists()


def test_an_architecture_that_others_can_write_to_is_not_loaded(folder, compiles, caplog):
    get().folder.parent.chmod(0o777)
    assert not get().folder.is_relative_to(folder)
    assert compiles() == 2
    assert "can be written to by others" in only_warning(caplog)


def test_a_linked_folder_of_failures_is_not_followed(folder, sources, tmp_path):
    target = precious(tmp_path / "target")
    before = files_of(target)
    (folder / "sm_90a").mkdir(parents=True)
    (folder / "sm_90a" / "failed").symlink_to(target)
    write_sources(sources, main=MAIN.replace("value()", "missing()"))
    key = NVRTC.spec(toy(), ARCH).key
    (target / key).mkdir()
    (target / key / "precious").write_text("")
    before = files_of(target)
    with pytest.raises(CompileError) as caught:
        get()
    assert caught.value.log.exists()
    assert not caught.value.log.is_relative_to(folder)
    assert files_of(target) == before
    open_cache().clear()
    assert files_of(target) == before


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("relative/path", "expected an absolute path of a folder, got 'relative/path'"),
        ("{tmp}/file", "/file is not a folder"),
        ("{tmp}/file/below", "/file is not a folder"),
        ("{tmp}/loop/below", "cannot be reached"),
        ("/" + "x" * 300, "cannot be reached"),
        ("/dev/null", "is not a folder|can be written to by others"),
        ("/tmp", "can be written to by others"),
    ],
)
def test_a_wrong_variable(monkeypatch, tmp_path, value, match):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", value.format(tmp=tmp_path))
    with pytest.raises(CacheError, match=rf"VSA_JIT_CACHE_DIR: .*({match})"):
        get()


def test_a_link_on_the_way_is_followed_once(monkeypatch, tmp_path):
    """Whoever can change the link later changes nothing."""
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(tmp_path / "link" / "cache"))
    assert open_cache().root == real / "cache"
    assert get().folder.is_relative_to(real)


def test_a_parent_that_a_shared_group_can_write_to_is_refused(monkeypatch, tmp_path):
    parent = tmp_path / "project"
    parent.mkdir()
    parent.chmod(0o775)
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(parent / "cache"))
    user, group = os.getuid(), os.getgid()
    monkeypatch.setattr(os, "getgid", lambda: user)
    (tmp_path / "own").mkdir()
    if group == user:
        assert why_replaceable(parent / "cache") is None
    monkeypatch.setattr(os, "getgid", lambda: user + 1)
    with pytest.raises(CacheError, match=f"but {parent} can be written to by others"):
        get()


def test_a_home_of_somebody_else_is_left_alone(monkeypatch, tmp_path, caplog):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    monkeypatch.delenv("VSA_JIT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    monkeypatch.setenv("HOME", str(home))
    assert get().artefact.exists()
    assert list(home.iterdir()) == []
    assert f"{home} belongs to user 12345" in only_warning(caplog)


def test_looking_makes_no_folder(folder):
    assert list(open_cache().entries()) == []
    assert find(NVRTC.spec(toy(), ARCH)) is None
    assert not folder.exists()


def test_files_are_private_under_any_umask(monkeypatch, tmp_path):
    folder = tmp_path / "new" / "parents" / "cache"
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(folder))
    old = os.umask(0)
    try:
        entry = get()
    finally:
        os.umask(old)
    assert entry.folder.is_relative_to(folder)
    for path in (
        folder.parent.parent,
        folder.parent,
        folder,
        entry.folder.parent,
        entry.folder,
        *entry.folder.iterdir(),
    ):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0, path


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


def test_a_forked_child_does_not_remove_the_private_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"""
import os, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from vsa_jit.jit.cache.location import private_cache
root = private_cache().root
child = os.fork()
if child == 0:
    raise SystemExit(0)
os.waitpid(child, 0)
print(root.exists())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "True"


def test_a_forked_child_makes_its_own_private_folder(monkeypatch, tmp_path, lose_home):
    """That of its parent ends with the parent."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lose_home()
    mine = get()
    roots = fork.Queue()

    def work():
        assert find(mine.spec) is None
        roots.put((open_cache().root, get().folder))

    assert in_child(work) == 0
    root, folder = roots.get(timeout=30)
    assert root != open_cache().root
    assert folder.is_relative_to(root)
    assert mine.artefact.exists()


def test_a_compiler_whose_artefact_is_no_code(folder, monkeypatch):
    monkeypatch.setattr(compiling, "run_worker", lambda label, private, artefact, cancelled: artefact.touch())
    with pytest.raises(CompileError, match=r"toy could not be compiled: kernel\.cubin is no compiled code"):
        get()
    assert list(open_cache().entries()) == []


def test_nowhere_to_write_is_an_error_with_a_name(monkeypatch, lose_home):
    def nowhere(**kwargs):
        raise FileNotFoundError("No usable temporary directory found")

    lose_home()
    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    with pytest.raises(CacheError, match="no folder for compiled kernels: No usable temporary directory found"):
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


def test_another_host_that_published_while_this_one_could_not(folder, monkeypatch, caplog):
    entry = get()
    misses(monkeypatch)

    def swept(*arguments):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "kernel.cubin")

    monkeypatch.setattr(compiling, "run_worker", swept)
    assert get() == entry
    assert not caplog.records


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


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_error_names_outlives_a_private_folder(tmp_path, sources, fails):
    if fails:
        write_sources(sources, main=MAIN.replace("value()", "missing()"))
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from pathlib import Path
from support.toys import *
from vsa_jit.jit.compile import CompileError, entries_of
from vsa_jit.jit.engines import base
base.kernels_dir = lambda: Path({str(sources)!r})
try:
    print(entries_of([toy()], ARCH, NVRTC, target="a test")[0].artefact)
except CompileError as error:
    print(error.log)
"""
    environment = {**os.environ, "HOME": str(tmp_path / "nowhere"), "TMPDIR": str(tmp_path)}
    for variable in ("VSA_JIT_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(variable, None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path = Path(run.stdout.strip())
    assert path.is_relative_to(tmp_path)
    assert path.exists() == fails

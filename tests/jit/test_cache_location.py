"""Where the cache is: no folder must be writable, and a private one ends with its process."""

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.caches import fork, get, in_child, mounted, only_warning
from support.toys import ARCH, MAIN, NVRTC, toy, write_sources

from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.lookup import find
from vsa_jit.jit.errors import CacheError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("sources", "forgotten")


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


def test_looking_makes_no_folder(folder):
    assert list(open_cache().entries()) == []
    assert find(NVRTC.spec(toy(), ARCH)) is None
    assert not folder.exists()


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


def test_nowhere_to_write_is_an_error_with_a_name(monkeypatch, lose_home):
    def nowhere(**kwargs):
        raise FileNotFoundError("No usable temporary directory found")

    lose_home()
    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    with pytest.raises(CacheError, match="no folder for compiled kernels: No usable temporary directory found"):
        get()


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

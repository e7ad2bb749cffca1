"""No code that somebody else could have written is loaded, and no link leads out of the cache."""

import os
import stat
from pathlib import Path

import pytest
from support.caches import get, only_warning
from support.toys import ARCH, MAIN, NVRTC, toy, write_sources

from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.permissions import why_replaceable
from vsa_jit.jit.errors import CacheError, CompileError

pytestmark = pytest.mark.usefixtures("sources", "forgotten")


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

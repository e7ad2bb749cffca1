"""Entries of the cache: what their key depends on, and what a bad one is not mistaken for."""

import json
import logging
import platform
import shutil
from dataclasses import replace

import pytest
from support.caches import get
from support.toys import ARCH, HEADER, MAIN, NVRTC, toy, use_sources, write_sources

from vsa_jit.jit import compile as compiling
from vsa_jit.jit import toolchain
from vsa_jit.jit.cache.entry import manifest_of
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.lookup import find
from vsa_jit.jit.engines.nvcc import NvccEngine
from vsa_jit.jit.errors import CompileError

pytestmark = pytest.mark.usefixtures("sources", "forgotten")


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
def test_a_bad_entry_is_dropped_and_rebuilt_with_one_warning(cache_of_two, folder, compiles, caplog, spoil):
    shutil.copytree(cache_of_two, folder)
    entry, other = get(toy(2)), get(toy(1))
    assert compiles() == 0
    spoil(entry, other)
    for _ in range(3):
        rebuilt = get()
        assert rebuilt == entry
        assert find(entry.spec) == entry
    assert compiles() == 1
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


def test_a_compiler_whose_artefact_is_no_code(folder, monkeypatch):
    monkeypatch.setattr(compiling, "run_worker", lambda label, private, artefact, cancelled: artefact.touch())
    with pytest.raises(CompileError, match=r"toy could not be compiled: kernel\.cubin is no compiled code"):
        get()
    assert list(open_cache().entries()) == []

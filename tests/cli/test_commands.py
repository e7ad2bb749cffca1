"""``vsa-jit warmup``, ``cache`` and ``doctor``, and ``vsa_jit.warmup``: what they do, print and refuse."""

import io
import json
import os
import shutil
import stat
import tarfile
from pathlib import Path

import pytest
import torch
from support.caches import forget
from support.toys import ARCH, NVRTC, toy

import vsa_jit
from vsa_jit import doctor
from vsa_jit.backends import warmup
from vsa_jit.backends.sm90 import support
from vsa_jit.cli.main import main
from vsa_jit.jit import engines, toolchain
from vsa_jit.jit.archive import export_entries, import_entries
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.cache.lookup import find
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.errors import CacheError, Unavailable


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "cache"
    for variable in ("VSA_JIT_ENGINE", "VSA_JIT_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(path))
    forget()
    yield path
    forget()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def small_kernels(sources, monkeypatch):
    """Instead of the package's, which take seconds to compile."""
    monkeypatch.setattr(warmup, "kernels_of", lambda dtype, head_dim, block, segments: [toy(1), toy(2)])


@pytest.fixture
def entries(sources, cache_of_two, folder):
    """Two entries of small kernels."""
    shutil.copytree(cache_of_two, folder)
    return entries_of([toy(1), toy(2)], ARCH, NVRTC, target="a test")


def command(*arguments: str) -> int:
    return main(arguments)


def test_warmup_without_a_gpu(no_gpu, capsys, folder):
    assert command("warmup", "--arch", "9.0a", "--dtype", "bf16", "--head-dim", "128", "--block-size", "4x4x4") == 0
    *paths, count = capsys.readouterr().out.splitlines()
    assert count == "15 kernels are ready"
    assert {Path(path).parent for path in paths} == {folder / "sm_90a"}
    before = [os.stat(path).st_mtime_ns for path in paths]
    found = vsa_jit.warmup("9.0a", dtype=torch.bfloat16, head_dim=128, block_size=64)
    assert [str(path) for path in found] == paths
    assert [os.stat(path).st_mtime_ns for path in paths] == before


@pytest.mark.parametrize("arch", ["9.0", "SM90", "sm_90a", "90", "90a", "compute_90a"])
def test_warmup_by_any_name(no_gpu, small_kernels, entries, capsys, arch):
    arguments = ("--head-dim", "128", "--block-size", "4,4,4")
    assert command("warmup", "--arch", "9.0a", "--dtype", "bf16", *arguments) == 0
    by_name = capsys.readouterr().out
    assert command("warmup", "--arch", arch, "--dtype", "bfloat16", *arguments) == 0
    assert capsys.readouterr().out == by_name
    assert list(map(str, vsa_jit.warmup(arch, dtype=torch.bfloat16, head_dim=128))) == by_name.splitlines()[:-1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "arch: expected one of ('9.0a',) where there is no GPU, got None"),
        (("--arch", "8.0"), "argument --arch: invalid choice: '8.0'"),
        (("--arch", "sm_90x"), "argument --arch: invalid choice: 'sm_90x'"),
        (("--arch", "9.0a", "--engine", "ptx"), "argument --engine: invalid choice: 'ptx'"),
        (("--arch", "9.0a", "--dtype", "fp32"), "argument --dtype: invalid choice: 'fp32'"),
        (("--arch", "9.0a", "--head-dim", "96"), "head_dim: expected 64 or 128, got 96"),
        (("--arch", "9.0a", "--block-size", "63"), "argument --block-size: expected"),
    ],
)
def test_warmup_refuses(no_gpu, capsys, arguments, error):
    assert command("warmup", *arguments) == 2
    assert f"vsa-jit: error: {error}" in capsys.readouterr().err


def test_warmup_where_nothing_can_be_kept(no_gpu, small_kernels, capsys, lose_home):
    lose_home()
    assert command("warmup", "--arch", "9.0a", "--dtype", "bf16", "--head-dim", "128") == 1
    assert "the kernels cannot be kept" in capsys.readouterr().err
    with pytest.raises(CacheError, match="the kernels cannot be kept"):
        vsa_jit.warmup(ARCH, dtype=torch.bfloat16, head_dim=128)


def test_warmup_where_a_part_of_the_folder_is_unsafe(no_gpu, small_kernels, capsys, folder):
    (folder / "sm_90a").mkdir(parents=True)
    (folder / "sm_90a").chmod(0o777)
    assert command("warmup", "--arch", "9.0a", "--dtype", "bf16", "--head-dim", "128") == 1
    assert "the kernels cannot be kept" in capsys.readouterr().err


def test_warmup_of_a_full_cache_that_can_only_be_read(no_gpu, small_kernels, folder, monkeypatch):
    arguments = ("warmup", "--arch", "9.0a", "--dtype", "bf16", "--head-dim", "128")
    assert command(*arguments) == 0
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *mode: Path(path) != folder and access(path, *mode))
    forget()
    assert command(*arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"arch": 9.0}, TypeError, "arch: expected a string, got float"),
        ({"arch": "8.9"}, ValueError, "arch: expected one of ('9.0a',), got '8.9'"),
        ({"arch": "sm_100"}, ValueError, "arch: expected one of ('9.0a',), got 'sm_100'"),
        ({"arch": ARCH, "dtype": "bf16"}, TypeError, "dtype: expected dtype or several, got str"),
        ({"arch": ARCH, "dtype": torch.float32}, ValueError, "dtype: expected torch.bfloat16 or torch.float16, got"),
        ({"arch": ARCH, "dtype": []}, ValueError, "dtype: expected at least one, got none"),
        ({"arch": ARCH, "head_dim": True}, TypeError, "head_dim: expected int or several, got bool"),
        ({"arch": ARCH, "head_dim": (64, 80)}, ValueError, "head_dim: expected 64 or 128, got 80"),
        ({"arch": ARCH, "block_size": 63}, ValueError, "block_size: expected a positive multiple of 64 tokens, got 63"),
        ({"arch": ARCH, "block_size": []}, ValueError, "block_size: expected at least one, got none"),
        ({"arch": ARCH, "engine": "cuda"}, ValueError, "engine: expected one of ('auto', 'nvrtc', 'nvcc'), got 'cuda'"),
    ],
)
def test_warmup_names_a_wrong_argument(no_gpu, arguments, error, message):
    with pytest.raises(error) as caught:
        vsa_jit.warmup(**arguments)
    assert str(caught.value).startswith(message)


def test_warmup_on_a_gpu_without_kernels_of_ours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert vsa_jit.warmup() == []


def test_the_command_on_a_gpu_without_kernels_of_ours(monkeypatch, capsys, lose_home):
    """There is nothing to keep, so that no folder is needed either."""
    lose_home()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert command("warmup") == 0
    assert capsys.readouterr().out == "0 kernels are ready\n"


def test_warmup_loads_on_the_gpu_that_is_here(monkeypatch):
    loaded = []
    monkeypatch.setattr(warmup, "_arch_here", lambda: ARCH)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(warmup, "entries_of", lambda *arguments, **others: [])
    monkeypatch.setattr(warmup.module, "load", lambda *arguments: loaded.append(arguments))
    vsa_jit.warmup(dtype=torch.float16, head_dim=64, block_size=[64, (2, 8, 8)], segments=False)
    ((kernels, device, engine),) = loaded
    labels = [kernel.label for kernel in kernels]
    assert labels[0] == "block means fp16 D=64"
    backward = ["backward's preparation", "backward of q", "backward of k and v"]
    assert labels[1:5] == [f"{name} fp16 D=64" for name in ("forward", *backward)]
    assert labels[5] == "order of an inverse's rows"
    coarse = ["coarse attention", "coarse backward of q", "coarse backward of k and v"]
    assert labels[6:9] == [f"{name} D=64" for name in coarse]
    # Blocks of 128 tokens need two more.
    assert labels[9:] == ["backward in one pass fp16 D=64", "store of dq fp16 D=64"]
    assert (device, engine) == (3, "nvrtc")


def test_a_wrong_engine_variable(no_gpu, monkeypatch, capsys):
    monkeypatch.setenv("VSA_JIT_ENGINE", "ptx")
    assert command("warmup", "--arch", "9.0a") == 2
    assert "VSA_JIT_ENGINE: expected one of ('auto', 'nvrtc', 'nvcc'), got 'ptx'" in capsys.readouterr().err


def test_list_shows_good_and_bad(entries, capsys, folder):
    good, bad = sorted(entries, key=lambda entry: entry.spec.key)
    bad.artefact.write_bytes(b"")
    assert command("cache", "list") == 0
    first, second, count = capsys.readouterr().out.splitlines()
    assert first.startswith(f"sm_90a  {good.spec.key[:12]}  toy  NVRTC 13")
    assert second == f"sm_90a  {bad.spec.key[:12]}  BAD: kernel.cubin is not what was compiled"
    assert count == f"2 kernels in {folder}"


def test_clear(entries, capsys, folder):
    assert command("cache", "clear") == 0
    assert capsys.readouterr().out == f"removed 2 kernels from {folder}\n"
    assert not any(entry.folder.exists() for entry in entries)


def test_export_and_import(entries, capsys, folder, tmp_path):
    contents = {entry.spec.key: entry.artefact.read_bytes() for entry in entries}
    archive = tmp_path / "kernels.tar.gz"
    assert command("cache", "export", str(archive)) == 0
    assert command("cache", "clear") == 0
    assert command("cache", "import", str(archive)) == 0
    assert command("cache", "import", str(archive)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"wrote 2 kernels to {archive}",
        f"removed 2 kernels from {folder}",
        f"took 2 kernels into {folder}; 0 were there already",
        f"took 0 kernels into {folder}; 2 were there already",
    ]
    found = {entry.spec.key: entry.artefact.read_bytes() for _, entry in open_cache().entries()}
    assert found == contents
    assert [find(entry.spec) for entry in entries] == entries
    assert stat.S_IMODE(archive.stat().st_mode) == 0o644


def test_export_leaves_bad_entries_out(entries, tmp_path):
    entries[0].artefact.write_bytes(b"")
    assert export_entries(open_cache(), tmp_path / "kernels.tar.gz") == 1


def test_an_export_that_fails_leaves_no_file(entries, tmp_path, monkeypatch, capsys):
    target = tmp_path / "archive" / "kernels.tar.gz"
    target.parent.mkdir()
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_entries(open_cache(), target)
    assert list(target.parent.iterdir()) == []
    assert command("cache", "export", str(tmp_path / "nowhere" / "kernels.tar.gz")) == 1
    assert "nowhere" in capsys.readouterr().err


def test_an_export_replaces_only_files(entries, tmp_path, capsys):
    pipe, real, link = tmp_path / "pipe", tmp_path / "real", tmp_path / "link"
    os.mkfifo(pipe)
    real.write_text("old")
    link.symlink_to(real)
    assert command("cache", "export", str(pipe)) == 1
    assert "expected the name of a file" in capsys.readouterr().err
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert command("cache", "export", str(link)) == 0
    assert link.is_symlink()
    assert tarfile.is_tarfile(real)


def packed(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                # A header alone, whatever it says of contents.
                header = content.tobuf(tarfile.PAX_FORMAT if content.pax_headers else tarfile.GNU_FORMAT)
                archive.fileobj.write(header)
                archive.offset += len(header)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def entry_files(entry) -> dict[str, bytes]:
    prefix = f"{entry.spec.arch}/{entry.spec.key}"
    return {f"{prefix}/{path.name}": path.read_bytes() for path in entry.folder.iterdir()}


def a_link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE
    member.linkname = target
    return member


def a_sparse_file(name: str) -> tarfile.TarInfo:
    """A few bytes that say they are a terabyte."""
    member = tarfile.TarInfo(name)
    member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "1"}
    return member


def a_huge_file(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 1 << 63
    return member


def spoiled(good: dict[str, bytes], part: str, change) -> dict[str, bytes]:
    return {name: change(content) if name.endswith(part) else content for name, content in good.items()}


BROKEN = {
    "altered code": lambda files: spoiled(files, ".cubin", lambda code: code[:-1] + bytes([code[-1] ^ 1])),
    "no code": lambda files: {name: content for name, content in files.items() if not name.endswith(".cubin")},
    "no manifest": lambda files: {name: content for name, content in files.items() if not name.endswith(".json")},
    "empty manifest": lambda files: spoiled(files, ".json", lambda text: b""),
    "another key": lambda files: {name.replace(name.split("/")[1], "0" * 64): text for name, text in files.items()},
    "another architecture": lambda files: {name.replace("sm_90a", "sm_80"): text for name, text in files.items()},
    "a path outside": lambda files: {**files, "../outside": b"x"},
    "an absolute path": lambda files: {**files, "/tmp/outside": b"x"},
    "another file": lambda files: {**files, f"{next(iter(files)).rpartition('/')[0]}/run.sh": b"x"},
    "a manifest too deep": lambda files: spoiled(files, ".json", lambda text: b"[" * 200_000),
    "a label with escapes": lambda files: spoiled(files, ".json", lambda text: text.replace(b'"toy"', b'"\\u001b[2J"')),
    "a compiler with escapes": lambda files: spoiled(
        files, ".json", lambda text: text.replace(b"NVRTC", b"\\u001b[2J")
    ),
    "a recipe too deep": lambda files: spoiled(
        files, ".json", lambda text: text.replace(b'"toy.cu"', b"[" * 900 + b"]" * 900)
    ),
    "a recipe that is none": lambda files: spoiled(files, ".json", lambda text: b'{"recipe": {"flags": 1}}'),
    "a size beyond all": lambda files: {**files, "huge": a_huge_file(f"sm_90a/{'0' * 64}/kernel.cubin")},
    "a sparse file": lambda files: {**files, "sparse": a_sparse_file(f"sm_90a/{'0' * 64}/kernel.cubin")},
    "another artefact": lambda files: {**files, f"{next(iter(files)).rpartition('/')[0]}/kernel.so": b"x"},
    "an unknown architecture": lambda files: {**files, f"sm_{'9' * 300}/{'0' * 64}/kernel.cubin": b"x"},
    "a link": lambda files: {**files, "link": a_link(f"sm_90a/{'0' * 64}/kernel.cubin", "/etc/passwd")},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_import_takes_nothing_of_a_broken_archive(entries, tmp_path, folder, broken):
    good, other = (entry_files(entry) for entry in entries)
    archive = packed(tmp_path / "broken.tar.gz", {**other, **BROKEN[broken](good)})
    shutil.rmtree(folder)
    forget()
    with pytest.raises(CacheError, match=f"{archive}: expected an archive of `vsa-jit cache export`"):
        import_entries(open_cache(), archive)
    assert list(open_cache().entries()) == []
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b broken gzip"])
def test_import_refuses_what_is_no_archive(tmp_path, capsys, content):
    archive = tmp_path / "kernels.tar.gz"
    archive.write_bytes(content)
    assert command("cache", "import", str(archive)) == 1
    assert f"vsa-jit: error: {archive}: expected an archive" in capsys.readouterr().err


def test_import_refuses_a_member_twice(entries, tmp_path):
    files = entry_files(entries[0])
    archive = tmp_path / "twice.tar.gz"
    with tarfile.open(archive, "w:gz") as written:
        for name, content in (*files.items(), *files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            written.addfile(member, io.BytesIO(content))
    with pytest.raises(CacheError, match="is in it twice"):
        import_entries(open_cache(), archive)


def test_import_refuses_what_would_fill_the_memory(entries, tmp_path, monkeypatch):
    archive = tmp_path / "kernels.tar.gz"
    export_entries(open_cache(), archive)
    monkeypatch.setattr("vsa_jit.jit.archive.LARGEST_ARCHIVE", 1 << 10)
    with pytest.raises(CacheError, match="of at most"):
        import_entries(open_cache(), archive)


def test_import_into_a_folder_that_does_not_take_it(entries, tmp_path, folder):
    archive = tmp_path / "kernels.tar.gz"
    export_entries(open_cache(), archive)
    shutil.rmtree(folder)
    (folder / "sm_90a").mkdir(parents=True)
    (folder / "sm_90a").chmod(0o777)
    with pytest.raises(CacheError, match=r"cannot be written to: .* can be written to by others"):
        import_entries(open_cache(), archive)


def test_import_where_nothing_is_kept(entries, tmp_path, capsys, lose_home):
    archive = tmp_path / "kernels.tar.gz"
    export_entries(open_cache(), archive)
    lose_home()
    assert command("cache", "import", str(archive)) == 1
    assert "ends with this process" in capsys.readouterr().err


def test_import_refuses_half_an_archive(entries, tmp_path):
    archive = tmp_path / "kernels.tar.gz"
    export_entries(open_cache(), archive)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(CacheError, match="expected an archive"):
        import_entries(open_cache(), archive)


def test_a_folder_that_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", "relative")
    assert command("cache", "list") == 1
    assert "VSA_JIT_CACHE_DIR: expected an absolute path of a folder, got 'relative'" in capsys.readouterr().err


@pytest.fixture
def nothing(monkeypatch, no_gpu):
    """A machine with nothing but Python and PyTorch for the CPU."""

    def missing(what, fix):
        def look(*args):
            raise Unavailable(f"no {what}", fix)

        return look

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(toolchain, "driver_version", missing("driver", "install a driver"))
    monkeypatch.setattr(toolchain, "package_version", lambda *names: None)
    for module in (toolchain, engines.nvrtc):
        monkeypatch.setattr(module, "find_nvrtc", missing("NVRTC", "pip install nvrtc"))
    for module in (toolchain, engines.nvcc):
        monkeypatch.setattr(module, "find_nvcc", missing("nvcc", "install nvcc"))
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)


def test_doctor_on_a_machine_with_nothing(nothing, capsys):
    assert command("doctor") == 0
    out = capsys.readouterr().out
    for line in (
        "GPU                   none that PyTorch sees",
        "driver                missing: no driver\n                      fix: install a driver",
        "nvrtc                 missing: no NVRTC\n                      fix: pip install nvrtc",
        "nvcc                  missing: no nvcc\n                      fix: install nvcc",
        "host compiler         missing: c++ is not on PATH\n                      fix: apt install g++, or set CXX",
        "ninja                 missing: ninja is not on PATH\n                      fix: pip install ninja",
        "triton                missing: triton is not installed\n                      fix: pip install triton",
        "engine nvrtc          would not: no NVRTC\n                      fix: pip install nvrtc",
        "engine nvcc           would not: no nvcc\n                      fix: install nvcc",
        "torch on cpu          would run",
    ):
        assert line + "\n" in out


def test_doctor_as_json(entries, capsys, folder):
    assert command("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert report["nvrtc"]["cuda"] == toolchain.dotted(toolchain.find_nvrtc().version)
    assert report["cache"] == {
        "folder": str(folder), "kept": True, "writable": True, "kernels": 2, "bad": 0,
        "bytes": sum(entry.size for entry in entries),
    }  # fmt: skip
    assert report["settings"]["VSA_JIT_CACHE_DIR"] == {"value": str(folder), "wrong": None}
    assert report["engines"]["nvrtc"] == {"would_run": True, "reason": None, "fix": None}
    if not torch.cuda.is_available():
        assert report["backends"]["cpu"]["torch"]["would_run"]
        assert not report["backends"]["cpu"]["sm90"]["would_run"]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_doctor_on_a_hopper_gpu_whose_driver_is_old(hopper, monkeypatch, capsys):
    support.why_no_engine.cache_clear()
    monkeypatch.setattr(toolchain, "driver_version", lambda: (12, 2))
    try:
        assert command("doctor") == 1
    finally:
        support.why_no_engine.cache_clear()
    out = capsys.readouterr().out
    assert "GPU 0                 NVIDIA H100, compute capability 9.0\n" in out
    reason = "the NVIDIA driver is of CUDA 12.2, older than 12.4 (install a newer NVIDIA driver)"
    assert f"sm90 on cuda:0        would not: {reason}\n" in out
    assert "triton on cuda:0      would run\n" in out


@pytest.mark.parametrize(
    "error",
    [Unavailable("the CUDA sources were expected elsewhere", "install vsa-jit again"), PermissionError(13, "no entry")],
)
def test_doctor_shows_what_keeps_a_call_from_its_engine(hopper, monkeypatch, capsys, error):
    support.why_no_engine.cache_clear()
    monkeypatch.setattr(toolchain, "driver_version", lambda: (13, 0))

    def missing():
        raise error

    monkeypatch.setattr("vsa_jit.jit.engines.base.kernels_dir", missing)
    try:
        assert command("doctor") == 1
    finally:
        support.why_no_engine.cache_clear()
    assert f"sm90 on cuda:0        would not: {error}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("VSA_JIT_CACHE_DIR", "relative", "expected an absolute path of a folder, got 'relative'"),
        ("VSA_JIT_ENGINE", "ptx", "VSA_JIT_ENGINE: expected one of"),
        ("VSA_JIT_BACKEND", "cuda", "VSA_JIT_BACKEND: expected one of"),
    ],
)
def test_doctor_shows_a_wrong_setting(monkeypatch, capsys, variable, value, shown):
    monkeypatch.setenv(variable, value)
    assert command("doctor") == 1
    assert shown in capsys.readouterr().out
    assert not doctor.is_well(doctor.examine())

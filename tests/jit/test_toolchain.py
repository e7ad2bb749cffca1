"""What there is to compile with: found in every layout, of one version, new enough, or named with what fixes it."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from vsa_jit import doctor
from vsa_jit.backends.sm90.support import ARCH
from vsa_jit.checks import check_choice
from vsa_jit.jit import engines, toolchain
from vsa_jit.jit.errors import Unavailable
from vsa_jit.jit.source import kernels_dir, read_source
from vsa_jit.jit.toolchain import Nvcc, Nvrtc

NVRTC, NVCC = engines.ENGINES
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "VSA_JIT_ENGINE", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    remembered = (toolchain.libcuda, toolchain.driver_version, toolchain.find_nvrtc, toolchain.find_nvcc)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def headers(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "cuda_runtime.h").write_text("")
    (folder / "cuda_runtime_api.h").write_text(f"#pragma once\n#define CUDART_VERSION  {number}\n")
    return folder


def fake_nvrtc(monkeypatch, tmp_path, version, include=None, found_via="site-packages"):
    library = tmp_path / "libnvrtc.so"
    library.write_bytes(b"12345")
    monkeypatch.setattr(toolchain, "locate_nvrtc", lambda: (str(library), found_via))
    monkeypatch.setattr(toolchain, "nvrtc_version", lambda path: version)
    monkeypatch.setattr(toolchain, "locate_headers", lambda: None if include is None else str(include))


def fake_driver(monkeypatch, version):
    def driver():
        if version is None:
            raise Unavailable("no NVIDIA driver")
        return version

    monkeypatch.setattr(toolchain, "driver_version", driver)


def test_nvrtc_of_this_environment_compiles_with_its_own_headers():
    nvrtc = toolchain.find_nvrtc()
    assert nvrtc.version >= toolchain.OLDEST_CUDA
    assert nvrtc.include is not None, nvrtc.without_include
    assert toolchain.headers_version(Path(nvrtc.include)) == nvrtc.version


# Where pip, conda and a toolkit put the library and the headers; the CUDA version, and what says where they are.
LAYOUTS = {
    "pip, CUDA 12": ("site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "site/nvidia/cuda_runtime/include", 12080, None),
    "pip, CUDA 13": ("site/nvidia/cu13/lib/libnvrtc.so.13", "site/nvidia/cu13/include", 13000, None),
    "conda": ("root/lib/libnvrtc.so.12", "root/targets/x86_64-linux/include", 12060, "CONDA_PREFIX"),
    "toolkit": ("root/lib64/libnvrtc.so.12", "root/include", 12060, "CUDA_HOME"),
}
# Without PyTorch, which brings an NVRTC of its own where it is built for CUDA.
FIND = f"""
import json, sys, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["vsa_jit"] = types.ModuleType("vsa_jit")
sys.modules["vsa_jit"].__path__ = [{str(ROOT / "vsa_jit")!r}]
from vsa_jit.jit import toolchain
found = toolchain.find_nvrtc()
print(json.dumps([found.path, found.version, found.include]))
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(tmp_path, layout):
    """A Python environment that has all packages of this one but NVIDIA's, and a library of NVRTC's name that loads."""
    library, include, number, variable = LAYOUTS[layout]
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (tmp_path / "site").symlink_to(site)
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith("nvidia"):
            (packages / path.name).symlink_to(path)

    place = tmp_path / library
    place.parent.mkdir(parents=True)
    source = tmp_path / "stub.c"
    version = [number // 1000, number % 1000 // 10]
    source.write_text(
        f"int nvrtcVersion(int *major, int *minor) {{ *major = {version[0]}; *minor = {version[1]}; return 0; }}\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{place.name}", "-o", place, source], check=True)
    headers(tmp_path / include, number)

    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(packages)}
    if variable is not None:
        variables[variable] = str(tmp_path / "root")
    command = [str(environment / "bin" / "python"), "-c", FIND]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found_library, found_version, found_include = json.loads(run.stdout)
    assert Path(found_library).resolve() == place.resolve()
    assert found_version == version
    assert Path(found_include).resolve() == (tmp_path / include).resolve()


def test_headers_of_another_version_are_not_used(monkeypatch, tmp_path):
    include = headers(tmp_path / "include", 12040)
    fake_nvrtc(monkeypatch, tmp_path, (13, 0), include)
    nvrtc = toolchain.find_nvrtc()
    assert nvrtc.include is None
    assert nvrtc.without_include == f"CUDA headers at {include} are 12.4, and NVRTC is 13.0"


@pytest.mark.parametrize("number", [12040, 12060, 13000, 13010])
def test_headers_of_the_same_version_are_used(monkeypatch, tmp_path, number):
    include = headers(tmp_path / "include", number)
    version = (number // 1000, number % 1000 // 10)
    fake_nvrtc(monkeypatch, tmp_path, version, include)
    assert toolchain.find_nvrtc() == Nvrtc(
        str(tmp_path / "libnvrtc.so"),
        version,
        f"{version[0]}.{version[1]}, 5 bytes",
        "site-packages",
        str(include),
        None,
    )


def test_headers_that_are_missing_or_unreadable(monkeypatch, tmp_path):
    fake_nvrtc(monkeypatch, tmp_path, (13, 0))
    assert toolchain.find_nvrtc().without_include == "CUDA headers were not found"
    assert toolchain.headers_version(tmp_path) is None


def test_a_kernel_that_needs_headers_says_so(monkeypatch, tmp_path):
    (tmp_path / "half.cu").write_text('#include <cuda_fp16.h>\nextern "C" __global__ void half_kernel(__half* x) {}\n')
    (tmp_path / "none.cu").write_text("#include <cstdint>\n")
    assert read_source("half.cu", tmp_path).needs_cuda_headers
    assert not read_source("none.cu", tmp_path).needs_cuda_headers


def test_our_kernels_include_nothing_of_cuda():
    for path in kernels_dir().rglob("*.cu"):
        assert not read_source(path.relative_to(kernels_dir()).as_posix(), kernels_dir()).needs_cuda_headers, path


@pytest.mark.parametrize(
    ("nvrtc", "driver", "reason"),
    [
        ((12, 4), (12, 4), None),
        ((12, 9), (12, 4), None),
        ((13, 0), (13, 0), None),
        ((13, 0), None, None),
        ((12, 3), (12, 8), "NVRTC is of CUDA 12.3, older than 12.4"),
        ((11, 8), (12, 8), "NVRTC is of CUDA 11.8, older than 12.4"),
        ((13, 0), (12, 8), "NVRTC is of CUDA 13.0, and the NVIDIA driver supports up to 12.8"),
    ],
)
def test_versions_of_nvrtc_and_driver(monkeypatch, tmp_path, nvrtc, driver, reason):
    fake_nvrtc(monkeypatch, tmp_path, nvrtc)
    fake_driver(monkeypatch, driver)
    found = engines.why_not(NVRTC)
    assert (found and found.reason) == reason
    assert reason is None or found.fix


@pytest.mark.parametrize(("driver", "fits"), [((12, 3), False), ((12, 4), True), ((13, 0), True)])
def test_version_of_the_driver(monkeypatch, driver, fits):
    fake_driver(monkeypatch, driver)
    if fits:
        toolchain.check_driver()
    else:
        with pytest.raises(Unavailable, match=r"the NVIDIA driver is of CUDA 12\.3, older than 12\.4"):
            toolchain.check_driver()


@pytest.mark.parametrize("package", ["cupy", "cuda.pathfinder"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch, package):
    monkeypatch.setattr(toolchain, "has_package", lambda name: name != package)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    error = engines.why_not(NVRTC)
    assert (error.reason, error.fix) == (f"the package {package} is not installed", "pip install 'vsa-jit[cuda12]'")


def test_nvrtc_that_is_nowhere(monkeypatch):
    def nowhere():
        raise Unavailable("NVRTC was found in no pip package, conda or toolkit", toolchain.cuda_extra())

    monkeypatch.setattr(toolchain, "locate_nvrtc", nowhere)
    assert engines.why_not(NVRTC).reason == "NVRTC was found in no pip package, conda or toolkit"


def toolkit(root: Path, release="13.0", build="V13.0.88", lib="lib64", runtime=True) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / lib).mkdir()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, {build}"\n')
    nvcc.chmod(0o755)
    if runtime:
        (root / lib / "libcudart.so").write_text("")
    return root


def tools(monkeypatch, tmp_path, *names: str) -> Path:
    """A PATH with nothing but these programs."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(toolchain, "tool_path", lambda: str(folder))
    return folder


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("lib", ["lib64", "lib"])
def test_a_toolkit_that_is_named(monkeypatch, tmp_path, variable, lib):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    root = toolkit(tmp_path / "cuda", "12.6", "V12.6.20", lib)
    monkeypatch.setenv(variable, str(root))
    assert toolchain.find_nvcc() == Nvcc(str(root / "bin" / "nvcc"), str(root), (12, 6), "12.6.20")


def test_a_toolkit_on_path(monkeypatch, tmp_path):
    folder = tools(monkeypatch, tmp_path, "c++", "ninja")
    root = toolkit(tmp_path / "cuda")
    (folder / "nvcc").symlink_to(root / "bin" / "nvcc")
    assert toolchain.find_nvcc().home == str(root)


NO_TOOLKIT = "no CUDA toolkit (bin/nvcc and libcudart.so) in CUDA_HOME, around the nvcc on PATH or in /usr/local/cuda"


@pytest.mark.parametrize("runtime", [True, False])
def test_a_named_toolkit_that_is_none(monkeypatch, tmp_path, runtime):
    """pip's nvcc has no library to link with; another toolkit is not taken in its place."""
    tools(monkeypatch, tmp_path, "c++", "ninja")
    root = toolkit(tmp_path / "cuda", runtime=False) if runtime else tmp_path / "nothing"
    monkeypatch.setenv("CUDA_HOME", str(root))
    error = engines.why_not(NVCC)
    reason = f"no CUDA toolkit (bin/nvcc and libcudart.so) in {tmp_path / ('cuda' if runtime else 'nothing')}"
    assert (error.reason, error.fix) == (reason, "install a CUDA toolkit and set CUDA_HOME to it")


def test_no_toolkit_anywhere(monkeypatch, tmp_path):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    monkeypatch.setattr(toolchain, "find_cuda_home", lambda: None)
    assert engines.why_not(NVCC).reason == NO_TOOLKIT


@pytest.mark.parametrize(
    ("value", "found"), [("ccache g++", "ccache"), ("", "c++"), ("'my compiler' -m64", "my compiler")]
)
def test_cxx_may_have_arguments(monkeypatch, tmp_path, value, found):
    tools(monkeypatch, tmp_path, "ninja", found)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("CXX", value)
    assert toolchain.host_compiler() == found
    assert toolchain.find_nvcc().path == str(tmp_path / "cuda" / "bin" / "nvcc")


def test_a_cxx_that_is_no_command_is_named(monkeypatch, tmp_path):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("CXX", "g++ '-DX")
    reason = 'CXX: expected a command, got "g++ \'-DX" (No closing quotation)'
    assert engines.why_not(NVCC).reason == reason
    assert doctor.examine()["host_compiler"] == {"missing": reason, "fix": "set CXX to a C++ compiler"}


def test_an_nvcc_that_speaks_no_utf8(monkeypatch, tmp_path):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    root = toolkit(tmp_path / "cuda")
    (root / "bin" / "nvcc").write_bytes(b"#!/bin/sh\necho '\xff release 13.0, V13.0.88'\n")
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert toolchain.find_nvcc().build == "13.0.88"


def test_a_broken_nvrtc_is_a_reason(monkeypatch, tmp_path):
    library = tmp_path / "libnvrtc.so.13"
    library.write_text("no library")
    monkeypatch.setattr(toolchain, "locate_nvrtc", lambda: (str(library), "site-packages"))
    assert engines.why_not(NVRTC).reason.startswith("NVRTC cannot be loaded: OSError: ")


def test_a_module_of_the_user_named_cuda(monkeypatch, tmp_path):
    (tmp_path / "cuda.py").write_text("raise SystemError('mine')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    assert engines.why_not(NVRTC).reason == "the package cuda.pathfinder is not installed"


@pytest.mark.parametrize(
    ("present", "reason", "fix"),
    [
        (("ninja",), "no C++ compiler on PATH, which nvcc needs", "apt install g++, or set CXX"),
        (("c++",), "ninja is not installed", "pip install ninja"),
    ],
)
def test_what_nvcc_needs_beside_it(monkeypatch, tmp_path, present, reason, fix):
    tools(monkeypatch, tmp_path, *present)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    error = engines.why_not(NVCC)
    assert (error.reason, error.fix) == (reason, fix)


@pytest.mark.parametrize(
    ("nvcc", "built_for", "driver", "reason"),
    [
        ("13.0", "13.0", (13, 0), None),
        ("12.4", "12.8", (12, 8), None),
        ("12.3", "12.8", (12, 8), "nvcc is of CUDA 12.3, older than 12.4"),
        ("12.8", "13.0", (13, 0), "nvcc is of CUDA 12.8, and PyTorch is built for CUDA 13.0"),
        ("13.0", "13.0", (12, 8), "nvcc is of CUDA 13.0, and the NVIDIA driver supports up to 12.8"),
        ("13.0", None, (13, 0), "this PyTorch is built without CUDA"),
    ],
)
def test_versions_of_nvcc(monkeypatch, tmp_path, nvcc, built_for, driver, reason):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", nvcc, f"V{nvcc}.1")))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    fake_driver(monkeypatch, driver)
    error = engines.why_not(NVCC)
    assert (error and error.reason) == reason


def test_a_toolkit_that_cannot_be_entered(monkeypatch, tmp_path):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    reason = engines.why_not(NVCC).reason
    monkeypatch.undo()
    assert reason == f"no CUDA toolkit (bin/nvcc and libcudart.so) in {tmp_path / 'cuda'}"


def test_an_nvcc_that_does_not_run(monkeypatch, tmp_path):
    tools(monkeypatch, tmp_path, "c++", "ninja")
    root = toolkit(tmp_path / "cuda")
    (root / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert "does not run: " in engines.why_not(NVCC).reason
    toolchain.find_nvcc.cache_clear()
    (root / "bin" / "nvcc").write_text("#!/bin/sh\necho nothing\n")
    assert "does not tell a version" in engines.why_not(NVCC).reason


def test_ninja_of_this_environment_is_found_though_it_is_not_activated(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert toolchain.tool_path().split(":") == [str(Path(sys.executable).parent), "/nowhere"]


def only(monkeypatch, *runs):
    """Engines of which only these would run."""

    def check(engine):
        def checked():
            if engine.name not in runs:
                raise Unavailable(f"no {engine.name}", f"install {engine.name}")

        return checked

    for engine in engines.ENGINES:
        monkeypatch.setattr(engine, "check", check(engine), raising=True)


@pytest.mark.parametrize(
    ("runs", "name", "chosen"),
    [
        (("nvrtc", "nvcc"), "auto", "nvrtc"),
        (("nvcc",), "auto", "nvcc"),
        (("nvrtc", "nvcc"), "nvcc", "nvcc"),
        (("nvrtc",), "nvrtc", "nvrtc"),
    ],
)
def test_choice_of_the_engine(monkeypatch, runs, name, chosen):
    only(monkeypatch, *runs)
    assert engines.choose((), ARCH, name).name == chosen
    monkeypatch.setenv("VSA_JIT_ENGINE", name)
    assert engines.choose((), ARCH).name == chosen


def test_no_engine_gives_all_reasons(monkeypatch):
    only(monkeypatch)
    with pytest.raises(Unavailable) as caught:
        engines.choose((), ARCH)
    assert str(caught.value) == "no compiler: nvrtc: no nvrtc (install nvrtc); nvcc: no nvcc (install nvcc)"
    with pytest.raises(Unavailable, match=r"^no compiler: nvcc: no nvcc \(install nvcc\)$"):
        engines.choose((), ARCH, "nvcc")


def test_an_unknown_engine_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"engine: expected one of \('auto', 'nvrtc', 'nvcc'\), got 'ptx'"):
        check_choice("engine", "ptx", engines.NAMES)
    monkeypatch.setenv("VSA_JIT_ENGINE", "NVRTC")
    with pytest.raises(ValueError, match=r"VSA_JIT_ENGINE: expected one of .*, got 'NVRTC'"):
        engines.choose((), ARCH)


def test_sources_are_read_in_the_c_locale():
    """A library may set it, whatever the process began with."""
    code = (
        "import locale; locale.setlocale(locale.LC_ALL, 'C'); from vsa_jit.jit.source import kernels_dir, read_source;"
        "assert 'ᵀ' in read_source('vsa/attend_forward.cu', kernels_dir()).files['kittens/warpgroup.cuh']"
    )
    run = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

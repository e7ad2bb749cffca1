"""What there is to compile with: the driver, NVRTC and its headers, nvcc with its host compiler and ninja."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from vsa_jit.jit.errors import Unavailable

Version = tuple[int, int]

OLDEST_CUDA: Version = (12, 4)
# The architectures that there are kernels for: the name that users give, and the compiler's.
ARCHS = {"9.0a": "sm_90a"}
CAPABILITIES = {(9, 0): "9.0a"}


def arch_named(name: str) -> str:
    """An architecture of ``ARCHS`` by any of its usual names, such as 9.0, sm_90 or sm_90a; another name as it is."""
    found = re.fullmatch(r"(?:sm_?|compute_)?(\d+)\.?(\d)a?", name.lower())
    arch = f"{found[1]}.{found[2]}a" if found else name
    return arch if arch in ARCHS else name


@dataclass(frozen=True)
class Nvrtc:
    """NVRTC's library and, where there are headers of the same version, their folder."""

    path: str
    version: Version
    build: str
    found_via: str
    include: str | None
    without_include: str | None


@dataclass(frozen=True)
class Nvcc:
    """nvcc of a toolkit, with all that ``torch.utils.cpp_extension`` needs beside it."""

    path: str
    home: str
    version: Version
    build: str


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def cuda_extra() -> str:
    """The command that installs CuPy and NVRTC for the CUDA that PyTorch was built for."""
    major = (torch.version.cuda or "13").partition(".")[0]
    return f"pip install 'vsa-jit[cuda{major}]'"


@functools.cache
def libcuda() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        Unavailable: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Unavailable("no NVIDIA driver: libcuda.so.1 was not found", "install the NVIDIA driver") from None


@functools.cache
def driver_version() -> Version:
    """The newest CUDA that the driver supports.

    Raises:
        Unavailable: there is no driver.
    """
    number = ctypes.c_int()
    if libcuda().cuDriverGetVersion(ctypes.byref(number)) != 0:
        raise Unavailable("the NVIDIA driver does not tell its version", "nvidia-smi")
    return _of_number(number.value)


@functools.cache
def find_nvrtc() -> Nvrtc:
    """NVRTC as CuPy finds it: in pip packages, in conda, in a toolkit of the system.

    Raises:
        Unavailable: CuPy or NVRTC is missing.
    """
    for package in ("cupy", "cuda.pathfinder"):
        if not has_package(package):
            raise Unavailable(f"the package {package} is not installed", cuda_extra())
    try:
        library, found_via = locate_nvrtc()
        version = nvrtc_version(library)
        include = locate_headers()
    except Unavailable:
        raise
    except Exception as error:  # whatever a broken installation does
        raise Unavailable(f"NVRTC cannot be loaded: {type(error).__name__}: {error}", cuda_extra()) from None
    without_include = None
    if include is None:
        without_include = "CUDA headers were not found"
    else:
        found = headers_version(Path(include))
        if found != version:
            said = "of no known version" if found is None else dotted(found)
            without_include = f"CUDA headers at {include} are {said}, and NVRTC is {dotted(version)}"
            include = None
    # NVRTC tells no build, and its size differs from one to the next.
    build = f"{dotted(version)}, {Path(library).stat().st_size} bytes"
    return Nvrtc(library, version, build, found_via, include, without_include)


def has_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # looking for a submodule runs its parent, which may be anything
        return False


def package_version(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def locate_nvrtc() -> tuple[str, str]:
    """Path of NVRTC's library and how it was found.

    Raises:
        Unavailable: it was not found.
    """
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        found = load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError:
        raise Unavailable("NVRTC was found in no pip package, conda or toolkit", cuda_extra()) from None
    return str(found.abs_path), str(found.found_via)


def nvrtc_version(library: str) -> Version:
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(library).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def locate_headers() -> str | None:
    """The folder of CUDA's headers."""
    from cuda.pathfinder import locate_nvidia_header_directory

    found = locate_nvidia_header_directory("cudart")
    return None if found is None else str(found.abs_path)


def headers_version(include: Path) -> Version | None:
    """The CUDA version that a folder of headers says it is of."""
    try:
        text = (include / "cuda_runtime_api.h").read_text(errors="replace")
    except OSError:
        return None
    number = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    return _of_number(int(number[1])) if number else None


@functools.cache
def find_nvcc() -> Nvcc:
    """nvcc where PyTorch looks for it: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda.

    Raises:
        Unavailable: it, the toolkit's runtime library, a host compiler or ninja is missing.
    """
    home = find_cuda_home()
    if home is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        place = named or "CUDA_HOME, around the nvcc on PATH or in /usr/local/cuda"
        raise Unavailable(
            f"no CUDA toolkit (bin/nvcc and libcudart.so) in {place}", "install a CUDA toolkit and set CUDA_HOME to it"
        )
    nvcc = home / "bin" / "nvcc"
    text = _output(str(nvcc), "--version")
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise Unavailable(f"{nvcc} --version does not tell a version", "install the CUDA toolkit again")
    if shutil.which(host_compiler()) is None:
        raise Unavailable("no C++ compiler on PATH, which nvcc needs", "apt install g++, or set CXX")
    if shutil.which("ninja", path=tool_path()) is None:
        raise Unavailable("ninja is not installed", "pip install ninja")
    build = re.search(r"V(\d+\.\d+\.\d+)", text)
    return Nvcc(
        path=str(nvcc),
        home=str(home),
        version=(int(release[1]), int(release[2])),
        build=build[1] if build else dotted((int(release[1]), int(release[2]))),
    )


def find_cuda_home() -> Path | None:
    """The folder of a CUDA toolkit that one can compile and link with."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if named:
        guesses = [Path(named)]
    else:
        around = [Path(on_path).resolve().parent.parent] if on_path else []
        guesses = [*around, Path("/usr/local/cuda")]
    for home in guesses:
        # Unlike pathlib's, these answer for a folder that cannot be entered.
        if os.path.isfile(home / "bin" / "nvcc") and any(
            os.path.exists(home / lib / "libcudart.so") for lib in ("lib64", "lib")
        ):
            return home
    return None


def host_compiler() -> str:
    """The program that compiles C++: what CXX starts with, as in "ccache g++", or c++.

    Raises:
        Unavailable: CXX is no command.
    """
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise Unavailable(f"CXX: expected a command, got {named!r} ({error})", "set CXX to a C++ compiler") from None
    return words[0] if words else "c++"


def tool_path() -> str:
    """PATH with the folder of this Python's scripts in front, where ``pip install ninja`` puts it."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def check_version(what: str, version: Version, fix: str) -> None:
    """Checks a CUDA version against the oldest that compiles and runs the kernels.

    Raises:
        Unavailable: it is older.
    """
    if version < OLDEST_CUDA:
        raise Unavailable(f"{what} is of CUDA {dotted(version)}, older than {dotted(OLDEST_CUDA)}", fix)


def check_driver() -> None:
    """Raises ``Unavailable`` where there is no driver or one too old."""
    check_version("the NVIDIA driver", driver_version(), "install a newer NVIDIA driver")


def check_runs(what: str, version: Version) -> None:
    """Checks that what a compiler of this version makes runs on the driver, where there is a driver.

    Raises:
        Unavailable: the compiler is of a later CUDA major version.
    """
    try:
        driver = driver_version()
    except Unavailable:
        return
    if version[0] > driver[0]:
        raise Unavailable(
            f"{what} is of CUDA {dotted(version)}, and the NVIDIA driver supports up to {dotted(driver)}",
            "install a newer NVIDIA driver, or the compiler of the driver's CUDA",
        )


def _of_number(number: int) -> Version:
    """CUDA writes 12.4 as 12040."""
    return number // 1000, number % 1000 // 10


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from None

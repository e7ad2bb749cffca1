"""Compiles the job in a folder: ``python compile.py FOLDER``. A process of its own, which needs nothing of vsa_jit.

``FOLDER/job.json`` says what to do and ``FOLDER/src`` holds the sources. The compiler's messages go to standard output;
the artefact is written to the folder, by a rename. With ``--with-parent`` the process and all that it started end as
soon as standard input does: when the process that wanted the kernel is no more.
"""

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path

# What nvcc and the compilers under it take from the environment: an artefact must be what its key says.
CODE_CHANGING_VARIABLES = {
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "PYTORCH_NVCC", "TORCH_CUDA_ARCH_LIST"),
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"),
}


def compile_nvrtc(folder: Path, job: dict) -> None:
    # The library that was found, and its companion: CuPy's bindings and NVRTC then get them by their names.
    library = Path(job["library"]).resolve()
    major, minor = job["version"]
    for companion in library.parent.glob(f"libnvrtc-builtins.so.{major}.{minor}*"):
        ctypes.CDLL(str(companion), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    # CuPy makes this folder when it is imported, by default in a home that may not be writable.
    os.environ["CUPY_CACHE_DIR"] = str(folder)
    from cupy_backends.cuda.libs import nvrtc

    if nvrtc.getVersion() != (major, minor):
        raise RuntimeError(f"error: CuPy uses NVRTC {nvrtc.getVersion()}, not {(major, minor)} of {library}")
    root = folder / "src"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    texts = [(root / name).read_bytes() for name in names]
    program = nvrtc.createProgram(
        (root / job["main"]).read_text(encoding="utf-8"), job["main"], texts, [name.encode() for name in names]
    )
    try:
        nvrtc.compileProgram(program, job["options"])
        cubin = nvrtc.getCUBIN(program)
    finally:
        print(nvrtc.getProgramLog(program))
    unfinished = folder / "unfinished"
    unfinished.write_bytes(cubin)
    unfinished.rename(folder / job["artefact"])


def compile_nvcc(folder: Path, job: dict) -> None:
    os.environ.update(job["environment"])
    from torch.utils import cpp_extension

    # A folder of its own for each run: PyTorch's lock file in it outlives a process that is killed.
    objects = folder / "objects"
    shutil.rmtree(objects, ignore_errors=True)
    objects.mkdir()
    library = cpp_extension.load(
        name="kernel",
        sources=[str(folder / "src" / job["main"])],
        extra_include_paths=[str(folder / "src")],
        # Ninja runs the compiler through a shell.
        extra_cuda_cflags=[shlex.quote(option) for option in job["options"]],
        extra_ldflags=job["link_options"],
        build_directory=str(objects),
        is_python_module=False,
    )
    Path(library).rename(folder / job["artefact"])


def end_with_parent() -> None:
    # Not by sys.stdin, whose lock an interpreter that ends would wait for.
    os.read(0, 1)
    # Its own session: started by hand it leads none, and that of the shell is left alone.
    kill_session(os.getpid())
    os._exit(1)


def kill_session(session: int) -> None:
    """Kills every other process of a session. Process groups do not do: ninja gives each compiler one of its own."""
    killed = {os.getpid()}
    # What one has started before it was killed, the next pass finds.
    while found := processes_of(session) - killed:
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        killed |= found


def processes_of(session: int) -> set[int]:
    found: set[int] = set()
    try:
        # A /proc of another namespace of processes counts them by other numbers.
        if os.readlink("/proc/self") != str(os.getpid()):
            return found
        processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return found
    for process in processes:
        with contextlib.suppress(OSError, IndexError):
            # Fields after the name in parentheses: state, parent, group, session.
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.add(int(process))
    return found


def main(folder: Path, *options: str) -> int:
    if "--with-parent" in options:
        threading.Thread(target=end_with_parent, daemon=True).start()
    for variable in CODE_CHANGING_VARIABLES:
        os.environ.pop(variable, None)
    job = json.loads((folder / "job.json").read_text())
    # The packages of the process that asked, after this interpreter's own.
    sys.path.extend(path for path in job["packages"] if path not in sys.path)
    try:
        {"nvrtc": compile_nvrtc, "nvcc": compile_nvcc}[job["engine"]](folder, job)
    except RuntimeError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))

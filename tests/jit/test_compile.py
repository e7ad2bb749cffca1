"""Compiling: both engines on the same sources, what an error says, the time limit, and what a user sees."""

import contextlib
import logging
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import alive, pid_in, wait_until
from support.toys import ARCH, HEADER, MAIN, NVRTC, toy, write_sources

from vsa_jit.jit import compile as compiling
from vsa_jit.jit import engines, module, progress, toolchain
from vsa_jit.jit.cache.lock import locked
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.engines.nvcc import NvccEngine
from vsa_jit.jit.errors import CompileError, LoadError, NotWarmError, Unavailable
from vsa_jit.jit.source import read_source
from vsa_jit.jit.worker import compile as worker_module

ROOT = Path(__file__).parents[2]
# What an ELF file says it is for.
EM_CUDA = 190


pytestmark = pytest.mark.usefixtures("sources", "folder", "forgotten")


def get(engine=NVRTC, **kwargs):
    (entry,) = entries_of([toy(**kwargs)], ARCH, engine, target="a test")
    return entry


def compile_again(error: CompileError) -> subprocess.CompletedProcess:
    """Runs the command that an error names, without a terminal."""
    return subprocess.run(error.command, shell=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_nvrtc_gives_code_for_a_gpu():
    artefact = get().artefact.read_bytes()
    assert artefact[:4] == b"\x7fELF"
    assert int.from_bytes(artefact[18:20], "little") == EM_CUDA
    assert b"toy" in artefact


def test_nvrtc_compiles_with_cuda_headers(sources):
    write_sources(sources, main="#include <cuda_fp16.h>\n" + MAIN)
    assert read_source("toy.cu", sources).needs_cuda_headers
    assert get().size > 0


def test_missing_headers_are_named_with_their_cure(sources, monkeypatch):
    write_sources(sources, main="#include <cuda_fp16.h>\n" + MAIN)
    without = replace(toolchain.find_nvrtc(), include=None, without_include="CUDA headers were not found")
    monkeypatch.setattr("vsa_jit.jit.engines.nvrtc.find_nvrtc", lambda: without)
    with pytest.raises(CompileError) as caught:
        get()
    assert caught.value.first_error == (
        "toy.cu needs CUDA's headers: CUDA headers were not found "
        f"(install the headers of CUDA {toolchain.dotted(without.version)})"
    )


def test_a_missing_include_is_named_with_who_includes_it(sources):
    (sources / "parts" / "value.cuh").write_text('#include "parts/nothing.cuh"\n')
    with pytest.raises(
        Unavailable, match=r"parts/nothing.cuh: expected below .*, included by parts/value.cuh: No such"
    ):
        get()


def test_a_source_is_its_closure(sources):
    source = read_source("toy.cu", sources)
    assert source.files == {"toy.cu": MAIN, "parts/value.cuh": HEADER}
    (sources / "unrelated.cuh").write_text("")
    assert read_source("toy.cu", sources).digest == source.digest


@pytest.mark.parametrize(
    ("main", "first_error"),
    [
        (MAIN.replace("value()", "missing()"), 'toy.cu(6): error: identifier "missing" is undefined'),
        (MAIN.replace("== VSA_PARAMS_BYTES", "!= VSA_PARAMS_BYTES"), "toy.cu(4): error: static assertion failed"),
        (MAIN.replace("if (", 'asm volatile("no.such.instruction;");\n if ('), "ptxas"),
    ],
)
def test_an_error_carries_the_first_error_a_command_and_the_log(folder, sources, main, first_error):
    write_sources(sources, main=main)
    with pytest.raises(CompileError) as caught:
        get()
    error = caught.value
    assert error.first_error.startswith(first_error)
    assert error.log.is_relative_to(folder / "sm_90a" / "failed")
    assert error.first_error in error.log.read_text()
    for part in ("toy could not be compiled", error.first_error, error.command, str(error.log)):
        assert part in str(error)
    again = compile_again(error)
    assert again.returncode == 1
    assert error.first_error in again.stdout
    write_sources(sources)
    assert get().size > 0


def test_the_command_needs_no_terminal_and_makes_what_was_asked_for(folder, sources):
    write_sources(sources, main=MAIN.replace("value()", "missing()"))
    with pytest.raises(CompileError) as caught:
        get()
    kept = caught.value.log.parent
    fixed = kept / "src" / "toy.cu"
    fixed.write_text(MAIN)
    assert compile_again(caught.value).returncode == 0
    assert (kept / "kernel.cubin").read_bytes().startswith(b"\x7fELF")


def worker_that(monkeypatch, tmp_path, does: str) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os, signal, time\n{does}\n")
    monkeypatch.setattr(compiling, "WORKER", worker)


@pytest.fixture(params=["sleeper.wait()"])
def ninja_like(request, monkeypatch, tmp_path):
    """A worker that, like ninja, starts a compiler in a process group of its own; gives the file with its number.

    The parameter is what it does then.
    """
    pid_file = tmp_path / "pid"
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import os, subprocess, sys, threading\nsys.path.insert(0, {str(compiling.WORKER.parent)!r})\n"
        "import compile as worker\n"
        "threading.Thread(target=worker.end_with_parent, daemon=True).start()\n"
        "sleeper = subprocess.Popen(['sleep', '100'], preexec_fn=os.setpgrp)\n"
        f"open({str(pid_file)!r}, 'w').write(str(sleeper.pid))\n{request.param}\n"
    )
    monkeypatch.setattr(compiling, "WORKER", worker)
    return pid_file


def forked_get() -> int:
    """A child that compiles, and ends with 7 on Ctrl-C."""
    child = os.fork()
    if child != 0:
        return child
    # Processes that a shell starts in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        get()
    except KeyboardInterrupt:
        os._exit(7)
    finally:
        os._exit(1)


def test_the_time_limit_ends_all_that_the_compiler_started(monkeypatch, ninja_like):
    monkeypatch.setattr(compiling, "TIME_LIMIT_S", 2.0)
    with pytest.raises(CompileError, match="did not finish"):
        get()
    assert wait_until(lambda: not alive(pid_in(ninja_like)), 5)


@pytest.mark.parametrize("ninja_like", ["os.kill(os.getpid(), 9)"], indirect=True)
def test_a_worker_that_crashes_takes_its_compiler_along(ninja_like):
    with pytest.raises(CompileError, match=r"the compiler crashed \(SIGKILL\)"):
        get()
    assert wait_until(lambda: not alive(pid_in(ninja_like)), 5)


def test_a_worker_that_shares_a_session_ends_alone():
    """Started by hand, it must not take the shell along."""
    code = (
        f"import sys\nsys.path.insert(0, {str(compiling.WORKER.parent)!r})\nimport compile as worker\n"
        "worker.end_with_parent()"
    )
    shell = shlex.join([sys.executable, "-c", code]) + " < /dev/null; echo $?"
    run = subprocess.run(shell, shell=True, start_new_session=True, capture_output=True, text=True)
    assert run.stdout == "1\n"


@pytest.mark.parametrize("compiles", [True, False])
def test_a_process_whose_children_somebody_else_waits_for(sources, compiles):
    if not compiles:
        write_sources(sources, main=MAIN.replace("value()", "missing()"))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        code = 1
        try:
            code = 7 if get().size > 0 else 1
        except CompileError as error:
            code = 8 if error.log is not None and 'identifier "missing" is undefined' in error.first_error else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (7 if compiles else 8)


def test_the_worker_is_killed_where_processes_cannot_be_listed(monkeypatch, ninja_like):
    monkeypatch.setattr(compiling, "TIME_LIMIT_S", 2.0)
    monkeypatch.setattr(worker_module, "processes_of", lambda session: set())
    with pytest.raises(CompileError, match="did not finish"):
        get()
    os.kill(pid_in(ninja_like), signal.SIGKILL)


def test_what_starts_while_a_session_is_killed_is_killed_too(monkeypatch):
    passes = [{11, 12, os.getpid()}, {12, 13, os.getpid()}, {os.getpid()}]
    killed = []
    monkeypatch.setattr(worker_module, "processes_of", lambda session: passes.pop(0))
    monkeypatch.setattr(worker_module.os, "kill", lambda process, signal: killed.append(process))
    worker_module.kill_session(11)
    assert (sorted(killed), passes) == ([11, 12, 13], [])


@pytest.mark.parametrize("readable", [True, False])
def test_processes_of_another_namespace_are_left_alone(monkeypatch, readable):
    def readlink(path):
        if not readable:
            raise FileNotFoundError(path)
        return "1"

    assert os.getpid() in worker_module.processes_of(os.getsid(0))
    monkeypatch.setattr(worker_module.os, "readlink", readlink)
    assert worker_module.processes_of(os.getsid(0)) == set()


def test_a_killed_process_takes_its_compiler_along(ninja_like):
    child = forked_get()
    pid = pid_in(ninja_like)
    assert alive(pid)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert wait_until(lambda: not alive(pid), 10)


def test_ctrl_c_ends_a_compile_at_once(ninja_like):
    child = forked_get()
    pid = pid_in(ninja_like)
    start = time.monotonic()
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert time.monotonic() - start < 5
    assert wait_until(lambda: not alive(pid), 5)


def test_ctrl_c_ends_the_wait_for_another_process(folder, monkeypatch):
    get(addend=7)
    lock = folder / "sm_90a" / "locks" / f"{NVRTC.spec(toy(), ARCH).key}.lock"
    with locked(lock, threading.Event()):
        child = forked_get()
        time.sleep(1)
        os.kill(child, signal.SIGINT)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize("name", ["it's", "a $HOME", 'q"uote', "ünï cødé", "a:b", "100%"])
def test_odd_names_of_folders(monkeypatch, tmp_path, sources, name):
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(tmp_path / name))
    assert get().folder.is_relative_to(tmp_path / name)
    write_sources(sources, main=MAIN.replace("value()", "missing()"))
    with pytest.raises(CompileError) as caught:
        get()
    again = compile_again(caught.value)
    assert caught.value.first_error in again.stdout


def test_nvcc_says_which_names_it_cannot_take(linkable, monkeypatch, tmp_path):
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(tmp_path / "a:b"))
    with pytest.raises(
        CompileError, match=r"ninja and nvcc cannot build in .*a:b.*name another folder by VSA_JIT_CACHE_DIR"
    ):
        get(NvccEngine())


def test_the_worker_is_not_led_astray(monkeypatch, tmp_path):
    """By modules of the user that shadow Python's own, by relative paths, by variables that are Python's or nvcc's."""
    (tmp_path / "enum.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), "relative", *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONINSPECT", "1")
    assert get().size > 0


def test_variables_that_change_the_code_reach_no_compiler(monkeypatch, tmp_path):
    """Neither here nor in the command that an error names."""
    says = (
        "def compile_nvrtc(*job):\n    raise RuntimeError('flags: ' + str(os.environ.get('NVCC_APPEND_FLAGS')))\n\n\n"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(compiling.WORKER.read_text().replace("def main(", says + "def main("))
    monkeypatch.setattr(compiling, "WORKER", worker)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    with pytest.raises(CompileError, match="flags: None") as caught:
        get()
    again = compile_again(caught.value)
    assert again.stdout == "flags: None\n"


@pytest.mark.parametrize("executable", [None, "", "/usr/bin/uwsgi"])
def test_a_python_that_does_not_know_itself(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(CompileError, match="does not know its own program"):
        get()


def test_a_python_that_does_not_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CompileError, match="/nowhere/python does not start"):
        get()


def test_a_terminal_that_goes_away(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(progress, "is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stderr", Gone())
    assert get().size > 0


def test_a_compiler_that_crashes_is_an_error_and_not_our_end(monkeypatch, tmp_path):
    worker_that(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(CompileError, match=r"the compiler crashed \(SIGSEGV\)"):
        get()


def test_a_compiler_that_does_not_end_is_ended(monkeypatch, tmp_path):
    worker_that(monkeypatch, tmp_path, "time.sleep(60)")
    monkeypatch.setattr(compiling, "TIME_LIMIT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(CompileError, match=r"the compiler did not finish within 0\.5 s"):
        get()
    assert time.monotonic() - start < 10


def test_a_cancelled_compile_is_no_failure(folder, monkeypatch, tmp_path):
    """Of two kernels one fails: the other's compiler ends at once, and leaves nothing."""
    worker_that(
        monkeypatch,
        tmp_path,
        "import sys\n"
        "if '-DTOY_ADDEND=7' in open(sys.argv[1] + '/job.json').read(): raise SystemExit('error: seven')\n"
        "time.sleep(60)",
    )
    monkeypatch.setattr(compiling, "at_once", lambda wanted, gigabytes: wanted)
    start = time.monotonic()
    with pytest.raises(CompileError, match="seven could not be compiled: error: seven"):
        entries_of([toy(), toy(7, "seven")], ARCH, NVRTC, target="a test")
    assert time.monotonic() - start < 20
    kept = [path.name for path in (folder / "sm_90a" / "failed").iterdir()]
    assert kept == [NVRTC.spec(toy(7), ARCH).key]
    assert list((folder / "sm_90a" / "build").iterdir()) == []


def test_a_compiler_that_says_nothing(monkeypatch, tmp_path):
    worker_that(monkeypatch, tmp_path, "raise SystemExit(1)")
    with pytest.raises(CompileError, match="the compiler said nothing"):
        get()


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("nothing\na.cu(3): error: expected ;\na.cu(4): error: more\n", "a.cu(3): error: expected ;"),
        ("Error building extension 'kernel': [1/2] nvcc\nFAILED\na.cu(1): error: no\n", "a.cu(1): error: no"),
        ("ptxas fatal   : Unresolved extern\n", "ptxas fatal   : Unresolved extern"),
        ("first\n\nlast\n\n", "last"),
    ],
)
def test_the_first_error_of_a_log(log, line):
    assert compiling.first_error_of(log) == line


@pytest.mark.parametrize(
    ("wanted", "memory", "cores", "expected"),
    [(8, 100.0, 16, 8), (8, 100.0, 2, 2), (8, 3.0, 16, 3), (8, 0.2, 16, 1), (8, None, 4, 4), (1, 100.0, 16, 1)],
)
def test_as_many_compilers_as_cores_and_memory_allow(monkeypatch, wanted, memory, cores, expected):
    monkeypatch.setattr(compiling, "available_gigabytes", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert compiling.at_once(wanted, 1.0) == expected


def test_memory_is_read():
    assert 0.01 < compiling.available_gigabytes() < 100_000


# The line, with what, for which GPU, with what compiler, how long about, and where it is kept.
LINE = r"compiling 1 kernel \(toy\) for a test \(sm_90a\) with NVRTC 13.*, about 4 s, kept in .*/cache/sm_90a"


def test_nothing_is_shown_where_nobody_looks_on(capfd, caplog):
    with caplog.at_level(logging.WARNING, logger="vsa_jit"):
        get()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_information_is_logged_where_it_is_asked_for(capfd, caplog):
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        get()
        get()
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(LINE, first)
    assert re.fullmatch(r"compiled in \d+\.\d s", second)
    assert capfd.readouterr().err == ""


def test_the_line_says_where_nothing_is_kept(caplog, lose_home):
    lose_home()
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        get()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("compiling")]
    assert line.endswith(", about 4 s, not kept")


SHOW = """
import sys
sys.path[:0] = {paths!r}
from support.toys import *
from vsa_jit.jit.cache.lock import locked
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.engines import base
from pathlib import Path
base.kernels_dir = lambda: Path({sources!r})
{notebook}
for _ in range(2):
    entries_of([toy()], ARCH, NVRTC, target="a test")
"""


def test_a_terminal_shows_a_line_and_a_bar_and_then_silence(sources):
    terminal, its_side = pty.openpty()
    code = SHOW.format(paths=[str(ROOT), str(ROOT / "tests")], sources=str(sources), notebook="")
    run = subprocess.Popen([sys.executable, "-c", code], stderr=its_side, stdout=its_side)
    os.close(its_side)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        pass
    assert run.wait() == 0, shown
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    assert re.fullmatch("vsa_jit: " + LINE, lines[0])
    assert re.fullmatch(r"(\rvsa_jit: \[[#.]{24}\] \d/1, \d+\.\d s)+", lines[1])
    assert "[########################] 1/1" in lines[1].rpartition("\r")[2]
    assert lines[2:] == [""]


def test_a_notebook_shows_the_same(sources):
    code = SHOW.format(
        paths=[str(ROOT), str(ROOT / "tests")],
        sources=str(sources),
        notebook="import types; sys.modules['ipykernel'] = types.ModuleType('ipykernel')",
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.startswith("vsa_jit: compiling 1 kernel (toy) for a test (sm_90a) with NVRTC")
    assert "[########################] 1/1" in run.stderr


def test_the_bar_ends_where_a_compile_fails(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_interactive", lambda: True)
    threads = threading.active_count()

    def fail():
        with progress.Compiling(["a", "b"], "a GPU", "a compiler", 1, Path("/x")) as shown:
            shown.advance()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "[############............] 1/2" in capsys.readouterr().err
    assert threading.active_count() == threads


def cuda_toolkit() -> toolchain.Nvcc:
    try:
        return toolchain.find_nvcc()
    except toolchain.Unavailable as error:
        pytest.skip(f"needs a CUDA toolkit: {error}")


@pytest.fixture
def linkable(monkeypatch, tmp_path):
    """nvcc, and the CUDA libraries of PyTorch that its build links with: empty ones where PyTorch has none."""
    nvcc = cuda_toolkit()
    if torch.version.cuda is None:
        stubs = tmp_path / "stubs"
        stubs.mkdir()
        for name in ("libc10_cuda.so", "libtorch_cuda.so"):
            subprocess.run(["cc", "-shared", "-o", stubs / name, "-x", "c", "/dev/null"], check=True)
        # Nor does it look for a toolkit.
        worker = tmp_path / "worker.py"
        worker.write_text(
            "import runpy\nimport torch.utils.cpp_extension\n"
            f"torch.utils.cpp_extension.CUDA_HOME = {nvcc.home!r}\n"
            f"runpy.run_path({str(compiling.WORKER)!r}, run_name='__main__')\n"
        )
        monkeypatch.setattr(compiling, "WORKER", worker)
        monkeypatch.setenv("LIBRARY_PATH", str(stubs))
        monkeypatch.setenv("LD_LIBRARY_PATH", f"{nvcc.home}/lib64")
        monkeypatch.setattr(torch.version, "cuda", toolchain.dotted(nvcc.version))
    return nvcc


def test_nvcc_builds_the_same_sources(linkable, tmp_path):
    engine = NvccEngine()
    assert engines.why_not(engine) is None
    entry = get(engine)
    needed = subprocess.run(["readelf", "-d", entry.artefact], capture_output=True, text=True, check=True).stdout
    assert "libcudart.so" in needed
    assert "torch" not in needed
    assert (
        "vsa_jit_get_function"
        in subprocess.run(["nm", "-D", entry.artefact], capture_output=True, text=True, check=True).stdout
    )
    assert str(tmp_path).encode() not in entry.artefact.read_bytes()
    assert get(engine) == entry
    # Only this engine has the kernel in the cache, then both have.
    assert engines.choose([toy()], ARCH).name == "nvcc"
    assert entry.folder != get().folder
    assert engines.choose([toy()], ARCH).name == "nvrtc"


def test_an_error_of_nvcc(linkable, sources):
    write_sources(sources, main=MAIN.replace("value()", "missing()"))
    with pytest.raises(CompileError) as caught:
        get(NvccEngine())
    assert 'error: identifier "missing" is undefined' in caught.value.first_error
    assert "toy.cu(6)" in caught.value.first_error
    assert caught.value.first_error in caught.value.log.read_text()
    again = compile_again(caught.value)
    assert again.returncode == 1
    assert caught.value.first_error in again.stdout


def test_a_lock_that_pytorch_left_blocks_nothing(linkable, monkeypatch):
    """Killed while nvcc runs, PyTorch leaves its lock file, and would wait for it for ever in the same folder."""
    child = os.fork()
    if child == 0:
        try:
            get(NvccEngine())
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    locks: list[Path] = []
    while not locks and time.monotonic() < deadline:
        locks = list(Path(os.environ["VSA_JIT_CACHE_DIR"]).glob("sm_90a/build/*/objects/lock"))
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert locks, "PyTorch took no lock"
    assert get(NvccEngine()).size > 0


def test_a_missing_kernel_in_a_capture_asks_for_a_warmup(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NotWarmError, match="toy: not loaded, and a CUDA graph is being captured; run warmup first"):
        module.load([toy()], 0, "nvrtc")


@pytest.mark.parametrize("broken", ["engine", "thread", "context", "cubin"])
def test_whatever_fails_while_loading_is_a_load_error(monkeypatch, broken):
    def fail(*args, **kwargs):
        raise RuntimeError(f"no {broken}")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(module, "make_context_current", fail if broken == "context" else lambda device: None)
    if broken == "engine":
        monkeypatch.setattr(engines, "named", fail)
    if broken == "thread":
        monkeypatch.setattr(threading.Thread, "start", fail)
    monkeypatch.setattr(NVRTC.__class__, "function", fail)
    with pytest.raises(LoadError, match=rf"toy could not be loaded: RuntimeError: no {broken}$"):
        module.load([toy()], 0, "nvrtc")

"""Every CUDA kernel, as it is shipped, compiles for Hopper with NVRTC and with nvcc: no spill, no local memory, and no
more shared memory than a thread block can have."""

import ctypes
import re
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from vsa_jit.backends.sm90.specialise import ARCH, DTYPES, HEAD_DIMS, kernels_of
from vsa_jit.jit import toolchain
from vsa_jit.jit.compile import run_worker
from vsa_jit.jit.engines.nvcc import LINK_OPTIONS, NvccEngine
from vsa_jit.jit.engines.nvrtc import NvrtcEngine
from vsa_jit.jit.errors import CompileError

# Of a thread block on sm_90, from the CUDA programming guide's table of compute capabilities.
MOST_SHARED_MEMORY = 227 * 1024
KERNELS = {kernel.label: kernel for dtype in DTYPES for head_dim in HEAD_DIMS for kernel in kernels_of(dtype, head_dim)}


def check_resources(log: str, kernel) -> None:
    """Checks what ptxas says of a kernel: "N bytes stack frame, N bytes spill stores, N bytes spill loads"."""
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert used == [("0", "0", "0")], log
    static = re.search(r"(\d+) bytes smem", log)
    assert kernel.smem_bytes + (int(static[1]) if static else 0) <= MOST_SHARED_MEMORY, log
    assert re.search(r"Used \d+ registers", log), log
    assert "warning" not in log, log
    # What ptxas says where it takes products one at a time.
    assert "Potential Performance Loss" not in log, log


def check_queries_stay(cubin: Path) -> None:
    """Checks that nothing writes the registers that hold Q while a loop multiplies by them.

    ptxas 13.0 does that to some loops: it gives the probabilities the same registers.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    # CuPy gives NVRTC's code without its last byte, as if it were text.
    whole = cubin.with_suffix(".whole")
    whole.write_bytes(cubin.read_bytes() + b"\0")
    sass = subprocess.run([tool, whole], capture_output=True, text=True, check=True).stdout
    code = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass)]
    loads = [i for i, line in enumerate(code) if line.startswith("LDSM")]
    products = [i for i, line in enumerate(code) if line.startswith("HGMMA")]
    held = {int(re.search(r" R(\d+)", code[i])[1]) + step for i in loads for step in range(4)}
    taken = {int(match[1]) for i in products if (match := re.match(r"HGMMA\S+ R\d+, R(\d+),", code[i]))}
    assert held & taken
    # The last products that take Q end the loop.
    last = max(i for i in products if (match := re.match(r"HGMMA\S+ R\d+, R(\d+),", code[i])) and int(match[1]) in held)
    for line in code[loads[-1] + 1 : last]:
        written = re.match(r"(\S+) (?:P\d, )?R(\d+)\b", line)
        if written and not written[1].startswith(("ST", "SYNCS", "BAR", "RED", "ATOMS")):
            assert int(written[2]) not in held, line


@pytest.mark.parametrize("label", KERNELS)
def test_nvrtc(label, tmp_path):
    kernel, engine = KERNELS[label], NvrtcEngine()
    spec = engine.spec(kernel, ARCH)
    engine.write_job(tmp_path, kernel, spec)
    run_worker(label, tmp_path, tmp_path / spec.artefact, threading.Event())
    assert (tmp_path / spec.artefact).read_bytes().startswith(b"\x7fELF")
    check_resources((tmp_path / "log.txt").read_text(), kernel)
    if kernel.entry == "attend_forward":
        check_queries_stay(tmp_path / spec.artefact)


@pytest.mark.parametrize("label", KERNELS)
def test_nvcc(label, tmp_path):
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.Unavailable as error:
        pytest.skip(f"needs a CUDA toolkit: {error}")
    kernel, engine = KERNELS[label], NvccEngine()
    spec = engine.spec(kernel, ARCH)
    engine.write_job(tmp_path, kernel, spec)
    options = [flag for flag in spec.flags if flag not in LINK_OPTIONS]
    sources = tmp_path / "src"
    command = [nvcc.path, *options, f"-I{sources}", "-c", "-o", tmp_path / "kernel.o", sources / "nvcc_entry.cu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_resources(run.stdout + run.stderr, kernel)


def with_fields_in_another_order(structure: type[ctypes.Structure], *names: str) -> type[ctypes.Structure]:
    """A structure of the same size in which two fields of one type have changed places."""
    others = dict(zip(names, reversed(names), strict=True))
    fields = [(others.get(name, name), kind) for name, kind in structure._fields_]
    return type(structure.__name__, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(
    ("label", "names"), [("forward bf16 D=64", ("out", "out_s")), ("forward bf16 D=64", ("queries", "keys"))], ids=str
)
def test_a_field_that_the_host_has_elsewhere_does_not_compile(label, names, tmp_path):
    kernel, engine = KERNELS[label], NvrtcEngine()
    other = with_fields_in_another_order(kernel.params, *names)
    assert ctypes.sizeof(other) == ctypes.sizeof(kernel.params)
    kernel = replace(kernel, params=other)
    spec = engine.spec(kernel, ARCH)
    engine.write_job(tmp_path, kernel, spec)
    with pytest.raises(CompileError):
        run_worker(label, tmp_path, tmp_path / spec.artefact, threading.Event())
    assert f"the host has Params::{names[0]}" in (tmp_path / "log.txt").read_text()


def test_every_dtype_and_head_dim_is_here():
    # Of each the block means and the forward.
    assert len(KERNELS) == 4 * 2
    assert set(DTYPES) == {torch.bfloat16, torch.float16}
    assert HEAD_DIMS == (64, 128)

"""Every CUDA kernel, as it is shipped, compiles for Hopper with NVRTC and with nvcc: no spill, no local memory, and no
more shared memory than a thread block can have."""

import ctypes
import itertools
import re
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from vsa_jit.backends.sm90 import specialise
from vsa_jit.backends.sm90.specialise import ARCH, DTYPES, HEAD_DIMS, kernels_of
from vsa_jit.jit import toolchain
from vsa_jit.jit.compile import run_worker
from vsa_jit.jit.engines.nvcc import LINK_OPTIONS, NvccEngine
from vsa_jit.jit.engines.nvrtc import NvrtcEngine
from vsa_jit.jit.errors import CompileError

# Of a thread block on sm_90, from the CUDA programming guide's table of compute capabilities.
MOST_SHARED_MEMORY = 227 * 1024
# What each thread block takes beside its own, of a multiprocessor that has as much more than a thread block.
RESERVED_SHARED_MEMORY = 1024
KERNELS = {
    kernel.label: kernel
    for dtype in DTYPES
    for head_dim in HEAD_DIMS
    # Those for segments differ between the dtypes as the others do.
    for segments in ((False, True) if dtype == torch.bfloat16 else (False,))
    for kernel in kernels_of(dtype, head_dim, segments=segments)
}

# Both compilers have the same ptxas: nvcc takes every source with one dtype and one size of heads.
KERNELS_OF_NVCC = [
    label
    for label, kernel in KERNELS.items()
    if "fp16" not in label and ("D=64" not in label or kernel.entry == "attend_backward_kv_64")
]


def check_resources(log: str, kernel) -> None:
    """Checks what ptxas says of a kernel: "N bytes stack frame, N bytes spill stores, N bytes spill loads"."""
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert used == [("0", "0", "0")], log
    static = re.search(r"(\d+) bytes smem", log)
    of_block = kernel.smem_bytes + (int(static[1]) if static else 0)
    assert of_block <= MOST_SHARED_MEMORY, log
    if kernel.entry in SHARING:
        assert 2 * (of_block + RESERVED_SHARED_MEMORY) <= MOST_SHARED_MEMORY + RESERVED_SHARED_MEMORY, log
    registers = re.search(r"Used (\d+) registers", log)
    assert registers, log
    if kernel.entry in BESIDE:
        assert int(registers[1]) <= BESIDE[kernel.entry], log
    assert "warning" not in log, log
    # What ptxas says where it takes products one at a time.
    assert "Potential Performance Loss" not in log, log


# Of this two thread blocks share a multiprocessor.
SHARING = ("attend_backward_kv_64",)
# A thread block of each fits on a multiprocessor, whose four parts have 16,384 registers each.
BESIDE = {"block_means": specialise.MEANS_REGISTERS, "coarse_attend": specialise.COARSE_REGISTERS}
# They hold left operands in registers while a loop multiplies by them.
HOLDING = ("attend_forward", "attend_backward_q", "attend_backward_kv", "attend_backward_kv_64")


@pytest.mark.parametrize("segments", [False, True], ids=["video", "segments"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_run_beside_block_means(dtype, head_dim, segments):
    means, coarse = specialise.block_means(dtype, head_dim, segments), specialise.coarse_attend(head_dim)
    of_both = means.smem_bytes + coarse.smem_bytes + 2 * RESERVED_SHARED_MEMORY
    assert of_both <= MOST_SHARED_MEMORY + RESERVED_SHARED_MEMORY
    # Warps go to the parts of a multiprocessor in turn.
    warps = [-(-kernel.threads // 32 // 4) for kernel in (means, coarse)]
    assert sum(32 * n * BESIDE[kernel.entry] for n, kernel in zip(warps, (means, coarse), strict=True)) <= 16384


def check_operands_stay(sass: str) -> None:
    """Checks that nothing writes the registers that hold left operands while a loop multiplies by them.

    ptxas 13.0 does that to some loops: it gives the probabilities the same registers.
    """
    code = [re.sub(r"^@!?U?P\w+\s+", "", line) for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass)]
    loads = [i for i, line in enumerate(code) if line.startswith("LDSM")]
    taken = {i: int(match[1]) for i, line in enumerate(code) if (match := re.match(r"HGMMA\S+ R\d+, R(\d+),", line))}
    # Each consumer's code loads its operands first.
    starts = [i for before, i in itertools.pairwise([0, *loads]) if any(before < product < i for product in taken)]
    for start, end in itertools.pairwise([loads[0], *starts, len(code)]):
        of_consumer = [i for i in loads if start <= i < end]
        held = {int(re.search(r" R(\d+)", code[i])[1]) + step for i in of_consumer for step in range(4)}
        # The last products that take them end the loop.
        last = max(i for i, register in taken.items() if start < i < end and register in held)
        for line in code[of_consumer[-1] + 1 : last]:
            written = re.match(r"(\S+) (?:P\d, )?R(\d+)\b", line)
            if written and not written[1].startswith(("ST", "SYNCS", "BAR", "RED", "ATOMS")):
                assert int(written[2]) not in held, line


def disassembled(tool: str, *arguments: object) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("label", KERNELS)
def test_nvrtc(label, tmp_path):
    kernel, engine = KERNELS[label], NvrtcEngine()
    spec = engine.spec(kernel, ARCH)
    engine.write_job(tmp_path, kernel, spec)
    run_worker(label, tmp_path, tmp_path / spec.artefact, threading.Event())
    assert (tmp_path / spec.artefact).read_bytes().startswith(b"\x7fELF")
    check_resources((tmp_path / "log.txt").read_text(), kernel)
    if kernel.entry in HOLDING:
        # CuPy gives NVRTC's code without its last byte, as if it were text.
        (tmp_path / "whole").write_bytes((tmp_path / spec.artefact).read_bytes() + b"\0")
        check_operands_stay(disassembled("nvdisasm", tmp_path / "whole"))


@pytest.mark.parametrize("label", KERNELS_OF_NVCC)
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
    if kernel.entry in HOLDING:
        check_operands_stay(disassembled("cuobjdump", "--dump-sass", tmp_path / "kernel.o"))


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
    # Of each the block means, the forward, and five of the backward, in bf16 for segments too; one that orders the rows
    # of an inverse, and one that makes the maps of segments; and the coarse branch's, which are for fp32.
    assert len(KERNELS) == 4 * 7 + 2 * 7 + 2 + 2 * 3
    assert set(DTYPES) == {torch.bfloat16, torch.float16}
    assert HEAD_DIMS == (64, 128)

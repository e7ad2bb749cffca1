"""Every CUDA kernel, as it is shipped, compiles for Hopper with NVRTC and with nvcc: no spill, no local memory, and no
more shared memory than a thread block can have."""

import re
import subprocess
import threading

import pytest
import torch

from vsa_jit.backends.sm90.means import DTYPES, HEAD_DIMS
from vsa_jit.backends.sm90.support import ARCH, kernels_of
from vsa_jit.jit import toolchain
from vsa_jit.jit.compile import run_worker
from vsa_jit.jit.engines.nvcc import LINK_OPTIONS, NvccEngine
from vsa_jit.jit.engines.nvrtc import NvrtcEngine
from vsa_jit.problem import TILE_OF_TOKENS

# Of a thread block on sm_90, from the CUDA programming guide's table of compute capabilities.
MOST_SHARED_MEMORY = 227 * 1024
KERNELS = {
    kernel.label: kernel
    for dtype in DTYPES
    for head_dim in HEAD_DIMS
    for block in TILE_OF_TOKENS
    for kernel in kernels_of(dtype, head_dim, block)
}


def check_resources(log: str, kernel) -> None:
    """Checks what ptxas says of a kernel: "N bytes stack frame, N bytes spill stores, N bytes spill loads"."""
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert used == [("0", "0", "0")], log
    static = re.search(r"(\d+) bytes smem", log)
    assert kernel.smem_bytes + (int(static[1]) if static else 0) <= MOST_SHARED_MEMORY, log
    assert re.search(r"Used \d+ registers", log), log
    assert "warning" not in log, log


@pytest.mark.parametrize("label", KERNELS)
def test_nvrtc(label, tmp_path):
    kernel, engine = KERNELS[label], NvrtcEngine()
    recipe = engine.recipe(kernel, ARCH)
    engine.write_job(tmp_path, kernel, recipe)
    run_worker(label, tmp_path, tmp_path / recipe.artefact, threading.Event())
    assert (tmp_path / recipe.artefact).read_bytes().startswith(b"\x7fELF")
    check_resources((tmp_path / "log.txt").read_text(), kernel)


@pytest.mark.parametrize("label", KERNELS)
def test_nvcc(label, tmp_path):
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.Unavailable as error:
        pytest.skip(f"needs a CUDA toolkit: {error}")
    kernel, engine = KERNELS[label], NvccEngine()
    recipe = engine.recipe(kernel, ARCH)
    engine.write_job(tmp_path, kernel, recipe)
    options = [flag for flag in recipe.flags if flag not in LINK_OPTIONS]
    sources = tmp_path / "src"
    command = [nvcc.path, *options, f"-I{sources}", "-c", "-o", tmp_path / "kernel.o", sources / "nvcc_entry.cu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_resources(run.stdout + run.stderr, kernel)


def test_every_dtype_and_head_dim_is_here():
    assert len(KERNELS) == 4
    assert set(DTYPES) == {torch.bfloat16, torch.float16}
    assert HEAD_DIMS == (64, 128)

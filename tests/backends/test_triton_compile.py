"""Every Triton kernel compiles for every supported architecture, without a GPU, and fits its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.compile_triton import ARCHITECTURES, TENSOR_MEMORY_COLUMNS

from vsa_jit.backends.triton import config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_kernels_fit_memory(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, ROOT / "tests/support/compile_triton.py", str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == {80: 28, 86: 109, 90: 54, 100: 52}.get(capability, 19)
    limits = {
        "shared": ARCHITECTURES[capability].shared_memory,
        "tensor": TENSOR_MEMORY_COLUMNS if capability == 100 else 0,
    }
    assert not [kernel for kernel in kernels for name, limit in limits.items() if kernel[name] > limit]


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("order", [(False, False), (True, False), (True, True)], ids=["plain", "raster", "border"])
def test_every_size_has_tiles(capability, itemsize, order):
    for block in (64, 128, 192, 256, 320, 512, 1024):
        for head_dim in (16, 24, 64, 80, 128, 160, 256):
            work = (block, head_dim, itemsize, ARCHITECTURES[capability])
            for tiles in (config.forward(*work), config.backward_q(*work), config.backward_kv(*work, *order)):
                assert block % tiles.rows == 0
                assert block % tiles.columns == 0


def test_larger_blocks_get_larger_tiles():
    hopper = ARCHITECTURES[90]
    assert config.forward(64, 128, 2, hopper).rows == 64
    for block in (128, 256, 384):
        assert config.forward(block, 128, 2, hopper).rows == 128
        assert config.backward_q(block, 128, 2, hopper).rows == 128
        assert config.backward_kv(block, 128, 2, hopper, raster=True, border=False).columns == 128
        assert config.backward_kv(block, 128, 2, hopper, raster=True, border=True).columns == 128
        # Where 128 rows were measured to be slower: sequences, and heads of 64.
        assert config.backward_kv(block, 128, 2, hopper, raster=False, border=False).columns == 64
        assert config.backward_kv(block, 64, 2, hopper, raster=True, border=True).columns == 64

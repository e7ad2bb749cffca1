"""Measures run-time compilation and its first kernel on a Hopper GPU: ``python tests/measure_jit.py``.

First calls are those of new processes, with an empty cache and then with a full one, after imports and the start of
CUDA. "kernels" is all from the choice of the backend to the end of its CUDA kernels on the GPU; "whole call" adds what
Triton and PyTorch load for the rest of a forward, whose Triton kernels are in Triton's cache. The block means are timed
alone, against the rate at which this GPU copies (bytes read and written), counted in bytes read.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from triton.testing import do_bench

from vsa_jit.backends import triton
from vsa_jit.backends.sm90 import backend, support
from vsa_jit.checks import check_problem
from vsa_jit.jit import engines, module

ROOT = Path(__file__).parent.parent
DEVICE = "cuda"
HEADS, LENGTH = 12, 39_936
VIDEO = (24, 32, 52)
BORDERED_VIDEO = (21, 30, 52)
COPY_BYTES = 1 << 30
CALLS = 1000
ROUNDS = 21

FIRST_CALL = """
import json, sys, time
import torch, triton, vsa_jit
if sys.argv[1] == "nvrtc":
    import cupy
from vsa_jit.backends import choose
from vsa_jit.backends.sm90 import backend
from vsa_jit.checks import check_problem
q, k, v = torch.randn(3, 1, 2, 4096, 128, device="cuda").bfloat16()
torch.cuda.synchronize()
start = time.perf_counter()
problem = check_problem(
    q, k, v, block_size=64, grid=None, layout="bhsd", softmax_scale=None,
    variable_block_sizes=None, q_variable_block_sizes=None,
)
choose.backend_for(problem, "sm90", q, k, v).block_means(problem, q, k, v, None, None)
torch.cuda.synchronize()
kernels = time.perf_counter() - start
vsa_jit.video_sparse_attn(q, k, v, topk=8, backend="sm90")
torch.cuda.synchronize()
print(json.dumps([kernels, time.perf_counter() - start]))
"""


def first_call(engine: str, cache: str) -> tuple[float, float]:
    """Seconds until the kernels have run, and until the whole call has, in a new process."""
    environment = {**os.environ, "VSA_JIT_CACHE_DIR": cache, "VSA_JIT_ENGINE": engine, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIRST_CALL, engine]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels, whole = json.loads(run.stdout)
    return kernels, whole


def measure_first_calls() -> None:
    for engine in engines.ENGINES:
        reason = engines.why_not(engine)
        if reason is not None:
            print(f"{engine.name}: {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            first_call(engine.name, f"{folder}/other")  # fills Triton's cache
            cold = [first_call(engine.name, f"{folder}/{i}") for i in range(3)]
            warm = [first_call(engine.name, f"{folder}/0") for _ in range(5)]
        for name, runs in (("cold", cold), ("warm", warm)):
            kernels, whole = (statistics.median(times) for times in zip(*runs, strict=True))
            print(f"{engine.name} {name}: kernels {kernels:.3f} s, whole call {whole:.3f} s")


def host_time(call: Callable[[], object], calls: int) -> str:
    """How long the host takes for one of so many calls, which the GPU's queue has to hold."""
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return f"{statistics.median(rounds):.1f} us ({min(rounds):.1f} to {max(rounds):.1f} in {ROUNDS} rounds)"


def measure_host_time() -> None:
    q, k, v = torch.randn(3, 1, 2, 256, 128, device=DEVICE).bfloat16()
    problem = problem_of(q, k, v)
    of_a_launch = host_time(lambda: backend.block_means(problem, q, k, v, None, None), CALLS)
    print(f"host time of a launch, with its three outputs: {of_a_launch}")


def problem_of(q, k, v, **others):
    arguments = {
        "block_size": 64, "grid": None, "layout": "bhsd", "softmax_scale": None,
        "variable_block_sizes": None, "q_variable_block_sizes": None,
    }  # fmt: skip
    return check_problem(q, k, v, **{**arguments, **others})


def milliseconds(run) -> float:
    return do_bench(run, warmup=50, rep=300, return_mode="median")


def measure_block_means() -> None:
    source = torch.randn(COPY_BYTES // 2, device=DEVICE).bfloat16()
    target = torch.empty_like(source)
    copy_rate = 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source))
    print(f"copy: {copy_rate / 1e9:.2f} TB/s read and written")
    sizes = torch.full((LENGTH // 64,), 64, dtype=torch.int32, device=DEVICE)
    orders = {
        "tiled": {"variable_block_sizes": sizes, "q_variable_block_sizes": sizes},
        "raster": {"grid": VIDEO},
        "raster, blocks of 256": {"grid": VIDEO, "block_size": 256},
        "raster, cut tiles": {"grid": BORDERED_VIDEO},
    }
    for head_dim, layout, name in itertools.product((128, 64), ("bhsd", "bshd"), orders):
        kernels = support.kernels_of(torch.bfloat16, head_dim)
        module.load(kernels, 0, engines.choose(kernels, support.ARCH).name)
        length = math.prod(orders[name].get("grid", (LENGTH,)))
        shape = (1, HEADS, length, head_dim) if layout == "bhsd" else (1, length, HEADS, head_dim)
        q, k, v = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3))
        problem = problem_of(q, k, v, layout=layout, **orders[name])
        given = orders[name].get("variable_block_sizes")
        arguments = (problem, q, k, v, given, given)
        for one, other in zip(backend.block_means(*arguments), triton.block_means(*arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        figures = []
        for run in (backend, triton):
            ms = milliseconds(functools.partial(run.block_means, *arguments))
            figures.append(f"{ms:.3f} ms, {3 * q.numel() * q.itemsize / ms / copy_rate:.3f} of the copy rate")
        print(f"D={head_dim} {layout} {name}: {figures[0]} (Triton {figures[1]})", flush=True)


if __name__ == "__main__":
    measure_block_means()
    measure_host_time()
    measure_first_calls()

"""The first call of a process on a Hopper GPU, with an empty cache (cold) and with a full one (warm), for each engine.

Each is the first of a new process, after imports and the start of CUDA.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import vsa_jit
from vsa_jit.backends.choose import backend_for
from vsa_jit.bench.cases import Case, Inputs, Selection, Shape
from vsa_jit.jit import engines

CASE = Case(Shape(4096, None, 1, 2, 128, "bf16", "bhsd"), 64, Selection(topk=8), "one", "sm90")
COLD_RUNS, WARM_RUNS = 3, 5
# What a call imports is no part of its time.
_LAUNCHES = ("vsa_jit.backends.sm90.launches", "vsa_jit.backends.triton.launches")
MODULES = {"nvrtc": (*_LAUNCHES, "cupy"), "nvcc": _LAUNCHES}
PROGRAM = "import sys; from vsa_jit.bench.first_call import run_here; run_here(*sys.argv[1:])"


@dataclass(frozen=True)
class FirstCall:
    """Medians in seconds, from the choice of the backend on.

    Attributes:
        kernels_s: to the end of its CUDA kernels on the GPU.
        whole_call_s: to the end of a whole forward after that.
    """

    engine: str
    cache: str
    kernels_s: float
    whole_call_s: float

    def __str__(self) -> str:
        return f"{self.engine} {self.cache}: kernels {self.kernels_s:.3f} s, whole call {self.whole_call_s:.3f} s"


@dataclass(frozen=True)
class NotRun:
    """An engine that this machine cannot compile with."""

    engine: str
    reason: str

    def __str__(self) -> str:
        return f"{self.engine}: {self.reason}"


def measure(device: torch.device) -> Iterator[FirstCall | NotRun]:
    for engine in engines.ENGINES:
        reason = engines.why_not(engine)
        if reason is not None:
            yield NotRun(engine.name, str(reason))
            continue
        with tempfile.TemporaryDirectory() as folder:
            _run(engine.name, device, f"{folder}/other")  # reads libraries from disk
            cold = [_run(engine.name, device, f"{folder}/{i}") for i in range(COLD_RUNS)]
            warm = [_run(engine.name, device, f"{folder}/0") for _ in range(WARM_RUNS)]
        for cache, runs in (("cold", cold), ("warm", warm)):
            kernels, whole_call = (median(times) for times in zip(*runs, strict=True))
            yield FirstCall(engine.name, cache, kernels, whole_call)


def _run(engine: str, device: torch.device, cache: str) -> tuple[float, float]:
    """Seconds of a first call in a new process, until its kernels have run and until all of it has."""
    folders = [str(Path(vsa_jit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "VSA_JIT_CACHE_DIR": cache,
        "VSA_JIT_ENGINE": engine,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
    }
    command = [sys.executable, "-c", PROGRAM, str(device), *MODULES[engine]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the first call with {engine} failed:\n{run.stderr}")
    kernels, whole_call = json.loads(run.stdout)
    return kernels, whole_call


def run_here(device_name: str, *modules: str) -> None:
    """Makes the first call of this process, and prints its seconds as JSON."""
    for module in modules:
        importlib.import_module(module)
    device = torch.device(device_name)
    inputs = Inputs.random(CASE.shape, device, seed=0)
    q, k, v = inputs.q, inputs.k, inputs.v
    problem, topk = CASE.problem, CASE.topk
    _wait(device)
    start = time.perf_counter()
    backend_for("block_means", problem, CASE.backend, q, k, v).block_means(problem, q, k, v, None, None)
    _wait(device)
    kernels = time.perf_counter() - start
    vsa_jit.video_sparse_attn(q, k, v, topk=topk, backend=CASE.backend)
    _wait(device)
    print(json.dumps([kernels, time.perf_counter() - start]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

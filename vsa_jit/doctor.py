"""What this machine has, what would run on it, and why the rest would not."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vsa_jit.backends import choose
from vsa_jit.checks import check_choice
from vsa_jit.jit import engines, toolchain
from vsa_jit.jit.cache import location
from vsa_jit.jit.cache.entry import BadEntry
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.errors import JitError, Unavailable
from vsa_jit.jit.toolchain import dotted
from vsa_jit.problem import Problem, Side

# The kind of call that the answer is for.
DTYPE = torch.bfloat16
HEAD_DIM = 128


def examine() -> dict[str, Any]:
    """A record of nested dictionaries that JSON can hold; what is missing has ``missing``, and ``fix`` where known."""
    return {
        "vsa_jit": toolchain.package_version("vsa-jit") or "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": _or_missing(lambda: {"cuda": dotted(toolchain.driver_version())}),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "triton": _package("pip install triton", "triton"),
        "cupy": _package(toolchain.cuda_extra(), "cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "nvrtc": _or_missing(_nvrtc),
        "headers": _or_missing(_headers),
        "nvcc": _or_missing(_nvcc),
        "host_compiler": _or_missing(lambda: _tool(toolchain.host_compiler(), "apt install g++, or set CXX")),
        "ninja": _tool("ninja", "pip install ninja"),
        "cache": _or_missing(_cache),
        "settings": {
            choose.ENVIRONMENT_VARIABLE: _setting(choose.ENVIRONMENT_VARIABLE, _one_of(choose.NAMES)),
            engines.ENVIRONMENT_VARIABLE: _setting(engines.ENVIRONMENT_VARIABLE, _one_of(engines.NAMES)),
            location.ENVIRONMENT_VARIABLE: _setting(location.ENVIRONMENT_VARIABLE, lambda name, value: open_cache()),
        },
        "engines": {engine.name: _verdict(engines.why_not(engine)) for engine in engines.ENGINES},
        "backends": {str(device): _backends(device) for device in _devices()},
    }


def is_well(report: dict[str, Any]) -> bool:
    """Whether every device has the backend that was made for it, and nothing is set wrong."""
    return all(setting["wrong"] is None for setting in report["settings"].values()) and all(
        verdict["would_run"] or not verdict["made_for"]
        for verdicts in report["backends"].values()
        for verdict in verdicts.values()
    )


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]


def _one_of(names: Sequence[str]) -> Callable[[str, str], object]:
    return lambda variable, value: check_choice(variable, value, names)


def _setting(name: str, check: Callable[[str, str], object]) -> dict[str, Any]:
    value = os.environ.get(name)
    wrong = None
    try:
        if value:
            check(name, value)
    except (ValueError, JitError) as error:
        wrong = str(error)
    return {"value": value, "wrong": wrong}


def _gpu(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "name": torch.cuda.get_device_name(index),
        "capability": dotted(torch.cuda.get_device_capability(index)),
    }


def _or_missing(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Unavailable as error:
        return _missing(error.reason, error.fix)
    except JitError as error:
        return _missing(str(error), None)


def _missing(reason: str, fix: str | None) -> dict[str, Any]:
    return {"missing": reason, "fix": fix}


def _package(fix: str, *names: str) -> dict[str, Any]:
    found = toolchain.package_version(*names)
    return _missing(f"{names[0]} is not installed", fix) if found is None else {"version": found}


def _tool(name: str, fix: str) -> dict[str, Any]:
    path = shutil.which(name, path=toolchain.tool_path())
    return _missing(f"{name} is not on PATH", fix) if path is None else {"path": path}


def _nvrtc() -> dict[str, Any]:
    nvrtc = toolchain.find_nvrtc()
    return {"cuda": dotted(nvrtc.version), "path": nvrtc.path, "found_via": nvrtc.found_via}


def _headers() -> dict[str, Any]:
    nvrtc = toolchain.find_nvrtc()
    if nvrtc.include is None:
        return _missing(f"{nvrtc.without_include} (no kernel of this package needs them)", None)
    return {"cuda": dotted(nvrtc.version), "path": nvrtc.include}


def _nvcc() -> dict[str, Any]:
    nvcc = toolchain.find_nvcc()
    return {"cuda": nvcc.build, "path": nvcc.path}


def _cache() -> dict[str, Any]:
    cache = open_cache()
    entries = [entry for _, entry in cache.entries()]
    good = [entry for entry in entries if not isinstance(entry, BadEntry)]
    return {
        "folder": str(cache.root),
        "kept": cache.persistent,
        "writable": cache.writable,
        "kernels": len(good),
        "bad": len(entries) - len(good),
        "bytes": sum(entry.size for entry in good),
    }


def _verdict(reason: Unavailable | None) -> dict[str, Any]:
    if reason is None:
        return {"would_run": True, "reason": None, "fix": None}
    return {"would_run": False, "reason": reason.reason, "fix": reason.fix}


def _backends(device: torch.device) -> dict[str, Any]:
    side = Side(heads=1, length=64, tile=(1, 1, 64), grid=None, layout="bhsd")
    problem = Problem(batch=1, head_dim=HEAD_DIM, queries=side, keys=side, softmax_scale=HEAD_DIM**-0.5)
    verdicts = {}
    for spec in choose.specs():
        try:
            reason = spec.why_not_on(device) or spec.why_not(problem, DTYPE, ())
            if reason is None:
                spec.engine_of(problem, device, DTYPE)
        except (ValueError, JitError, OSError) as error:
            reason = str(error)
        verdicts[spec.name] = {"would_run": reason is None, "reason": reason, "made_for": spec.is_native_on(device)}
    return verdicts

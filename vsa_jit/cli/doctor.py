"""The command ``vsa-jit doctor``: what this machine has, and what would run on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from vsa_jit.doctor import examine, is_well

SUMMARY = "show what this machine has, which backends and engines would run, and what fixes the others"
DESCRIPTION = """\
Backends are asked about a call in bf16 with head dimension 128. The exit code is 1 where a GPU lacks the backend that
was made for it, or a setting is wrong.
"""
FOUND = ("driver", "torch", "triton", "cupy", "nvrtc", "headers", "nvcc", "host_compiler", "ninja", "cache")
WIDTH = 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, text in _lines(report):
            print(f"{name:<{WIDTH}}{text}")
    return 0 if is_well(report) else 1


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "vsa_jit", f"{report['vsa_jit']}, Python {report['python']}, {report['platform']}"
    for gpu in report["gpus"]:
        yield f"GPU {gpu['index']}", f"{gpu['name']}, compute capability {gpu['capability']}"
    if not report["gpus"]:
        yield "GPU", "none that PyTorch sees"
    for name in FOUND:
        found = report[name]
        if "missing" in found:
            yield name.replace("_", " "), f"missing: {found['missing']}"
            if found["fix"] is not None:
                yield "", f"fix: {found['fix']}"
        else:
            yield name.replace("_", " "), ", ".join(f"{key} {value}" for key, value in found.items())
    for name, setting in report["settings"].items():
        if setting["value"]:
            yield name, setting["wrong"] or setting["value"]
    for name, verdict in report["engines"].items():
        yield f"engine {name}", "would run" if verdict["would_run"] else f"would not: {verdict['reason']}"
        if not verdict["would_run"] and verdict["fix"] is not None:
            yield "", f"fix: {verdict['fix']}"
    for device, verdicts in report["backends"].items():
        for name, verdict in verdicts.items():
            yield f"{name} on {device}", "would run" if verdict["would_run"] else f"would not: {verdict['reason']}"

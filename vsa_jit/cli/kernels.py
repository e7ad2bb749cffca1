"""``vsa-jit bench --kernels`` and ``--first-call``: what they do with their arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TypeVar

import torch

from vsa_jit.bench import first_call, kernels, report
from vsa_jit.bench.cases import DEFAULTS
from vsa_jit.cli.parse import refuse_beside

Result = TypeVar("Result", kernels.Result, first_call.FirstCall | first_call.NotRun)

# What each work says itself, or what is of other ways to measure.
OTHERS = (
    *("seq_len", "grid", "segments", "context", "shape", "sparsity", "topk", "recipe", "block_size", "head_dim"),
    *("dtype", "backend"),
    *("model", "layers", "mode", "direction", "heads", "batch", "layout", "gate", "peer"),
    *("profile", "csv", "plot", "trace"),
)


def run_kernels(args: argparse.Namespace, device: torch.device) -> int:
    """Measures the works that the arguments name.

    Returns:
        The exit code: 0, or 1 where a check failed.

    Raises:
        argparse.ArgumentError: the arguments do not go together, name no work, or the device cannot run them.
    """
    refuse_beside("kernels", args, ("first_call", *OTHERS))
    for name in args.kernels:
        if not kernels.named([name]):
            raise argparse.ArgumentError(
                None,
                f"argument --kernels: expected a part of a work's name, such as 'W1' or 'block means', got {name!r}",
            )
    _check_device("kernels", device)
    seconds = args.seconds or DEFAULTS[device.type].seconds
    setting = kernels.Setting(device, seconds, args.seed)
    results = _report(args, device, seconds, (work.measure(setting) for work in kernels.named(args.kernels)))
    return 1 if any(isinstance(result, kernels.Failed) for result in results) else 0


def run_first_call(args: argparse.Namespace, device: torch.device) -> int:
    """Measures first calls.

    Raises:
        argparse.ArgumentError: the arguments do not go together, or the device cannot run them.
    """
    refuse_beside("first-call", args, ("seconds", "seed", *OTHERS))
    _check_device("first-call", device)
    _report(args, device, None, first_call.measure(device))
    return 0


def _check_device(flag: str, device: torch.device) -> None:
    try:
        kernels.check_device(device)
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentError(None, f"argument --{flag}: expected a Hopper GPU: {error}") from error


def _report(
    args: argparse.Namespace, device: torch.device, seconds: float | None, results: Iterable[Result]
) -> list[Result]:
    """Prints each result as soon as there is one, and writes all of them."""
    environment = report.environment(device, args.seed, seconds)
    people = sys.stderr if args.json == "-" else sys.stdout
    report.print_header(environment, [], people)
    all_results = []
    for result in results:
        print(result, file=people, flush=True)
        all_results.append(result)
    if args.json is not None:
        with report.open_output(args.json) as file:
            report.write_records(environment, map(asdict, all_results), file)
    return all_results

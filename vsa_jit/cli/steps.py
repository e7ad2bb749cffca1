"""``vsa-jit bench --model``: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from itertools import product

import torch

from vsa_jit.bench import report, step_report
from vsa_jit.bench.cases import DEFAULTS, DIRECTIONS, Selection
from vsa_jit.bench.extras import DIFFUSERS_INSTALL, has_diffusers
from vsa_jit.bench.steps import MODELS, MODES, Bench, Plan, StepCheck, StepRow, best_sdpa
from vsa_jit.cli.parse import refuse_beside

# What a model says itself, or what is of kernels alone.
OTHERS = (
    *("seq_len", "segments", "context", "shape", "recipe", "head_dim", "heads", "layout"),
    *("peer", "profile", "csv", "plot", "trace"),
)
DEFAULT_BLOCK_SIZES = ((4, 4, 4), (2, 8, 8))


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Measures the steps that the arguments describe.

    Returns:
        The exit code: 0, or 1 where the check failed.

    Raises:
        argparse.ArgumentError: the arguments do not go together.
    """
    plan = plan_of(args, device)
    if not has_diffusers():
        raise argparse.ArgumentError(None, f"argument --model: expected diffusers to be installed: {DIFFUSERS_INSTALL}")
    seconds = args.seconds or DEFAULTS[device.type].seconds
    environment = report.environment(device, args.seed, seconds)
    people = sys.stderr if args.json == "-" else sys.stdout
    report.print_header(environment, [], people)
    progress = report.Progress(1 + len(plan.directions) * (1 + len(plan.modes)))
    progress.start("choosing the dense attention")
    sdpa = best_sdpa(plan, device, args.seed, seconds)
    bench = Bench(plan, device, args.seed)
    checks: list[StepCheck] = []
    rows: list[StepRow] = []
    for direction in plan.directions:
        progress.start(f"checking, {direction}")
        checks += bench.check(direction, "eager", sdpa[direction])
    for mode in plan.modes:
        if mode == "compiled" and all(check.ok for check in checks):
            bench.compile()
            for direction in plan.directions:
                checks += bench.check(direction, mode, sdpa[direction])
        for direction in plan.directions:
            progress.start(f"{direction}, {mode}")
            if all(check.ok for check in checks):
                rows += bench.measure(direction, mode, sdpa[direction], seconds)
    progress.finish()
    step_report.print_table(plan, sdpa, checks, rows, people)
    if args.json is not None:
        with report.open_output(args.json) as file:
            step_report.write_json(environment, plan, sdpa, checks, rows, file)
    return 0 if all(check.ok for check in checks) else 1


def plan_of(args: argparse.Namespace, device: torch.device) -> Plan:
    """What the arguments describe, with the model's own sizes where they are silent."""
    refuse_beside("model", args, OTHERS)
    for name in ("grid", "backend", "dtype"):
        values = getattr(args, name) or ()
        if len(values) > 1:
            raise argparse.ArgumentError(None, f"argument --{name}: expected one value with --model, got {len(values)}")
    if args.gate == "one":
        raise argparse.ArgumentError(None, "argument --gate: expected tensor or off with --model, got 'one'")
    model = MODELS[args.model]
    if args.layers is not None and args.layers > model.config["num_layers"]:
        most = model.config["num_layers"]
        raise argparse.ArgumentError(None, f"argument --layers: expected at most {most}, got {args.layers}")
    defaults = DEFAULTS[device.type]
    if args.topk:
        selections = [Selection(topk=topk) for topk in args.topk]
    else:
        selections = [Selection(sparsity=sparsity) for sparsity in args.sparsity or defaults.sparsities]
    return Plan(
        model=args.model,
        layers=args.layers or model.config["num_layers"],
        grid=args.grid[0] if args.grid else model.grid,
        batch=args.batch or 1,
        dtype=args.dtype[0] if args.dtype else defaults.dtype,
        gate=args.gate == "tensor",
        backend=args.backend[0] if args.backend else "auto",
        variants=tuple(product(args.block_size or DEFAULT_BLOCK_SIZES, selections)),
        directions=DIRECTIONS if args.direction in (None, "both") else (args.direction,),
        modes=MODES if args.mode in (None, "both") else (args.mode,),
    )

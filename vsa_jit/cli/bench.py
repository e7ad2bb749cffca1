"""The command ``vsa-jit bench``: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vsa_jit.backends.choose import NAMES
from vsa_jit.bench import report
from vsa_jit.bench.cases import (
    DEFAULTS,
    DIRECTIONS,
    DTYPES,
    GATES,
    PRESETS,
    RECIPES,
    BlockSize,
    Case,
    Defaults,
    Inputs,
    Preset,
    Samples,
    Selection,
    Shape,
    num_tokens,
    sample_lengths,
)
from vsa_jit.bench.extras import INSTALL, has_matplotlib
from vsa_jit.bench.peers import PEERS, Missing, Peer
from vsa_jit.bench.stages import write_trace
from vsa_jit.bench.steps import MODELS, MODES
from vsa_jit.bench.sweep import OK, Row, sweep
from vsa_jit.checks import CONTEXTS, LAYOUTS
from vsa_jit.cli import kernels, parse, steps
from vsa_jit.problem import Layout

SUMMARY = "measure speed, memory and precision beside dense attention"
DESCRIPTION = f"""\
Sweeps every combination of what is given, and for each one and each pass prints its time, TFLOP/s, speed-up over
dense attention, peak memory of both, and its precision. Outputs are checked first: a row whose check fails says FAILED,
has no speed, and makes the exit code 1. Without arguments it takes under two minutes, with sizes that suit the device.

{report.NOTES}
"""
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = "\n".join(f"default on {device}: {defaults}" for device, defaults in DEFAULTS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def several(group: argparse._ActionsContainer, flag: str, kind: Callable[[str], Any], name: str, text: str) -> None:
        group.add_argument(flag, nargs="+", action="extend", type=kind, metavar=name, help=text)

    what = parser.add_argument_group("what to sweep (several values each)")
    several(what, "--seq-len", parse.positive_int, "S", "plain sequences of S tokens")
    several(what, "--grid", parse.triple, "TxHxW", "videos in raster order, such as 21x30x52")
    several(
        what,
        "--segments",
        parse.segments,
        "LIST",
        "plain tokens, which are context, and videos, such as 77+21x30x52; a comma between packed samples",
    )
    several(what, "--shape", parse.one_of(PRESETS), "NAME", "known shapes. " + _listed(PRESETS))
    selection = what.add_mutually_exclusive_group()
    several(selection, "--sparsity", parse.sparsity, "X", "share of key blocks to leave out, in [0, 1)")
    several(selection, "--topk", parse.positive_int, "N", "key blocks, with segments of video, for each query block")
    several(selection, "--recipe", parse.one_of(RECIPES), "NAME", "a top-k and its block size. " + _listed(RECIPES))
    several(what, "--block-size", parse.block_size, "SIZE", "tokens, or a tile such as 4x8x8; a multiple of 64 tokens")
    several(what, "--head-dim", parse.head_dim, "D", "size of a head")
    several(what, "--dtype", parse.dtype, "NAME", ", ".join(DTYPES))
    several(what, "--backend", parse.one_of(NAMES), "NAME", f"{', '.join(NAMES)}; default auto")

    model = parser.add_argument_group("the step of a whole model, instead")
    model.add_argument(
        "--model",
        type=parse.one_of(MODELS),
        metavar="NAME",
        help=f"time inference and training steps of a transformer of diffusers with random weights. {_listed(MODELS)}",
    )
    model.add_argument("--layers", type=parse.positive_int, metavar="N", help="its first N layers; default all")
    model.add_argument(
        "--mode",
        type=parse.one_of((*MODES, "both")),
        help="eager, compiled (compile_repeated_blocks, full graphs) or both (default)",
    )

    hopper = parser.add_argument_group("calls and their parts on a Hopper GPU, instead")
    hopper.add_argument(
        "--kernels",
        nargs="*",
        metavar="NAME",
        help="check and time the forward beside cuDNN's and Triton's, segments beside a video alone, the block means "
        "beside a copy, and host times: all, or those whose name has one of these parts, such as 'W1, random', "
        "segments or 'block means'",
    )
    hopper.add_argument(
        "--first-call",
        action="store_true",
        help="time the first calls of new processes with each engine, nothing cached (cold) and all of it (warm)",
    )

    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--direction",
        type=parse.one_of((*DIRECTIONS, "both")),
        help="forward, backward or both (default)",
    )
    how.add_argument("--heads", type=parse.positive_int, metavar="H", help="number of heads")
    how.add_argument("--batch", type=parse.positive_int, metavar="B", help="batch size, default 1")
    how.add_argument(
        "--layout",
        type=parse.one_of(LAYOUTS),
        help="bhsd (default) or bshd (default with --peer, whose callers hold it)",
    )
    how.add_argument(
        "--gate",
        type=parse.one_of(GATES),
        help="weight of the coarse output: tensor (as a learned gate; default), one, or off, which drops it (default "
        "with --model)",
    )
    how.add_argument(
        "--context",
        type=parse.one_of(CONTEXTS),
        help="of --segments: videos attend all of it (attend; default), or its blocks compete with theirs (compete)",
    )
    several(
        how,
        "--peer",
        parse.one_of(PEERS),
        "NAME",
        f"operators of other packages to time beside ours: {', '.join(PEERS)} (pip install fastvideo-kernel)",
    )
    how.add_argument("--device", type=parse.device, help="cpu, cuda or cuda:N; default cuda where there is one")
    how.add_argument("--seconds", type=parse.seconds, metavar="X", help="time that goes into each measurement")
    how.add_argument("--seed", type=parse.seed, default=0, help="of the random inputs, default 0")

    output = parser.add_argument_group("what to write")
    output.add_argument("--profile", action="store_true", help="print the time of each stage")
    output.add_argument(
        "--json",
        metavar="FILE",
        help="the environment and complete rows; - is standard output, and the tables then go to standard error",
    )
    output.add_argument("--csv", metavar="FILE", help="complete rows, the environment in each; - as for --json")
    output.add_argument("--plot", metavar="FILE.png", type=Path, help="speed-up and peak memory by length and sparsity")
    output.add_argument(
        "--trace", metavar="FILE.json", type=Path, help="Chrome trace of a forward and backward of the first case"
    )


def _listed(named: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {entry}" for name, entry in named.items())


def run(args: argparse.Namespace) -> int:
    """Runs the sweep that the arguments describe.

    Returns:
        The exit code: 0, or 1 where some row failed.

    Raises:
        argparse.ArgumentError: the arguments do not go together, or the device cannot run them.
    """
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.kernels is not None or args.first_call:
        _check_outputs(args)
        return kernels.run_first_call(args, device) if args.kernels is None else kernels.run_kernels(args, device)
    if args.model is not None:
        _check_outputs(args)
        return steps.run(args, device)
    for name, other in (("layers", "model"), ("mode", "model"), ("context", "segments")):
        if getattr(args, name) is not None and getattr(args, other) is None:
            raise argparse.ArgumentError(None, f"argument --{name}: expected argument --{other} beside it")
    defaults = DEFAULTS[device.type]
    seconds = args.seconds or defaults.seconds
    directions = DIRECTIONS if args.direction in (None, "both") else (args.direction,)
    cases = plan(args, defaults)
    _check_runnable(cases, device)
    _check_outputs(args)
    peers = _load_peers(args)

    environment = report.environment(device, args.seed, seconds) | {peer.name: peer.about for peer in peers}
    people = sys.stderr if "-" in (args.json, args.csv) else sys.stdout
    choices = dict.fromkeys(str(case.choice(device)) for case in cases)
    report.print_header(environment, [*choices, *(f"{peer.name}: {peer.about}" for peer in peers)], people)
    progress = report.Progress(len(cases) * len(directions))
    rows = list(
        sweep(
            cases,
            directions,
            device,
            seconds=seconds,
            seed=args.seed,
            profile=args.profile,
            peers=peers,
            on_start=lambda case, direction: progress.start(f"{direction}, {case}"),
        )
    )
    progress.finish()
    report.print_tables(rows, people)
    _write_outputs(args, environment, rows, device)
    return 0 if all(row.status == OK for row in rows) else 1


class _Sequence(NamedTuple):
    """The tokens of a shape."""

    length: int
    grid: tuple[int, int, int] | None = None
    segments: Samples | None = None
    preset: Preset | None = None


def plan(args: argparse.Namespace, defaults: Defaults) -> list[Case]:
    """Every combination that the arguments name, the cases of one shape beside each other."""
    presets = [PRESETS[name] for name in args.shape or ()]
    sequences = [
        *(_Sequence(length) for length in args.seq_len or ()),
        *(_Sequence(num_tokens(grid), grid) for grid in args.grid or ()),
        *(_Sequence(sum(sample_lengths(samples)), segments=samples) for samples in args.segments or ()),
        *(_Sequence(preset.seq_len, preset.grid, preset=preset) for preset in presets),
    ]
    if not sequences:
        sequences = [_Sequence(length) for length in defaults.seq_lens]
        sequences += [_Sequence(num_tokens(grid), grid) for grid in defaults.grids]
    cases = []
    for seq_len, grid, segments, preset in sequences:
        sizes = preset or defaults
        for head_dim, dtype in product(args.head_dim or [sizes.head_dim], args.dtype or [defaults.dtype]):
            heads = args.heads or sizes.heads
            layout: Layout = args.layout or ("bshd" if args.peer else "bhsd")
            shape = Shape(seq_len, grid, args.batch or 1, heads, head_dim, dtype, layout, segments=segments)
            choices = _selections(args, defaults, preset)
            for (block_size, selection), backend in product(choices, args.backend or ["auto"]):
                cases.append(
                    Case(shape, block_size, selection, args.gate or "tensor", backend, args.context or "attend")
                )
    return cases


def _selections(
    args: argparse.Namespace, defaults: Defaults, preset: Preset | None
) -> list[tuple[BlockSize, Selection]]:
    """What each case attends: pairs of a block size and how many blocks of it."""
    if args.recipe:
        if args.block_size:
            raise argparse.ArgumentError(None, "argument --block-size: not allowed with argument --recipe")
        recipes = (RECIPES[name] for name in args.recipe)
        return [(recipe.block_size, Selection(topk=recipe.topk)) for recipe in recipes]
    block_sizes: Sequence[BlockSize] = args.block_size or defaults.block_sizes
    if args.topk:
        return list(product(block_sizes, (Selection(topk=topk) for topk in args.topk)))
    if preset is not None and not args.sparsity:
        return [(size, Selection(topk=max(1, preset.selected // num_tokens(size)))) for size in block_sizes]
    sparsities = args.sparsity or defaults.sparsities
    return list(product(block_sizes, (Selection(sparsity=sparsity) for sparsity in sparsities)))


def _check_runnable(cases: Sequence[Case], device: torch.device) -> None:
    for case in cases:
        try:
            case.choice(device)
        except (ValueError, RuntimeError) as error:
            raise argparse.ArgumentError(None, str(error)) from error


def _load_peers(args: argparse.Namespace) -> list[Peer]:
    peers = []
    for name in dict.fromkeys(args.peer or ()):
        try:
            peers.append(PEERS[name]())
        except Missing as error:
            raise argparse.ArgumentError(None, f"argument --peer {name}: {error}") from error
    return peers


def _check_outputs(args: argparse.Namespace) -> None:
    """Before anything is measured: a sweep must not be lost for a file that cannot be written."""
    if args.json == "-" and args.csv == "-":
        raise argparse.ArgumentError(None, "argument --csv: expected a file where --json is standard output, got '-'")
    taken: dict[Path, str] = {}
    for flag, target in (("json", args.json), ("csv", args.csv), ("plot", args.plot), ("trace", args.trace)):
        if target is None or (target == "-" and flag in ("json", "csv")):
            continue
        path = Path(target).absolute()
        if str(target) in ("", ".", "-") or path.is_dir() or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentError(
                None, f"argument --{flag}: expected a file in a folder that can be written to, got '{target}'"
            )
        if path in taken:
            raise argparse.ArgumentError(
                None, f"argument --{flag}: expected another file than --{taken[path]}'s, got '{target}'"
            )
        taken[path] = flag
    if args.plot is not None:
        if args.plot.suffix.lower() not in PLOT_SUFFIXES:
            raise argparse.ArgumentError(
                None, f"argument --plot: expected a name ending in {', '.join(PLOT_SUFFIXES)}, got '{args.plot}'"
            )
        if not has_matplotlib():
            raise argparse.ArgumentError(None, f"argument --plot: expected matplotlib to be installed: {INSTALL}")


def _write_outputs(
    args: argparse.Namespace, environment: dict[str, Any], rows: Sequence[Row], device: torch.device
) -> None:
    for target, write in ((args.json, report.write_json), (args.csv, report.write_csv)):
        if target is not None:
            with report.open_output(target) as file:
                write(environment, rows, file)
    if args.plot is not None:
        from vsa_jit.bench.plot import plot

        plot(rows, environment, args.plot)
    if args.trace is not None:
        write_trace(rows[0].case, Inputs.random(rows[0].case.shape, device, args.seed), args.trace)

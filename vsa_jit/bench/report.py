"""What a sweep found, for people (tables) and for programs (JSON, CSV)."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TextIO

import torch

from vsa_jit.bench.cases import format_samples, format_size
from vsa_jit.bench.check import Checked, Metrics
from vsa_jit.bench.extras import has_rich
from vsa_jit.bench.peers import PeerResult
from vsa_jit.bench.stages import Stage
from vsa_jit.bench.sweep import FAILED, Row
from vsa_jit.text import counted

NOTES = """\
ms, TFLOP/s: the whole call, as a user sees it, at 4·B·H·S·(topk·block)·D FLOP forward and 2.5 times that backward;
with segments at 4·D FLOP for each query and key that it attends, context too.
topk, sparsity: of key blocks; with segments of those of video, for each sample.
speed-up: over dense attention by the fastest of PyTorch's SDPA backends, named beside its time; of packed samples each
by a call of its own.
MiB: peak memory above what the call found allocated; for the backward, of a forward and its backward together.
error, bound: against fp64 on the selected keys; the bound is twice plain PyTorch's error in the same dtype.
same keys: every block selected, against dense attention by the backend named: rounding is the only difference.
approximation: the row's own selection without the coarse branch, against the same. Random inputs have nearly uniform
scores, so it says nothing about a trained model."""
PEER_NOTES = """\
peer/ours: the time of another package's operator over that of ours, called in turn on the same tensors, with the tiling
and the transposes that its callers do. Only results that agree with ours, which then selects in the inputs' dtype as it
does, have a time: error is the largest difference of a block of tokens, but of one in a hundred, which a near tie of
scores may change."""

SPEED_COLUMNS = (
    "#",
    "tokens",
    "B·H·D",
    "dtype",
    "block",
    "topk",
    "sparsity",
    "backend",
    "pass",
    "check",
    "ms",
    "TFLOP/s",
    "speed-up",
    "dense ms",
    "dense by",
    "MiB",
    "dense MiB",
)
PRECISION_COLUMNS = (
    "#",
    "pass",
    "checked",
    "error",
    "bound",
    "against",
    "same keys: cos",
    "L1",
    "RMSE",
    "approximation: cos",
    "L1",
    "RMSE",
)
PEER_COLUMNS = ("#", "pass", "peer", "checked", "error", "bound", "ours ms", "peer ms", "peer/ours", "why not")
STAGE_COLUMNS = ("stage", "ms", "%", "TFLOP/s")


def environment(device: torch.device, seed: int, seconds: float | None) -> dict[str, Any]:
    """The machine, the versions and the settings that the rows hold for."""
    on_cuda = device.type == "cuda"
    cpu = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else cpu,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_cuda else None,
        "cpu_threads": torch.get_num_threads(),
        "vsa_jit": _version("vsa-jit"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "python": platform.python_version(),
        "seed": seed,
        "seconds_per_measurement": seconds,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record(row: Row) -> dict[str, Any]:
    """A row, complete and flat except for its stages and peers. Times in ms, rates in TFLOP/s, memory in MiB."""
    case, shape = row.case, row.case.shape
    worst, error, bound = _worst(row.checked)
    return {
        "seq_len": shape.seq_len,
        "grid": None if shape.grid is None else format_size(shape.grid),
        "segments": None if shape.segments is None else format_samples(shape.segments),
        "context": None if shape.segments is None else case.context,
        "batch": shape.batch,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype,
        "layout": shape.layout,
        "block_size": format_size(case.block_size),
        "block_tokens": case.problem.block,
        "num_kv_blocks": case.problem.keys.num_blocks,
        "selection": str(case.selection),
        "topk": _of_samples(case.topk_of_samples),
        "sparsity": case.sparsity,
        "gate": case.gate,
        "backend": row.backend,
        "engine": row.engine,
        "direction": row.direction,
        "status": row.status,
        "checked": worst,
        "check_error": error,
        "check_bound": bound,
        **_fields("", row.timing, ("ms", "tflops", "speedup", "peak_mib")),
        **_fields("dense_", row.dense, ("name", "ms", "tflops", "peak_mib")),
        "precision_against": None if row.precision is None else row.precision.against,
        **_fields("same_keys_", row.precision and row.precision.same_keys, ("cosine", "l1", "rmse")),
        **_fields("approximation_", row.precision and row.precision.approximation, ("cosine", "l1", "rmse")),
        "stages": [asdict(stage) for stage in row.stages],
        "peers": [_peer_record(peer) for peer in row.peers],
    }


def _worst(checked: Checked | None) -> tuple[str | None, float | None, float | None]:
    return (None, None, None) if checked is None else (checked.worst, *checked.errors[checked.worst])


def _peer_record(peer: PeerResult) -> dict[str, Any]:
    worst, error, bound = map(_finite, _worst(peer.checked))
    return {
        "name": peer.name,
        "ms": peer.ms,
        "ratio": peer.ratio,
        "checked": worst,
        "check_error": error,
        "check_bound": bound,
        "why_not": peer.why_not,
    }


def _of_samples(values: Sequence[int]) -> int | str:
    """The number, or those of packed samples in their order, as the segments are written."""
    return values[0] if len(values) == 1 else ",".join(map(str, values))


def _fields(prefix: str, source: object | None, names: Sequence[str]) -> dict[str, Any]:
    return {prefix + name: getattr(source, name, None) for name in names}


def write_json(environment: dict[str, Any], rows: Sequence[Row], file: TextIO) -> None:
    write_records(environment, map(record, rows), file)


def write_records(environment: dict[str, Any], records: Iterable[dict[str, Any]], file: TextIO) -> None:
    rows = [{name: _finite(value) for name, value in entry.items()} for entry in records]
    json.dump({"environment": environment, "rows": rows}, file, indent=2, allow_nan=False)
    file.write("\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(environment: dict[str, Any], rows: Sequence[Row], file: TextIO) -> None:
    """A line for each row, which repeats the environment; each stage's time and each peer's field is a column."""
    lines = []
    for row in rows:
        flat = {**environment, **record(row)}
        for stage in flat.pop("stages"):
            flat[f"stage_{stage['name']}_ms"] = stage["ms"]
        for peer in flat.pop("peers"):
            name = peer.pop("name")
            flat |= {f"peer_{name}_{field}": value for field, value in peer.items()}
        lines.append(flat)
    writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)


def open_output(target: str) -> contextlib.AbstractContextManager[TextIO]:
    """The file, or standard output for "-"."""
    if target == "-":
        return contextlib.nullcontext(sys.stdout)
    return open(target, "w", encoding="utf-8", newline="")


def print_header(environment: dict[str, Any], choices: Iterable[str], file: TextIO) -> None:
    """The machine and the versions, and which backends run and why."""
    capability = environment["compute_capability"]
    threads = counted(environment["cpu_threads"], "thread")
    kind = threads if capability is None else f"compute capability {capability}"
    print(f"device: {environment['device']}, {environment['device_name']}, {kind}", file=file)
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("vsa_jit", "torch", "triton", "cuda") if environment[name]
    )
    print(f"versions: {versions}", file=file)
    for choice in choices:
        print(choice, file=file)


def print_tables(rows: Sequence[Row], file: TextIO) -> None:
    """Speed and memory, precision, peers where there are any, then the stages of each row that has them."""
    print(file=file)
    print_table(SPEED_COLUMNS, [_speed_cells(number, row) for number, row in enumerate(rows, 1)], file)
    print(file=file)
    print_table(PRECISION_COLUMNS, [_precision_cells(number, row) for number, row in enumerate(rows, 1)], file)
    peers = [_peer_cells(number, row, peer) for number, row in enumerate(rows, 1) for peer in row.peers]
    if peers:
        print(file=file)
        print_table(PEER_COLUMNS, peers, file)
    print(f"\n{NOTES}", file=file)
    if peers:
        print(PEER_NOTES, file=file)
    for number, row in enumerate(rows, 1):
        if row.stages:
            print(f"\n# {number}: {row.direction}, {row.case}", file=file)
            print_table(STAGE_COLUMNS, _stage_cells(row), file)


def _speed_cells(number: int, row: Row) -> list[str]:
    case, shape, timing, dense = row.case, row.case.shape, row.timing, row.dense
    cells = [
        str(number),
        f"{shape.tokens} ({case.context})" if case.compete else shape.tokens,
        f"{shape.batch}·{shape.heads}·{shape.head_dim}",
        shape.dtype,
        format_size(case.block_size),
        case.selected,
        f"{case.sparsity:.3f}",
        row.backend,
        row.direction,
        row.status,
    ]
    if timing is None:
        return cells + ["-"] * 7
    own = [f"{timing.ms:.3f}", _rate(timing.tflops), "-" if timing.speedup is None else f"{timing.speedup:.2f}x"]
    beside = ["-", "-"] if dense is None else [f"{dense.ms:.3f}", dense.name]
    return [*cells, *own, *beside, memory(timing.peak_mib), memory(None if dense is None else dense.peak_mib)]


def _precision_cells(number: int, row: Row) -> list[str]:
    checked, precision = row.checked, row.precision
    cells = [str(number), row.direction, *_check_cells(checked)]
    if precision is None:
        return cells + ["-"] * 7
    return [*cells, precision.against, *_metric_cells(precision.same_keys), *_metric_cells(precision.approximation)]


def _check_cells(checked: Checked | None) -> list[str]:
    if checked is None:
        return ["-"] * 3
    return [checked.worst, *(f"{value:.2e}" for value in checked.errors[checked.worst])]


def _peer_cells(number: int, row: Row, peer: PeerResult) -> list[str]:
    cells = [str(number), row.direction, peer.name, *_check_cells(peer.checked)]
    if row.timing is None or peer.ms is None or peer.ratio is None:
        return [*cells, *["-"] * 3, peer.why_not or "-"]
    return [*cells, f"{row.timing.ms:.3f}", f"{peer.ms:.3f}", f"{peer.ratio:.2f}x", "-"]


def _metric_cells(metrics: Metrics) -> list[str]:
    return [f"{metrics.cosine:.7f}", f"{metrics.l1:.2e}", f"{metrics.rmse:.2e}"]


def _stage_cells(row: Row) -> list[list[str]]:
    assert row.timing is not None
    cells = []
    for stage in (*row.stages, Stage("whole call", row.timing.ms, 0.0, row.timing.tflops)):
        if stage.ms is None:
            cells.append([stage.name, f"noise (<{stage.noise_ms:.3f})", "-", "-"])
        else:
            share = 100 * stage.ms / row.timing.ms
            tflops = "-" if stage.tflops is None else _rate(stage.tflops)
            cells.append([stage.name, f"{stage.ms:.3f}", f"{share:.1f}", tflops])
    return cells


def _rate(tflops: float) -> str:
    """Three digits, whether a GPU or a CPU made them."""
    return f"{tflops:.0f}" if tflops >= 100 else f"{tflops:#.3g}"


def memory(mib: float | None) -> str:
    """PyTorch counts memory on GPUs only."""
    return "n/a" if mib is None else f"{mib:.0f}"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], file: TextIO) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    # With its borders a table takes three more for each column; in a narrower terminal it would lose text.
    if file.isatty() and has_rich() and sum(widths) + 3 * len(widths) < shutil.get_terminal_size().columns:
        from rich.console import Console
        from rich.table import Column, Table

        table = Table(*(Column(column, justify="right") for column in columns))
        for row in rows:
            table.add_row(*row, style="bold red" if FAILED in row else None)
        Console(file=file).print(table)
        return
    for cells in (columns, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), file=file)


class Progress:
    """Which row is running, on one line of a terminal that is written over; silent anywhere else."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = 0
        self._shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def start(self, what: str) -> None:
        self._started += 1
        self._write(f"[{self._started}/{self._total}] {what}")

    def finish(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        if self._shown:
            # Back to the start of the line, and erase what was there; a line that wraps could not be written over.
            columns = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: columns - 1]}", end="", file=sys.stderr, flush=True)

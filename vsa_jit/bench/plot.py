"""A picture of a sweep: speed-up and peak memory, against sequence length and against sparsity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vsa_jit.bench.cases import DIRECTIONS, format_size
from vsa_jit.bench.sweep import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ("-", "v"), ("--", "P"), (":", "X"), ("-.", "*"))
DENSE_COLOUR = "#777777"

# Inches.
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.2
NOTE_HEIGHT = 0.4
LEGEND_ENTRY_WIDTH, LEGEND_ENTRY_HEIGHT = 3.0, 0.2
MARGIN_HEIGHT = 1.6

Settings = tuple[str, ...]


@dataclass(frozen=True)
class _Axis:
    """What a panel has on its x axis, and what its lines are told apart by besides their settings."""

    label: str
    x: Callable[[Row], float]
    line: Callable[[Row], str]
    logarithmic: bool


AXES = (
    _Axis(
        "sequence length (tokens)",
        x=lambda row: row.case.shape.seq_len,
        line=lambda row: str(row.case.selection),
        logarithmic=True,
    ),
    _Axis(
        "sparsity (% of key blocks left out)",
        x=lambda row: 100 * row.case.sparsity,
        line=lambda row: f"{row.case.shape.tokens} tokens",
        logarithmic=False,
    ),
)


def plot(rows: Sequence[Row], environment: dict[str, Any], path: Path) -> None:
    """Draws the rows that were measured: two panels, speed-up over memory, for each x axis and direction."""
    measured = [row for row in rows if row.timing is not None]
    directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row in rows)]
    variants = _variants(measured)
    has_memory = any(_memory(row) is not None for row in measured)

    width = PANEL_WIDTH * len(directions)
    entries = max(len({(axis.line(row), _settings(row)) for row in measured}) for axis in AXES) + has_memory
    legend_columns = max(1, int(width / LEGEND_ENTRY_WIDTH))
    legend_height = LEGEND_ENTRY_HEIGHT * (1 + -(-entries // legend_columns))
    heights = [PANEL_HEIGHT, PANEL_HEIGHT if has_memory else NOTE_HEIGHT, legend_height]
    figure = Figure(figsize=(width * len(AXES), sum(heights) + MARGIN_HEIGHT), layout="constrained")
    grid = figure.add_gridspec(3, len(AXES) * len(directions), height_ratios=heights)

    speed: Axes | None = None
    memory: Axes | None = None
    for number, axis in enumerate(AXES):
        first = number * len(directions)
        handles: dict[str, Artist] = {}
        for column, direction in enumerate(directions, first):
            chosen = [row for row in measured if row.direction == direction]
            speed = figure.add_subplot(grid[0, column], sharey=speed)
            speed.set_title(direction)
            speed.axhline(1.0, color=DENSE_COLOUR, linewidth=1.0, linestyle="--")
            handles |= _draw(speed, axis, chosen, variants, _speedup, "speed-up over dense attention (×)")
            if has_memory:
                memory = figure.add_subplot(grid[1, column], sharey=memory)
                handles |= _draw(memory, axis, chosen, variants, _memory, "peak memory (MiB)")
                handles |= _draw_dense_memory(memory, axis, chosen)
        legend = figure.add_subplot(grid[2, first : first + len(directions)])
        legend.set_axis_off()
        legend.legend(handles.values(), handles.keys(), loc="upper center", ncols=legend_columns, fontsize=8)

    # Only now: the panels of a row share this axis, and a limit that is set no longer grows with what is drawn.
    for axes in filter(None, (speed, memory)):
        axes.set_ylim(0.0, 1.05 * axes.get_ylim()[1])
    if not has_memory:
        note = figure.add_subplot(grid[1, :])
        note.set_axis_off()
        text = "peak memory: not measured on a CPU" if measured else "no row was measured"
        note.text(0.5, 0.5, text, ha="center", va="center", color=DENSE_COLOUR)
    figure.suptitle(_title(measured, environment))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _title(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    shared = [values[0] for values in zip(*map(_settings, rows), strict=True) if len(set(values)) == 1]
    names = sorted({row.dense.name for row in rows if row.dense is not None})
    return (
        f"{', '.join(['video_sparse_attn', *shared])}\n{environment['device_name']}, torch {environment['torch']}, "
        f"dense attention by the fastest SDPA backend ({', '.join(names) or 'none ran'})"
    )


def _speedup(row: Row) -> float | None:
    return None if row.timing is None else row.timing.speedup


def _memory(row: Row) -> float | None:
    return None if row.timing is None else row.timing.peak_mib


def _settings(row: Row) -> Settings:
    """Everything besides length, sparsity and direction that a sweep can vary."""
    shape = row.case.shape
    order = "plain order" if shape.grid is None else "raster order"
    if shape.segments is not None:
        order = f"segments, context {row.case.context}s"
    block = f"block {format_size(row.case.block_size)}"
    return order, block, f"D={shape.head_dim}", f"H={shape.heads}", shape.dtype, f"backend {row.backend}"


def _variants(rows: Sequence[Row]) -> dict[Settings, str]:
    """A name for each combination of settings: those of them that differ between the rows."""
    combinations = dict.fromkeys(map(_settings, rows))
    differs = [len(set(values)) > 1 for values in zip(*combinations, strict=True)]
    return {settings: ", ".join(itertools.compress(settings, differs)) for settings in combinations}


def _draw(
    axes: Axes,
    axis: _Axis,
    rows: Sequence[Row],
    variants: dict[Settings, str],
    y: Callable[[Row], float | None],
    y_label: str,
) -> dict[str, Artist]:
    """Draws a line of its own colour for each value of ``axis.line``, with dashes and markers for each variant.

    Returns:
        The lines by their labels.
    """
    drawn: dict[str, Artist] = {}
    lines = dict.fromkeys(map(axis.line, rows))
    for (number, line), (variant, settings) in itertools.product(enumerate(lines), enumerate(variants)):
        points = sorted(
            (axis.x(row), value)
            for row in rows
            if axis.line(row) == line and _settings(row) == settings and (value := y(row)) is not None
        )
        if points:
            style, marker = STYLES[variant % len(STYLES)]
            label = ", ".join(filter(None, (line, variants[settings])))
            colour = COLOURS[number % len(COLOURS)]
            (drawn[label],) = axes.plot(*zip(*points, strict=True), linestyle=style, marker=marker, color=colour)
    axes.set_xlabel(axis.label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if axis.logarithmic:
        # A tick at every length that was measured, and nowhere else.
        lengths = sorted({axis.x(row) for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,.0f}" for length in lengths], rotation=30, ha="right")
        axes.xaxis.set_minor_locator(NullLocator())
    return drawn


def _draw_dense_memory(axes: Axes, axis: _Axis, rows: Sequence[Row]) -> dict[str, Artist]:
    points = {(axis.x(row), row.dense.peak_mib) for row in rows if row.dense and row.dense.peak_mib is not None}
    if not points:
        return {}
    return {"dense attention": axes.scatter(*zip(*points, strict=True), marker="x", color=DENSE_COLOUR, zorder=3)}

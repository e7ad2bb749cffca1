"""The picture of a recording."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vsa_jit.bench.cases import format_size

if TYPE_CHECKING:
    from vsa_jit.integrations.diffusers.record import Recording

# Inches.
PANEL_WIDTH, PANEL_HEIGHT = 4.8, 4.0
MEAN_COLOUR, LOWEST_COLOUR, CHANCE_COLOUR = "#0072b2", "#d55e00", "#777777"


def draw(recording: Recording, chosen: int, path: str | PathLike[str]) -> None:
    """Draws a row of three panels for each transformer; ``chosen`` is the index of the sparsity of two of them."""
    names = recording.names
    figure = Figure(figsize=(3 * PANEL_WIDTH, PANEL_HEIGHT * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 3, squeeze=False)
    for name, (by_head, by_sparsity, by_call) in zip(names, panels, strict=True):
        shares = recording.shares(name)
        _draw_heads(figure, by_head, shares[..., chosen].nanmean(0), name, recording.sparsities[chosen])
        _draw_sparsities(by_sparsity, shares, recording.sparsities)
        _draw_calls(by_call, shares[..., chosen], recording.sparsities[chosen])
    block = format_size(recording.block_size)
    figure.suptitle(f"share of dense attention's probability on the selected blocks of {block} tokens")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def _draw_heads(figure: Figure, axes: Axes, shares: Tensor, name: str, sparsity: float) -> None:
    image = axes.imshow(shares.numpy(), aspect="auto", vmin=0.0, vmax=1.0, cmap="viridis")
    figure.colorbar(image, ax=axes)
    axes.set_title(f"{name}, sparsity {sparsity:g}, mean over calls")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _draw_sparsities(axes: Axes, shares: Tensor, sparsities: tuple[float, ...]) -> None:
    order = sorted(range(len(sparsities)), key=sparsities.__getitem__)
    x = [sparsities[index] for index in order]
    by_head = shares.nanmean(0).flatten(0, 1)[:, order]
    axes.plot(x, by_head.nanmean(0).numpy(), marker="o", color=MEAN_COLOUR, label="mean")
    axes.plot(
        x, by_head.nan_to_num(1.0).amin(0).numpy(), marker="s", color=LOWEST_COLOUR, label="lowest layer and head"
    )
    axes.plot(x, [1 - sparsity for sparsity in x], linestyle="--", color=CHANCE_COLOUR, label="chance")
    axes.set_title("by sparsity")
    axes.set_xlabel("sparsity")
    _finish(axes)


def _draw_calls(axes: Axes, shares: Tensor, sparsity: float) -> None:
    by_call = shares.flatten(1)
    axes.plot(by_call.nanmean(1).numpy(), marker="o", color=MEAN_COLOUR, label="mean")
    axes.plot(by_call.nan_to_num(1.0).amin(1).numpy(), marker="s", color=LOWEST_COLOUR, label="lowest layer and head")
    axes.set_title(f"by call, sparsity {sparsity:g}")
    axes.set_xlabel("call of the transformer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_ylim(0.0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)

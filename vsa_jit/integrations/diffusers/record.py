"""What a model's own runs say about which sparsity, dense layers and dense steps it bears."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor

import vsa_jit
from vsa_jit.bench.extras import DIFFUSERS_INSTALL, has_matplotlib
from vsa_jit.checks import check_block_size, check_sparsities
from vsa_jit.integrations.diffusers.models import family_of, find_transformers
from vsa_jit.integrations.diffusers.processor import Grid, is_enabled
from vsa_jit.integrations.diffusers.settings import Settings
from vsa_jit.problem import SegmentList

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


class Recording:
    """Of each call of a transformer, layer and head: the share of dense attention's probability on selected blocks.

    ``print`` shows the means over calls and heads, ``write_json`` writes all, ``plot`` draws it. NaN, or null in JSON,
    is where a layer did not attend in a call, as under a cache of blocks.

    Attributes:
        sparsities: the shares of key blocks left out that were asked about.
        block_size: the tile (t, h, w).
        grids: by the name of each transformer the (T, H, W) of each of its calls, in order.
    """

    def __init__(self, sparsities: Sequence[float], block_size: tuple[int, int, int]) -> None:
        self.sparsities = tuple(sparsities)
        self.block_size = block_size
        self.grids: dict[str, list[tuple[int, int, int]]] = {}
        # By transformer, and by call and layer.
        self._shares: dict[str, dict[tuple[int, int], Tensor]] = {}

    def add(self, name: str, layer: int, grid: tuple[int, int, int], shares: Tensor) -> None:
        """Keeps what a layer's call gave, [heads, sparsities], where it is: nothing waits for a GPU."""
        kept, grids = self._shares.setdefault(name, {}), self.grids.setdefault(name, [])
        last = next(reversed(kept), None)
        if last is None or layer <= last[1]:
            grids.append(grid)
        kept[len(grids) - 1, layer] = shares

    @property
    def names(self) -> list[str]:
        """The transformers that ran."""
        return list(self._shares)

    def shares(self, name: str = "transformer") -> Tensor:
        """fp32 [calls, layers, heads, sparsities] on the CPU.

        Raises:
            ValueError: no call of this transformer was recorded.
        """
        if name not in self._shares:
            raise ValueError(f"name: expected one of those that ran, {self.names}, got {name!r}")
        kept = self._shares[name]
        calls, layers = (1 + max(places) for places in zip(*kept, strict=True))
        shares = torch.full((calls, layers, *next(iter(kept.values())).shape), float("nan"))
        for place, values in kept.items():
            shares[place] = values.cpu()
        return shares

    def write_json(self, path: str | PathLike[str]) -> None:
        """Writes all of it: ``shares`` is a list by call, layer, head and sparsity."""
        transformers = {
            name: {"grids": self.grids[name], "shares": _without_nan(self.shares(name).tolist())} for name in self.names
        }
        content = {"sparsities": self.sparsities, "block_size": self.block_size, "transformers": transformers}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)
            file.write("\n")

    def plot(self, path: str | PathLike[str], sparsity: float | None = None) -> None:
        """Draws, for each transformer, layers by heads at one sparsity, and shares by sparsity and by call.

        Args:
            path: a .png, .pdf or .svg file.
            sparsity: one of ``sparsities``; the middle one if None.

        Raises:
            ValueError: the sparsity was not recorded, or nothing was.
            ImportError: matplotlib is not installed.
        """
        chosen = self.sparsities[len(self.sparsities) // 2] if sparsity is None else sparsity
        if chosen not in self.sparsities:
            raise ValueError(f"sparsity: expected one of {self.sparsities}, got {sparsity}")
        if not self.names:
            raise ValueError("expected a recording of at least one call, got an empty one")
        if not has_matplotlib():
            raise ImportError(f"expected matplotlib to be installed: {DIFFUSERS_INSTALL}")
        from vsa_jit.integrations.diffusers.picture import draw

        draw(self, self.sparsities.index(chosen), path)

    def __str__(self) -> str:
        lines = []
        for name in self.names:
            by_layer = self.shares(name).nanmean((0, 2))
            lines.append(f"{name}: probability of dense attention on the selected blocks, mean over calls and heads")
            lines.append("sparsity  " + "  ".join(f"{sparsity:5g}" for sparsity in self.sparsities))
            lines += [
                f"layer {layer:2d}  " + "  ".join(f"{share:.3f}" for share in row)
                for layer, row in enumerate(by_layer.tolist())
            ]
        return "\n".join(lines)


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values


@contextmanager
def record(
    transformer_or_pipe: Any,
    *,
    sparsity: Sequence[float] = SPARSITIES,
    block_size: int | Sequence[int] | None = None,
) -> Iterator[Recording]:
    """Records ``vsa_jit.recall`` of every self-attention that a model computes.

    That takes a dense attention, and for each sparsity a sparse one, beside the model's own. Where VSA is not enabled,
    the model attends all keys as it does by itself. For inference: what checkpointing computes again in a backward
    would count as a call of its own. ``enable_vsa`` and ``disable_vsa`` come before or after.

    Args:
        transformer_or_pipe: as in ``enable_vsa``.
        sparsity: the shares of key blocks to leave out that are asked about.
        block_size: a block, as in ``enable_vsa``; None for the one that is enabled, else (4,4,4).

    Yields:
        The ``Recording``, which fills as the model runs.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model is sharded (``enable_parallelism``) or being recorded.
        RuntimeError: while recording, where the model is compiled in full graphs; at the end, where VSA was enabled or
            disabled inside.
    """
    models = find_transformers(transformer_or_pipe)
    check_sparsities(sparsity)
    attentions = {name: family_of(transformer).attentions(transformer) for name, transformer in models.items()}
    was_enabled = {name: is_enabled(attentions[name]) for name in models}
    first = next(iter(models))
    if block_size is None:
        block_size = attentions[first][0].processor.settings.tile if was_enabled[first] else (4, 4, 4)
    tile = check_block_size(block_size, with_grid=True)
    for name, transformer in models.items():
        family_of(transformer).check(transformer)
        for attention in attentions[name]:
            processor = attention.processor
            if getattr(processor, "_parallel_config", None) is not None:
                raise ValueError(
                    "transformer_or_pipe: expected a model on one device, got one with context parallelism"
                )
            if getattr(processor, "observer", None) is not None:
                raise ValueError("transformer_or_pipe: expected a model that is not being recorded, got one that is")
    recording = Recording(sparsity, tile)
    observed = []
    for name, transformer in models.items():
        if not was_enabled[name]:
            settings = Settings.all_dense(tile, len(attentions[name]))
            family_of(transformer).enable(transformer, settings, None)
        for attention in attentions[name]:
            processor = attention.processor
            processor.observer = _Observer(recording, name, processor.settings.selection_dtype)
            observed.append((attention, processor))
    try:
        yield recording
    finally:
        is_as_it_was = all(attention.processor is processor for attention, processor in observed)
        for _, processor in observed:
            processor.observer = None
        for name, transformer in models.items():
            if is_as_it_was and not was_enabled[name]:
                family_of(transformer).disable(transformer)
    if not is_as_it_was:
        raise RuntimeError("record: expected no enable_vsa or disable_vsa inside; calls after it were not recorded")


class _Observer:
    def __init__(self, recording: Recording, name: str, selection_dtype: torch.dtype | None) -> None:
        self._recording = recording
        self._name = name
        self._selection_dtype = selection_dtype

    def __call__(self, layer: int, q: Tensor, k: Tensor, grid: Grid, segments: SegmentList | None = None) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("record: expected a model that is not compiled")
        recording = self._recording
        shares = vsa_jit.recall(
            q,
            k,
            sparsity=recording.sparsities,
            block_size=recording.block_size,
            grid=grid if segments is None else None,
            segments=segments,
            layout="bshd",
            selection_dtype=self._selection_dtype,
        )
        recording.add(self._name, layer, grid, shares.mean(0))

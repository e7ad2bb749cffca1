"""What a model's own runs say about which sparsity, dense layers and dense steps it bears."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor

import vsa_jit
from vsa_jit.checks import check_block_size, check_several_topk
from vsa_jit.integrations.diffusers import wan
from vsa_jit.integrations.diffusers.models import find_transformers
from vsa_jit.integrations.diffusers.settings import Settings

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


class Recording:
    """Of each call of a transformer, layer and head: the share of dense attention's probability on selected blocks.

    ``print`` shows the means over calls and heads, ``write_json`` writes all, ``plot`` draws it.

    Attributes:
        sparsities: the shares of key blocks left out that were asked about.
        block_size: the tile (t, h, w).
        grids: by the name of each transformer the (T, H, W) of each of its calls, in order.
    """

    def __init__(self, sparsities: Sequence[float], block_size: tuple[int, int, int]) -> None:
        self.sparsities = tuple(sparsities)
        self.block_size = block_size
        self.grids: dict[str, list[tuple[int, int, int]]] = {}
        # By transformer and layer, in order of the calls.
        self._shares: dict[str, dict[int, list[Tensor]]] = {}

    def add(self, name: str, layer: int, grid: tuple[int, int, int], shares: Tensor) -> None:
        """Keeps what a layer's call gave, [heads, sparsities], where it is: nothing waits for a GPU."""
        if layer == 0:
            self.grids.setdefault(name, []).append(grid)
        self._shares.setdefault(name, {}).setdefault(layer, []).append(shares)

    @property
    def names(self) -> list[str]:
        """The transformers that ran."""
        return list(self._shares)

    def shares(self, name: str = "transformer") -> Tensor:
        """fp32 [calls, layers, heads, sparsities] on the CPU."""
        layers = self._shares[name]
        return torch.stack([torch.stack(layers[layer]) for layer in sorted(layers)], dim=1).cpu()

    def write_json(self, path: str | PathLike[str]) -> None:
        """Writes all of it: ``shares`` is a list by call, layer, head and sparsity."""
        transformers = {name: {"grids": self.grids[name], "shares": self.shares(name).tolist()} for name in self.names}
        content = {"sparsities": self.sparsities, "block_size": self.block_size, "transformers": transformers}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.write("\n")

    def plot(self, path: str | PathLike[str], sparsity: float | None = None) -> None:
        """Draws, for each transformer, layers by heads at one sparsity, and shares by sparsity and by call.

        Args:
            path: a .png, .pdf or .svg file.
            sparsity: one of ``sparsities``; the middle one if None.

        Raises:
            ValueError: the sparsity was not recorded, or nothing was.
        """
        from vsa_jit.integrations.diffusers.picture import draw

        chosen = self.sparsities[len(self.sparsities) // 2] if sparsity is None else sparsity
        if chosen not in self.sparsities:
            raise ValueError(f"sparsity: expected one of {self.sparsities}, got {sparsity}")
        if not self.names:
            raise ValueError("expected a recording of at least one call, got an empty one")
        draw(self, self.sparsities.index(chosen), path)

    def __str__(self) -> str:
        lines = []
        for name in self.names:
            by_layer = self.shares(name).mean((0, 2))
            lines.append(
                f"{name}: share of dense attention's probability on the selected blocks, mean over calls and heads"
            )
            lines.append("sparsity  " + "  ".join(f"{sparsity:5g}" for sparsity in self.sparsities))
            lines += [
                f"layer {layer:2d}  " + "  ".join(f"{share:.3f}" for share in row)
                for layer, row in enumerate(by_layer.tolist())
            ]
        return "\n".join(lines)


@contextmanager
def record(
    transformer_or_pipe: Any,
    *,
    sparsity: Sequence[float] = SPARSITIES,
    block_size: int | Sequence[int] | None = None,
) -> Iterator[Recording]:
    """Records ``vsa_jit.recall`` of every self-attention that a model computes, which about doubles its time.

    Where VSA is not enabled, the model attends all keys as it does by itself. For inference: what checkpointing
    computes again in a backward would count as a call of its own.

    Args:
        transformer_or_pipe: as in ``enable_vsa``.
        sparsity: the shares of key blocks to leave out that are asked about.
        block_size: a block, as in ``enable_vsa``; None for the one that is enabled, else (4,4,4).

    Yields:
        The ``Recording``, which fills as the model runs.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model is sharded (``enable_parallelism``).
        RuntimeError: while recording, where the model is compiled.
    """
    models = find_transformers(transformer_or_pipe)
    check_several_topk(None, sparsity, 1)
    first = next(iter(models.values()))
    if block_size is None:
        block_size = first.blocks[0].attn1.processor.settings.tile if wan.is_enabled(first) else (4, 4, 4)
    tile = check_block_size(block_size, with_grid=True)
    for transformer in models.values():
        if transformer.blocks[0].attn1.processor._parallel_config is not None:
            raise ValueError("transformer_or_pipe: expected a model on one device, got one with context parallelism")
    recording = Recording(sparsity, tile)
    was_enabled = {name: wan.is_enabled(transformer) for name, transformer in models.items()}
    for name, transformer in models.items():
        if not was_enabled[name]:
            wan.enable(transformer, Settings.all_dense(tile, len(transformer.blocks)), None)
        for block in transformer.blocks:
            processor = block.attn1.processor
            processor.observer = _Observer(recording, name, processor.settings.selection_dtype)
    try:
        yield recording
    finally:
        for name, transformer in models.items():
            for block in transformer.blocks:
                block.attn1.processor.observer = None
            if not was_enabled[name]:
                wan.disable(transformer)


class _Observer:
    def __init__(self, recording: Recording, name: str, selection_dtype: torch.dtype | None) -> None:
        self._recording = recording
        self._name = name
        self._selection_dtype = selection_dtype

    def __call__(self, layer: int, q: Tensor, k: Tensor, grid: tuple[int, int, int]) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("record: expected a model that is not compiled")
        recording = self._recording
        shares = vsa_jit.recall(
            q,
            k,
            sparsity=recording.sparsities,
            block_size=recording.block_size,
            grid=grid,
            layout="bshd",
            selection_dtype=self._selection_dtype,
        )
        recording.add(self._name, layer, grid, shares.mean(0))

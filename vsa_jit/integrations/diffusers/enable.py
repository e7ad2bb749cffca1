"""``enable_vsa`` and ``disable_vsa``: what they are given, and what they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vsa_jit.backends.choose import NAMES
from vsa_jit.checks import check_block_size, check_choice, check_int, check_selection_dtype, check_topk
from vsa_jit.integrations.diffusers.checkpoint import Source, read_gates, split
from vsa_jit.integrations.diffusers.models import family_of, find_transformers, is_in_parallel_wrapper
from vsa_jit.integrations.diffusers.settings import DenseSteps, Settings
from vsa_jit.problem import BackendName


def enable_vsa(
    transformer_or_pipe: Any,
    *,
    sparsity: float | None = None,
    topk: int | None = None,
    gates: Source | None = None,
    block_size: int | Sequence[int] = (4, 4, 4),
    dense_layers: Sequence[int] = (),
    dense_steps: int = 0,
    selection_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
) -> None:
    """Makes the self-attention of a diffusers model Video Sparse Attention, for videos of any size.

    Wan 2.1 and 2.2, from text and from images (``WanTransformer3DModel``), HunyuanVideo and HunyuanVideo 1.5
    (``HunyuanVideoTransformer3DModel``, ``HunyuanVideo15Transformer3DModel``) and CogVideoX
    (``CogVideoXTransformer3DModel``). The processors of self-attention change, and gates are added where they are asked
    for. Before or after ``enable_parallelism`` (Ulysses, Wan alone), ``torch.compile``, adapters and whole-model
    offloading; gates before data parallelism and before offloading by parts. A second call replaces the settings of
    the first.

    Where video and prompt attend together, every query attends all tokens of the prompt, and those of the prompt attend
    the whole video; ``sparsity`` and ``topk`` count blocks of video. HunyuanVideo masks the padding of its prompts: how
    many tokens count is read from the mask, which waits for the device once in each forward of the model, however many
    layers it has.

    Args:
        transformer_or_pipe: a transformer, also one in a wrapper, or a pipeline with one or two of them.
        sparsity: the share of key blocks to leave out, in [0, 1). Exactly one of it and ``topk`` is given.
        topk: key blocks to attend for each query block, at least 1.
        gates: of Wan alone: where the gates come from, layers of each block that weigh the coarse output. A folder, a
            ``.safetensors`` file or a repository of the hub, of a pipeline or of its transformer. A state dict, or for
            each of several transformers one by its name in the pipeline. Only keys of gates are read,
            ``blocks.N.to_gate_compress.{weight,bias}``. What it has none for is zero, and a warning names it; an empty
            dict makes all zero, to be trained. None: gates that the model has from an earlier call are kept, and where
            it has none the coarse output is dropped with its cost.
        block_size: tokens of a block or a video tile (t, h, w), as in ``video_sparse_attn``.
        dense_layers: layers that attend all keys, by index, from the end where it is negative. Of HunyuanVideo the
            dual-stream blocks come first, then the single-stream blocks.
        dense_steps: the first steps of each run that attend all keys, as the scheduler of this pipeline counts them.
            Not for a transformer that ``torch.compile`` compiles as a whole (its repeated blocks may be compiled).
        selection_dtype: as in ``video_sparse_attn``: the dtype of the weights for a model that FastVideo trained.
        backend: as in ``video_sparse_attn``.

    Raises:
        TypeError, ValueError: an argument is wrong, or a key of a gate is none of the model's; the message names it,
            what was expected and what came.
    """
    models = find_transformers(transformer_or_pipe)
    # How many blocks there are is known when a video comes.
    check_topk(topk, sparsity, 1)
    tile = check_block_size(block_size, with_grid=True)
    check_selection_dtype(selection_dtype)
    check_choice("backend", backend, NAMES)
    steps = _check_steps(dense_steps, transformer_or_pipe)
    sources = None if gates is None else split("gates", gates, list(models))
    if gates is not None and is_in_parallel_wrapper(transformer_or_pipe):
        raise ValueError(
            "transformer_or_pipe: expected a model that is not in DistributedDataParallel or FSDP yet, which would not "
            "know of its gates"
        )
    plans = []
    for name, transformer in models.items():
        family = family_of(transformer)
        if gates is not None and not family.TAKES_GATES:
            raise ValueError(f"gates: expected None for {type(transformer).__name__}, got {type(gates).__name__}")
        family.check(transformer)
        layers = _check_layers(dense_layers, len(family.attentions(transformer)))
        settings = Settings(topk, sparsity, tile, selection_dtype, layers, steps, backend)
        new_gates = None if sources is None else read_gates(sources[name], name, transformer)
        plans.append((family, transformer, settings, new_gates))
    for family, transformer, settings, new_gates in plans:
        family.enable(transformer, settings, new_gates)


def disable_vsa(transformer_or_pipe: Any) -> None:
    """Gives a model its own attention back, and removes the gates with their weights.

    Args:
        transformer_or_pipe: as in ``enable_vsa``; where it is not enabled, nothing changes.

    Raises:
        TypeError: there is no supported transformer.
    """
    for transformer in find_transformers(transformer_or_pipe).values():
        family_of(transformer).disable(transformer)


def _check_layers(dense_layers: Sequence[int], layers: int) -> frozenset[int]:
    """The layers that are dense, counted from the front."""
    if isinstance(dense_layers, str) or not isinstance(dense_layers, (Sequence, set, frozenset)):
        raise TypeError(f"dense_layers: expected indices of layers, got {type(dense_layers).__name__}")
    indices = [check_int("dense_layers", layer, "indices of layers") for layer in dense_layers]
    for index in indices:
        if not -layers <= index < layers:
            raise ValueError(f"dense_layers: expected indices from {-layers} to {layers - 1}, got {index}")
    return frozenset(index % layers for index in indices)


def _check_steps(dense_steps: int, transformer_or_pipe: Any) -> DenseSteps | None:
    count = check_int("dense_steps", dense_steps)
    if count < 0:
        raise ValueError(f"dense_steps: expected at least 0, got {count}")
    if count == 0:
        return None
    if isinstance(transformer_or_pipe, nn.Module):
        raise ValueError(f"dense_steps: expected 0 for a transformer alone, got {count}; it is a pipeline that counts")
    scheduler = getattr(transformer_or_pipe, "scheduler", None)
    if not hasattr(scheduler, "step_index"):
        raise ValueError(
            f"dense_steps: expected 0 where the scheduler counts no steps ({type(scheduler).__name__}), got {count}"
        )
    return DenseSteps(count, transformer_or_pipe)

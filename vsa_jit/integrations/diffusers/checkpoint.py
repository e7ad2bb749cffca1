"""Weights that were trained with Video Sparse Attention: FastVideo's FastWan checkpoints, for diffusers' Wan."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from vsa_jit.checks import DTYPES
from vsa_jit.integrations.diffusers.models import find_transformers
from vsa_jit.integrations.diffusers.wan import GATE

Source: TypeAlias = "str | PathLike[str] | Mapping[str, Any]"

# Parts of a key that name a wrapper, or the model itself.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_layer"}
MODEL_NAMES = {"base_model", "model", "transformer", "diffusion_model"}
# FastVideo's names of Wan's layers and diffusers', as patterns of whole keys; other names are the same in both.
RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"patch_embedding\.proj\.(\w+)", r"patch_embedding.\1"),
        (r"(condition_embedder\.text_embedder)\.fc_in\.(\w+)", r"\1.linear_1.\2"),
        (r"(condition_embedder\.text_embedder)\.fc_out\.(\w+)", r"\1.linear_2.\2"),
        (r"(condition_embedder\.time_embedder)\.mlp\.fc_in\.(\w+)", r"\1.linear_1.\2"),
        (r"(condition_embedder\.time_embedder)\.mlp\.fc_out\.(\w+)", r"\1.linear_2.\2"),
        (r"condition_embedder\.time_modulation\.linear\.(\w+)", r"condition_embedder.time_proj.\1"),
        (r"(condition_embedder\.image_embedder\.ff)\.fc_in\.(\w+)", r"\1.net.0.proj.\2"),
        (r"(condition_embedder\.image_embedder\.ff)\.fc_out\.(\w+)", r"\1.net.2.\2"),
        (r"(blocks\.\d+)\.(to_[qkv]|norm_[qk])\.(\w+)", r"\1.attn1.\2.\3"),
        (r"(blocks\.\d+)\.to_out\.(\w+)", r"\1.attn1.to_out.0.\2"),
        (r"(blocks\.\d+\.attn2)\.to_out\.(\w+)", r"\1.to_out.0.\2"),
        (r"(blocks\.\d+\.ffn)\.fc_in\.(\w+)", r"\1.net.0.proj.\2"),
        (r"(blocks\.\d+\.ffn)\.fc_out\.(\w+)", r"\1.net.2.\2"),
        (r"(blocks\.\d+)\.self_attn_residual_norm\.norm\.(\w+)", r"\1.norm2.\2"),
    )
)
MOST_NAMED = 8


def load_fastwan(transformer_or_pipe: Any, source: Source) -> None:
    """Loads all weights but the gates of a FastWan checkpoint, whichever of the two names it gives each.

    diffusers loads a checkpoint that has its own names by itself. One that has FastVideo's, or some of each, leaves it
    with weights that were not loaded.

    Args:
        transformer_or_pipe: as in ``enable_vsa``, which loads the gates.
        source: as ``gates`` in ``enable_vsa``.

    Raises:
        TypeError, ValueError: an argument is wrong, or keys are missing or name no weight; the message names them.
    """
    models = find_transformers(transformer_or_pipe)
    loaded = {}
    for name, transformer in models.items():
        weights = {
            _diffusers_name(key): value
            for key, value in _tensors(source, name, len(models), "source", lambda key: GATE not in key)
        }
        expected = {key for key in transformer.state_dict() if GATE not in key}
        for what, keys in (("lacks", expected - weights.keys()), ("has beside them", weights.keys() - expected)):
            if keys:
                raise ValueError(
                    f"source: expected the weights of {name}, got a checkpoint that {what} {_listed(sorted(keys))}"
                )
        loaded[name] = weights
    for name, transformer in models.items():
        transformer.load_state_dict(loaded[name], strict=False)


def read_gates(source: Source, name: str, models: int, transformer: Any) -> list[nn.Linear]:
    """The gate of each block of a transformer, zero where the source has none, which a warning then says.

    Args:
        source: ``gates`` in ``enable_vsa``.
        name: the transformer's name in its pipeline.
        models: how many transformers the pipeline has.

    Raises:
        TypeError, ValueError: the source cannot be read, or its gates are not this model's.
    """
    gates = [_zero_gate(transformer, block) for block in transformer.blocks]
    parameters = {
        f"blocks.{layer}.{GATE}.{kind}": parameter
        for layer, gate in enumerate(gates)
        for kind, parameter in gate.named_parameters()
    }
    found: dict[str, str] = {}
    strangers = []
    for key, value in _tensors(source, name, models, "gates", lambda key: GATE in key):
        place = _without_wrappers(key).replace(f".attn1.{GATE}", f".{GATE}")
        if place not in parameters:
            strangers.append(key)
            continue
        if place in found:
            raise ValueError(f"gates: expected one key for {place}, got {found[place]} and {key}")
        expected = tuple(parameters[place].shape)
        if tuple(value.shape) != expected:
            raise ValueError(f"gates: expected {key} of shape {expected}, got {tuple(value.shape)}")
        found[place] = key
        with torch.no_grad():
            parameters[place].copy_(value)
    if strangers:
        raise ValueError(
            f"gates: expected keys blocks.N.{GATE}.weight and .bias with N from 0 to {len(gates) - 1}, "
            f"got {_listed(strangers)}"
        )
    missing = sorted(parameters.keys() - found.keys())
    are_wanted = not isinstance(source, Mapping) or len(source) > 0
    if missing and are_wanted:
        warnings.warn(
            f"vsa_jit: gates of {name} that were not found are zero, which drops the coarse output: {_listed(missing)}",
            stacklevel=3,
        )
    return gates


def _zero_gate(transformer: Any, block: Any) -> nn.Linear:
    projection = block.attn1.to_q
    weight = projection.weight
    if weight.device.type == "meta" or _is_offloaded(transformer):
        raise ValueError(
            "transformer_or_pipe: expected a model whose weights are in place, got one that is offloaded by parts; "
            "enable VSA with gates before offloading"
        )
    # One that is quantised is not computed in its dtype.
    dtype = weight.dtype if weight.dtype in DTYPES else transformer.dtype
    gate = nn.Linear(projection.in_features, projection.out_features, device=weight.device, dtype=dtype)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    return gate


def _is_offloaded(transformer: Any) -> bool:
    """Whether parts of a model are moved to the device one by one: a layer that is added later would stay behind."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            return True
        if module is not transformer and hasattr(module, "_hf_hook"):
            return True
    return False


def _tensors(
    source: Source, name: str, models: int, argument: str, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of a state dict, a file, a folder or a repository, as far as they are wanted."""
    if isinstance(source, Mapping):
        by_name = [isinstance(value, Mapping) for value in source.values()]
        if source and all(by_name):
            if name not in source:
                raise ValueError(f"{argument}: expected a state dict for {name}, got those of {', '.join(source)}")
            yield from _tensors(source[name], name, 1, argument, is_wanted)
            return
        if source and models > 1:
            raise ValueError(
                f"{argument}: expected a state dict for each of {models} transformers by its name, got one"
            )
        yield from ((key, value) for key, value in source.items() if is_wanted(key))
        return
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"{argument}: expected a path, a repository or a state dict, got {type(source).__name__}")
    for file in _files(source, name, models, argument):
        with safe_open(file, framework="pt") as tensors:
            for key in filter(is_wanted, tensors.keys()):
                yield key, tensors.get_tensor(key)


def _files(source: str | PathLike[str], name: str, models: int, argument: str) -> Sequence[Path]:
    """The safetensors files of a transformer, with or without an index that names them."""
    path = Path(source)
    if path.is_file():
        if models > 1:
            raise ValueError(f"{argument}: expected a folder with one for each of {models} transformers, got a file")
        return [path]
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise ValueError(f"{argument}: expected a file, a folder or a repository owner/name, got {str(source)!r}")
        path = Path(snapshot_download(str(source), allow_patterns=[f"{name}/*.safetensors", "*.safetensors"]))
    files = sorted((path / name).glob("*.safetensors"))
    if not files and models == 1:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{argument}: expected .safetensors files in {path} or in its folder {name}, found none")
    return files


def _diffusers_name(key: str) -> str:
    key = _without_wrappers(key)
    for pattern, replacement in RENAMES:
        match = pattern.fullmatch(key)
        if match:
            return match.expand(replacement)
    return key


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS | MODEL_NAMES)


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - MOST_NAMED
    return ", ".join(keys[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

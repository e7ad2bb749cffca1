"""Weights that were trained with Video Sparse Attention: FastVideo's FastWan checkpoints, for diffusers' Wan."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from vsa_jit.checks import DTYPES
from vsa_jit.integrations.diffusers import wan
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
SUFFIX = ".safetensors"


def load_fastwan(transformer_or_pipe: Any, source: Source) -> None:
    """Loads all weights but the gates of a FastWan checkpoint, whichever of the two names it gives each.

    diffusers loads a checkpoint that has its own names by itself. Of one that has FastVideo's, or some of each, its
    ``from_pretrained`` leaves weights on the device "meta"; this fills them, before the model is moved to a device.

    Args:
        transformer_or_pipe: Wan, as in ``enable_vsa``, which loads the gates; not offloaded.
        source: as ``gates`` in ``enable_vsa``.

    Raises:
        TypeError, ValueError: an argument is wrong, or keys are missing or name no weight; the message names them.
    """
    models = find_transformers(transformer_or_pipe, (wan,))
    sources = split("source", source, list(models))
    plans = []
    for name, transformer in models.items():
        if _is_offloaded(transformer):
            raise ValueError(
                "transformer_or_pipe: expected a model whose weights are in place, got one that is offloaded"
            )
        expected = {key: value for key, value in transformer.state_dict().items() if GATE not in key}
        ignored = transformer._keys_to_ignore_on_load_unexpected or ()
        weights: dict[str, Tensor] = {}
        found: dict[str, str] = {}
        for key, value in _tensors("source", sources[name], lambda key: GATE not in key):
            place = _diffusers_name(key)
            if place not in expected and any(re.search(pattern, place) for pattern in ignored):
                continue
            _keep_one("source", place, key, found)
            if place in expected:
                _check_shape("source", key, value, expected[place])
            weights[place] = value
        for what, keys in (
            ("lacks", expected.keys() - weights.keys()),
            ("has beside them", weights.keys() - expected.keys()),
        ):
            if keys:
                raise ValueError(
                    f"source: expected the weights of {name}, got a checkpoint that {what} {_listed(sorted(keys))}"
                )
        plans.append((transformer, weights))
    for transformer, weights in plans:
        _load(transformer, weights)


def _load(transformer: Any, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into those that are in place, and puts them where a weight is not."""
    places = transformer.state_dict()
    device = next((place.device for place in places.values() if not place.is_meta), torch.device("cpu"))
    absent = {key: value.to(device, places[key].dtype) for key, value in weights.items() if places[key].is_meta}
    transformer.load_state_dict(absent, strict=False, assign=True)
    transformer.load_state_dict({key: value for key, value in weights.items() if key not in absent}, strict=False)


def split(argument: str, source: Source, names: Sequence[str]) -> dict[str, Source]:
    """The source of each of a pipeline's transformers: a state dict, or a path of its own.

    Raises:
        TypeError, ValueError: there is none for each; the message names the argument.
    """
    listed = ", ".join(names)
    if isinstance(source, Mapping):
        if source and all(isinstance(value, Mapping) for value in source.values()):
            if set(source) != set(names):
                raise ValueError(f"{argument}: expected state dicts of {listed}, got those of {_listed(source)}")
            return dict(source)
        if source and len(names) > 1:
            raise ValueError(f"{argument}: expected a state dict for each of {listed} by its name, got one")
        return dict.fromkeys(names, source)
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"{argument}: expected a path, a repository or a state dict, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        path = _download(argument, str(source), names)
    if len(names) == 1:
        return {names[0]: path / names[0] if (path / names[0]).is_dir() else path}
    return {name: path / name for name in names}


def _download(argument: str, repository: str, names: Sequence[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{argument}: expected a file, a folder or a repository owner/name, got {repository!r}")
    folder = Path(snapshot_download(repository, allow_patterns=[f"{name}/*{SUFFIX}" for name in names]))
    if len(names) == 1 and not (folder / names[0]).is_dir():
        # A repository of a transformer alone has them at its root; a pattern matches folders too.
        folder = Path(snapshot_download(repository, allow_patterns=[f"*{SUFFIX}"], ignore_patterns=["*/*"]))
    return folder


def read_gates(source: Source, name: str, transformer: Any) -> list[nn.Linear]:
    """The gate of each block of a transformer, zero where the source has none, which a warning then says.

    Args:
        source: of this transformer.
        name: the transformer's name in its pipeline.

    Raises:
        TypeError, ValueError: the source cannot be read, its gates are not this model's, or the model cannot take any.
    """
    gates = [_zero_gate(transformer, block) for block in transformer.blocks]
    parameters = {
        f"blocks.{layer}.{GATE}.{kind}": parameter
        for layer, gate in enumerate(gates)
        for kind, parameter in gate.named_parameters()
    }
    found: dict[str, str] = {}
    strangers = []
    for key, value in _tensors("gates", source, lambda key: GATE in key):
        place = _without_wrappers(key).replace(f".attn1.{GATE}", f".{GATE}")
        if place not in parameters:
            strangers.append(key)
            continue
        _keep_one("gates", place, key, found)
        _check_shape("gates", key, value, parameters[place])
        with torch.no_grad():
            parameters[place].copy_(value)
    if strangers:
        raise ValueError(
            f"gates: expected keys blocks.N.{GATE}.weight and .bias with N from 0 to {len(gates) - 1}, "
            f"got {_listed(strangers)}"
        )
    missing = sorted(parameters.keys() - found.keys())
    is_empty = isinstance(source, Mapping) and len(source) == 0
    if missing and not is_empty:
        warnings.warn(
            f"vsa_jit: gates of {name} that were not found are zero, which drops the coarse output: {_listed(missing)}",
            stacklevel=3,
        )
    return gates


def _keep_one(argument: str, place: str, key: str, found: dict[str, str]) -> None:
    if place in found:
        raise ValueError(f"{argument}: expected one value for {place}, got two, {found[place]} and {key}")
    found[place] = key


def _check_shape(argument: str, key: str, value: Tensor, place: Tensor) -> None:
    if value.shape != place.shape:
        raise ValueError(f"{argument}: expected {key} of shape {tuple(place.shape)}, got {tuple(value.shape)}")


def _zero_gate(transformer: Any, block: Any) -> nn.Linear:
    projection = block.attn1.to_q
    weight = projection.weight
    if weight.device.type == "meta" or _is_offloaded(transformer):
        raise ValueError(
            "transformer_or_pipe: expected a model whose weights are in place, got one that is offloaded by parts or "
            "that load_fastwan has not filled; enable VSA with gates before offloading"
        )
    if hasattr(block, GATE) and type(getattr(block, GATE)) is not nn.Linear:
        raise ValueError("gates: expected None for a model whose gates have adapters, which new gates would drop")
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


def _tensors(argument: str, source: Source, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of a state dict, a file, a folder or a repository, as far as they are wanted."""
    if isinstance(source, Mapping):
        for key, value in source.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise TypeError(f"{argument}: expected tensors by their names, got {type(value).__name__} at {key!r}")
            if is_wanted(key):
                yield key, value
        return
    for file in _files(argument, source):
        with safe_open(file, framework="pt") as tensors:
            for key in filter(is_wanted, tensors.keys()):
                yield key, tensors.get_tensor(key)


def _files(argument: str, source: str | PathLike[str]) -> list[Path]:
    """A safetensors file, or those of a folder, with or without an index that names them."""
    path = Path(source)
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == SUFFIX for file in files):
        raise ValueError(f"{argument}: expected a {SUFFIX} file or a folder with some, got {path}")
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


def _listed(keys: Iterable[str]) -> str:
    keys = list(map(str, keys))
    more = len(keys) - MOST_NAMED
    return ", ".join(keys[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

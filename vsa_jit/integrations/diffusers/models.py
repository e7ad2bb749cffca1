"""Which models of diffusers can attend sparsely, and where they are found."""

from __future__ import annotations

from typing import Any

from torch import nn

from vsa_jit.integrations.diffusers import wan

# Wrappers that know the parameters they found, by the names of their classes: not all PyTorchs have all of them.
PARALLEL_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def find_transformers(transformer_or_pipe: Any) -> dict[str, Any]:
    """The transformers that can attend sparsely, by their names in a pipeline, or by "transformer".

    Raises:
        TypeError: there is none.
        ValueError: a wrapper holds several.
    """
    found = {}
    for name, component in _components(transformer_or_pipe).items():
        # A wrapper of torch.compile, of an adapter or of data parallelism holds one.
        models = [module for module in component.modules() if wan.is_supported(module)]
        if len(models) > 1:
            raise ValueError(
                f"transformer_or_pipe: expected one model, got {type(component).__name__} with {len(models)}; "
                "give them one by one"
            )
        if models:
            found[name] = models[0]
    if not found:
        kinds = sorted({type(component).__name__ for component in _components(transformer_or_pipe).values()})
        inside = "" if isinstance(transformer_or_pipe, nn.Module) or not kinds else f" with {', '.join(kinds)}"
        raise TypeError(
            f"transformer_or_pipe: expected a {wan.MODEL}, or a pipeline with one, got "
            f"{type(transformer_or_pipe).__name__}{inside}"
        )
    return found


def is_in_parallel_wrapper(transformer_or_pipe: Any) -> bool:
    """Whether the parameters of a model, or of a part of it, were already counted by data parallelism."""
    return any(
        base.__name__ in PARALLEL_WRAPPERS
        for component in _components(transformer_or_pipe).values()
        for module in component.modules()
        for base in type(module).__mro__
    )


def _components(transformer_or_pipe: Any) -> dict[str, nn.Module]:
    if isinstance(transformer_or_pipe, nn.Module):
        return {"transformer": transformer_or_pipe}
    components = getattr(transformer_or_pipe, "components", None)
    if not isinstance(components, dict):
        return {}
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}

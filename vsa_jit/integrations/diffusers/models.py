"""Which models of diffusers can attend sparsely, and where they are found."""

from __future__ import annotations

from typing import Any

from torch import nn

from vsa_jit.integrations.diffusers import wan


def find_transformers(transformer_or_pipe: Any) -> dict[str, Any]:
    """The transformers that can attend sparsely, by their names in a pipeline, or by "transformer".

    Raises:
        TypeError: there is none.
    """
    if isinstance(transformer_or_pipe, nn.Module):
        components = {"transformer": transformer_or_pipe}
    else:
        components = getattr(transformer_or_pipe, "components", {})
    found = {}
    for name, component in components.items():
        modules = component.modules() if isinstance(component, nn.Module) else ()
        # A wrapper (of torch.compile, of an adapter, of data parallelism) holds one model.
        transformer = next(filter(wan.is_supported, modules), None)
        if transformer is not None:
            found[name] = transformer
    if not found:
        kinds = sorted({type(x).__name__ for x in components.values() if isinstance(x, nn.Module)})
        got = type(transformer_or_pipe).__name__ + (f" with {', '.join(kinds)}" if kinds else "")
        raise TypeError(
            f"transformer_or_pipe: expected a {wan.MODEL} or a pipeline with one, got {got}; models that attend text "
            "and video jointly are not served yet"
        )
    return found

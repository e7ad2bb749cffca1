"""Which models of diffusers can attend sparsely, and where they are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from vsa_jit.integrations.diffusers import cogvideox, hunyuan_video, wan
from vsa_jit.integrations.diffusers.settings import Settings


class Family(Protocol):
    """What the module of a family of models has."""

    @property
    def MODELS(self) -> tuple[type[nn.Module], ...]: ...

    @property
    def TAKES_GATES(self) -> bool: ...

    def attentions(self, transformer: Any) -> list[Any]:
        """The attention modules that become sparse, in the order in which ``dense_layers`` counts them."""

    def check(self, transformer: Any) -> None:
        """Raises ``ValueError`` where a model has attention that the family's processors cannot do as well."""

    def enable(self, transformer: Any, settings: Settings, gates: Sequence[nn.Linear] | None) -> None:
        """Gives a model that was checked its processors; ``gates`` is None where the family takes none."""

    def disable(self, transformer: Any) -> None:
        """Undoes ``enable``."""


FAMILIES: tuple[Family, ...] = (wan, hunyuan_video, cogvideox)
# Wrappers that know the parameters they found, by the names of their classes: not all PyTorchs have all of them.
PARALLEL_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer that ``find_transformers`` found."""
    return next(family for family in FAMILIES if isinstance(transformer, family.MODELS))


def find_transformers(transformer_or_pipe: Any, families: Sequence[Family] = FAMILIES) -> dict[str, Any]:
    """The transformers that can attend sparsely, by their names in a pipeline, or by "transformer".

    Args:
        families: those that are asked for.

    Raises:
        TypeError: there is none.
        ValueError: a wrapper holds several.
    """
    supported = tuple(model for family in families for model in family.MODELS)
    found = {}
    for name, component in _components(transformer_or_pipe).items():
        # A wrapper of torch.compile, of an adapter or of data parallelism holds one.
        models = [module for module in component.modules() if isinstance(module, supported)]
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
            f"transformer_or_pipe: expected a {_alternatives(supported)}, or a pipeline with one, got "
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


def _alternatives(models: Sequence[type]) -> str:
    *others, last = [model.__name__ for model in models]
    return f"{', '.join(others)} or {last}" if others else last


def _components(transformer_or_pipe: Any) -> dict[str, nn.Module]:
    if isinstance(transformer_or_pipe, nn.Module):
        return {"transformer": transformer_or_pipe}
    components = getattr(transformer_or_pipe, "components", None)
    if not isinstance(components, dict):
        return {}
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}

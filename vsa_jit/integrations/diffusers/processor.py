"""What the attention processors of all models share, and how processors and hooks come into a model and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from vsa_jit.integrations.diffusers.settings import Settings

Grid = tuple[int, int, int]
# Called with the layer, q and k, the video's size, and the segments where the sequence is not the video alone.
Observer = Callable[..., None]


class VsaProcessor:
    """Self-attention of one layer by Video Sparse Attention, in place of the processor ``original``."""

    def __init__(self, layer: int, attention: Any, settings: Settings) -> None:
        self.layer = layer
        self.settings = settings
        self.original = attention.processor
        self.is_dense = layer in settings.dense_layers
        self.observer: Observer | None = None

    # diffusers sets both on the processors that it finds, and the original one keeps them where it has them.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.check_parallel(value)
        self.original._parallel_config = value

    @staticmethod
    def check_parallel(config: Any) -> None:
        """Raises ``ValueError`` where the sequence is sharded in a way that is not served."""
        raise NotImplementedError


def is_enabled(attentions: Iterable[Any]) -> bool:
    """Whether some attention module of a model has a processor of ours."""
    return any(isinstance(attention.processor, VsaProcessor) for attention in attentions)


def check_originals(attentions: Iterable[Any], originals: Sequence[type], ours: type[VsaProcessor]) -> None:
    """Raises ``ValueError`` where attention is not what ``ours`` can do as well."""
    for attention in attentions:
        processor = attention.processor
        if not isinstance(processor, (*originals, ours)):
            names = " or ".join(original.__name__ for original in originals)
            raise ValueError(f"transformer_or_pipe: expected self-attention by {names}, got {type(processor).__name__}")
        ours.check_parallel(getattr(processor, "_parallel_config", None))


def restore(attentions: Iterable[Any]) -> None:
    """Gives each attention module that has a processor of ours the one that it had."""
    for attention in attentions:
        if isinstance(attention.processor, VsaProcessor):
            attention.set_processor(attention.processor.original)


def remove_hooks(module: nn.Module, kind: type) -> None:
    """Removes hooks of a class, also those of a copy of a model, to which no handle leads."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)

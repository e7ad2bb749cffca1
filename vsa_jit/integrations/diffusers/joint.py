"""What models that attend a video and a prompt together share: what a forward tells its layers, which keys count."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vsa_jit.integrations.diffusers.processor import Grid, VsaProcessor
from vsa_jit.integrations.diffusers.settings import Settings

TOKENS = 1


class JointCall(NamedTuple):
    """What a forward of the model tells each of its layers.

    It travels with the call, so that a block that is computed again in a backward sees the video and the prompts of its
    own forward.

    Attributes:
        grid: (T, H, W), the video's size in tokens.
        text_lengths: how many tokens of each prompt are keys, the first ones; None where all are.
        rotary: what the model's own processors take as ``image_rotary_emb``.
    """

    grid: Grid
    is_dense_step: bool
    text_lengths: tuple[int, ...] | None = None
    rotary: tuple[Tensor, Tensor] | None = None


class JointProcessor(VsaProcessor):
    """Attention of a video and a prompt together, on one device."""

    @staticmethod
    def check_parallel(config: Any) -> None:
        if config is not None and config.context_parallel_config is not None:
            raise ValueError("transformer_or_pipe: expected a model on one device, got one with context parallelism")

    def attends_densely(self, call: JointCall) -> bool:
        return self.is_dense or call.is_dense_step


class ForwardArguments:
    """Names the arguments of a model's forward, however they were given."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self._names, args, strict=False)) | dict(kwargs)


def is_dense_step(settings: Settings) -> bool:
    return settings.dense_steps is not None and settings.dense_steps.is_under_way()


class ValidTokens:
    """The tokens of [B, T·H·W + N, heads, D] that are attended: each row is a video and then a prompt with padding.

    Nothing is copied. Where all prompts are of one length, the tokens that count are a view. Where they are not, the
    rows are samples of one sequence. So is the padding of each, which attends itself and which nothing else attends.

    Args:
        text_lengths: of each row, how many of its N tokens of text count, the first ones; None where all do.
    """

    def __init__(self, grid: Grid, num_text: int, text_lengths: Sequence[int] | None) -> None:
        self.num_video = math.prod(grid)
        self.num_text = num_text
        lengths = [num_text] if text_lengths is None else list(text_lengths)
        self._length = lengths[0]
        self._is_packed = any(length != self._length for length in lengths)
        self.segments: list[Any] = [grid, self._length]
        if self._is_packed:
            self.segments = []
            for length in lengths:
                self.segments.append([grid, length])
                if length < num_text:
                    self.segments.append([num_text - length])

    def view(self, x: Tensor) -> Tensor:
        """The tokens of q, k or v that ``segments`` are of."""
        if self._is_packed:
            return x.flatten(0, 1).unsqueeze(0)
        return x[:, : self.num_video + self._length]

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the video and of all tokens of text, zero where padding was left out of the view."""
        if self._is_packed:
            out = out.squeeze(0).unflatten(0, (-1, self.num_video + self.num_text))
        video, text = out[:, : self.num_video], out[:, self.num_video :]
        return video, F.pad(text, (0, 0, 0, 0, 0, self.num_text - text.shape[TOKENS]))

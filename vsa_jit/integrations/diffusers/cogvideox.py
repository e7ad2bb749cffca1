"""CogVideoX in diffusers: each sequence is a prompt, whose padding counts, and then a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from vsa_jit.integrations.diffusers import processor
from vsa_jit.integrations.diffusers.joint import TOKENS, ForwardArguments, JointCall, JointProcessor, is_dense_step
from vsa_jit.integrations.diffusers.settings import Settings

MODELS = (CogVideoXTransformer3DModel,)
TAKES_GATES = False
ORIGINALS = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)
# The keyword under which the model's ``attention_kwargs`` bring the call to each processor.
CALL = "vsa_call"


class VideoSize:
    """A forward pre-hook of the model, which hands the size of the video on to every layer."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self._arguments = ForwardArguments(model)

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        arguments = self._arguments.named(args, kwargs)
        frames, _, height, width = arguments["hidden_states"].shape[1:]
        space, time = model.config.patch_size, model.config.patch_size_t or 1
        grid = (frames // time, height // space, width // space)
        given = arguments.get("attention_kwargs") or {}
        return (), arguments | {"attention_kwargs": given | {CALL: JointCall(grid, is_dense_step(self.settings))}}


class CogVideoXVsaProcessor(JointProcessor):
    """Attention of one block by Video Sparse Attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        vsa_call: JointCall | None = None,
    ) -> tuple[Tensor, Tensor]:
        if vsa_call is None:
            raise RuntimeError("the model does not tell the size of the video: call enable_vsa again")
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, got a Tensor; every token of the prompt is attended")
        is_dense = self.attends_densely(vsa_call)
        num_text = encoder_hidden_states.shape[TOKENS]
        segments: list[Any] = [num_text, vsa_call.grid]
        if not is_dense or self.observer is not None:
            q, k, v = self._project(attn, torch.cat((encoder_hidden_states, hidden_states), TOKENS))
            if image_rotary_emb is not None:
                for x in (q, k):
                    x[:, num_text:] = apply_rotary_emb(x[:, num_text:], image_rotary_emb, sequence_dim=TOKENS)
        if self.observer is not None:
            self.observer(self.layer, q, k, vsa_call.grid, segments)
        if is_dense:
            return self.original(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)

        out = self.settings.attend(q, k, v, segments=segments).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, num_text:], out[:, :num_text]

    def _project(self, attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.original, FusedCogVideoXAttnProcessor2_0):
            q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        return attn.norm_q(q), attn.norm_k(k), v


def attentions(transformer: Any) -> list[Any]:
    """The attention of each block."""
    return [block.attn1 for block in transformer.transformer_blocks]


def check(transformer: Any) -> None:
    """Raises ``ValueError`` where a model has attention that its processors cannot do as well."""
    processor.check_originals(attentions(transformer), ORIGINALS, CogVideoXVsaProcessor)


def enable(transformer: Any, settings: Settings, gates: Sequence[nn.Linear] | None) -> None:
    """Gives each block of a model that was checked its processor."""
    disable(transformer)
    transformer.register_forward_pre_hook(VideoSize(transformer, settings), with_kwargs=True)
    for layer, attention in enumerate(attentions(transformer)):
        attention.set_processor(CogVideoXVsaProcessor(layer, attention, settings))


def disable(transformer: Any) -> None:
    """Undoes ``enable``."""
    processor.remove_hooks(transformer, VideoSize)
    processor.restore(attentions(transformer))

"""HunyuanVideo and HunyuanVideo 1.5 in diffusers: each sequence is a video and then a prompt, padded at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn

from vsa_jit.integrations.diffusers import processor
from vsa_jit.integrations.diffusers.joint import (
    TOKENS,
    ForwardArguments,
    JointCall,
    JointProcessor,
    ValidTokens,
    is_dense_step,
)
from vsa_jit.integrations.diffusers.settings import Settings

MODELS = (HunyuanVideoTransformer3DModel, HunyuanVideo15Transformer3DModel)
TAKES_GATES = False
ORIGINALS = (HunyuanVideoAttnProcessor2_0, HunyuanVideo15AttnProcessor2_0)


class VideoSize:
    """A forward hook of ``transformer.rope``, whose output reaches every layer."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Of the forward that is under way, from ``TextLengths``.
        self.text_lengths: tuple[int, ...] | None = None

    def __call__(self, rope: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> JointCall:
        frames, height, width = args[0].shape[-3:]
        grid = (frames // rope.patch_size_t, height // rope.patch_size, width // rope.patch_size)
        return JointCall(grid, is_dense_step(self.settings), self.text_lengths, output)


class TextLengths:
    """A forward pre-hook of the model, which reads how many tokens of each prompt are keys: it waits for the device."""

    def __init__(self, model: nn.Module, video_size: VideoSize) -> None:
        self._arguments = ForwardArguments(model)
        self._video_size = video_size

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._arguments.named(args, kwargs)
        count = _keys_in_15 if isinstance(model, HunyuanVideo15Transformer3DModel) else _keys
        self._video_size.text_lengths = tuple(count(arguments).tolist())


def _keys(arguments: dict[str, Any]) -> Tensor:
    """The model takes the sum of the mask for the length of the prompt, wherever its ones are."""
    return _tensor(arguments, "encoder_attention_mask").sum(1, dtype=torch.int)


def _keys_in_15(arguments: dict[str, Any]) -> Tensor:
    """The model sorts the tokens of three encoders so that keys come first, and takes an image of zeros for none."""
    masks = [_tensor(arguments, name).bool() for name in ("encoder_attention_mask", "encoder_attention_mask_2")]
    images = _tensor(arguments, "image_embeds")
    return masks[0].sum(1) + masks[1].sum(1) + images.any() * images.shape[1]


def _tensor(arguments: dict[str, Any], name: str) -> Tensor:
    value = arguments.get(name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    return value


class HunyuanVideoVsaProcessor(JointProcessor):
    """Attention of one dual-stream or single-stream block by Video Sparse Attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: JointCall | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = image_rotary_emb
        if not isinstance(call, JointCall) or call.rotary is None or call.text_lengths is None:
            raise RuntimeError("the model does not tell the size of the video: call enable_vsa again")
        is_dense = self.attends_densely(call)
        if not is_dense or self.observer is not None:
            q, k, v = _project(attn, hidden_states, encoder_hidden_states, call.rotary)
            valid = ValidTokens(call.grid, encoder_hidden_states.shape[TOKENS], call.text_lengths)
            q, k, v = valid.view(q), valid.view(k), valid.view(v)
        if self.observer is not None:
            self.observer(self.layer, q, k, call.grid, valid.segments)
        if is_dense:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, call.rotary)

        out = self.settings.attend(q, k, v, segments=valid.segments)
        video, text = (x.flatten(2).to(q.dtype) for x in valid.split(out))
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return video, text


def _project(attn: Any, video: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a video and its text, [B, T·H·W + N, heads, D]."""
    num_video = video.shape[TOKENS]
    is_single_stream = attn.add_q_proj is None
    tokens = torch.cat((video, text), TOKENS) if is_single_stream else video
    q, k, v = (_heads(attn, linear, tokens) for linear in (attn.to_q, attn.to_k, attn.to_v))
    q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
    for x in (q, k):
        x[:, :num_video] = apply_rotary_emb(x[:, :num_video], rotary, sequence_dim=TOKENS)
    if is_single_stream:
        return q, k, v
    text_q, text_k, text_v = (
        _heads(attn, linear, text) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    text_q, text_k = _normed(attn.norm_added_q, text_q), _normed(attn.norm_added_k, text_k)
    return torch.cat((q, text_q), TOKENS), torch.cat((k, text_k), TOKENS), torch.cat((v, text_v), TOKENS)


def _heads(attn: Any, linear: Any, tokens: Tensor) -> Tensor:
    return linear(tokens).unflatten(-1, (attn.heads, -1))


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def attentions(transformer: Any) -> list[Any]:
    """Of the dual-stream blocks, and then of the single-stream blocks, of which HunyuanVideo 1.5 has none."""
    return [
        block.attn
        for block in (*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ()))
    ]


def check(transformer: Any) -> None:
    """Raises ``ValueError`` where a model has attention that its processors cannot do as well."""
    processor.check_originals(attentions(transformer), ORIGINALS, HunyuanVideoVsaProcessor)


def enable(transformer: Any, settings: Settings, gates: Sequence[nn.Linear] | None) -> None:
    """Gives each block of a model that was checked its processor."""
    disable(transformer)
    video_size = VideoSize(settings)
    transformer.rope.register_forward_hook(video_size)
    transformer.register_forward_pre_hook(TextLengths(transformer, video_size), with_kwargs=True)
    for layer, attention in enumerate(attentions(transformer)):
        attention.set_processor(HunyuanVideoVsaProcessor(layer, attention, settings))


def disable(transformer: Any) -> None:
    """Undoes ``enable``."""
    processor.remove_hooks(transformer, TextLengths)
    processor.remove_hooks(transformer.rope, VideoSize)
    processor.restore(attentions(transformer))

"""Wan 2.1 and 2.2 in diffusers: the processor of its self-attention, and what tells it the size of the video."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from vsa_jit.integrations.diffusers import processor
from vsa_jit.integrations.diffusers.processor import Grid, VsaProcessor
from vsa_jit.integrations.diffusers.settings import Settings

MODELS = (WanTransformer3DModel,)
TAKES_GATES = True
# The layer of a block that gives the weight of the coarse output, under the name that FastWan's checkpoints have.
GATE = "to_gate_compress"
HEADS, TOKENS = 2, 1


class VideoRotary(NamedTuple):
    """What the position embedding gives to every block: the rotations, and which video they are of.

    It travels with the call, so that a block that is computed again in a backward sees the video of its own forward.
    ``cos`` and ``sin`` are [1, S, 1, D/2], and ``rotations`` the same as complex numbers.
    """

    cos: Tensor
    sin: Tensor
    rotations: Tensor
    grid: Grid
    is_dense_step: bool


class VideoSize:
    """A forward hook of ``transformer.rope``, which alone sees the whole latent, also where the sequence is sharded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, rope: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> VideoRotary:
        frames, height, width = args[0].shape[-3:]
        t, h, w = rope.patch_size
        grid = (frames // t, height // h, width // w)
        # Each value comes twice, once for each number of a pair.
        cos, sin = output[0][..., 0::2].float(), output[1][..., 1::2].float()
        dense_steps = self.settings.dense_steps
        is_dense_step = dense_steps is not None and dense_steps.is_under_way()
        return VideoRotary(cos, sin, torch.complex(cos, sin), grid, is_dense_step)


class WanVsaProcessor(VsaProcessor):
    """Self-attention of one block of Wan by Video Sparse Attention, or by all keys where the layer or step is dense."""

    def __init__(self, layer: int, block: Any, settings: Settings) -> None:
        super().__init__(layer, block.attn1, settings)
        # The block owns its processor: the memory of a model that nobody holds any more is free at once.
        self._block = weakref.ref(block)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_block": self._block()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _block=weakref.ref(state["_block"]))

    @staticmethod
    def check_parallel(config: Any) -> None:
        """Raises ``ValueError`` where the sequence is sharded in a way that is not served."""
        context = None if config is None else config.context_parallel_config
        if context is None:
            return
        if context.ring_degree > 1:
            raise ValueError(
                f"ring_degree: expected 1, got {context.ring_degree}; each rank must see whole sequences to choose "
                "blocks, which ulysses_degree gives it"
            )
        if context.ulysses_anything:
            raise ValueError("ulysses_anything: expected False (heads and tokens shared evenly), got True")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: VideoRotary | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("expected self-attention without a mask, got encoder_hidden_states or attention_mask")
        if not isinstance(rotary_emb, VideoRotary):
            raise RuntimeError("transformer.rope does not tell the size of the video: call enable_vsa again")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        q, k = rotate(q, rotary_emb), rotate(k, rotary_emb)
        if self.observer is not None:
            self.observer(self.layer, q, k, rotary_emb.grid)

        if self.is_dense or rotary_emb.is_dense_step:
            out = dispatch_attention_fn(q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config)
        else:
            gate = getattr(self._block(), GATE, None)
            gate = None if gate is None else gate(hidden_states).unflatten(-1, (attn.heads, -1))
            out = self._attend(q, k, v, gate, rotary_emb.grid)
        out = out.flatten(-2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, grid: Grid) -> Tensor:
        config = self._parallel_config
        if config is None:
            return self.settings.attend(q, k, v, gate=gate, grid=grid)
        # Ulysses: whole sequences of some heads, instead of some tokens of all heads.
        mesh = config.context_parallel_config._ulysses_mesh
        heads, ranks = q.shape[HEADS], mesh.size()
        if heads % ranks != 0:
            raise ValueError(f"ulysses_degree: expected a divisor of the model's {heads} heads, got {ranks}")
        group = mesh.get_group()

        def to_heads(x: Tensor) -> Tensor:
            return SeqAllToAllDim.apply(group, x, HEADS, TOKENS)

        gate = None if gate is None else to_heads(gate)
        out = self.settings.attend(to_heads(q), to_heads(k), to_heads(v), gate=gate, grid=grid)
        return SeqAllToAllDim.apply(group, out, TOKENS, HEADS)


def rotate(x: Tensor, rotary: VideoRotary) -> Tensor:
    """Rotary position embedding of [B, S, heads, D], whose pairs of neighbouring values are complex numbers."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler has no complex numbers, and makes one pass of this.
        real, imaginary = pairs.unbind(-1)
        cos, sin = rotary.cos, rotary.sin
        rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotary.rotations)
    return rotated.flatten(-2).to(x.dtype)


def attentions(transformer: Any) -> list[Any]:
    """The self-attention of each block."""
    return [block.attn1 for block in transformer.blocks]


def check(transformer: Any) -> None:
    """Raises ``ValueError`` where a model has attention that its processors cannot do as well."""
    processor.check_originals(attentions(transformer), (WanAttnProcessor,), WanVsaProcessor)


def enable(transformer: Any, settings: Settings, gates: Sequence[nn.Linear] | None) -> None:
    """Gives each block of a model that was checked its processor, and its gate; without new gates old ones stay."""
    _restore(transformer)
    transformer.rope.register_forward_hook(VideoSize(settings))
    for layer, block in enumerate(transformer.blocks):
        if gates is not None:
            setattr(block, GATE, gates[layer])
        block.attn1.set_processor(WanVsaProcessor(layer, block, settings))


def disable(transformer: Any) -> None:
    """Undoes ``enable``."""
    _restore(transformer)
    for block in transformer.blocks:
        if hasattr(block, GATE):
            delattr(block, GATE)


def _restore(transformer: Any) -> None:
    """Gives each block that has a processor of ours the one that it had, and the position embedding its output."""
    processor.remove_hooks(transformer.rope, VideoSize)
    processor.restore(attentions(transformer))

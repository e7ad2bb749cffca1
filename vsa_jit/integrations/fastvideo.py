"""FastVideo's attention for MiniMax-H3 on segments: what it tiles and pads around its kernel is read where it lies."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from fastvideo.attention.backends import video_sparse_attn_h3 as h3
from torch import Tensor

import vsa_jit

# Each asks for code of FastVideo's that takes its tiles: a record of scores, and its own kernel for Blackwell GPUs.
_PROBE, _SM100A = "FASTVIDEO_H3_VSA_PROBE", "FASTVIDEO_VSA_SM100A"


def enable_segments() -> None:
    """Makes MiniMax-H3's layers that are built in this process from now on attend segments.

    Called once, before the model is loaded. FastVideo's workers are processes that import the main script again: the
    call must stand at the top of it, outside of ``if __name__ == "__main__"``. Outputs are FastVideo's to rounding.
    """
    h3.MiniMaxH3VSABackend.get_impl_cls = staticmethod(lambda: SegmentsImpl)
    h3.MiniMaxH3VSABackend.get_builder_cls = staticmethod(lambda: SegmentsMetadataBuilder)


@dataclass
class SegmentsMetadata(h3.MiniMaxH3VSAMetadata):
    """FastVideo's metadata, and the lengths of what comes before the video with the video's (T, H, W)."""

    segments: list[int | tuple[int, int, int]] = field(kw_only=True)


class SegmentsMetadataBuilder(h3.MiniMaxH3VSAMetadataBuilder):
    """Says of each step whether its layers attend segments."""

    def build(
        self,
        current_timestep: int,
        raw_latent_shape: tuple[int, int, int],
        patch_size: tuple[int, int, int],
        VSA_sparsity: float,
        prefix_segments: tuple[int, ...],
        device: torch.device,
        **settings: Any,
    ) -> h3.MiniMaxH3VSAMetadata:
        """``SegmentsMetadata``, or FastVideo's own where a variable of its environment asks for code that needs it."""
        metadata = super().build(
            current_timestep, raw_latent_shape, patch_size, VSA_sparsity, prefix_segments, device, **settings
        )
        if os.environ.get(_PROBE) or os.environ.get(_SM100A, "0") == "1":
            return metadata
        t, h, w = (extent // side for extent, side in zip(raw_latent_shape, patch_size, strict=True))
        return SegmentsMetadata(**metadata.asdict_zerocopy(), segments=[*map(int, prefix_segments), (t, h, w)])


class SegmentsImpl(h3.MiniMaxH3VSAImpl):
    """FastVideo's implementation, which ``SegmentsMetadata`` lets leave the sequence as it is."""

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: h3.MiniMaxH3VSAMetadata) -> Tensor:
        if isinstance(attn_metadata, SegmentsMetadata):
            return qkv
        return super().preprocess_qkv(qkv, attn_metadata)

    def postprocess_output(self, output: Tensor, attn_metadata: h3.MiniMaxH3VSAMetadata) -> Tensor:
        if isinstance(attn_metadata, SegmentsMetadata):
            return output
        return super().postprocess_output(output, attn_metadata)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate_compress: Tensor | None,
        attn_metadata: h3.MiniMaxH3VSAMetadata,
    ) -> Tensor:
        """Attention of the whole sequence over its segments.

        Args:
            query, key, value: [B, S, H, D], text, condition frames, audio and video one after the other.
            gate_compress: like query; None for no coarse output.

        Returns:
            Like query.
        """
        if not isinstance(attn_metadata, SegmentsMetadata):
            return super().forward(query, key, value, gate_compress, attn_metadata)
        sparsity = 0.0 if self.layer_idx in attn_metadata.dense_layers else attn_metadata.VSA_sparsity
        return vsa_jit.video_sparse_attn(
            query,
            key,
            value,
            # FastVideo's own rounding of a share of tiles: it keeps 4 of 10 at a sparsity of 0.7.
            topk=h3.compute_topk(sparsity, attn_metadata.num_video_tiles),
            block_size=h3.VSA_H3_TILE_SHAPES[attn_metadata.tile_elems],
            compress_attn_weight=0.0 if gate_compress is None else gate_compress,
            segments=attn_metadata.segments,
            context="attend" if attn_metadata.exempt else "compete",
            layout="bshd",
        )

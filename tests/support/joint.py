"""Tiny models of diffusers that attend video and text together, with random weights, and their inputs."""

import math
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel

HEADS, HEAD_DIM = 2, 24
GRID = (3, 5, 6)
# Tokens of text, padding included; HunyuanVideo 1.5 has 5 of a second encoder and 3 of an image beside them.
NUM_TEXT, NUM_TEXT_2, NUM_IMAGE = 7, 5, 3
HUNYUAN = ("hunyuan_video", "token_replace")
HUNYUAN_15 = ("hunyuan_video15", "hunyuan_video15 with an image")
COGVIDEOX = ("cogvideox", "cogvideox 1.5", "cogvideox without rotary")
KINDS = (*HUNYUAN, *HUNYUAN_15, *COGVIDEOX)


def tiny(kind: str, **overrides: Any) -> torch.nn.Module:
    """A model of four layers at most, in evaluation mode."""
    config: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "text_embed_dim": 16}
    if kind in COGVIDEOX:
        config |= {"in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "num_layers": 2}
        config |= {"sample_width": 12, "sample_height": 10, "sample_frames": 9, "max_text_seq_length": NUM_TEXT}
        config["use_rotary_positional_embeddings"] = kind != "cogvideox without rotary"
        if kind == "cogvideox 1.5":
            config |= {"patch_size_t": 2, "patch_bias": False}
        model = CogVideoXTransformer3DModel(**(config | overrides))
    else:
        config |= {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 1.0}
        config["rope_axes_dim"] = (8, 8, 8)
        if kind in HUNYUAN:
            config |= {"num_single_layers": 2, "pooled_projection_dim": 8, "guidance_embeds": False}
            config["image_condition_type"] = "token_replace" if kind == "token_replace" else None
            model = HunyuanVideoTransformer3DModel(**(config | overrides))
        else:
            config |= {"text_embed_2_dim": 6, "image_embed_dim": 10}
            model = HunyuanVideo15Transformer3DModel(**(config | overrides))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            # Queries and keys large enough that attention is far from uniform.
            is_norm = ".norm_q." in name or ".norm_k." in name or ".norm_added_" in name
            torch.nn.init.normal_(parameter, mean=1.5 if is_norm else 0.0, std=0.3)
    return model.eval()


def inputs(
    kind: str, lengths: tuple[int, ...] = (NUM_TEXT, NUM_TEXT), grid=GRID, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Of prompts of these lengths, padded at their end; CogVideoX has no mask."""
    batch, (t, h, w) = len(lengths), grid

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    arguments: dict[str, Any] = {"timestep": torch.randint(0, 1000, (batch,)), "return_dict": False}
    arguments["encoder_hidden_states"] = randn(batch, NUM_TEXT, 16)
    if kind in COGVIDEOX:
        frames = 2 * t if kind == "cogvideox 1.5" else t
        arguments["hidden_states"] = randn(batch, frames, 4, 2 * h, 2 * w)
        if kind != "cogvideox without rotary":
            angles = torch.randn(math.prod(grid), HEAD_DIM // 2).repeat_interleave(2, dim=1)
            arguments["image_rotary_emb"] = (angles.cos(), angles.sin())
        return arguments
    positions = torch.arange(NUM_TEXT)
    arguments["encoder_attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
    if kind in HUNYUAN:
        arguments["hidden_states"] = randn(batch, 4, t, 2 * h, 2 * w)
        arguments["pooled_projections"] = randn(batch, 8)
        return arguments
    arguments["hidden_states"] = randn(batch, 4, t, h, w)
    arguments["timestep"] = arguments["timestep"].to(dtype)
    arguments["encoder_hidden_states_2"] = randn(batch, NUM_TEXT_2, 6)
    arguments["encoder_attention_mask_2"] = (torch.arange(NUM_TEXT_2) < torch.tensor(lengths)[:, None] - 2).long()
    image = randn(batch, NUM_IMAGE, 10)
    arguments["image_embeds"] = image if kind == "hunyuan_video15 with an image" else torch.zeros_like(image)
    return arguments


def text_lengths(kind: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """How many tokens beside the video each row has as keys."""
    if kind in COGVIDEOX:
        return (NUM_TEXT,) * len(lengths)
    if kind in HUNYUAN:
        return lengths
    images = NUM_IMAGE if kind == "hunyuan_video15 with an image" else 0
    return tuple(length + min(max(length - 2, 0), NUM_TEXT_2) + images for length in lengths)


def num_text(kind: str) -> int:
    """Tokens beside the video, padding included."""
    return NUM_TEXT + NUM_TEXT_2 + NUM_IMAGE if kind in HUNYUAN_15 else NUM_TEXT

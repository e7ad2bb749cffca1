"""Tiny Wan models of diffusers with random weights, and their inputs."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

HEADS, HEAD_DIM = 2, 24
# Tokens of the video; the model makes one of 1x2x2 values.
GRID = (3, 5, 6)
KINDS = {
    "text to video": {},
    "image to video": {"in_channels": 12, "image_dim": 20, "added_kv_proj_dim": HEADS * HEAD_DIM},
    "a timestep for each token": {},
}


def tiny(kind: str = "text to video", layers: int = 2) -> WanTransformer3DModel:
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": layers,
    }
    model = WanTransformer3DModel(**(config | KINDS[kind]))
    # Large enough that attention is far from uniform.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(
    kind: str = "text to video", grid=GRID, batch: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    t, h, w = grid
    channels = 12 if kind == "image to video" else 4
    timestep = torch.randint(0, 1000, (batch, t * h * w) if kind == "a timestep for each token" else (batch,))
    arguments = {
        "hidden_states": torch.randn(batch, channels, t, 2 * h, 2 * w, dtype=dtype),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 512 if kind == "image to video" else 7, 16, dtype=dtype),
        "return_dict": False,
    }
    if kind == "image to video":
        arguments["encoder_hidden_states_image"] = torch.randn(batch, 9, 20, dtype=dtype)
    return arguments


def as_fp32(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}


def run(model: torch.nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**arguments)[0]


def difference(x: Tensor, wanted: Tensor) -> float:
    x, wanted = x.detach().double(), wanted.detach().double()
    return ((x - wanted).norm() / wanted.norm()).item()


def gate_weights(layers: int = 2) -> dict[str, Tensor]:
    """Gates as FastWan's checkpoints have them."""
    size = HEADS * HEAD_DIM
    shapes = {"weight": (size, size), "bias": (size,)}
    return {
        f"blocks.{layer}.to_gate_compress.{kind}": 0.3 * torch.randn(shape)
        for layer in range(layers)
        for kind, shape in shapes.items()
    }

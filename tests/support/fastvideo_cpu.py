"""FastVideo's own attention classes on a CPU, in this process and in others, on the stand-in for its kernels.

What is set aside for that: the ``__init__`` of its package, which imports all of its pipelines; ``torchvision``, of
which one function is imported to save images, and whose builds for GPUs do not load beside a PyTorch for CPUs; and the
question of the platform, since the CPU's has no attention classes: those of the GPU's are taken, by its own rule.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch


def load() -> None:
    """Makes ``fastvideo.attention`` importable; nothing where that was done before."""
    if "fastvideo" in sys.modules:
        return
    from transformers.utils import is_torchvision_available

    # transformers asks once, and must not find what is put in torchvision's place.
    is_torchvision_available()
    spec = importlib.util.find_spec("fastvideo")
    _put_module("fastvideo").__path__ = list(spec.submodule_search_locations)
    missing = [name for name in ("torchvision", "torchvision.utils") if name not in sys.modules]
    for name in missing:
        _put_module(name).make_grid = None
    from fastvideo import platforms
    from fastvideo.platforms.cpu import CpuPlatform
    from fastvideo.platforms.cuda import CudaPlatformBase

    for name in missing:
        del sys.modules[name]
    platforms._current_platform = CpuPlatform()
    CpuPlatform.get_attn_backend_cls = CudaPlatformBase.get_attn_backend_cls


def _put_module(name: str) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def start(rank: int, ranks: int, store: Path) -> None:
    """Sequence parallelism over processes that meet in a file."""
    from fastvideo import distributed

    distributed.init_distributed_environment(ranks, rank, f"file://{store}")
    distributed.initialize_model_parallel(sequence_model_parallel_size=ranks)


def stop() -> None:
    from fastvideo.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def attention(backend: str, heads: int, head_dim: int) -> torch.nn.Module:
    """FastVideo's layer, with the backend that ``FASTVIDEO_ATTENTION_BACKEND`` names."""
    from fastvideo.attention.layer import DistributedAttention_VSA
    from fastvideo.platforms import AttentionBackendEnum

    os.environ["FASTVIDEO_ATTENTION_BACKEND"] = backend
    try:
        return DistributedAttention_VSA(
            heads, head_dim, supported_attention_backends=(AttentionBackendEnum[backend],), prefix="blocks.0.attn"
        )
    finally:
        del os.environ["FASTVIDEO_ATTENTION_BACKEND"]


def wan_metadata(grid: tuple[int, int, int], sparsity: float):
    from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder

    t, h, w = grid
    return VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0,
        raw_latent_shape=(t, 2 * h, 2 * w),
        patch_size=(1, 2, 2),
        VSA_sparsity=sparsity,
        device=torch.device("cpu"),
        # As in training, where a buffer that is written again would break the backward.
        cache_tile_buf=False,
    )


def h3_metadata(grid: tuple[int, int, int], sparsity: float, prefix: tuple[int, ...], tile_size: int, **settings):
    """From the builder that FastVideo takes for its layers of MiniMax-H3."""
    from fastvideo.attention.backends.video_sparse_attn_h3 import MiniMaxH3VSABackend

    t, h, w = grid
    return MiniMaxH3VSABackend.get_builder_cls()().build(
        current_timestep=0,
        raw_latent_shape=(t, 2 * h, 2 * w),
        patch_size=(1, 2, 2),
        VSA_sparsity=sparsity,
        prefix_segments=prefix,
        device=torch.device("cpu"),
        tile_size=tile_size,
        **settings,
    )


def print_h3_implementation() -> None:
    """In a process of its own: the name of the class that runs MiniMax-H3's attention there."""
    print(type(attention("VIDEO_SPARSE_ATTN_H3", 2, 64).attn_impl).__name__)


def run(layer: torch.nn.Module, metadata, q, k, v, gate, dout) -> dict[str, torch.Tensor]:
    """Output and gradients for this rank's part of the sequence, [B, S, H, D]."""
    from fastvideo.forward_context import set_forward_context

    leaves = {"q": q, "k": k, "v": v} | ({} if gate is None else {"gate_compress": gate})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    with set_forward_context(0, metadata):
        out, _ = layer(**leaves, original_seq_len=metadata.total_seq_length)
    out.backward(dout)
    gradients = {"d" + name.partition("_")[0]: x.grad for name, x in leaves.items()}
    return {"out": out.detach(), **gradients}


def run_rank(rank: int, ranks: int, folder: str, grid: tuple[int, int, int], sparsity: float) -> None:
    """One of several processes: takes its part of the inputs in a folder, and leaves its part of the results there."""
    load()
    start(rank, ranks, Path(folder, "store"))
    shards = [x.chunk(ranks, 1)[rank] for x in torch.load(Path(folder, "inputs.pt"))]
    _, _, heads, head_dim = shards[0].shape
    results = run(attention("VIDEO_SPARSE_ATTN", heads, head_dim), wan_metadata(grid, sparsity), *shards)
    torch.save(results, Path(folder, f"results{rank}.pt"))
    stop()

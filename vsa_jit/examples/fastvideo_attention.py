"""FastVideo's call of its kernels on vsa_jit, and the same attention without the tiling around it.

Needs the distribution vsa-jit-fastvideo-kernel, which vsa_jit/integrations/fastvideo_stand_in/README.md describes. Runs
on a GPU, or in seconds on a CPU.
"""

import torch
from fastvideo_kernel import build_vsa_metadata, video_sparse_attn

import vsa_jit


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid, tile, topk = (5, 12, 18), (4, 4, 4), 8
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v, gate = (torch.randn(1, 2, tokens, 64, device=device, dtype=torch.bfloat16) for _ in range(4))

    # What FastVideo does around each call: tiles one after the other, each padded to full size, and back.
    metadata = build_vsa_metadata(grid, tile, device=device)
    sizes = metadata["variable_block_sizes"]

    def tiled(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(1, 2, len(sizes) * metadata["max_block_size"], 64)
        padded[:, :, metadata["non_pad_index"]] = x[:, :, metadata["tile_partition_indices"]]
        return padded

    out = video_sparse_attn(tiled(q), tiled(k), tiled(v), sizes, sizes, topk, tile, compress_attn_weight=tiled(gate))
    out = out[:, :, metadata["non_pad_index"]][:, :, metadata["reverse_tile_partition_indices"]]

    # The same without any of that.
    print(vsa_jit.explain(q, k, v, topk=topk, block_size=tile, grid=grid))
    raster = vsa_jit.video_sparse_attn(
        q, k, v, topk=topk, block_size=tile, compress_attn_weight=gate, grid=grid, selection_dtype=q.dtype
    )
    print(f"{tokens} tokens in {len(sizes)} tiles, {topk} of them attended by each")
    print("the same output without tiling:", torch.allclose(out.float(), raster.float(), rtol=0.02, atol=0.02))


if __name__ == "__main__":
    main()

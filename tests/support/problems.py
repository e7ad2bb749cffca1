"""Calls to test: fresh random inputs of a shape and an order of tokens, with NaN wherever a value must not matter."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vsa_jit
from support import reference as ref

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU and not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)"),
]
# What runs a call, and where.
BACKENDS = [
    ("torch", "cpu"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("sm90", "cuda"), marks=ON_HOPPER),
]
# Triton's interpreter, which takes seconds for what takes others milliseconds.
INTERPRETED = [] if GPU else [("triton", "cpu")]
TILE_OF_TOKENS = {64: (4, 4, 4), 128: (2, 8, 8), 256: (4, 8, 8)}


@dataclass(frozen=True)
class Case:
    name: str
    q_len: int = 200
    kv_len: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int = 32
    block_size: int | tuple[int, int, int] = 64
    grid: tuple[int, int, int] | None = None
    sizes: tuple[int, ...] | None = None
    q_sizes: tuple[int, ...] | None = None
    layout: str = "bhsd"
    topk: int = 2
    gate: str | float | None = None
    magnitude: float = 1.0
    softmax_scale: float | None = None
    fused_qkv: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)

    @property
    def tile(self) -> tuple[int, int, int]:
        if not isinstance(self.block_size, int):
            return self.block_size
        return TILE_OF_TOKENS[self.block_size] if self.grid else (1, 1, self.block_size)


class Inputs:
    """Tensors of a case on a device, the arguments of the call, and its masks."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int | None = None):
        self.case, self.device, self.dtype = case, device, dtype
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        q_len = math.prod(case.grid) if case.grid else case.q_len
        kv_len = q_len if case.kv_len is None else case.kv_len
        kv_heads = case.kv_heads or case.heads
        block = math.prod(case.tile)
        self.sizes = None if case.sizes is None else torch.tensor(case.sizes, dtype=torch.int32, device=device)
        q_sizes = None if case.q_sizes is None else torch.tensor(case.q_sizes, dtype=torch.int64, device=device)
        self.given_q_sizes = q_sizes
        if q_sizes is None and q_len == kv_len:
            q_sizes = self.sizes
        self.q_sizes = q_sizes
        self.q_block = ref.block_of_tokens(q_len, case.tile, case.grid)
        self.kv_block = ref.block_of_tokens(kv_len, case.tile, case.grid)
        self.q_valid = ref.valid_tokens(q_len, block, q_sizes)
        self.kv_valid = ref.valid_tokens(kv_len, block, self.sizes)
        self.num_q_blocks, self.num_kv_blocks = int(self.q_block.max()) + 1, int(self.kv_block.max()) + 1
        self.kv_nonempty = torch.zeros(self.num_kv_blocks, dtype=torch.bool)
        self.kv_nonempty[self.kv_block[self.kv_valid]] = True
        self.scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale

        shape_q = (case.batch, case.heads, q_len, case.head_dim)
        shape_kv = (case.batch, kv_heads, kv_len, case.head_dim)
        self.q = self._tensor(shape_q, self.q_valid, case.magnitude)
        self.k = self._tensor(shape_kv, self.kv_valid)
        self.v = self._tensor(shape_kv, self.kv_valid)
        if case.fused_qkv:
            self._fuse()
        self.gate = case.gate
        if case.gate == "full":
            self.gate = self._tensor(shape_q, self.q_valid)
        elif case.gate == "per channel":
            self.gate = (
                torch.randn((1, case.heads, 1, case.head_dim), generator=self.generator)
                .to(device, dtype)
                .requires_grad_()
            )
            if case.layout == "bshd":
                self.gate = self.gate.detach().transpose(1, 2).contiguous().requires_grad_()
        self.dout = self._tensor(shape_q, self.q_valid).detach()
        self.dlse = self.bhsd(self._tensor((*shape_q[:3], 1), self.q_valid).detach())[..., 0].float().contiguous()

    def _tensor(self, shape: tuple[int, ...], valid: Tensor, magnitude: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * magnitude
        x[:, :, ~valid] = float("nan")
        x = x.transpose(1, 2).contiguous() if self.case.layout == "bshd" else x
        return x.to(self.device, self.dtype).requires_grad_()

    def _fuse(self) -> None:
        """q, k, v as views of one tensor, as a fused projection gives them."""
        qkv = torch.stack([self.q.detach(), self.k.detach(), self.v.detach()], dim=-2)
        self.q, self.k, self.v = (x.requires_grad_() for x in qkv.unbind(-2))
        assert not self.q.is_contiguous()

    def stretch_keys(self, factors: Tensor) -> None:
        """Multiplies the keys of each block by a factor, and with them their scores."""
        of_tokens = factors[self.kv_block].to(self.device, self.dtype)[:, None]
        with torch.no_grad():
            self.bhsd(self.k).mul_(of_tokens)

    def bhsd(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.case.layout == "bshd" else x

    @property
    def order(self) -> dict:
        """The arguments that say where the tokens are."""
        return {
            "block_size": self.case.block_size,
            "grid": self.case.grid,
            "layout": self.case.layout,
            "softmax_scale": self.case.softmax_scale,
            "variable_block_sizes": self.sizes,
            "q_variable_block_sizes": self.given_q_sizes,
        }

    @property
    def order_of_blocks(self) -> dict:
        """The same for the functions that take a map, which know of no query sizes but those that they are given."""
        return {**self.order, "q_variable_block_sizes": self.q_sizes}

    def video_sparse_attn(self, backend: str) -> Tensor:
        return vsa_jit.video_sparse_attn(
            self.q,
            self.k,
            self.v,
            topk=self.case.topk,
            compress_attn_weight=self.gate,
            backend=backend,
            **self.order,
        )

    def clean(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """q, k, v and the gate as fresh [B, H, S, D] leaves of a dtype, 0 where they are not valid."""
        valid = {"q": self.q_valid, "k": self.kv_valid, "v": self.kv_valid}
        tensors = {}
        for name, mask in valid.items():
            x = self.bhsd(getattr(self, name)).detach().to(dtype)
            tensors[name] = x.masked_fill(~mask.to(x.device)[:, None], 0.0).requires_grad_()
        if isinstance(self.gate, Tensor):
            gate = self.bhsd(self.gate).detach().to(dtype)
            tensors["gate"] = gate.nan_to_num(0.0).requires_grad_()
        return tensors

    def clean_dout(self, dtype: torch.dtype) -> Tensor:
        return self.bhsd(self.dout).to(dtype).nan_to_num(0.0)

    def mask(self, block_map: Tensor) -> Tensor:
        return ref.token_mask(block_map.to(self.device), self.q_block, self.kv_block, self.q_valid, self.kv_valid)

    def means(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        sides = ((self.q_block, self.q_valid), (self.kv_block, self.kv_valid), (self.kv_block, self.kv_valid))
        return [ref.block_means(tensors[name], *side) for name, side in zip("qkv", sides, strict=True)]

    def block_map(self) -> Tensor:
        """The map that top-k selection gives, bool [B, H, n_q, n_k]."""
        q_c, k_c, _ = self.means({name: x.detach() for name, x in self.clean(torch.float64).items()})
        k_c = k_c.repeat_interleave(q_c.shape[1] // k_c.shape[1], 1)
        return ref.select(q_c @ k_c.mT, self.case.topk, self.kv_nonempty)

    def uneven_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """``q2k_idx`` and ``q2k_num`` of rows of 0 … n_k blocks in any order, junk past a row's number; their map."""
        rows = (self.case.batch, self.case.heads, self.num_q_blocks)
        num = torch.randint(0, self.num_kv_blocks + 1, rows, generator=self.generator, dtype=torch.int32)
        num.view(-1)[0] = 0
        idx = torch.rand((*rows, self.num_kv_blocks), generator=self.generator).argsort(-1).int()
        used = torch.arange(self.num_kv_blocks) < num[..., None]
        block_map = torch.zeros(idx.shape, dtype=torch.bool).scatter(-1, idx.long(), used)
        idx = idx.masked_fill(~used, 2**31 - 1)
        return idx.to(self.device), num.to(self.device), block_map

    def check_forward(self, out: Tensor, lse: Tensor, block_map: Tensor) -> None:
        """Checks the output, [B, H, S_q, D], and the statistics of a map against dense attention."""
        mask = self.mask(block_map)

        def dense(compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            tensors = self.clean(compute_dtype)
            with torch.no_grad():
                return ref.attention(tensors["q"], tensors["k"], tensors["v"], mask, self.scale)

        plain, expected = dense(self.dtype), dense(torch.float32)
        ref.assert_close("out", out, expected[0], plain[0])
        ref.assert_close("lse", lse, expected[1], plain[1])
        assert torch.equal(lse.isneginf(), expected[1].isneginf())
        padding = out[:, :, ~self.q_valid.to(self.device)]
        assert torch.equal(padding, torch.zeros_like(padding))

    def expected(self, dtype: torch.dtype, block_map: Tensor) -> dict[str, Tensor]:
        """Output and gradients of ``video_sparse_attn`` with this map, computed densely in a dtype."""
        tensors = self.clean(dtype)
        out = self.dense(tensors, block_map)
        out.backward(self.clean_dout(dtype))
        return {"out": out, **{f"d{name}": x.grad for name, x in tensors.items()}}

    def dense(self, tensors: dict[str, Tensor], block_map: Tensor) -> Tensor:
        """The output of ``video_sparse_attn`` with this map for clean tensors, [B, H, S_q, D]."""
        out, _ = ref.attention(tensors["q"], tensors["k"], tensors["v"], self.mask(block_map), self.scale)
        weight = tensors.get("gate", 1.0 if self.case.gate is None else self.case.gate)
        q_c, k_c, v_c = self.means(tensors)
        group = q_c.shape[1] // k_c.shape[1]
        k_c, v_c = k_c.repeat_interleave(group, 1), v_c.repeat_interleave(group, 1)
        out_c = ref.coarse(q_c, k_c, v_c, self.kv_nonempty, self.scale)[:, :, self.q_block.to(out.device)]
        return out + (weight * out_c).masked_fill(~self.q_valid.to(out.device)[:, None], 0.0)


HALF = (torch.bfloat16, torch.float16)
CASES = [
    Case("plain, partial last block", batch=2),
    Case("plain, whole blocks", q_len=256, head_dim=64, topk=3),
    Case("plain, shorter than a block", q_len=37, topk=1),
    Case("cross, grouped heads", q_len=130, kv_len=300, batch=2, heads=4, kv_heads=2, gate="full"),
    Case("tiled", q_len=256, sizes=(64, 17, 0, 40), topk=3, gate="full"),
    Case("tiled, sizes beyond the block", q_len=192, sizes=(64, 1000, -5), topk=2),
    Case("tiled, all blocks empty but one", q_len=256, sizes=(0, 0, 5, 0), topk=2, gate="full"),
    Case("tiled, other query sizes", q_len=192, kv_len=256, sizes=(64, 1, 63, 40), q_sizes=(64, 0, 33), gate=0.5),
    Case("tiled, plain queries", q_len=100, kv_len=256, sizes=(64, 1, 63, 40)),
    Case("tiled 128", q_len=384, block_size=(2, 8, 8), sizes=(128, 100, 7), topk=2, gate="full"),
    Case("raster", grid=(5, 6, 7), block_size=(4, 4, 4), topk=3, gate="full"),
    Case("raster, whole tiles", grid=(4, 8, 4), block_size=64, topk=2, head_dim=64),
    Case("raster, bshd", grid=(5, 6, 7), block_size=64, layout="bshd", topk=3, batch=2, gate="full"),
    Case("raster 128", grid=(3, 9, 10), block_size=128, topk=2, gate="per channel"),
    Case("raster 256, bshd", grid=(5, 9, 9), block_size=(4, 8, 8), layout="bshd", topk=3, gate="per channel"),
    Case("raster, tiles that are no shifted rows", grid=(5, 7, 9), block_size=(4, 6, 8), topk=2, gate="full"),
    Case("raster, tall tile", grid=(130, 2, 3), block_size=(64, 1, 1), topk=2, gate="full"),
    Case("raster, flat tile", grid=(2, 9, 33), block_size=(1, 4, 32), topk=2),
    Case("192 tokens", q_len=400, block_size=192, topk=2),
    Case("320 tokens, bshd", q_len=700, block_size=320, topk=2, layout="bshd"),
    Case("256 tokens", q_len=600, block_size=256, topk=2, gate=0.0),
    Case("head 16", head_dim=16, heads=1),
    Case("head 80", head_dim=80, heads=1, gate="full"),
    Case("head 96, bshd", head_dim=96, heads=3, layout="bshd"),
    Case("head 200", q_len=130, head_dim=200, heads=1),
    Case("head 256", q_len=130, head_dim=256, heads=1),
    Case("large logits", q_len=256, magnitude=30.0, topk=3, head_dim=64, dtypes=HALF),
    # A backward that recomputes p from lse carries the rounding of lse, which at 100 is more than fp32's own error.
    Case("large logits, fp32", q_len=256, magnitude=5.0, topk=3, head_dim=64, dtypes=(torch.float32,)),
    Case("own scale", softmax_scale=0.37),
    Case("fused qkv", fused_qkv=True, layout="bshd", gate="full"),
    Case("fused qkv, raster", fused_qkv=True, grid=(5, 6, 7), block_size=64),
    Case("more top-k than blocks", topk=99),
]


def steep(order: str, blocks: int) -> Tensor:
    """By how much the scores of each key block are stretched: most are then far beyond what fp32 holds as powers."""
    rising = torch.linspace(0, 60, blocks)
    return {"rising": rising, "falling": rising.flip(0), "mixed": rising[torch.randperm(blocks)]}[order]

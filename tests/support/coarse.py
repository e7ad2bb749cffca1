"""Calls of the coarse branch: block means, and how its Hopper kernels compare with other backends."""

from typing import NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90 import coarse
from vsa_jit.backends.torch import launches as torch_backend
from vsa_jit.backends.triton import launches as triton_backend
from vsa_jit.problem import Coarse
from vsa_jit.segments import Segments, order_of

BACKENDS = {"torch": torch_backend, "triton": triton_backend}
TILE = (4, 4, 4)
# Of each segment its sample, and a video or so many plain tokens.
TEXT_AND_VIDEO = (0, 0, 0, 77, 0, 20, 22, 12)
PACKED = (0, 0, 0, 77, 0, 5, 6, 7, 1, 20, 20, 15, 2, 0, 0, 1, 3, 0, 0, 200, 3, 3, 4, 8, 3, 0, 0, 65)


class Case(NamedTuple):
    """A call.

    Attributes:
        sizes: None where all blocks have tokens, "some" or "none".
        exact: scores are sums of a few small numbers, of which many are equal, so that every backend has the same bits.
            Else they are drawn, and no two are as close as backends differ.
        attended: whether there are means of v.
    """

    name: str
    num_q: int
    num_k: int
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    topk: tuple[int, ...] = (7,)
    sizes: str | None = None
    exact: bool = False
    segments: tuple[int, ...] | None = None
    compete: bool = False
    dtype: torch.dtype = torch.float32
    attended: bool = True
    scale: float = 0.05

    @property
    def of_segments(self) -> Segments | None:
        return order_of(self.segments, TILE).segments

    @property
    def coarse(self) -> Coarse:
        return Coarse(self.of_segments, self.scale, self.dtype)

    def means(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k and v, and the sizes of key blocks. The third of several samples holds NaN."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        of_q, of_k = (self.heads, self.num_q), (self.kv_heads, self.num_k)
        q, k, v = (torch.randn(self.batch, *of, self.head_dim, generator=generator) for of in (of_q, of_k, of_k))
        if self.exact:
            q, k = q.mul_(0.4).round_(), k.mul_(0.4).round_()
        sizes = None
        if self.sizes is not None:
            sizes = torch.arange(self.num_k) % 3
            if self.sizes == "none":
                sizes.zero_()
            empty = sizes == 0
            k[:, :, empty] = v[:, :, empty] = 0
        if self.of_segments is not None and len(self.of_segments.samples) > 2:
            spoiled = self.of_segments.samples[2].first_block
            for x in (q, k, v):
                x[:, :, spoiled] = float("nan")
        return q.to(device), k.to(device), v.to(device), None if sizes is None else sizes.to(device)

    def check_forward(self, device: str, backend: str) -> None:
        """Fails unless the kernels and a backend's composition agree."""
        q, k, v, sizes = self.means(device)
        v = v if self.attended else None
        call = self.coarse, q, k, v, sizes, self.topk, self.compete
        out, idx, num = coarse.coarse_attend(*call)
        expected = BACKENDS[backend].coarse_attend(*call)
        assert torch.equal(num, expected[2])
        assert torch.equal(idx, expected[1])
        if v is None:
            assert out is None
        else:
            self.check_close(out, expected[0])

    def check_backward(self, device: str, backend: str) -> None:
        q, k, v, sizes = self.means(device)
        call = self.coarse, q, k, v, sizes, torch.randn_like(q)
        results = coarse.coarse_attend_backward(*call)
        expected = BACKENDS[backend].coarse_attend_backward(*call)
        for result, of_backend in zip(results, expected, strict=True):
            self.check_close(result, of_backend)

    def check_close(self, result: Tensor, expected: Tensor) -> None:
        # Where scores are rounded, some probability may be rounded the other way.
        relative = 1e-5 if self.dtype == torch.float32 else 2**-7
        largest = expected.nan_to_num(0).abs().max().item()
        torch.testing.assert_close(result, expected, rtol=relative, atol=relative * largest, equal_nan=True)

"""Operators of other packages beside ours: from the same tensors to the same output, with what their callers do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vsa_jit.bench.attention import Attention, Run, sparse
from vsa_jit.bench.cases import DTYPES, Case, Inputs
from vsa_jit.bench.check import Checked
from vsa_jit.grid import block_tokens, tile_tokens
from vsa_jit.problem import bhsd

# Two implementations that round alike still sum in another order, so that near ties may choose other key blocks: of
# 100 blocks of tokens one may differ.
BLOCKS_PER_OUTLIER = 100


class Peer(Protocol):
    """Another package's operator."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str:
        """The package, its version and what of it runs."""

    def why_not(self, case: Case) -> str | None:
        """What keeps it from running the case, or None."""

    def attention(self, case: Case, device: torch.device) -> Attention:
        """A function of q, k, v and, where the case has one, the gate, all of the case's size and in its order.

        What its callers keep from call to call is made here.
        """


class Missing(Exception):
    """A peer that is not installed, or is not what it seems."""


@dataclass(frozen=True)
class PeerResult:
    """What was found of a peer.

    Attributes:
        why_not: why it has no time.
        checked: its results against ours; None where there are none.
        ms: of its calls taken in turn with ours; ``ratio`` is it over ours of the same rounds.
    """

    name: str
    why_not: str | None = None
    checked: Checked | None = None
    ms: float | None = None
    ratio: float | None = None


def check_peer(
    peer: Peer, case: Case, inputs: Inputs, checked: Checked, direction: str
) -> tuple[PeerResult, Callable[[], object] | None]:
    """Compares what a peer computes with what we do.

    Args:
        checked: our own results against fp64.

    Returns:
        The comparison, and the call to time, or None where there is none that may be timed.
    """
    why_not = peer.why_not(case)
    if why_not is not None:
        return PeerResult(peer.name, why_not), None
    # Its block means and scores have the inputs' dtype, and so has our selection here. The call that is timed selects
    # in fp32, which is another choice of blocks, and as many of them.
    ours = sparse(case, inputs, selection_dtype=DTYPES[case.shape.dtype])
    theirs = Run(peer.attention(case, inputs.device), ours.inputs, ours.dout)
    try:
        results, call = theirs.results(direction), theirs.call(direction)
    except Exception as error:
        # Another package's operator raises what it likes where it cannot run.
        first_line = str(error).partition("\n")[0]
        return PeerResult(peer.name, f"{type(error).__name__}: {first_line}"), None
    names = ("out",) if direction == "forward" else ("dq", "dk", "dv", "dgate")
    errors = {
        # Each may be as far from fp64 as the check allows us, and ours is so far.
        name: (_difference(case, x, wanted), sum(checked.errors[name]))
        for name, x, wanted in zip(names, results, ours.results(direction), strict=False)
    }
    compared = Checked(errors)
    if not compared.ok:
        return PeerResult(peer.name, "its results differ from ours", compared), None
    return PeerResult(peer.name, checked=compared), call


def _difference(case: Case, x: Tensor, wanted: Tensor) -> float:
    """The largest difference of a block of tokens but outliers: its norm, in norms of that block or an average one."""
    if x.shape != wanted.shape:
        return float("inf")
    tokens = block_tokens(case.problem.queries, None, x.device)
    differences, references = [], []
    for sample, wanted_sample in zip(bhsd(x, case.shape.layout), bhsd(wanted, case.shape.layout), strict=True):
        for head, wanted_head in zip(sample, wanted_sample, strict=True):
            differences.append(_squares_of_blocks(head.double() - wanted_head.double(), tokens))
            references.append(_squares_of_blocks(wanted_head.double(), tokens))
    squares = torch.cat(references)
    # A block that few queries attend has gradients as small as the rounding of others.
    errors = (torch.cat(differences) / squares.clamp(min=squares.mean())).sqrt()
    if not errors.isfinite().all():
        return float("nan")
    return errors.sort().values[-1 - len(errors) // BLOCKS_PER_OUTLIER].item()


def _squares_of_blocks(x: Tensor, tokens: Tensor) -> Tensor:
    """Sums over the tokens of each block, [n], of the squares of x [S, D]."""
    of_tokens = x.square().sum(-1)
    return of_tokens[tokens.clamp(min=0)].masked_fill(tokens < 0, 0.0).sum(-1)


@dataclass(frozen=True)
class _Tiling:
    """A video's tokens in tiles, one after the other, each padded to full size at its end.

    Attributes:
        tokens: raster tokens in the order of tiles, int64 [S].
        slots: where they go in the padded sequence, int64 [S].
        back: where each raster token went, int64 [S].
        sizes: tokens of each tile, int32 [n].
    """

    tokens: Tensor
    slots: Tensor
    back: Tensor
    sizes: Tensor
    length: int

    @classmethod
    def of(cls, grid: Sequence[int], tile: Sequence[int], device: torch.device) -> _Tiling:
        tiles = tile_tokens(grid, tile, device)
        is_token = tiles >= 0
        sizes = is_token.sum(1, dtype=torch.int32)
        tokens = tiles[is_token]
        is_filled = torch.arange(tiles.shape[1], device=device) < sizes[:, None]
        slots = is_filled.flatten().nonzero().flatten()
        return cls(tokens, slots, slots[tokens.argsort()], sizes, tiles.numel())

    def buffer(self, x: Tensor) -> Tensor:
        """What ``padded`` fills: zeros [B, slots, H, D] for x of [B, S, H, D]."""
        return x.new_zeros((x.shape[0], self.length, *x.shape[2:]))

    def padded(self, x: Tensor, buffer: Tensor) -> Tensor:
        buffer[:, self.slots] = x[:, self.tokens]
        return buffer


@dataclass(frozen=True)
class FastVideo:
    """FastVideo's ``video_sparse_attn``, called as by its attention layer.

    The layer also concatenates q, k, v and the gate, to send them between GPUs: that is left out.
    """

    name: str = field(default="fastvideo", init=False)
    about: str
    video_sparse_attn: Callable[..., Tensor]
    # Older releases have none.
    video_sparse_attn_bshd: Callable[..., Tensor] | None

    @classmethod
    def load(cls) -> FastVideo:
        """The installed package.

        Raises:
            Missing: there is none that can be measured.
        """
        try:
            import fastvideo_kernel
        except Exception as error:
            # Without a GPU its Triton code raises a RuntimeError.
            if isinstance(error, ImportError) and error.name == "fastvideo_kernel":
                install = "pip install fastvideo-kernel"
                raise Missing(f"the package fastvideo-kernel is not installed ({install})") from error
            raise Missing(f"the package fastvideo-kernel cannot be imported: {error}") from error
        module: Any = fastvideo_kernel
        if not hasattr(module, "video_sparse_attn"):
            raise Missing("the package fastvideo_kernel that is installed has no video_sparse_attn")
        version = getattr(module, "__version__", "of unknown version")
        if version.endswith("+vsa.jit"):
            raise Missing(
                "the package fastvideo_kernel is vsa-jit-fastvideo-kernel, which calls vsa_jit: it would be compared "
                "with itself (pip uninstall vsa-jit-fastvideo-kernel, pip install fastvideo-kernel)"
            )
        try:
            importlib.import_module("fastvideo_kernel._C.fastvideo_kernel_ops")
            kernels = "with its compiled extension"
        except ImportError:
            kernels = "without its compiled extension"
        return cls(
            f"fastvideo-kernel {version}, {kernels}",
            module.video_sparse_attn,
            getattr(module, "video_sparse_attn_bshd", None),
        )

    def why_not(self, case: Case) -> str | None:
        shape = case.shape
        if shape.grid is None:
            return "its callers tile one video: expected a grid"
        if shape.layout != "bshd":
            return f"its callers hold [B, S, H, D]: expected layout bshd, got {shape.layout}"
        if shape.dtype != "bf16":
            return f"its kernels compute in bf16, got {shape.dtype}"
        if shape.head_dim not in (64, 128):
            return f"it takes heads of 64 or 128, got {shape.head_dim}"
        if case.problem.block not in (64, 128, 256):
            return f"it takes blocks of 64, 128 or 256 tokens, got {case.problem.block}"
        if case.gate == "off":
            return "it always adds the coarse output: expected gate tensor or one"
        return None

    def attention(self, case: Case, device: torch.device) -> Attention:
        assert case.shape.grid is not None
        tile = case.problem.keys.tile
        tiling = _Tiling.of(case.shape.grid, tile, device)
        topk = case.topk
        # Of 256 tokens its callers take this one, where there is one: it needs no transposes.
        bshd = self.video_sparse_attn_bshd if case.problem.block == 256 else None
        buffers: list[Tensor] = []

        def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
            tensors = [q, k, v] if gate is None else [q, k, v, gate]
            if torch.is_grad_enabled():
                padded = [tiling.padded(x, tiling.buffer(x)) for x in tensors]
            else:
                # Inference writes into the same padding in every layer, training into new.
                buffers.extend(tiling.buffer(x) for x in tensors[len(buffers) :])
                padded = [tiling.padded(x, buffer) for x, buffer in zip(tensors, buffers, strict=True)]
            if bshd is None:
                padded = [x.transpose(1, 2).contiguous() for x in padded]
            out = (bshd or self.video_sparse_attn)(
                *padded[:3],
                tiling.sizes,
                tiling.sizes,
                topk,
                block_size=tile,
                compress_attn_weight=None if gate is None else padded[3],
            )
            return (out if bshd is not None else out.transpose(1, 2))[:, tiling.back]

        return attention


PEERS: dict[str, Callable[[], Peer]] = {"fastvideo": FastVideo.load}

"""The kernels of a Hopper GPU by themselves: forward, backward, the block means, and the host time of their calls.

What kernels compute is compared with Triton's before they are timed; of host times nothing is. What is compared is
timed in turn, round after round: such work runs at the GPU's limit of power, so that its clock changes from one second
to the next.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsa_jit
from vsa_jit.backends.choose import backend_for, selection_backend_for
from vsa_jit.backends.coarse import select
from vsa_jit.bench.attention import SDPA_NAMES, dense, sparse
from vsa_jit.bench.cases import BlockSize, Case, Inputs, Samples, Selection, Shape, flops_factor, sample_lengths
from vsa_jit.bench.measure import host_times_us, median_ms, times_ms
from vsa_jit.problem import BackendName, Layout, Operands, axes

OURS: BackendName = "sm90"
THEIRS: BackendName = "triton"
DENSE = SDPBackend.CUDNN_ATTENTION
# A forward is timed so often, and the least and most of its ratios say by how much these differ.
RUNS = 6
W1_TOKENS = 39_936
W1_VIDEO, W1_BORDERED = (24, 32, 52), (21, 30, 52)
W1_BLOCKS = (6, 8, 13)
# As many tokens as W1's video in all, in tiles that are all whole, so that there are as many products too.
W1_CONTEXT: Samples = ((W1_VIDEO, 512),)
W1_PACKED: Samples = tuple(
    (grid,)
    for grid in (
        *((4, 32, 40), (8, 16, 40), (12, 16, 24), (4, 48, 28)),
        *((8, 32, 20), (16, 16, 20), (24, 16, 12), (4, 16, 76)),
    )
)
# 6,400 tokens, of which the host sees the segments alone.
HOST_VIDEO = (8, 20, 40)
HOST_SEGMENTS: Samples = ((32, (8, 8, 12)),) * 8
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Result(ABC):
    """What was measured under a name."""

    name: str

    def __str__(self) -> str:
        return f"{self.name}: {self.figures()}"

    @abstractmethod
    def figures(self) -> str: ...


@dataclass(frozen=True)
class Failed(Result):
    """No time: what was computed differs from what Triton's kernels compute."""

    status: str = "FAILED"

    def figures(self) -> str:
        return f"{self.status}, other results than Triton's kernels"


@dataclass(frozen=True)
class DenseTime(Result):
    ms: float
    tflops: float

    def figures(self) -> str:
        return f"{self.ms:.3f} ms, {self.tflops:.0f} TFLOP/s"


@dataclass(frozen=True)
class AttentionTime(Result):
    """``of_dense``: TFLOP/s as a share of those of W1's dense attention; the least and most are of single runs."""

    ms: float
    tflops: float
    of_dense: float
    of_dense_min: float
    of_dense_max: float
    times_triton: float

    def figures(self) -> str:
        return (
            f"{self.ms:.3f} ms, {self.tflops:.0f} TFLOP/s, {self.of_dense:.3f} of dense "
            f"({self.of_dense_min:.3f} to {self.of_dense_max:.3f}), {self.times_triton:.2f} times Triton"
        )


@dataclass(frozen=True)
class SegmentsTime(Result):
    """``of_video``: TFLOP/s as a share of those of a video alone; the least and most are of single runs."""

    ms: float
    tflops: float
    of_video: float
    of_video_min: float
    of_video_max: float
    video_ms: float
    video_tflops: float

    def figures(self) -> str:
        return (
            f"{self.ms:.3f} ms, {self.tflops:.0f} TFLOP/s, {self.of_video:.3f} of a video alone "
            f"({self.of_video_min:.3f} to {self.of_video_max:.3f}; "
            f"{self.video_ms:.3f} ms, {self.video_tflops:.0f} TFLOP/s)"
        )


@dataclass(frozen=True)
class KernelTime(Result):
    ms: float

    def figures(self) -> str:
        return f"{self.ms:.4f} ms"


@dataclass(frozen=True)
class CopyTime(Result):
    ms: float
    tb_per_s: float

    def figures(self) -> str:
        return f"{self.ms:.3f} ms, {self.tb_per_s:.2f} TB/s read and written"


@dataclass(frozen=True)
class MeansTime(Result):
    """``of_copy``: bytes read for each second, as a share of those that a copy reads and writes."""

    ms: float
    of_copy: float
    triton_ms: float
    triton_of_copy: float

    def figures(self) -> str:
        return (
            f"{self.ms:.3f} ms, {self.of_copy:.3f} of the copy rate "
            f"(Triton {self.triton_ms:.3f} ms, {self.triton_of_copy:.3f} of the copy rate)"
        )


@dataclass(frozen=True)
class HostTime(Result):
    us: float
    us_min: float
    us_max: float

    def figures(self) -> str:
        return f"{self.us:.1f} us ({self.us_min:.1f} to {self.us_max:.1f})"


@dataclass(frozen=True)
class SegmentsHostTime(HostTime):
    video_us: float
    times_video: float

    def figures(self) -> str:
        return f"{super().figures()}, {self.times_video:.2f} times a video alone ({self.video_us:.1f} us)"


@dataclass(frozen=True)
class Setting:
    """Where works are measured, and how long each call of one is."""

    device: torch.device
    seconds: float
    seed: int

    def inputs(self, shape: Shape) -> Inputs:
        return Inputs.random(shape, self.device, self.seed)

    def times_ms(self, *calls: Callable[[], object]) -> list[float]:
        """The median of each call, which are timed in turn."""
        return [median(times) for times in times_ms(calls, self.device, self.seconds)]

    def host_time(self, name: str, call: Callable[[], object], calls: int) -> HostTime:
        # What a first call compiles and loads is not its host time.
        call()
        rounds = host_times_us(call, self.device, calls)
        return HostTime(name, median(rounds), min(rounds), max(rounds))

    @functools.cached_property
    def copy_ms(self) -> float:
        source = torch.randn(COPY_BYTES // 2, device=self.device).bfloat16()
        target = torch.empty_like(source)
        return median_ms(lambda: target.copy_(source), self.device, self.seconds)

    @property
    def copy_rate(self) -> float:
        """Bytes read and written for each second."""
        return 2e3 * COPY_BYTES / self.copy_ms


class Work(Protocol):
    """Something to measure, under a name."""

    @property
    def name(self) -> str: ...

    def measure(self, setting: Setting) -> Result: ...


OfSegments = TypeVar("OfSegments", bound=Work)


@dataclass(frozen=True)
class _BesideVideo(Generic[OfSegments]):
    """A work on segments, and the same on a video alone. The name is that of the first."""

    work: OfSegments
    video: OfSegments

    @property
    def name(self) -> str:
        return self.work.name


@dataclass(frozen=True)
class Dense:
    """PyTorch's dense attention of W1's size."""

    head_dim: int
    backend: SDPBackend

    @property
    def name(self) -> str:
        return f"dense, D={self.head_dim}, {SDPA_NAMES[self.backend]}"

    def measure(self, setting: Setting) -> DenseTime:
        shape = _w1(self.head_dim).shape
        (ms,) = setting.times_ms(dense_call(setting.inputs(shape), self.backend))
        return DenseTime(self.name, ms, shape.dense_flops / ms * 1e-9)


class _Calls(NamedTuple):
    """Calls that compute the same, and the work of one."""

    ours: Callable[[], object]
    theirs: Callable[[], object]
    flops: float


@dataclass(frozen=True)
class Forward:
    """The forward of the fine branch, on a map of which each row has the case's number of key blocks.

    They are drawn uniformly, or are the nearest ones in a video of ``neighbouring`` blocks, by Euclidean distance less
    twice a uniform number. ``hot``: every row names this share of all key blocks, and draws the others.
    """

    direction: ClassVar[str] = "forward"

    name: str
    case: Case
    neighbouring: tuple[int, int, int] | None = None
    hot: float = 0.0

    def measure(self, setting: Setting) -> AttentionTime | Failed:
        calls = self.checked_calls(setting)
        if calls is None:
            return Failed(self.name)
        shape = _w1(self.case.shape.head_dim).shape
        dense_flops = shape.dense_flops * flops_factor(self.direction)
        dense_call = self.dense_call(setting.inputs(shape))
        runs = [setting.times_ms(calls.ours, calls.theirs, dense_call) for _ in range(RUNS)]
        of_dense = [calls.flops / ms / (dense_flops / dense_ms) for ms, _, dense_ms in runs]
        ms = median(ms for ms, _, _ in runs)
        return AttentionTime(
            self.name,
            ms,
            calls.flops / ms * 1e-9,
            median(of_dense),
            min(of_dense),
            max(of_dense),
            median(triton_ms / ms for ms, triton_ms, _ in runs),
        )

    def checked_calls(self, setting: Setting) -> _Calls | None:
        """On one map, or None where the results differ."""
        inputs = setting.inputs(self.case.shape)
        selection = self.selection(setting)
        ours, theirs = (self.call(inputs, *selection, backend) for backend in (OURS, THEIRS))
        if not self.agree(ours(), theirs()):
            return None
        return _Calls(ours, theirs, self.case.flops_of(*selection) * flops_factor(self.direction))

    def call(
        self, inputs: Inputs, q2k_idx: Tensor, q2k_num: Tensor, backend: BackendName
    ) -> Callable[[], tuple[Tensor, ...]]:
        return attend_call(self.case, inputs, q2k_idx, q2k_num, backend)

    def dense_call(self, inputs: Inputs) -> Callable[[], object]:
        return dense_call(inputs, DENSE)

    def agree(self, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
        return _agree(ours, theirs, (2e-2, 1e-5))

    def selection(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """The key blocks of each query block, int32 [1, H, n, m], and their number, int32 [1, H, n]."""
        case, device = self.case, setting.device
        generator = torch.Generator(device).manual_seed(setting.seed)
        blocks = case.problem.keys.num_blocks
        scores = torch.rand((1, case.shape.heads, blocks, blocks), generator=generator, device=device)
        if self.neighbouring is not None:
            sides = (torch.arange(side, device=device).float() for side in self.neighbouring)
            places = torch.cartesian_prod(*sides)
            scores = 2 * scores - torch.cdist(places, places)
        scores[..., torch.randperm(blocks, generator=generator, device=device)[: int(self.hot * blocks)]] += 2
        if case.problem.keys.segments is not None:
            run, segments = selection_backend_for("select", case.backend, device), case.problem.keys.segments
            q2k_idx, q2k_num = select(run, segments, scores[0], None, case.topk_of_samples, case.compete)
            return q2k_idx[None], q2k_num[None]
        q2k_idx = scores.topk(case.topk, -1).indices.int()
        return q2k_idx, torch.full(q2k_idx.shape[:3], case.topk, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Backward(Forward):
    """Gradients of q, k and v on such a map: the backend's own function, with all that it prepares.

    Attributes:
        deterministic: under ``torch.use_deterministic_algorithms``, without its filling of new tensors.
    """

    direction: ClassVar[str] = "backward"

    deterministic: bool = False

    def call(
        self, inputs: Inputs, q2k_idx: Tensor, q2k_num: Tensor, backend: BackendName
    ) -> Callable[[], tuple[Tensor, ...]]:
        call = attend_backward_call(self.case, inputs, q2k_idx, q2k_num, backend)
        return _deterministic(call) if self.deterministic else call

    def dense_call(self, inputs: Inputs) -> Callable[[], object]:
        return dense_backward_call(inputs, DENSE)

    def agree(self, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
        # Segment by segment: gradients of context are small, and those of the video would hide its errors.
        lengths, tokens = self.case.shape.segment_lengths, axes(self.case.shape.layout)[2]
        ours, theirs = (tuple(part for x in xs for part in x.split(lengths, tokens)) for xs in (ours, theirs))
        return all((x - y).norm() <= 1e-2 * y.norm() for x, y in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class BesideVideo(_BesideVideo[Forward]):
    """An attention of segments, in turn with that of a video alone."""

    def measure(self, setting: Setting) -> SegmentsTime | Failed:
        calls, video = (work.checked_calls(setting) for work in (self.work, self.video))
        if calls is None or video is None:
            return Failed(self.name)
        runs = [setting.times_ms(calls.ours, video.ours) for _ in range(RUNS)]
        of_video = [calls.flops / ms / (video.flops / video_ms) for ms, video_ms in runs]
        ms, video_ms = (median(times) for times in zip(*runs, strict=True))
        return SegmentsTime(
            self.name,
            ms,
            calls.flops / ms * 1e-9,
            median(of_video),
            min(of_video),
            max(of_video),
            video_ms,
            video.flops / video_ms * 1e-9,
        )


@dataclass(frozen=True)
class Inverse:
    """The query blocks of each key block of a random map, by itself; a backward makes them beside its preparation."""

    name: str
    case: Case

    def measure(self, setting: Setting) -> KernelTime:
        index, num = Forward(self.name, self.case).selection(setting)
        inputs, problem = setting.inputs(self.case.shape), self.case.problem
        qkv = inputs.q, inputs.k, inputs.v
        operands = Operands(*qkv, index, num, None, None, None, None, 0.0)
        transpose_index = backend_for("attend_backward", problem, OURS, *qkv).transpose_index
        assert transpose_index is not None
        (ms,) = setting.times_ms(lambda: transpose_index(problem, operands))
        return KernelTime(self.name, ms)


@dataclass(frozen=True)
class Copy:
    """What the block means are compared with: the rate at which the GPU copies."""

    name: str = "copy"

    def measure(self, setting: Setting) -> CopyTime:
        return CopyTime(self.name, setting.copy_ms, setting.copy_rate * 1e-12)


@dataclass(frozen=True)
class Means:
    """The block means of q, k and v. ``tiled``: tensors of block sizes say that all blocks are full."""

    name: str
    case: Case
    tiled: bool

    def measure(self, setting: Setting) -> MeansTime | Failed:
        inputs = setting.inputs(self.case.shape)
        ours, theirs = (means_call(self.case, inputs, backend, self.tiled) for backend in (OURS, THEIRS))
        if not _agree(ours(), theirs(), (1e-5,) * 3):
            return Failed(self.name)
        ms, triton_ms = setting.times_ms(ours, theirs)
        read_ms = 3e3 * inputs.q.nbytes / setting.copy_rate
        return MeansTime(self.name, ms, read_ms / ms, triton_ms, read_ms / triton_ms)


@dataclass(frozen=True)
class HostCall:
    """A call of ``block_sparse_attn_from_indices`` on a small shape."""

    name: str
    case: Case
    # Fewer than the GPU's queue holds.
    calls: int = 200

    def measure(self, setting: Setting) -> HostTime:
        selection = Forward(self.name, self.case).selection(setting)
        call = attend_call(self.case, setting.inputs(self.case.shape), *selection, OURS)
        return setting.host_time(self.name, call, self.calls)


@dataclass(frozen=True)
class HostOfWhole:
    """A call of ``video_sparse_attn`` on a small shape, in inference, or with its backward.

    Attributes:
        in_one_thread: the backward runs in the thread that calls it; else PyTorch hands it to one of its own.
    """

    name: str
    case: Case
    with_backward: bool = False
    in_one_thread: bool = False
    # Fewer than the GPU's queue holds: a call has several launches.
    calls: int = 50

    def measure(self, setting: Setting) -> HostTime:
        run = sparse(self.case, setting.inputs(self.case.shape))
        call = run.step() if self.with_backward else run.forward
        with torch.autograd.set_multithreading_enabled(not self.in_one_thread):
            return setting.host_time(self.name, call, self.calls)


@dataclass(frozen=True)
class HostBesideVideo(_BesideVideo[HostOfWhole]):
    """A call on small segments, and one on a video of as many tokens."""

    def measure(self, setting: Setting) -> SegmentsHostTime:
        time, video = (work.measure(setting) for work in (self.work, self.video))
        return SegmentsHostTime(self.name, time.us, time.us_min, time.us_max, video.us, time.us / video.us)


@dataclass(frozen=True)
class HostLaunch:
    """A launch of the block means on a small shape, with its three outputs."""

    name: str
    case: Case
    calls: int = 1000

    def measure(self, setting: Setting) -> HostTime:
        call = means_call(self.case, setting.inputs(self.case.shape), OURS, tiled=False)
        return setting.host_time(self.name, call, self.calls)


def _case(
    heads: int,
    tokens: int,
    head_dim: int,
    block_size: BlockSize,
    topk: int,
    grid: tuple[int, int, int] | None = None,
    layout: Layout = "bhsd",
    segments: Samples | None = None,
    gate: str = "off",
) -> Case:
    shape = Shape(tokens, grid, 1, heads, head_dim, "bf16", layout, segments)
    return Case(shape, block_size, Selection(topk=topk), gate, OURS)


def _w1(
    head_dim: int = 128,
    block_size: BlockSize = 64,
    topk: int = 64,
    grid: tuple[int, int, int] | None = None,
    layout: Layout = "bhsd",
    segments: Samples | None = None,
) -> Case:
    tokens = W1_TOKENS if grid is None else math.prod(grid)
    if segments is not None:
        tokens = sum(sample_lengths(segments))
    return _case(12, tokens, head_dim, block_size, topk, grid, layout, segments)


def _block_means() -> Iterator[Means]:
    orders: list[tuple[str, tuple[int, int, int] | None, int]] = [
        ("tiled", None, 64),
        ("raster", W1_VIDEO, 64),
        ("raster, blocks of 256", W1_VIDEO, 256),
        ("raster, cut tiles", W1_BORDERED, 64),
    ]
    layouts: tuple[Layout, ...] = ("bhsd", "bshd")
    for head_dim, layout, (order, grid, block_size) in itertools.product((128, 64), layouts, orders):
        case = _w1(head_dim, block_size, 1, grid, layout)
        yield Means(f"block means, D={head_dim}, {layout}, {order}", case, tiled=order == "tiled")


def _backward() -> Iterator[Work]:
    yield Backward("backward, W1, random", _w1())
    yield Backward("backward, W1, neighbouring", _w1(), W1_BLOCKS)
    yield Backward("backward, W1, 5 % of key blocks in every row", _w1(), hot=0.05)
    yield Backward("backward, W1, D=64, random", _w1(head_dim=64))
    yield Backward("backward, W1, D=64, neighbouring", _w1(head_dim=64), W1_BLOCKS)
    yield Backward("backward, W1, raster, bhsd", _w1(block_size=(4, 4, 4), grid=W1_VIDEO))
    yield Backward("backward, W1, raster, bshd", _w1(block_size=(4, 4, 4), grid=W1_VIDEO, layout="bshd"))
    for block, topk in ((128, 32), (256, 16)):
        case = _w1(block_size=block, topk=topk)
        yield Backward(f"backward, W1, blocks of {block}", case)
        yield Backward(f"backward, W1, blocks of {block}, deterministic", case, deterministic=True)
    yield Backward("backward, W14, random", _case(40, 92_160, 128, 64, 144))
    yield Backward("backward, small, random", _case(8, 8192, 128, 64, 16))
    yield Inverse("inverse of a map, W1", _w1())
    yield Inverse("inverse of a map, W14", _case(40, 92_160, 128, 64, 144))


def _segments() -> Iterator[Work]:
    """W1's video with context, and as many tokens in packed samples, beside W1's video alone."""
    kinds: list[tuple[type[Forward], str]] = [(Forward, "segments"), (Backward, "backward, segments")]
    blocks: list[tuple[str, tuple[int, int, int], int]] = [("", (4, 4, 4), 64), (", blocks of 128", (4, 8, 4), 32)]
    orders = [("512 tokens of context after a video", W1_CONTEXT), ("8 packed samples", W1_PACKED)]
    for (kind, name), (of_blocks, tile, topk), (order, segments) in itertools.product(kinds, blocks, orders):
        case, video = (
            _w1(block_size=tile, topk=topk, grid=grid, layout="bshd", segments=of_case)
            for grid, of_case in ((None, segments), (W1_VIDEO, None))
        )
        full_name = f"{name}, {order}{of_blocks}"
        yield BesideVideo(kind(full_name, case), kind(full_name, video))
    case, video = (
        _case(2, math.prod(HOST_VIDEO), 128, 64, 8, grid, "bshd", of_case, "one")
        for grid, of_case in ((None, HOST_SEGMENTS), (HOST_VIDEO, None))
    )
    name = "host time of a call with 16 segments"
    yield HostBesideVideo(HostOfWhole(name, case), HostOfWhole(name, video))


def _host() -> Iterator[Work]:
    video = _case(12, math.prod(HOST_VIDEO), 64, 64, 10, HOST_VIDEO, "bshd", gate="tensor")
    yield HostOfWhole("host time of inference", video)
    yield HostOfWhole("host time of a training step", video, with_backward=True)
    name = "host time of a training step in one thread"
    yield HostOfWhole(name, video, with_backward=True, in_one_thread=True)
    yield HostCall("host time of a call", _case(2, 1024, 128, 64, 4))
    yield HostLaunch("host time of a launch of the block means", _case(2, 256, 128, 64, 1))


@functools.cache
def works() -> tuple[Work, ...]:
    return (
        *(Dense(head_dim, backend) for head_dim in (128, 64) for backend in (DENSE, SDPBackend.FLASH_ATTENTION)),
        Forward("W1, random", _w1()),
        Forward("W1, neighbouring", _w1(), W1_BLOCKS),
        Forward("W1, D=64, random", _w1(head_dim=64)),
        Forward("W1, D=64, neighbouring", _w1(head_dim=64), W1_BLOCKS),
        Forward("W1, raster, bhsd", _w1(block_size=(4, 4, 4), grid=W1_VIDEO)),
        Forward("W1, raster, bshd", _w1(block_size=(4, 4, 4), grid=W1_VIDEO, layout="bshd")),
        Forward("W1, blocks of 128", _w1(block_size=128, topk=32)),
        Forward("W1, blocks of 192", _w1(block_size=192, topk=21)),
        Forward("W1, blocks of 256", _w1(block_size=256, topk=16)),
        Forward("W14, random", _case(40, 92_160, 128, 64, 144)),
        Forward("small, random", _case(8, 8192, 128, 64, 16)),
        *_backward(),
        Copy(),
        *_block_means(),
        *_segments(),
        *_host(),
    )


def named(parts: Collection[str]) -> tuple[Work, ...]:
    """The works whose name has one of these parts; all where there are none."""
    return tuple(work for work in works() if not parts or any(part in work.name for part in parts))


def check_device(device: torch.device) -> None:
    """Raises ``RuntimeError`` or ``ValueError`` where these kernels do not run; the message says why."""
    _w1().choice(device)


def dense_call(inputs: Inputs, backend: SDPBackend) -> Callable[[], object]:
    run = dense(inputs)

    def call() -> object:
        with sdpa_kernel(backend):
            return run.forward()

    return call


def dense_backward_call(inputs: Inputs, backend: SDPBackend) -> Callable[[], object]:
    with sdpa_kernel(backend):
        return dense(inputs).call("backward")


def _deterministic(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    # Its attribute is a property, of which type checkers do not know.
    settings: Any = torch.utils.deterministic

    def run() -> tuple[Tensor, ...]:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        filled = settings.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = filled

    return run


def attend_backward_call(
    case: Case, inputs: Inputs, q2k_idx: Tensor, q2k_num: Tensor, backend: BackendName
) -> Callable[[], tuple[Tensor, ...]]:
    """A backend's own function for the gradients of q, k and v, after the forward."""
    q, k, v, problem = inputs.q, inputs.k, inputs.v, case.problem
    out, lse = attend_call(case, inputs, q2k_idx, q2k_num, backend)()
    operands = Operands(q, k, v, q2k_idx, q2k_num, None, None, None, None, 0.0)
    run = backend_for("attend_backward", problem, backend, q, k, v)

    def call() -> tuple[Tensor, ...]:
        dq, dk, dv, *_ = run.attend_backward(problem, operands, out, lse, inputs.dout, None, True, True)
        assert dq is not None
        assert dk is not None
        assert dv is not None
        return dq, dk, dv

    return call


def attend_call(
    case: Case, inputs: Inputs, q2k_idx: Tensor, q2k_num: Tensor, backend: BackendName
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The forward of the fine branch, which gives the output and its log-sum-exp."""
    return functools.partial(
        vsa_jit.block_sparse_attn_from_indices,
        inputs.q,
        inputs.k,
        inputs.v,
        q2k_idx,
        q2k_num,
        block_size=case.block_size,
        **case.shape.order,
        backend=backend,
    )


def means_call(
    case: Case, inputs: Inputs, backend: BackendName, tiled: bool
) -> Callable[[], tuple[Tensor, Tensor, Tensor | None]]:
    """A backend's own function for the block means of q, k and v."""
    problem = case.problem
    q, k, v = inputs.q, inputs.k, inputs.v
    sizes = None
    if tiled:
        sizes = torch.full((problem.keys.num_blocks,), problem.block, dtype=torch.int32, device=inputs.device)
    return functools.partial(
        backend_for("block_means", problem, backend, q, k, v).block_means, problem, q, k, v, sizes, sizes
    )


def _agree(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...], tolerances: tuple[float, ...]) -> bool:
    """Whether results are the same to within relative tolerances, and absolute ones of a tenth of these."""
    return all(
        x is not None and y is not None and torch.allclose(x, y, rtol=tolerance, atol=tolerance / 10)
        for x, y, tolerance in zip(ours, theirs, tolerances, strict=True)
    )

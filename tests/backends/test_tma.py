"""How TMA is told to read blocks, without a GPU: the coordinates of every block lead to its tokens."""

import ctypes
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from support.hopper import starts_of
from torch import Tensor

from vsa_jit.backends.sm90 import forward, schedule, tma
from vsa_jit.backends.sm90.layout import box_of, divisor, token_layout, view_of
from vsa_jit.backends.sm90.structs import BOX_TOKENS, structures
from vsa_jit.backends.sm90.tma import tensor_ref, why_not_tma
from vsa_jit.grid import block_tokens
from vsa_jit.jit.driver import TensorMap
from vsa_jit.problem import Problem, Side

# How tensors lie in memory: the order of their dimensions, outermost first, where "3" is q, k and v of a projection.
MEMORY = ["bhsd", "bshd", "sbhd", "hbsd", "hsbd", "bs3hd", "bsh3d", "bhs3d"]


def tensor(memory: str, batch: int, heads: int, length: int, head_dim: int) -> Tensor:
    """A [B, H, S, D] view of a tensor that lies in memory in another order."""
    extents = {"b": batch, "h": heads, "s": length, "d": head_dim, "3": 3}
    x = torch.randn([extents[name] for name in memory]).half()
    if "3" in memory:
        x = x.select(memory.index("3"), 1)
        memory = memory.replace("3", "")
    return x.permute([memory.index(name) for name in "bhsd"])


@pytest.mark.parametrize(
    "tile", [(4, 4, 4), (2, 8, 8), (4, 8, 8), (4, 6, 8), (64, 1, 1), (1, 4, 32), (3, 8, 8), (1, 1, 320)]
)
def test_boxes_tile_a_block(tile):
    box = box_of(tile)
    assert math.prod(box) == BOX_TOKENS
    assert all(side % part == 0 for side, part in zip(tile, box, strict=True))


def launched(monkeypatch, problem: Problem, x: Tensor, processors: int = 132):
    """The parameters of the launch for q = k = v, with the tensor maps as they were asked for."""
    maps = []

    def encode_tensor_map(*arguments):
        maps.append(arguments)
        return TensorMap()

    monkeypatch.setattr(tma, "encode_tensor_map", encode_tensor_map)
    monkeypatch.setattr(forward.module, "launcher", lambda kernel, device: None)
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launch = forward._block_means_launch.__wrapped__(problem, x.dtype, 0, *[tensor_ref(x)] * 3, None, None)
    return launch, maps


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize(
    ("grid", "tile"), [((5, 6, 7), (4, 4, 4)), ((3, 9, 10), (2, 8, 8)), ((1, 1, 1), (4, 4, 4)), (None, (1, 1, 128))]
)
def test_coordinates_reach_the_tokens_of_each_block(monkeypatch, memory, batch, heads, grid, tile):
    length = 200 if grid is None else math.prod(grid)
    x = tensor(memory, batch, heads, length, 64)
    assert why_not_tma(x, grid) is None
    side = Side(heads, length, tile, grid, "bhsd")
    problem = Problem(batch, 64, side, side, 0.1)
    launch, maps = launched(monkeypatch, problem, x)
    _, address, dtype, extents, strides, box, _ = maps[0]
    assert (address, dtype) == (x.data_ptr(), torch.float16)
    assert all(0 < side <= 256 for side in box)
    assert all(stride * 2 % 16 == 0 and stride < 2**39 for stride in strides)
    layout, steps = launch.params.layouts[0], launch.params.operands[0].tensor.steps

    memory_of = torch.as_strided(x, (x.untyped_storage().size() // 2,), (1,), 0)
    tokens = block_tokens(side, None, torch.device("cpu"))
    for b, h, block in itertools.product(range(batch), range(heads), range(problem.queries.num_blocks)):
        channel = h * steps.head_channel + b * steps.batch_channel
        outer = h * steps.head_outer + b * steps.batch_outer
        found = {}
        for index in range(layout.boxes.value):
            first = origin(layout, block, index)
            for inside in itertools.product(*(range(side) for side in box[3:0:-1])):
                t, row, w = (at + by for at, by in zip(first, inside, strict=True))
                coordinates = (channel, w, row, t, outer)
                if all(at < extent for at, extent in zip(coordinates, extents, strict=True)):
                    offset = sum(at * stride for at, stride in zip(coordinates[1:], strides, strict=True))
                    found[t, row, w] = x.storage_offset() + channel + offset
        offsets = [found[at] for at in sorted(found)]
        expected = x[b, h, tokens[block][tokens[block] >= 0]]
        assert len(offsets) == len(expected)
        got = torch.stack([memory_of[offset : offset + 64] for offset in offsets])
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("processors", "blocks"), [(132, 132), (144, 144), (200, 144)])
def test_no_thread_block_is_without_a_block_of_tokens(monkeypatch, processors, blocks):
    x = tensor("bhsd", 2, 3, 210, 64)
    side = Side(3, 210, (4, 4, 4), (5, 6, 7), "bhsd")
    assert side.num_blocks == 8
    launch, _ = launched(monkeypatch, Problem(2, 64, side, side, 0.1), x, processors)
    # Of q, k and v there are 3 · 2 · 3 · 8 = 144.
    assert launch.blocks == blocks


def test_where_heads_are_neighbours_they_come_first(monkeypatch):
    for memory, expected in (("bhsd", 0), ("bshd", 1), ("bs3hd", 1)):
        x = tensor(memory, 1, 3, 210, 64)
        side = Side(3, 210, (4, 4, 4), (5, 6, 7), "bhsd")
        launch, _ = launched(monkeypatch, Problem(1, 64, side, side, 0.1), x)
        assert launch.params.heads_first == expected


def quotient(divisor, x: int) -> int:
    """``Divisor.quotient`` of ``kernels_src/vsa/layout.cuh``."""
    assert 0 <= 2 * x < 2**32
    return (2 * x * divisor.inverse >> 32) >> divisor.shift


def origin(layout, block: int, box: int) -> tuple[int, int, int]:
    """``origin_of_box`` of ``kernels_src/vsa/layout.cuh``."""

    def position(width, height, index):
        row = quotient(width, index)
        t = quotient(height, row)
        return t, row - t * height.value, index - row * width.value

    corner = position(layout.tiles_w, layout.tiles_h, block)
    inside = position(layout.boxes_w, layout.boxes_h, box)
    return tuple(
        at * getattr(layout.tile, axis) + by * getattr(layout.box.extent, axis)
        for axis, at, by in zip("thw", corner, inside, strict=True)
    )


@pytest.mark.parametrize(
    ("grid", "tile", "length", "padded"),
    [
        ((5, 6, 7), (4, 4, 4), 210, False),
        ((3, 9, 10), (2, 8, 8), 270, False),
        ((5, 9, 9), (4, 8, 8), 405, False),
        ((5, 7, 25), (4, 6, 8), 875, False),
        (None, (1, 1, 192), 700, False),
        (None, (2, 8, 8), 384, True),
    ],
)
def test_boxes_of_the_forward_reach_the_tokens_of_each_block(grid, tile, length, padded):
    side = Side(1, length, tile, grid, "bhsd")
    layout = token_layout(side, view_of(side, padded=padded), None)
    assert 1 << layout.box.w_log2 == layout.box.extent.w
    assert 1 << layout.box.hw_log2 == layout.box.extent.h * layout.box.extent.w
    extent = [getattr(layout.extent, axis) for axis in "thw"]
    assert math.prod(extent) == length
    tokens = block_tokens(side, None, torch.device("cpu"))
    for block in range(side.num_blocks):
        found = []
        for box in range(layout.boxes.value):
            first = origin(layout, block, box)
            for token in range(BOX_TOKENS):
                inside = (
                    token >> layout.box.hw_log2,
                    token >> layout.box.w_log2 & (layout.box.extent.h - 1),
                    token & (layout.box.extent.w - 1),
                )
                at = [start + by for start, by in zip(first, inside, strict=True)]
                if all(position < side for position, side in zip(at, extent, strict=True)):
                    found.append((at[0] * extent[1] + at[1]) * extent[2] + at[2])
        assert sorted(found) == sorted(tokens[block][tokens[block] >= 0].tolist())


@pytest.mark.parametrize("value", [1, 2, 3, 7, 13, 208, 1440, 65535, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1])
def test_divisors_divide(value):
    record = divisor(value)
    assert record.value == value
    largest = 2**31 - 1
    multiples = {multiple * value for multiple in (1, 7, 12345, largest // value)}
    for x in {0, 12345, largest - 1, largest} | {multiple + by for multiple in multiples for by in (-1, 0, 1)}:
        if x <= largest:
            assert quotient(record, x) == x // value


def view(shape, strides, address=0, size=2):
    return SimpleNamespace(
        shape=shape,
        stride=lambda axis=None: strides if axis is None else strides[axis],
        data_ptr=lambda: address,
        element_size=lambda: size,
    )


@pytest.mark.parametrize(
    ("shape", "strides", "address", "grid", "reason"),
    [
        ((2, 3, 64, 64), (12288, 4096, 64, 1), 0, None, None),
        ((2, 3, 64, 64), (12288, 4096, 64, 1), 8, None, "TMA needs an address that is a multiple of 16 bytes"),
        ((2, 3, 64, 64), (12288, 4096, 68, 1), 0, None, "TMA needs strides that are multiples of 16 bytes"),
        ((2, 3, 64, 64), (12289, 4096, 64, 1), 0, None, "TMA needs strides that are multiples of 16 bytes"),
        ((1, 1, 64, 64), (7, 9, 64, 1), 0, None, None),
        ((2, 1, 64, 64), (2**39, 64, 64, 1), 0, None, "TMA needs strides below 2^40 bytes"),
        ((1, 1, 2**36, 64), (0, 0, 64, 1), 0, (1, 1, 2**36), "TMA needs strides below 2^40 bytes"),
        ((2, 3, 64, 64), (2**36, 2**34, 64, 1), 0, None, "neither heads nor batches lie close enough together for TMA"),
        ((2, 3, 64, 64), (3 * 2**34, 2**34, 64, 1), 0, None, None),
    ],
)
def test_what_tma_cannot_read(shape, strides, address, grid, reason):
    found = why_not_tma(view(shape, strides, address), grid)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(("block", "most"), [(64, 2**20), (128, 2**19), (192, 2**20 // 3)])
def test_more_blocks_than_the_kernels_take(block, most):
    def problem(query_blocks, key_blocks):
        sides = (Side(1, blocks * block, (1, 1, block), None, "bhsd") for blocks in (query_blocks, key_blocks))
        return Problem(1, 64, *sides, 0.1)

    assert schedule.why_too_many_blocks(problem(2**20, most)) is None
    reason = schedule.why_too_many_blocks(problem(1, most + 1))
    assert reason == f"the kernels take at most {most} key blocks, and there are {most + 1}"
    reason = schedule.why_too_many_blocks(problem(2**20 + 1, 1))
    assert reason == f"the kernels take at most {2**20} query blocks, and there are {2**20 + 1}"


@pytest.mark.parametrize(
    ("num_rows", "heads", "first_heads", "group_rows", "groups"),
    [
        (624, 12, 12, 3, 2496),
        (624, 3, 3, 3, 624),
        (128, 8, 6, 3, 386),
        (32, 12, 12, 3, 132),
        (32, 8, 8, 2, 128),
        (31, 4, 4, 1, 124),
        (353, 1, 1, 3, 118),
        (2, 1, 1, 1, 2),
    ],
)
def test_groups_take_as_few_rounds_as_the_longest(num_rows, heads, first_heads, group_rows, groups):
    """Of blocks of one box, on 132 multiprocessors."""
    processors = 132
    assert schedule._row_groups(num_rows, 1, heads, processors, 3) == (first_heads, group_rows)
    long, short = (schedule.head_partition(num_rows, max(1, rows), 1, 3) for rows in (group_rows, group_rows - 1))
    assert groups == first_heads * long.query_groups.value + (heads - first_heads) * short.query_groups.value
    assert -(-groups // processors) == -(-heads * -(-num_rows // 3) // processors)


@pytest.mark.parametrize("boxes", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 31, 128, 1000])
@pytest.mark.parametrize("group_rows", [1, 2, 3])
def test_every_row_is_in_a_trio_and_a_window_has_a_lane_for_each(num_rows, group_rows, boxes):
    partition = schedule.head_partition(num_rows, group_rows if boxes == 1 else 3, boxes, 3)
    starts, windows = starts_of(partition, num_rows, boxes)
    assert starts[0] == 0
    assert starts[-1] == num_rows
    assert all(1 <= end - start <= 3 for start, end in itertools.pairwise(starts))
    assert windows[-1] == len(starts) - 1
    assert all(starts[end] - starts[start] <= 32 for start, end in itertools.pairwise(windows))


def test_the_parameters_fit_a_launch():
    assert ctypes.sizeof(structures(segments=False).BlockMeansParams) == 1024 <= 4096
    assert ctypes.sizeof(structures(segments=False).AttendForwardParams) == 1152 <= 4096

"""Who attends together in the Hopper forward, and what the lists of tiles hold: the kernel's own sources on the CPU."""

import itertools
import struct
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from support import emulate
from support.hopper import operands_of, problem_of, starts_of
from support.problems import Case, Inputs
from torch import Tensor

from vsa_jit.backends.sm90 import backward, launches
from vsa_jit.backends.sm90.structs import BOX_TOKENS
from vsa_jit.jit import module
from vsa_jit.problem import Side

pytestmark = emulate.NEEDS_COMPILER

WORK_TILE_WORDS = 28
# Boxes of keys that a warp looks at together.
WINDOW = 1024
CASES = [
    Case("64, plain", q_len=40 * 64 + 5, kv_len=1390),
    Case("64, tiled, some blocks empty", q_len=1280, sizes=tuple(max(0, 37 * i % 65 - 20) for i in range(20))),
    Case("128, tiled, some boxes empty", q_len=1280, block_size=128, sizes=tuple(range(0, 150, 15))),
    Case("192, plain", q_len=900, kv_len=1300, block_size=192),
    Case("64, more boxes than a window", q_len=200, kv_len=67000, heads=1),
    Case("192, a block in two windows", q_len=400, kv_len=67000, heads=1, block_size=192),
    # A lane looks at 4, 8, 16 and 32 boxes.
    *(Case(f"64, {boxes} boxes", q_len=700, kv_len=64 * boxes - 7, heads=1) for boxes in (100, 200, 400, 624)),
    Case("64, batch, grouped heads", q_len=700, batch=2, heads=6, kv_heads=3),
]
# Of which heads some are cut into shorter row groups, on so many multiprocessors.
CUT_TWICE = [
    (Case("5 rows", q_len=320, heads=4), 5),
    (Case("2 rows", q_len=128, heads=4), 5),
    (Case("40 rows, batch", q_len=2560, heads=2, batch=2), 9),
]


@dataclass
class Group:
    head: int  # of all batches
    q_block: list[int]
    q_box: list[int]
    tiles_of: list[int]
    poisoned: int
    tiles: list[tuple[int, int]]  # boxes of keys in their order, and which consumers attend each


def groups_of(monkeypatch, inputs: Inputs, idx: Tensor, num: Tensor, processors: int = 2) -> tuple[list[Group], Any]:
    """All work tiles of a call on a GPU with so many multiprocessors, and the parameters of its launch."""
    emulate.emulate(monkeypatch, processors)
    groups, launched = [], []
    case = inputs.case

    def launcher(kernel, device):
        listing = replace(kernel, source="list_groups.cu", entry="list_groups", threads=32)
        run = emulate.launcher(listing, device)

        def launch(blocks, params):
            launched.append(params)
            of_groups = type(params).from_buffer_copy(params)
            # Twice the room that there is: what is too long shows.
            of_groups.lists.length = 2 * params.lists.length
            num_work_tiles = params.schedule.num_work_tiles
            items = torch.zeros(num_work_tiles, WORK_TILE_WORDS, dtype=torch.int32)
            tiles = torch.zeros(num_work_tiles, of_groups.lists.length, 2, dtype=torch.int32)
            of_groups.lse, of_groups.lists.tiles = items.data_ptr(), tiles.data_ptr()
            # Nobody takes work tiles.
            of_groups.schedule.taken = None
            run(1, of_groups)
            for item, tiles_of_item in zip(items.tolist(), tiles.tolist(), strict=True):
                num_tiles, poisoned = item[9:11]
                batch, head, kv_head = item[20:23]
                assert num_tiles <= params.lists.length
                assert kv_head == head * (case.kv_heads or case.heads) // case.heads
                listed = [tile_of(inputs, *tile) for tile in tiles_of_item[:num_tiles]]
                groups.append(Group(batch * case.heads + head, item[0:3], item[3:6], item[6:9], poisoned, listed))

        return launch

    monkeypatch.setattr(module, "launcher", launcher)
    launches.attend(problem_of(inputs), operands_of(inputs, idx, num), False)
    return groups, launched[0]


def tile_of(inputs: Inputs, box_and_mask: int, valid: int) -> tuple[int, int]:
    """The box that a tile of a list is, and who attends it. What of it is valid is checked."""
    problem = problem_of(inputs)
    consumer_mask, box = (box_and_mask & 0xFFFFFFFF) >> 29, box_and_mask & 0x1FFFFFFF
    first, *inside = struct.unpack("4B", struct.pack("I", valid & 0xFFFFFFFF)) if valid else (0, 1, 1, BOX_TOKENS)
    assert inside[:2] == [1, 1]
    if inputs.sizes is None:
        assert first == 0
        assert inside[2] == min(BOX_TOKENS, problem.keys.length - box * BOX_TOKENS)
        return box, consumer_mask
    boxes = problem.block // BOX_TOKENS
    tokens = int(inputs.sizes[box // boxes]) - box % boxes * BOX_TOKENS
    assert first == BOX_TOKENS - min(tokens, BOX_TOKENS)
    assert inside[2] == BOX_TOKENS
    return box, consumer_mask


def boxes_with_tokens(inputs: Inputs, side: Side, blocks: set[int]) -> set[int]:
    """Of the keys or, where they have as many tokens, of the queries."""
    boxes = side.block // BOX_TOKENS
    sizes = inputs.sizes.tolist() if inputs.sizes is not None else None
    of_block = {
        block: side.length - block * side.block if sizes is None else sizes[block]
        for block in blocks
        if 0 <= block < side.num_blocks
    }
    return {
        block * boxes + box for block, tokens in of_block.items() for box in range(boxes) if tokens > box * BOX_TOKENS
    }


def work_class(length: int) -> int:
    """Rows of about the same length are alike: the exponent and three bits behind it."""
    return struct.unpack("I", struct.pack("f", length))[0] >> 20


def evenly_spread(tiles: list[tuple[int, int]]) -> list[int]:
    """The order of kinds for so many tiles of each: number p of n is at (2p + 1) / 2n, and a lower kind comes first."""
    counts = Counter(kind for _, kind in tiles)
    places = [(Fraction(2 * p + 1, 2 * n), kind) for kind, n in counts.items() for p in range(n)]
    return [kind for _, kind in sorted(places)]


def check_lists(inputs: Inputs, idx: Tensor, num: Tensor, groups: list[Group]) -> None:
    problem = problem_of(inputs)
    boxes, heads = problem.block // BOX_TOKENS, problem.batch * problem.queries.heads
    idx, lengths = idx.flatten(0, 1), num.clamp(0, idx.shape[-1]).flatten(0, 1)
    seen = [
        (group.head, block, box)
        for group in groups
        for block, box in zip(group.q_block, group.q_box, strict=True)
        if block >= 0
    ]
    everything = {
        (h, block, box) for h in range(heads) for block in range(problem.queries.num_blocks) for box in range(boxes)
    }
    assert len(seen) == len(everything)
    assert set(seen) == everything

    for group in groups:
        expected: dict[int, int] = {}
        poisoned = 0
        for i, block in enumerate(group.q_block):
            if block < 0:
                assert group.tiles_of[i] == 0
                continue
            named = set(idx[group.head, block, : lengths[group.head, block]].tolist())
            poisoned |= any(not 0 <= key < problem.keys.num_blocks for key in named) << i
            selected = boxes_with_tokens(inputs, problem.keys, named)
            assert group.tiles_of[i] == len(selected)
            for box in selected:
                expected[box] = expected.get(box, 0) | 1 << i
        assert group.poisoned == poisoned
        assert len(group.tiles) == len(expected)
        assert dict(group.tiles) == expected
        # The windows of the keys follow each other.
        assert [box // WINDOW for box, _ in group.tiles] == sorted(box // WINDOW for box in expected)
        for _, tiles in itertools.groupby(group.tiles, key=lambda tile: tile[0] // WINDOW):
            of_window = list(tiles)
            assert [kind for _, kind in of_window] == evenly_spread(of_window)
            for kind in set(expected.values()):
                of_kind = [box for box, members in of_window if members == kind]
                assert of_kind == sorted(of_kind)


def check(inputs: Inputs, idx: Tensor, num: Tensor, groups: list[Group], params: Any) -> None:
    check_lists(inputs, idx, num, groups)
    problem = problem_of(inputs)
    boxes, heads = problem.block // BOX_TOKENS, problem.batch * problem.queries.heads
    lengths = num.clamp(0, idx.shape[-1]).flatten(0, 1)
    for head in range(heads):
        partition = params.schedule.partitions[0 if head < params.schedule.first_heads else 1]
        starts, windows = starts_of(partition, problem.queries.num_blocks, boxes)
        of_head = [group for group in groups if group.head == head]
        for window, (first, end) in enumerate(itertools.pairwise(windows)):
            rows = range(starts[first], starts[end])
            from_longest = sorted(rows, key=lambda row: -work_class(int(lengths[head, row])))
            for row_group in range(first, end):
                index = (row_group - first) * partition.windows.value + window
                members = {b for group in of_head[index * boxes : (index + 1) * boxes] for b in group.q_block} - {-1}
                assert members == set(from_longest[starts[row_group] - rows.start : starts[row_group + 1] - rows.start])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_uneven_rows(monkeypatch, case):
    inputs = Inputs(replace(case, head_dim=64), "cpu", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    check(inputs, idx, num, *groups_of(monkeypatch, inputs, idx, num))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3], CASES[4], CASES[10]], ids=lambda case: case.name)
def test_lists_of_an_inverse(monkeypatch, case):
    """A key box's list has every query box that has tokens and whose block names its block, once."""
    emulate.emulate(monkeypatch, 2)
    inputs = Inputs(replace(case, head_dim=64), "cpu", torch.bfloat16)
    idx, num, block_map = inputs.uneven_indices()
    problem, operands = problem_of(inputs), operands_of(inputs, idx, num)
    workspace = backward.invert_map(problem, operands)
    listed = {}

    def launcher(kernel, device):
        run = emulate.launcher(replace(kernel, source="list_rows.cu", entry="list_rows", threads=32), device)

        def launch(blocks, params):
            # Twice the room that there is: what is too long shows.
            length, params.lists.length = params.lists.length, 2 * params.lists.length
            rows = torch.zeros(params.schedule.num_work_tiles, 6, dtype=torch.int32)
            tiles = torch.zeros(len(rows), params.lists.length, 2, dtype=torch.int32)
            params.dk.data, params.lists.tiles, params.schedule.taken = rows.data_ptr(), tiles.data_ptr(), None
            run(1, params)
            for (batch, head, q_head, block, box, num_tiles), of_row in zip(rows.tolist(), tiles, strict=True):
                assert num_tiles <= length
                assert q_head == head * problem.group
                listed[batch, q_head, block, box] = (of_row[:num_tiles, 0] & 0x7FFFFFFF).tolist()

        return launch

    monkeypatch.setattr(module, "launcher", launcher)
    backward.backward_kv(problem, operands, backward._Refs.of(operands, inputs.dout), workspace)
    boxes, heads = problem.block // BOX_TOKENS, problem.keys.heads
    rows = itertools.product(range(problem.batch), range(heads), range(problem.keys.num_blocks), range(boxes))
    expected = {}
    for batch, head, block, box in rows:
        names = block_map[batch, head * problem.group, :, block].nonzero().flatten().tolist()
        # Of every 32 blocks the first boxes come first.
        found = boxes_with_tokens(inputs, problem.queries, set(names))
        expected[batch, head * problem.group, block, box] = sorted(
            found, key=lambda x: (x // boxes // 32, x % boxes, x // boxes)
        )
    assert listed == expected


@pytest.mark.parametrize(("case", "processors"), CUT_TWICE, ids=[case.name for case, _ in CUT_TWICE])
def test_heads_that_are_cut_into_shorter_trios(monkeypatch, case, processors):
    inputs = Inputs(replace(case, head_dim=64), "cpu", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    groups, params = groups_of(monkeypatch, inputs, idx, num, processors)
    assert 0 < params.schedule.first_heads < case.batch * case.heads
    check(inputs, idx, num, groups, params)


@pytest.mark.parametrize("block", [64, 192])
def test_one_entry_that_names_no_block(monkeypatch, block):
    """Wherever it is in its row."""
    inputs = Inputs(Case("odd", q_len=50 * block, heads=1, head_dim=64, block_size=block), "cpu", torch.bfloat16)
    idx = torch.randint(50, (1, 1, 50, 25), dtype=torch.int32)
    rows = torch.arange(50)
    idx[:, :, rows, rows % 25] = torch.tensor([-1, 50, -(2**31), 2**31 - 1, 7], dtype=torch.int32)[rows % 5]
    num = torch.full((1, 1, 50), 25, dtype=torch.int32)
    check(inputs, idx, num, *groups_of(monkeypatch, inputs, idx, num))


def test_entries_that_name_no_block_and_numbers_beyond_the_width(monkeypatch):
    inputs = Inputs(Case("odd", q_len=2560, kv_len=640, head_dim=64), "cpu", torch.bfloat16)
    idx = torch.randint(-3, 13, (1, 2, 40, 7), dtype=torch.int32)
    num = torch.randint(-5, 15, (1, 2, 40), dtype=torch.int32)
    assert num.min() < 0
    assert num.max() > 7
    check(inputs, idx, num, *groups_of(monkeypatch, inputs, idx, num))


@pytest.mark.parametrize("block", [64, 128, 320])
def test_the_longest_list(monkeypatch, block):
    """Rows that have no key block in common fill what is kept for a list."""
    inputs = Inputs(Case("disjoint", q_len=9 * block, heads=1, head_dim=64, block_size=block), "cpu", torch.bfloat16)
    idx = torch.arange(9, dtype=torch.int32).view(1, 1, 9, 1)
    num = torch.ones(1, 1, 9, dtype=torch.int32)
    groups, params = groups_of(monkeypatch, inputs, idx, num)
    check(inputs, idx, num, groups, params)
    assert max(len(group.tiles) for group in groups) == params.lists.length

"""The Hopper kernels on the CPU, where every run has another schedule of their threads."""

from dataclasses import replace

import pytest
import torch
from support import emulate
from support.hopper import GATES, check_means, operands_of, problem_of, weight_of
from support.problems import Case, Inputs, steep

from vsa_jit.backends.sm90 import launches

pytestmark = emulate.NEEDS_COMPILER

CASES = [
    Case("64, plain", q_len=1390),
    Case("64, tiled", q_len=1280, sizes=tuple(37 * i % 65 for i in range(20))),
    Case("64, raster, bshd", grid=(7, 13, 11), block_size=(4, 4, 4), layout="bshd"),
    Case("64, other keys, grouped heads", q_len=1200, kv_len=700, kv_heads=1),
    Case("128, raster, bshd", grid=(5, 18, 11), block_size=(2, 8, 8), layout="bshd"),
    Case("128, tiled", q_len=1280, block_size=128, sizes=tuple(range(0, 150, 15))),
    Case("192, plain, batch", q_len=900, block_size=192, batch=2),
    Case("64, batch, grouped heads, bshd", q_len=400, batch=2, kv_heads=1, layout="bshd"),
    Case("256, other keys", q_len=300, kv_len=1300, block_size=256),
    Case("256, raster", grid=(7, 13, 11), block_size=(4, 8, 8)),
    Case("320, plain", q_len=1600, block_size=320),
    Case("1728, one block cut on all three axes", grid=(5, 6, 7), block_size=(12, 12, 12)),
]
# With one multiprocessor a thread block takes all items, and with many one item, of as few rows as can be.
KINDS = [(torch.bfloat16, 128, 1), (torch.float16, 64, 200)]


def check_forward(monkeypatch, case, dtype, processors):
    emulate.emulate(monkeypatch, processors)
    inputs = Inputs(case, "cpu", dtype)
    idx, num, block_map = inputs.uneven_indices()
    out, lse, _ = launches.attend(problem_of(inputs), operands_of(inputs, idx, num), False)
    inputs.check_forward(inputs.bhsd(out), lse, block_map)


@pytest.mark.parametrize(("dtype", "head_dim", "processors"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(monkeypatch, case, dtype, head_dim, processors):
    check_forward(monkeypatch, replace(case, head_dim=head_dim), dtype, processors)


@pytest.mark.parametrize("block", [64, 128])
def test_more_keys_than_a_list_is_made_of_at_a_time(monkeypatch, block):
    """One thread block takes all rows: after a long list comes another one."""
    case = Case("long", q_len=250, kv_len=67000, heads=1, head_dim=64, block_size=block)
    check_forward(monkeypatch, case, torch.float16, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_scores_that_differ_by_hundreds(monkeypatch, order, dtype):
    emulate.emulate(monkeypatch, 1)
    inputs = Inputs(Case("steep", q_len=330, kv_len=1500, head_dim=64), "cpu", dtype)
    inputs.stretch_keys(steep(order, inputs.num_kv_blocks))
    idx, num, block_map = inputs.uneven_indices()
    out, lse, _ = launches.attend(problem_of(inputs), operands_of(inputs, idx, num), False)
    inputs.check_forward(inputs.bhsd(out), lse, block_map)


@pytest.mark.parametrize(("gate", "order"), GATES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_the_coarse_output_is_added(monkeypatch, layout, gate, order):
    emulate.emulate(monkeypatch, 200)
    case = Case("gate", grid=(5, 6, 7), block_size=(4, 4, 4), head_dim=64, layout=layout, gate=gate)
    inputs = Inputs(case, "cpu", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    problem, operands = problem_of(inputs), operands_of(inputs, idx, num)
    alone, _, _ = launches.attend(problem, operands, False)
    out_c = torch.randn(1, case.heads, problem.queries.num_blocks, 64)
    weight = weight_of(inputs, order)
    with_coarse = operands._replace(out_c=out_c, gate=weight, gate_value=gate if weight is None else 0.0)
    out, _, out_s = launches.attend(problem, with_coarse, True)
    assert torch.equal(out_s, alone)
    coarse = out_c[:, :, inputs.q_block]
    added = coarse * (gate if weight is None else inputs.bhsd(weight).float())
    exact = inputs.bhsd(out_s).float() + added
    # `out_s` was rounded once before, `out` is rounded once.
    bound = 2.0**-8 * (inputs.bhsd(out_s).float().abs() + exact.abs()) + 1e-6
    assert ((inputs.bhsd(out).float() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("dtype", "head_dim", "processors"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_means(monkeypatch, case, dtype, head_dim, processors):
    emulate.emulate(monkeypatch, processors)
    inputs = Inputs(replace(case, head_dim=head_dim), "cpu", dtype)
    problem = problem_of(inputs)
    operands = operands_of(inputs, *inputs.uneven_indices()[:2])
    results = launches.block_means(problem, operands.q, operands.k, operands.v, operands.q_sizes, operands.kv_sizes)
    check_means(problem, inputs, results)


MISTAKES_OF_MEANS = {
    "a box is given back while it is read": (
        "block_means.cu",
        "if (info.count > 0) add_rows(",
        "if (MISTAKE) release(shared.barriers.empty[state.index]);\n            if (info.count > 0) add_rows(",
        "__syncwarp();\n            release(shared.barriers.empty[state.index]);",
        "__syncwarp();\n            if (!MISTAKE) release(shared.barriers.empty[state.index]);",
    ),
    "a late lane misses that a stage is free": (
        "block_means.cu",
        "wait(shared.barriers.empty[state.index], state.phase ^ 1);\n            __syncwarp();",
        "wait(shared.barriers.empty[state.index], state.phase ^ 1);\n            if (!MISTAKE) __syncwarp();",
    ),
}


@pytest.mark.parametrize("name", MISTAKES_OF_MEANS)
def test_the_emulator_finds_of_means(monkeypatch, tmp_path_factory, name):
    sources = emulate.with_mistakes(MISTAKES_OF_MEANS, tmp_path_factory.mktemp("means"))
    inputs = Inputs(Case("mistaken", q_len=1000, heads=3, head_dim=64), "cpu", torch.bfloat16)
    problem, operands = problem_of(inputs), operands_of(inputs, *inputs.uneven_indices()[:2])

    def block_means(mistake):
        emulate.emulate(monkeypatch, 2, sources, mistake)
        return launches.block_means(problem, operands.q, operands.k, operands.v, None, None)

    emulate.expect_to_find(block_means, list(MISTAKES_OF_MEANS).index(name) + 1)


@pytest.mark.parametrize("block", [64, 128])
def test_a_key_block_that_does_not_exist_spoils_its_rows_only(monkeypatch, block):
    emulate.emulate(monkeypatch, 200)
    inputs = Inputs(Case("outside", q_len=12 * block, block_size=block, head_dim=64), "cpu", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()
    num.clamp_(min=1)
    idx = idx.clamp(max=11)
    good, good_lse, _ = launches.attend(problem_of(inputs), operands_of(inputs, idx, num), False)
    idx[0, 0, 3, 0], idx[0, 1, 7, 0], idx[0, 1, 8, 0] = -1, 12, 2**31 - 1
    out, lse, _ = launches.attend(problem_of(inputs), operands_of(inputs, idx, num), False)
    spoiled = torch.zeros(1, 2, 12, dtype=torch.bool)
    spoiled[0, 0, 3] = spoiled[0, 1, 7] = spoiled[0, 1, 8] = True
    rows = spoiled.repeat_interleave(block, -1)
    assert out[rows].isnan().all()
    assert lse[rows].isnan().all()
    # The others may be in other groups than before, and have their keys in another order.
    torch.testing.assert_close(out[~rows], good[~rows], rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(lse[~rows], good_lse[~rows], rtol=1e-5, atol=1e-5)


# Files of kernels_src/vsa without their comments: texts, each with what takes its place. MISTAKE says at run time
# whether this one is made, so that all are compiled together.
MISTAKES = {
    "a late lane misses that Q is free": (
        "scheduler.cuh",
        "kittens::wait(barriers.empty[i], phases >> i & 1 ^ 1);\n            __syncwarp();",
        "kittens::wait(barriers.empty[i], phases >> i & 1 ^ 1);\n            if (!MISTAKE) __syncwarp();",
    ),
    "nobody frees a stage for who has no use for it": (
        "tile_queue.cuh",
        "if (absent > 0) kittens::arrive(empty, absent * kittens::kWarpgroupWarps);",
        "if (absent > 0 && !MISTAKE) kittens::arrive(empty, absent * kittens::kWarpgroupWarps);",
    ),
    "V is given back while it is read": (
        "attend_forward.cu",
        "warpgroup::mma_async_wait<0>(out, p);\n            release(shared.v_barriers.empty[before.v_stage]);",
        "if (MISTAKE) release(shared.v_barriers.empty[before.v_stage]);\n"
        "            warpgroup::mma_async_wait<0>(out, p);\n"
        "            if (!MISTAKE) release(shared.v_barriers.empty[before.v_stage]);",
    ),
    "probabilities change while they are read": (
        "attend_forward.cu",
        "warpgroup::mma_async_wait<0>(out, p);",
        "if (MISTAKE) softmax_step(params, shared, tile, softmax, scores, p, out);\n"
        "            warpgroup::mma_async_wait<0>(out, p);",
        "softmax_step(params, shared, tile, softmax, scores, p, out);\n            before = tile;",
        "if (!MISTAKE) softmax_step(params, shared, tile, softmax, scores, p, out);\n            before = tile;",
    ),
    "the next Q is loaded too early": (
        "attend_forward.cu",
        "if (left == 1) release(q_empty);",
        "if (left == 1 && !MISTAKE) release(q_empty);",
        "warpgroup::mma_async_wait<0>(scores);",
        "if (left == num_tiles && MISTAKE) release(q_empty);\n        warpgroup::mma_async_wait<0>(scores);",
    ),
    "rows are told before they are written": (
        "scheduler.cuh",
        "if (!ends) assign_rows(",
        "if (MISTAKE) kittens::arrive(work_tiles.slots[state.index].rows_known);\n        if (!ends) assign_rows(",
        "__syncwarp();\n        kittens::arrive(work_tiles.slots[state.index].rows_known);",
        "__syncwarp();\n        if (!MISTAKE) kittens::arrive(work_tiles.slots[state.index].rows_known);",
    ),
    "a list is told before it is written": (
        "scheduler.cuh",
        "if (!ends) {",
        "if (MISTAKE) kittens::arrive(work_tiles.slots[state.index].full);\n        if (!ends) {",
        "kittens::arrive(work_tiles.slots[state.index].full);\n        if (ends) return;",
        "if (!MISTAKE) kittens::arrive(work_tiles.slots[state.index].full);\n        if (ends) return;",
    ),
    "a ticket is told before it is written": (
        "tile_queue.cuh",
        "if (kHasK) ticket.k = code",
        "if (MISTAKE) kittens::arrive(queue.full[j][entry]);\n                        if (kHasK) ticket.k = code",
        "                        kittens::arrive(queue.full[j][entry]);\n                    }",
        "                        if (!MISTAKE) kittens::arrive(queue.full[j][entry]);\n                    }",
    ),
    "lanes of a loader do not wait for each other": (
        "tile_queue.cuh",
        "kittens::wait(empty, phase ^ 1);\n                __syncwarp();",
        "kittens::wait(empty, phase ^ 1);\n                if (!MISTAKE) __syncwarp();",
    ),
}


@pytest.fixture
def sources_with_mistakes(tmp_path):
    return emulate.with_mistakes(MISTAKES, tmp_path)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulator_finds(monkeypatch, sources_with_mistakes, name):
    """Each of these mistakes, in some of its runs."""
    # The third consumer has rows in every other group.
    # Large scores outgrow their references at different tiles in different warps.
    case = Case("mistaken", q_len=320, kv_len=1000, heads=6, head_dim=64, magnitude=4.0)
    inputs = Inputs(case, "cpu", torch.bfloat16)
    idx, num, _ = inputs.uneven_indices()

    def attend(mistake):
        emulate.emulate(monkeypatch, 2, sources_with_mistakes, mistake)
        return [launches.attend(problem_of(inputs), operands_of(inputs, idx, num), False)[0]]

    emulate.expect_to_find(attend, list(MISTAKES).index(name) + 1)

"""The Hopper kernels of the backward on the CPU, where every run has another schedule of their threads."""

from dataclasses import replace

import pytest
import torch
from support import emulate
from support.added import MeanGradients, outputs_of_few_bits
from support.hopper import GATES, check_gradients, dense_gradients, operands_of, problem_of, weight_of
from support.problems import Case, Inputs, steep

from vsa_jit.backends.sm90 import backward, launches
from vsa_jit.jit import module
from vsa_jit.problem import Gradients, Operands, Problem

pytestmark = emulate.NEEDS_COMPILER

CASES = [
    Case("64, plain", q_len=1390),
    Case("64, tiled", q_len=1280, sizes=tuple(37 * i % 65 for i in range(20))),
    Case("64, other sizes", q_len=640, kv_len=768, sizes=(64, 1, 0) * 4, q_sizes=(33, 0, 64, 63, 1) * 2),
    Case("64, raster, bshd", grid=(7, 13, 11), block_size=(4, 4, 4), layout="bshd"),
    Case("64, other keys, grouped heads", q_len=1200, kv_len=700, heads=3, kv_heads=1),
    Case("64, batch, grouped heads, bshd", q_len=400, batch=2, heads=4, kv_heads=2, layout="bshd"),
    Case("128, raster, bshd", grid=(5, 18, 11), block_size=(2, 8, 8), layout="bshd"),
    Case("128, tiled", q_len=1280, block_size=128, sizes=tuple(range(0, 150, 15))),
    Case("192, plain, batch", q_len=900, block_size=192, batch=2),
    Case("1728, one block cut on all three axes", grid=(5, 6, 7), block_size=(12, 12, 12)),
]
# Calls that take one pass, or two where algorithms must be deterministic.
ONE_PASS = [case for case in CASES if not case.name.startswith("64")]
GROUPED = [
    Case("128, grouped heads", q_len=900, kv_len=700, block_size=128, batch=2, heads=4, kv_heads=2),
    Case(
        "192, sizes, grouped heads",
        q_len=768,
        kv_len=1344,
        block_size=192,
        heads=3,
        kv_heads=1,
        sizes=(192, 0, 5, 130, 64, 65, 191),
        q_sizes=(0, 192, 100, 1),
    ),
]
# With one multiprocessor a thread block takes all items, and with many one item.
KINDS = [(torch.bfloat16, 128, 1), (torch.float16, 64, 200)]


class Call:
    """A call's operands, what the forward leaves of it, and its gradients computed densely."""

    def __init__(self, inputs: Inputs, with_dlse: bool = True):
        self.inputs = inputs
        idx, num, self.block_map = inputs.uneven_indices()
        self.problem, self.operands = problem_of(inputs), operands_of(inputs, idx, num)
        if inputs.given_q_sizes is not None:
            self.operands = self.operands._replace(q_sizes=inputs.given_q_sizes)
        self.dlse = inputs.dlse if with_dlse else None
        self.exact, self.plain = (
            dense_gradients(inputs, self.block_map, dtype, with_dlse) for dtype in (torch.float64, inputs.dtype)
        )
        out_s, lse = self.exact[:2]
        self.out_s, self.lse = inputs.bhsd(out_s.to(inputs.dtype)), lse.float()

    def run(
        self, need_dq: bool = True, need_dkv: bool = True, mean_gradients: MeanGradients | None = None, **others
    ) -> Gradients:
        operands = self.operands._replace(**others)
        call = (self.problem, operands, self.out_s, self.lse, self.inputs.dout, self.dlse)
        return launches.attend_backward(*call, need_dq, need_dkv, mean_gradients=mean_gradients)

    def check(self, gradients: Gradients) -> None:
        check_gradients(self.inputs, self.block_map, gradients[:3], self.exact[2:], self.plain[2:])


@pytest.mark.parametrize(("dtype", "head_dim", "processors"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward(monkeypatch, case, dtype, head_dim, processors):
    emulate.emulate(monkeypatch, processors)
    call = Call(Inputs(replace(case, head_dim=head_dim), "cpu", dtype))
    call.check(call.run())


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=lambda case: case.name)
def test_heads_of_64_channels_in_few_thread_blocks(monkeypatch, case):
    emulate.emulate(monkeypatch, 1)
    call = Call(Inputs(replace(case, head_dim=64), "cpu", torch.float16))
    call.check(call.run())


@pytest.mark.parametrize(
    ("case", "dtype", "head_dim"),
    [*((case, torch.float16, 64) for case in ONE_PASS), (ONE_PASS[1], torch.bfloat16, 128)],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_two_passes_of_larger_blocks(monkeypatch, case, dtype, head_dim):
    emulate.emulate(monkeypatch, 3)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    call = Call(Inputs(replace(case, head_dim=head_dim), "cpu", dtype))
    call.check(call.run())


@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)
def test_one_pass_of_grouped_heads(monkeypatch, case):
    emulate.emulate(monkeypatch, 2)
    call = Call(Inputs(replace(case, head_dim=128), "cpu", torch.bfloat16))
    call.check(call.run())


@pytest.mark.parametrize(
    "case",
    [
        *(Case(f"{length} tokens", q_len=length, block_size=192) for length in (65, 127, 900)),
        Case("sizes", q_len=768, block_size=192, sizes=(192, 0, 5, 130)),
        *(
            Case(f"{tile} of {grid}", grid=grid, block_size=tile)
            for grid, tile in [
                ((5, 6, 7), (12, 12, 12)),
                ((3, 18, 11), (2, 8, 8)),
                ((5, 11, 17), (4, 8, 8)),
                ((5, 11, 9), (6, 4, 8)),
                ((7, 9, 6), (4, 4, 8)),
            ]
        ),
    ],
    ids=lambda case: case.name,
)
def test_every_value_of_dq_has_a_place_of_its_own(monkeypatch, case):
    emulate.emulate(monkeypatch, 1)

    def launcher(kernel, device):
        return emulate.launcher(replace(kernel, source="dq_places.cu", entry="dq_places"), device)

    monkeypatch.setattr(module, "launcher", launcher)
    inputs = Inputs(replace(case, head_dim=64), "cpu", torch.float16)
    size, guard = inputs.q.numel(), 1 << 16
    memory = torch.zeros(guard + size + guard)
    sums = memory[guard : guard + size].view(inputs.q.shape)
    dq = torch.empty_like(inputs.q)
    backward._store_dq(problem_of(inputs), inputs.sizes, sums, torch.empty(sums.shape[:3]), dq, None)
    assert torch.equal(sums, torch.ones_like(sums))
    assert memory.sum() == size


@pytest.mark.parametrize("scale", [1e-37, 1e-6, 8.0])
def test_unusual_scales(monkeypatch, scale):
    """One pass divides by the scale, unless the quotient may be infinite."""
    emulate.emulate(monkeypatch, 2)
    case = Case("scaled", q_len=500, head_dim=64, block_size=128, softmax_scale=scale)
    call = Call(Inputs(case, "cpu", torch.float16))
    call.check(call.run())


@pytest.mark.parametrize("block", [64, 128])
def test_only_what_is_needed(monkeypatch, block):
    emulate.emulate(monkeypatch, 3)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    inputs = Inputs(Case("needed", q_len=500, head_dim=64, block_size=block), "cpu", torch.float16)
    call = Call(inputs, with_dlse=False)
    call.check(call.run())
    of_means = MeanGradients(call.problem)
    gradients = call.run(mean_gradients=of_means)
    alone = call.run(need_dkv=False, mean_gradients=of_means)
    assert alone.dk is None
    assert alone.dv is None
    assert torch.equal(alone.dq, gradients.dq)
    alone = call.run(need_dq=False, mean_gradients=of_means)
    assert alone.dq is None
    assert torch.equal(alone.dk, gradients.dk)
    assert torch.equal(alone.dv, gradients.dv)


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_scores_that_differ_by_hundreds(monkeypatch, order):
    emulate.emulate(monkeypatch, 2)
    inputs = Inputs(Case("steep", q_len=330, kv_len=900, head_dim=64), "cpu", torch.float16)
    inputs.stretch_keys(steep(order, inputs.num_kv_blocks))
    call = Call(inputs)
    call.check(call.run())


@pytest.mark.parametrize("block", [64, 128])
def test_queries_whose_keys_are_not_valid_have_no_gradient(monkeypatch, block):
    """Whatever the gradient of their log-sum-exp is, which is -inf."""
    emulate.emulate(monkeypatch, 2)
    sizes = (block, 0, 5, block)
    inputs = Inputs(
        Case("without keys", q_len=4 * block, block_size=block, head_dim=64, sizes=sizes), "cpu", torch.float16
    )
    call = Call(inputs)
    call.operands.q2k_idx[0, 1, 3, 0], call.operands.q2k_num[0, 1, 3] = 1, 1
    rows = torch.zeros(1, 2, 4 * block, dtype=torch.bool)
    rows[0, 1, 3 * block :] = True
    call.lse = call.lse.masked_fill(rows, -torch.inf)
    call.dlse = call.dlse.masked_fill(rows, torch.nan)
    gradients = call.run()
    assert torch.equal(gradients.dq[rows], torch.zeros_like(gradients.dq[rows]))
    for x in gradients[:3]:
        assert x.isfinite().all()
    assert gradients.dk[:, :, : 3 * block].any()


@pytest.mark.parametrize(("gate", "order"), GATES)
@pytest.mark.parametrize(
    ("case", "dtype", "head_dim"),
    [(CASES[1], torch.float16, 64), (CASES[3], torch.bfloat16, 128), (CASES[6], torch.float16, 64)],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_gradients_of_the_coarse_output(monkeypatch, case, dtype, head_dim, gate, order):
    emulate.emulate(monkeypatch, 200)
    inputs = Inputs(replace(case, head_dim=head_dim, gate=gate), "cpu", dtype)
    call = Call(inputs)
    queries = call.problem.queries
    out_c = torch.randn(call.problem.batch, queries.heads, queries.num_blocks, head_dim)
    weight = weight_of(inputs, order)
    value = gate if weight is None else 0.0
    gradients = call.run(out_c=out_c, gate=weight, gate_value=value)
    call.check(gradients)
    dout = inputs.clean_dout(torch.float64)
    factor = value if weight is None else inputs.bhsd(weight).double().nan_to_num(0.0)
    expected = torch.zeros(out_c.shape, dtype=torch.float64).index_add_(2, inputs.q_block, factor * dout)
    torch.testing.assert_close(gradients.dout_c.double(), expected, rtol=1e-5, atol=1e-4)
    if weight is None:
        assert gradients.dgate is None
    else:
        assert gradients.dgate.dtype == weight.dtype
        expected = dout * out_c.double()[:, :, inputs.q_block]
        rtol = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(inputs.bhsd(gradients.dgate).double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "dtype", "head_dim", "deterministic"),
    [
        (Case("64, raster", grid=(5, 3, 7), block_size=(4, 4, 4)), torch.bfloat16, 128, False),
        (Case("64, sizes, bshd", q_len=640, sizes=(64, 1, 0, 33, 64) * 2, layout="bshd"), torch.float16, 64, False),
        (CASES[4], torch.bfloat16, 128, False),
        (CASES[5], torch.float16, 64, False),
        (Case("128, raster", grid=(3, 9, 11), block_size=(2, 8, 8)), torch.float16, 64, False),
        (Case("128, raster", grid=(3, 9, 11), block_size=(2, 8, 8)), torch.float16, 128, True),
        (GROUPED[1], torch.bfloat16, 128, False),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_gradients_of_block_means_are_added(monkeypatch, case, dtype, head_dim, deterministic):
    """To gradients that are the same whether the coarse output is part of the output or not."""
    emulate.emulate(monkeypatch, 2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    call = Call(Inputs(replace(case, head_dim=head_dim), "cpu", dtype))
    operands, out_s, out = outputs_of_few_bits(call.problem, call.operands)
    rest = call.lse, call.inputs.dout, call.dlse, True, True
    without = launches.attend_backward(call.problem, operands, out_s, *rest)
    of_means = MeanGradients(call.problem)
    found = launches.attend_backward(call.problem, operands, out, *rest, True, of_means)
    of_means.check(operands, found, without)


@pytest.mark.parametrize("group", [1, 3])
def test_inverse(monkeypatch, group):
    emulate.emulate(monkeypatch, 4)
    # More key blocks than are inverted at a time, named by rows of very different length.
    heads, num_q_blocks, num_kv_blocks, width = 6, 70, 8200, 40
    idx = torch.randint(-2, 100, (2, heads, num_q_blocks, width), dtype=torch.int32)
    idx[:, :, ::3] = torch.randint(8000, num_kv_blocks + 2, idx[:, :, ::3].shape, dtype=torch.int32)
    num = torch.randint(-1, width + 3, (2, heads, num_q_blocks), dtype=torch.int32)
    q, k = (
        torch.empty(1, dtype=torch.float16).expand(2, own_heads, blocks * 64, 64)
        for own_heads, blocks in ((heads, num_q_blocks), (heads // group, num_kv_blocks))
    )
    problem = Problem.of(q, k, (1, 1, 64), None, "bhsd", 0.125)
    bits, order = launches.transpose_index(problem, Operands(q, k, k, idx, num, None, None, None, None, 0.0))
    counts = (torch.arange(width) < num[..., None]) & (idx >= 0) & (idx < num_kv_blocks)
    expected = torch.zeros(2, heads, num_q_blocks, num_kv_blocks + 1, dtype=torch.bool)
    expected.scatter_(-1, torch.where(counts, idx, num_kv_blocks).long(), True)
    expected = expected[..., :num_kv_blocks]
    column = torch.arange(num_q_blocks)
    given = bits[:, :, column // 32] >> column[:, None] % 32 & 1
    assert torch.equal(given.bool(), expected)
    assert not (bits[:, :, 2] >> (num_q_blocks - 64)).any()
    lengths = expected.unflatten(1, (-1, group)).sum((2, 3))
    assert torch.equal(order.sort().values, torch.arange(num_kv_blocks, dtype=torch.int32).expand_as(order))
    sorted_lengths = lengths.gather(-1, order.long())
    classes = sorted_lengths.float().view(torch.int32) >> 20
    assert (classes.diff() <= 0).all()
    # Rows of one class stay in order.
    assert (order.diff()[classes.diff() == 0] > 0).all()


@pytest.mark.parametrize("block", [64, 128])
def test_a_key_block_that_does_not_exist_spoils_its_rows(monkeypatch, block):
    emulate.emulate(monkeypatch, 200)
    inputs = Inputs(Case("outside", q_len=12 * block, block_size=block, head_dim=64), "cpu", torch.float16)
    call = Call(inputs)
    idx, num = call.operands.q2k_idx.clamp(max=11), call.operands.q2k_num
    num.clamp_(max=11)
    idx[0, 0, 3, 0], idx[0, 1, 7, 0] = -1, 12
    num[0, 0, 3], num[0, 1, 7] = 1, 4
    spoiled = torch.zeros(1, 2, 12, dtype=torch.bool)
    spoiled[0, 0, 3] = spoiled[0, 1, 7] = True
    rows = spoiled.repeat_interleave(block, -1)
    call.lse = call.lse.masked_fill(rows, torch.nan)
    gradients = call.run(mean_gradients=MeanGradients(call.problem), q2k_idx=idx, q2k_num=num)
    assert gradients.dq[rows].isnan().all()
    assert not gradients.dq[~rows].isnan().any()
    # A query that names other blocks, too, spoils theirs.
    named = torch.zeros(1, 2, 12, dtype=torch.bool)
    named[0, 1, idx[0, 1, 7, 1:4].long()] = True
    for x in gradients[1:3]:
        assert torch.equal(x.isnan().all(-1), named.repeat_interleave(block, -1))


# As MISTAKES of test_emulated.py.
MISTAKES = {
    "a query is given back while it is read": (
        "attend_backward_kv.cu",
        "warpgroup::mma_async_wait<0>(sum, before);\n    release(shared.barriers.empty[stage.index]);",
        "if (MISTAKE) release(shared.barriers.empty[stage.index]);\n"
        "    warpgroup::mma_async_wait<0>(sum, before);\n"
        "    if (!MISTAKE) release(shared.barriers.empty[stage.index]);",
    ),
    "probabilities are read before they are published": (
        "attend_backward_kv.cu",
        "full<buffer>::sync();",
        "if (MISTAKE) full<buffer>::arrive();\n        else full<buffer>::sync();",
    ),
    "nobody waits until probabilities were taken": (
        "attend_backward_kv.cu",
        "empty<buffer>::sync();",
        "if (MISTAKE) empty<buffer>::arrive();\n        else empty<buffer>::sync();",
    ),
    "a lane is late for the phase of a stage": (
        "backward.cuh",
        "wait(shared.barriers.empty[stage.index], stage.phase ^ 1);\n                __syncwarp();",
        "wait(shared.barriers.empty[stage.index], stage.phase ^ 1);\n                if (!MISTAKE) __syncwarp();",
    ),
    "keys are read before they have arrived": (
        "attend_backward_kv.cu",
        "wait(shared.k_barriers.full[0], k_phase);",
        "if (!MISTAKE) wait(shared.k_barriers.full[0], k_phase);",
    ),
    "differences are overwritten before dQ is computed": (
        "attend_backward_qkv.cu",
        "wait(shared.ds_barriers.empty[buffer], state.phase ^ 1);",
        "if (!MISTAKE) wait(shared.ds_barriers.empty[buffer], state.phase ^ 1);",
    ),
    "a query is given back before its dK is added": (
        "attend_backward_qkv.cu",
        "        warpgroup::mma_async_wait<0>(keys.dk, ds);\n        release(shared.barriers.empty[before.index]);",
        "        if (MISTAKE) release(shared.barriers.empty[before.index]);\n"
        "        warpgroup::mma_async_wait<0>(keys.dk, ds);\n"
        "        if (!MISTAKE) release(shared.barriers.empty[before.index]);",
    ),
    "a query of 64 channels is given back before its dK is added": (
        "attend_backward_kv_64.cu",
        "        warpgroup::mma_async_wait<1>(tile.dp, keys.dk, tile.ds);\n"
        "        release(shared.barriers.empty[before.index]);",
        "        if (MISTAKE) release(shared.barriers.empty[before.index]);\n"
        "        warpgroup::mma_async_wait<1>(tile.dp, keys.dk, tile.ds);\n"
        "        if (!MISTAKE) release(shared.barriers.empty[before.index]);",
    ),
    "probabilities of 64 channels change while dV is computed": (
        "attend_backward_kv_64.cu",
        "warpgroup::mma_async_wait<0>(keys.dv, tile.p);",
        "if (MISTAKE) copy(tile.p, tile.dp);\n    warpgroup::mma_async_wait<0>(keys.dv, tile.p);",
    ),
    "dO of 64 channels is given back while it is read": (
        "attend_backward_q.cu",
        "        if constexpr (kDoutColsInRegisters == kHeadDim) release(shared.q_barriers.empty[consumer]);",
        "        if (MISTAKE || kDoutColsInRegisters == kHeadDim) release(shared.q_barriers.empty[consumer]);",
        "        if constexpr (kDoutColsInRegisters < kHeadDim) {",
        "        if (!MISTAKE && kDoutColsInRegisters < kHeadDim) {",
    ),
    "a key is given back while it is read": (
        "attend_backward_q.cu",
        "warpgroup::mma_async_wait<0>(dq, ds);\n    release(shared.barriers.empty[stage]);",
        "if (MISTAKE) release(shared.barriers.empty[stage]);\n    warpgroup::mma_async_wait<0>(dq, ds);\n"
        "    if (!MISTAKE) release(shared.barriers.empty[stage]);",
    ),
    "differences change while they are read": (
        "attend_backward_q.cu",
        "warpgroup::mma_async_wait<0>(dq, ds);\n",
        "if (MISTAKE) copy(ds, dp);\n    warpgroup::mma_async_wait<0>(dq, ds);\n",
    ),
}


@pytest.fixture
def sources_with_mistakes(tmp_path):
    return emulate.with_mistakes(MISTAKES, tmp_path)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulator_finds(monkeypatch, sources_with_mistakes, name):
    # Rings of few stages, which wrap around in every work tile.
    source = MISTAKES[name][0]
    in_one_pass = source == "attend_backward_qkv.cu"
    head_dim = 64 if "64 channels" in name else 128
    case = Case(
        "mistaken",
        q_len=1000,
        kv_len=500,
        heads=2,
        kv_heads=1,
        head_dim=head_dim,
        block_size=128 if in_one_pass else 64,
    )
    inputs = Inputs(case, "cpu", torch.bfloat16)
    call = Call(inputs)
    of_q = in_one_pass or source == "attend_backward_q.cu"
    of_kv = in_one_pass or not of_q

    def run(mistake):
        emulate.emulate(monkeypatch, 2, sources_with_mistakes, mistake)
        return [x for x in call.run(need_dq=of_q, need_dkv=of_kv) if x is not None]

    emulate.expect_to_find(run, list(MISTAKES).index(name) + 1)

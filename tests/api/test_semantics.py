"""Every order of tokens, layout, block and head size against the dense reference, forward and backward."""

from dataclasses import replace

import pytest
import torch
from support import reference as ref
from support.problems import CASES, GPU, INTERPRETED, ON_HOPPER, Case, Inputs

import vsa_jit
from vsa_jit.backends.triton import config

CPU_RUNS = [("torch", "cpu", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
# Triton's interpreter computes products of bf16 wrongly.
INTERPRETER_RUNS = [] if GPU else [("triton", "cpu", dtype) for dtype in (torch.float16, torch.float32)]
GPU_RUNS = [
    pytest.param((backend, "cuda", dtype), marks=pytest.mark.gpu)
    for backend in ("triton", "torch")
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]
SM90_RUNS = [pytest.param(("sm90", "cuda", dtype), marks=ON_HOPPER) for dtype in (torch.bfloat16, torch.float16)]
# Its kernels are for heads of 64 and 128.
SM90_CASES = [
    replace(case, head_dim=128 if i % 2 else 64) for i, case in enumerate(CASES) if case.head_dim in (32, 64, 128)
]

RUNS = [*CPU_RUNS, *INTERPRETER_RUNS, *GPU_RUNS, *SM90_RUNS]


def run_name(run) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in run)


def with_cases(cases, runs):
    """Every case on every run of a dtype that the case is for."""
    return pytest.mark.parametrize(("case", "run"), pairs(cases, runs))


def pairs(cases, runs):
    found = []
    for run in runs:
        values, marks = (run.values[0], run.marks) if hasattr(run, "values") else (run, ())
        for case in cases:
            if values[2] in case.dtypes:
                if values in INTERPRETER_RUNS and case.grid and case.tile != (4, 4, 4):
                    # The interpreter takes many seconds for a head; videos in cubes have several.
                    case = replace(case, heads=1)
                found.append(pytest.param(case, values, marks=marks, id=f"{run_name(values)}-{case.name}"))
    return found


# In the interpreter these take the large tiles of a Hopper GPU in half precision. Others keep those of smaller GPUs:
# these are not square, so that whoever mixes up rows and columns of tiles gets wrong results.
WITH_TILES_OF_HOPPER = ("raster 256, bshd", "320 tokens, bshd")


@pytest.fixture
def interpreted_tiles(case, run, monkeypatch):
    if run in INTERPRETER_RUNS and case.name in WITH_TILES_OF_HOPPER:
        monkeypatch.setattr(config, "architecture", lambda device: config.Architecture(227 * 1024, wgmma=True))


@pytest.fixture(params=RUNS, ids=run_name)
def run(request):
    return request.param


@pytest.fixture(params=[run for run in RUNS if run not in INTERPRETER_RUNS[1:]], ids=run_name)
def quick_run(request):
    """For what no dtype changes: one is enough in the interpreter."""
    return request.param


def make_inputs(case: Case, run, seed: int | None = None) -> Inputs:
    """Inputs of a case on a run, with heads of a size that its backend has."""
    backend, device, dtype = run
    return Inputs(replace(case, head_dim=64) if backend == "sm90" else case, device, dtype, seed)


@pytest.mark.parametrize(
    ("case", "run"),
    [*pairs(CASES, [*CPU_RUNS, *INTERPRETER_RUNS[:1], *GPU_RUNS]), *pairs(SM90_CASES, SM90_RUNS)],
)
@pytest.mark.usefixtures("interpreted_tiles")
def test_video_sparse_attn(case: Case, run):
    backend, device, dtype = run
    inputs = Inputs(case, device, dtype)
    out = inputs.video_sparse_attn(backend)
    out.backward(inputs.dout)
    results = {"out": out, "dq": inputs.q.grad, "dk": inputs.k.grad, "dv": inputs.v.grad}
    if isinstance(inputs.gate, torch.Tensor):
        results["dgate"] = inputs.gate.grad

    block_map = inputs.block_map()
    expected, plain = inputs.expected(torch.float64, block_map), inputs.expected(dtype, block_map)
    assert out.dtype == dtype
    for name, result in results.items():
        ref.assert_close(name, inputs.bhsd(result), expected[name], plain[name])
    for name, valid in (
        ("out", inputs.q_valid),
        ("dq", inputs.q_valid),
        ("dk", inputs.kv_valid),
        ("dv", inputs.kv_valid),
    ):
        padding = inputs.bhsd(results[name])[:, :, ~valid.to(device)]
        assert torch.equal(padding, torch.zeros_like(padding)), f"{name} of padding is not 0"


INDEX_CASES = [
    Case("plain", q_len=200, kv_len=300, batch=2, heads=4, kv_heads=2),
    Case("tiled", q_len=256, sizes=(64, 17, 0, 40)),
    Case("raster, bshd", grid=(5, 6, 7), block_size=64, layout="bshd"),
    Case("raster 128", grid=(2, 9, 10), block_size=128),
]


@with_cases(INDEX_CASES, RUNS)
def test_indices_with_uneven_rows(case: Case, run):
    """Rows of 0 … n_k key blocks in any order, junk past a row's number; the gradient of lse counts too."""
    backend, _, dtype = run
    inputs = make_inputs(case, run)
    idx, num, block_map = inputs.uneven_indices()
    out, lse = vsa_jit.block_sparse_attn_from_indices(
        inputs.q, inputs.k, inputs.v, idx, num, backend=backend, **inputs.order_of_blocks
    )
    dlse = inputs.dlse.nan_to_num(0.0)
    finite = lse.isfinite()
    torch.autograd.backward([out, lse.masked_fill(~finite, 0.0)], [inputs.dout, dlse])

    def dense(compute_dtype):
        tensors = inputs.clean(compute_dtype)
        out, lse = ref.attention(tensors["q"], tensors["k"], tensors["v"], inputs.mask(block_map), inputs.scale)
        total = (out * inputs.clean_dout(compute_dtype)).sum()
        total = total + (lse.masked_fill(~lse.isfinite(), 0.0) * dlse).sum()
        total.backward()
        return {"out": out, "lse": lse, **{f"d{name}": tensors[name].grad for name in "qkv"}}

    expected, plain = dense(torch.float64), dense(dtype)
    results = {"out": inputs.bhsd(out), "lse": lse, "dq": inputs.bhsd(inputs.q.grad)}
    results |= {"dk": inputs.bhsd(inputs.k.grad), "dv": inputs.bhsd(inputs.v.grad)}
    for name, result in results.items():
        ref.assert_close(name, result, expected[name], plain[name])
    assert torch.equal(lse.isneginf(), expected["lse"].isneginf())


@pytest.mark.parametrize("rank", [3, 4])
def test_block_map_is_the_same_as_its_indices(rank: int, quick_run):
    backend, device, _ = quick_run
    inputs = make_inputs(Case("map", q_len=200, kv_len=300, batch=2), quick_run)
    shape = (2, inputs.case.heads, inputs.num_q_blocks, inputs.num_kv_blocks)[4 - rank :]
    block_map = (torch.rand(shape, generator=inputs.generator) < 0.5).to(device)
    order = {**inputs.order_of_blocks, "backend": backend}
    out, lse = vsa_jit.block_sparse_attn(inputs.q, inputs.k, inputs.v, block_map, **order)
    full = block_map.expand(2, -1, -1, -1) if rank == 3 else block_map
    idx = full.int().sort(dim=-1, descending=True, stable=True).indices.int()
    num = full.sum(-1, dtype=torch.int32)
    out_idx, lse_idx = vsa_jit.block_sparse_attn_from_indices(inputs.q, inputs.k, inputs.v, idx, num, **order)
    assert torch.equal(out, out_idx)
    assert torch.equal(lse, lse_idx)


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1, -(2**31)])
def test_index_out_of_range_gives_nan_to_its_row_only(wrong: int, run):
    backend, device, _ = run
    inputs = make_inputs(Case("range", q_len=256), run)
    idx = torch.tensor([0, 3], dtype=torch.int32).expand(1, 2, 4, 2).contiguous()
    num = torch.full((1, 2, 4), 2, dtype=torch.int32)
    order = {**inputs.order_of_blocks, "backend": backend}
    good, good_lse = vsa_jit.block_sparse_attn_from_indices(
        inputs.q, inputs.k, inputs.v, idx.to(device), num.to(device), **order
    )
    idx[0, 1, 2, 1] = wrong
    out, lse = vsa_jit.block_sparse_attn_from_indices(
        inputs.q, inputs.k, inputs.v, idx.to(device), num.to(device), **order
    )
    hit = torch.zeros(1, 2, 256, dtype=torch.bool, device=device)
    hit[0, 1, 128:192] = True
    assert out[hit].isnan().all()
    assert lse[hit].isnan().all()
    assert torch.equal(out[~hit], good[~hit])
    assert torch.equal(lse[~hit], good_lse[~hit])
    out.sum().backward()
    assert inputs.q.grad[hit].isnan().all()
    assert inputs.q.grad[~hit].isfinite().all()


def test_number_of_indices_is_clamped(quick_run):
    backend, device, _ = quick_run
    inputs = make_inputs(Case("number", q_len=256), quick_run)
    idx = torch.tensor([2, 0], dtype=torch.int32, device=device).expand(1, 2, 4, 2).contiguous()

    def attend(num):
        num = torch.tensor(num, dtype=torch.int32, device=device).expand(1, 2, 4).contiguous()
        call = vsa_jit.block_sparse_attn_from_indices
        return call(inputs.q, inputs.k, inputs.v, idx, num, backend=backend, **inputs.order_of_blocks)[0]

    assert torch.equal(attend([2, 0, 99, -7]), attend([2, 0, 2, 0]))


def test_same_bits_on_every_run(quick_run):
    backend, device, _ = quick_run
    interpreted = (backend, device) in INTERPRETED
    q_len, heads = (200, 2) if interpreted else (700, 4)
    case = Case("bits", q_len=q_len, heads=heads, kv_heads=heads // 2, topk=3, gate="full")
    results = []
    for _ in range(2):
        inputs = make_inputs(case, quick_run, seed=7)
        out = inputs.video_sparse_attn(backend)
        out.backward(inputs.dout)
        results.append([out, inputs.q.grad, inputs.k.grad, inputs.v.grad, inputs.gate.grad])
    if backend == "torch" and device == "cuda":
        results = [result[:2] for result in results]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_sparsity_and_topk_agree(quick_run):
    backend = quick_run[0]
    inputs = make_inputs(Case("sparsity", q_len=640, heads=1, head_dim=16), quick_run)
    call = vsa_jit.video_sparse_attn
    for sparsity, topk in ((0.0, 10), (0.7, 3), (0.75, 3), (0.99, 1)):
        by_sparsity = call(inputs.q, inputs.k, inputs.v, sparsity=sparsity, backend=backend)
        assert torch.equal(by_sparsity, call(inputs.q, inputs.k, inputs.v, topk=topk, backend=backend))


def test_sizes_of_any_stride(quick_run):
    backend, device, _ = quick_run
    inputs = make_inputs(Case("sizes", q_len=256, sizes=(40, 40, 40, 40)), quick_run)
    call = vsa_jit.video_sparse_attn
    arguments = {"topk": 2, "block_size": 64, "backend": backend}
    expected = call(inputs.q, inputs.k, inputs.v, inputs.sizes, **arguments)
    for sizes in (torch.tensor([40], device=device).expand(4), torch.full((8,), 40, device=device)[::2]):
        assert torch.equal(call(inputs.q, inputs.k, inputs.v, sizes, **arguments), expected)


def test_autocast_changes_nothing(run):
    backend, device, _ = run
    results = []
    for enabled in (False, True):
        inputs = make_inputs(Case("autocast", q_len=300, topk=3, gate="full"), run, seed=11)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            out = inputs.video_sparse_attn(backend)
            out.backward(inputs.dout)
        results.append([out, inputs.q.grad, inputs.gate.grad])
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


def test_overlapping_views(run):
    """Where no order of memory follows q's strides, outputs and gradients are still of q's shape and right."""
    backend, device, dtype = run
    if backend == "sm90":
        pytest.skip("TMA does not read such a view: tests/backends/test_tma.py")
    inputs = make_inputs(Case("overlap", q_len=192, heads=2, head_dim=32), run)
    base = torch.randn(192, 33, device=device).to(dtype)
    overlapping = torch.as_strided(base, (1, 2, 192, 32), (0, 1, 33, 1))
    call = vsa_jit.video_sparse_attn
    results = []
    for q in (overlapping.detach().requires_grad_(), overlapping.contiguous().requires_grad_()):
        out = call(q, inputs.k, inputs.v, topk=2, backend=backend)
        (dq,) = torch.autograd.grad(out, q, inputs.dout)
        results.append((out, dq))
    for strided, dense in zip(*results, strict=True):
        assert torch.equal(strided, dense)


def test_default_dtype_is_not_used(run):
    backend = run[0]
    inputs = make_inputs(Case("default", q_len=200), run)
    expected = inputs.video_sparse_attn(backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(inputs.video_sparse_attn(backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_nan_stays_in_the_rows_that_it_belongs_to(run):
    """A NaN query, and a NaN gradient of a query without keys, reach no key that the query does not attend."""
    backend, device, _ = run
    inputs = make_inputs(Case("nan", q_len=200, heads=1), run)
    with torch.no_grad():
        inputs.q[0, 0, 70] = float("nan")
    idx = torch.tensor([[1], [3], [0], [2]], dtype=torch.int32, device=device)[None, None]
    num = torch.tensor([[[1, 1, 0, 1]]], dtype=torch.int32, device=device)
    out, lse = vsa_jit.block_sparse_attn_from_indices(
        inputs.q, inputs.k, inputs.v, idx, num, backend=backend, **inputs.order_of_blocks
    )
    dlse = torch.zeros_like(lse)
    dlse[..., 128:192] = float("nan")
    torch.autograd.backward([out, lse], [inputs.dout, dlse])
    assert inputs.q.grad[0, 0, 128:192].count_nonzero() == 0
    for grad in (inputs.k.grad, inputs.v.grad):
        assert grad[0, 0, :192].isfinite().all()
        assert grad[0, 0, 192:].isnan().any()


@pytest.mark.parametrize("function", ["map", "indices"])
def test_sizes_of_keys_say_nothing_of_queries(function, run):
    """Where a map is given and lengths are equal, as in FastVideo's function of that name: every query row counts."""
    backend, device, _ = run
    case = Case("cross", q_len=192, kv_len=192, sizes=(64, 17, 0), q_sizes=(64, 64, 64), heads=4, kv_heads=2)
    inputs = make_inputs(case, run)
    idx, num, block_map = inputs.uneven_indices()
    order = {name: value for name, value in inputs.order.items() if name != "q_variable_block_sizes"}
    if function == "map":
        out, lse = vsa_jit.block_sparse_attn(
            inputs.q, inputs.k, inputs.v, block_map.to(device), backend=backend, **order
        )
    else:
        out, lse = vsa_jit.block_sparse_attn_from_indices(
            inputs.q, inputs.k, inputs.v, idx, num, backend=backend, **order
        )

    def dense(dtype):
        tensors = inputs.clean(dtype)
        return ref.attention(tensors["q"], tensors["k"], tensors["v"], inputs.mask(block_map), inputs.scale)

    for name, result, expected, plain in zip(
        ("out", "lse"), (out, lse), dense(torch.float64), dense(inputs.dtype), strict=True
    ):
        ref.assert_close(name, result, expected, plain)
    out.backward(inputs.dout)
    assert inputs.q.grad.isfinite().all()


def test_indices_of_64_bits_and_maps_that_broadcast(quick_run):
    backend, device, _ = quick_run
    inputs = make_inputs(Case("others", q_len=130, kv_len=200, batch=2, head_dim=16), quick_run)
    idx, num, _ = inputs.uneven_indices()
    order = {**inputs.order, "backend": backend}
    narrow = vsa_jit.block_sparse_attn_from_indices(inputs.q, inputs.k, inputs.v, idx, num, **order)
    wide = vsa_jit.block_sparse_attn_from_indices(inputs.q, inputs.k, inputs.v, idx.long(), num.long(), **order)
    block_map = torch.rand(1, 1, inputs.num_q_blocks, inputs.num_kv_blocks, device=device) < 0.5
    full = block_map.expand(2, 2, -1, -1).contiguous()
    maps = [
        vsa_jit.block_sparse_attn(inputs.q, inputs.k, inputs.v, x, **order) for x in (full, block_map, block_map[0, 0])
    ]
    for results, expected in ((wide, narrow), (maps[1], maps[0]), (maps[2], maps[0])):
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)

"""The Hopper backend on a Hopper GPU: its kernels against fp64, and how they are loaded and launched."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.hopper import check_means, load, problem_of, reference_means
from support.problems import ON_HOPPER, Case, Inputs
from support.toys import toy
from torch import Tensor

import vsa_jit
from vsa_jit.backends import choose as chooser
from vsa_jit.backends.sm90 import forward, launches, specialise
from vsa_jit.backends.triton import launches as triton
from vsa_jit.jit import engines, module
from vsa_jit.jit.driver import encode_tensor_map, fill
from vsa_jit.jit.errors import NotWarmError
from vsa_jit.problem import Problem, Side

pytestmark = ON_HOPPER
HALF = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 128]
ROOT = Path(__file__).parents[2]

CASES = [
    Case("plain, partial last block", q_len=200, batch=2, heads=3),
    Case("plain, one token", q_len=1),
    Case("plain, grouped heads, other lengths", q_len=130, kv_len=300, batch=2, heads=4, kv_heads=2),
    Case("plain, bshd", q_len=700, block_size=320, layout="bshd", batch=2, heads=3),
    Case("tiled", q_len=256, sizes=(64, 17, 0, 1000), q_sizes=(0, -5, 63, 64), batch=2),
    Case("tiled, bshd, 128", q_len=384, block_size=128, sizes=(128, 100, 7), layout="bshd"),
    Case("tiled, 192", q_len=576, block_size=192, sizes=(192, 130, 1)),
    Case("raster", grid=(5, 6, 7), block_size=(4, 4, 4), batch=2, heads=3),
    Case("raster, bshd", grid=(5, 6, 7), block_size=(4, 4, 4), batch=2, heads=3, layout="bshd"),
    Case("raster 128", grid=(3, 9, 10), block_size=128, layout="bshd"),
    Case("raster 256", grid=(5, 9, 9), block_size=(4, 8, 8)),
    Case("raster 192", grid=(5, 7, 9), block_size=(4, 6, 8)),
    Case("raster, tall tile", grid=(130, 2, 3), block_size=(64, 1, 1)),
    Case("raster, flat tile", grid=(2, 9, 33), block_size=(1, 4, 32)),
    Case("raster, one token", grid=(1, 1, 1), block_size=(4, 4, 4)),
    Case("fused qkv", fused_qkv=True, layout="bshd", batch=2),
    Case("fused qkv, raster", fused_qkv=True, grid=(5, 6, 7), block_size=64, batch=2, heads=3),
]


# So many blocks that each thread block takes several, one after the other, on a GPU of up to 500 multiprocessors.
MANY = [
    Case("many blocks", q_len=6_390, heads=16, batch=2),
    Case("many blocks of several boxes", grid=(17, 30, 52), layout="bshd", block_size=(4, 8, 8), heads=16),
]


def run_means(problem: Problem, inputs: Inputs, *, with_v: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    kernels = specialise.kernels_of(inputs.dtype, problem.head_dim)
    load(kernels, inputs.q.get_device())
    q_sizes = inputs.given_q_sizes if inputs.given_q_sizes is not None else inputs.sizes
    sizes = q_sizes if problem.queries.length == problem.keys.length or inputs.given_q_sizes is not None else None
    v = inputs.v if with_v else None
    return launches.block_means(problem, inputs.q, inputs.k, v, sizes, inputs.sizes)


def case_of(case: Case, head_dim: int) -> Case:
    return replace(case, head_dim=head_dim)


@pytest.mark.parametrize("case", [*CASES, *MANY], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_block_means(case, dtype, head_dim):
    inputs = Inputs(case_of(case, head_dim), "cuda", dtype)
    problem = problem_of(inputs)
    check_means(problem, inputs, run_means(problem, inputs))


def test_means_without_v():
    inputs = Inputs(case_of(CASES[7], 128), "cuda", torch.bfloat16)
    problem = problem_of(inputs)
    q_c, k_c, v_c = run_means(problem, inputs, with_v=False)
    assert v_c is None
    expected = run_means(problem, inputs)
    assert torch.equal(q_c, expected[0])
    assert torch.equal(k_c, expected[1])


@pytest.mark.parametrize("strides", ["expanded heads", "expanded batch", "expanded tokens", "sbhd", "hbsd", "hsbd"])
def test_means_of_strided_views(strides):
    batch, heads, length = 2, 3, 210
    if strides == "expanded heads":
        x = torch.randn(batch, 1, length, 64).expand(-1, heads, -1, -1)
    elif strides == "expanded batch":
        x = torch.randn(1, heads, length, 64).expand(batch, -1, -1, -1)
    elif strides == "expanded tokens":
        x = torch.randn(batch, heads, 1, 64).expand(-1, -1, length, -1)
    else:
        extents = {"s": length, "b": batch, "h": heads, "d": 64}
        x = torch.randn([extents[name] for name in strides]).permute([strides.index(name) for name in "bhsd"])
    on_gpu = torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device="cuda")
    base = torch.as_strided(on_gpu, (on_gpu.untyped_storage().size() // 2,), (1,))
    base.copy_(torch.as_strided(x, base.shape, (1,)))
    side = Side(heads, length, (4, 4, 4), (5, 6, 7), "bhsd")
    problem = Problem(batch, 64, side, side, 0.1)
    load(specialise.kernels_of(torch.bfloat16, 64), on_gpu.get_device())
    for result in launches.block_means(problem, on_gpu, on_gpu, on_gpu, None, None):
        expected = reference_means(side, on_gpu, None, torch.float64)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [CASES[7], *MANY], ids=lambda case: case.name)
def test_means_are_the_same_bits_every_time_and_whatever_was_there(case):
    inputs = Inputs(case_of(case, 128), "cuda", torch.bfloat16)
    problem = problem_of(inputs)
    first = run_means(problem, inputs)
    for _ in range(20):
        poison = [torch.full_like(x, float("nan")) for x in first]
        del poison
        for result, expected in zip(run_means(problem, inputs), first, strict=True):
            assert torch.equal(result, expected)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is loaded yet, and nothing chosen."""
    monkeypatch.setattr(module, "_loaded", {})
    for name, empty in (("_failed", {}), ("_chosen", {}), ("_logged", set())):
        monkeypatch.setattr(chooser, name, empty)
    for remembered in (forward._block_means_launch, encode_tensor_map):
        remembered.cache_clear()
    yield
    forward._block_means_launch.cache_clear()


def call(inputs: Inputs, name: str = "auto") -> Tensor:
    return vsa_jit.video_sparse_attn(inputs.q, inputs.k, inputs.v, topk=2, backend=name, **inputs.order)


@pytest.fixture
def inputs() -> Inputs:
    return Inputs(Case("raster", grid=(9, 10, 11), block_size=64, head_dim=64), "cuda", torch.bfloat16)


def test_engines_give_the_same_bits(fresh, inputs):
    if engines.why_not(engines.ENGINES[1]) is not None:
        pytest.skip(f"needs the engine nvcc: {engines.why_not(engines.ENGINES[1])}")
    problem = problem_of(inputs)
    results = []
    for engine in ("nvrtc", "nvcc"):
        module._loaded.clear()
        forward._block_means_launch.cache_clear()
        module.load(specialise.kernels_of(inputs.dtype, 64), 0, engine)
        results.append(run_means(problem, inputs))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_explain_and_the_log_name_backend_and_engine(fresh, inputs, caplog):
    choice = vsa_jit.explain(inputs.q, inputs.k, inputs.v, topk=2, **inputs.order)
    assert choice.backend == "sm90"
    assert choice.engine in ("nvrtc", "nvcc")
    assert choice.reasons == {"triton": "slower than sm90", "torch": "slower than sm90"}
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        call(inputs)
        call(inputs)
    messages = [record.getMessage() for record in caplog.records if "backend" in record.getMessage()]
    assert messages == ["backend sm90 runs on cuda:0"]


def test_tensors_that_tma_cannot_read(fresh, inputs):
    padded = torch.randn(1, 2, 990, 68, device="cuda").bfloat16()[..., :64]
    choice = vsa_jit.explain(padded, inputs.k, inputs.v, topk=2, **inputs.order)
    assert choice.backend == "triton"
    assert choice.reasons["sm90"].startswith("TMA needs strides that are multiples of 16 bytes")
    with pytest.raises(RuntimeError, match="backend='sm90' cannot run this call: TMA needs strides"):
        vsa_jit.video_sparse_attn(padded, inputs.k, inputs.v, topk=2, backend="sm90", **inputs.order)


def test_launches_go_to_the_current_stream(inputs):
    problem = problem_of(inputs)
    expected = run_means(problem, inputs)
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second or so of the default stream
    with torch.cuda.stream(side):
        results = run_means(problem, inputs)
        done.record()
    done.synchronize()
    assert not torch.cuda.default_stream().query()
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


def test_a_counter_is_the_number_of_blocks_when_the_kernel_starts(fresh, sources, monkeypatch):
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(sources / "cache"))
    kernel = toy()
    load([kernel], 0)
    launch = module.launcher(kernel, 0)
    memory = torch.full((33,), -1, dtype=torch.int32, device="cuda")
    # The kernel writes 42 into all but the last.
    params = kernel.params(memory.data_ptr(), 32)
    fill(0, memory[32:].data_ptr(), 7)
    launch(7, params)
    assert memory.tolist() == [42] * 32 + [7]
    fill(0, memory[3:].data_ptr(), 5)
    launch(5, params)
    assert memory.tolist() == [42] * 32 + [7]


def test_launches_go_to_the_device_of_the_tensors(fresh):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = Inputs(case_of(CASES[7], 64), "cuda:1", torch.bfloat16)
    assert torch.cuda.current_device() == 0
    problem = problem_of(inputs)
    results = run_means(problem, inputs)
    assert all(result.device == torch.device("cuda", 1) for result in results)
    check_means(problem, inputs, results)
    out = call(inputs)
    assert out.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0


def test_a_thread_that_has_not_used_cuda(fresh, inputs):
    load(specialise.kernels_of(inputs.dtype, 64), 0)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(call, inputs).result()
    torch.testing.assert_close(result, call(inputs), rtol=0, atol=0)


def test_threads_that_start_together_load_once(fresh, inputs, monkeypatch):
    loads = []
    do_load = module._load
    monkeypatch.setattr(module, "_load", lambda *arguments: (loads.append(arguments), do_load(*arguments)))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, [inputs] * 8))
    assert len(loads) == 1
    for result in results:
        assert torch.equal(result, results[0])


def test_never_waits_for_the_gpu(inputs):
    problem = problem_of(inputs)
    run_means(problem, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_means(problem, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_missing_kernel_never_corrupts_a_capture(fresh, inputs):
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        x = torch.zeros(8, device="cuda")

        def capture():
            with torch.cuda.graph(graph):
                x.add_(1)
                call(inputs)

        with pytest.raises(NotWarmError, match="run warmup first"):
            capture()
        torch.cuda.synchronize()
        assert not torch.cuda.is_current_stream_capturing()

        vsa_jit.warmup(dtype=inputs.dtype, head_dim=64)
        expected = call(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(inputs)
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        inputs.q.data.neg_()
        graph.replay()
        torch.testing.assert_close(out, call(inputs), rtol=0, atol=0)


def test_a_missing_kernel_is_told_of_in_a_capture_that_begins_with_a_map(fresh, inputs):
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    block_map = torch.ones(27, 27, dtype=torch.bool, device="cuda")
    with pytest.raises(NotWarmError, match="run warmup first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        vsa_jit.block_sparse_attn(q, k, v, block_map, **inputs.order)
    torch.cuda.synchronize()
    assert vsa_jit.block_sparse_attn(q, k, v, block_map, **inputs.order)[0].isfinite().all()


def test_compiles_into_one_graph(inputs):
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(inputs, "sm90"), call(inputs, "sm90"), rtol=0, atol=0)


def test_selection_is_that_of_triton(inputs):
    problem = problem_of(inputs)
    ours = run_means(problem, inputs)
    theirs = triton.block_means(problem, inputs.q, inputs.k, inputs.v, None, None)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


CALL = """
import logging, torch, vsa_jit
logging.basicConfig(level=logging.INFO)
q, k, v = torch.randn(3, 1, 2, 256, 64, device="cuda").bfloat16()
vsa_jit.video_sparse_attn(q, k, v, topk=2, backend="sm90")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("engine", ["nvrtc", "nvcc"])
def test_the_second_process_compiles_nothing(tmp_path, engine):
    if engines.why_not(dict(zip(engines.NAMES[1:], engines.ENGINES, strict=True))[engine]) is not None:
        pytest.skip(f"needs the engine {engine}")
    environment = {
        **os.environ, "VSA_JIT_CACHE_DIR": str(tmp_path / "cache"), "VSA_JIT_ENGINE": engine, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    logs = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        logs.append(run.stderr)
    assert "compiling 9 kernels (block means bf16 D=64, forward bf16 D=64, backward" in logs[0]
    assert "compiling" not in logs[1]

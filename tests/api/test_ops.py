"""The operators as PyTorch sees them: opcheck, torch.compile, CUDA graphs."""

import numpy as np
import pytest
import torch
from support import reference as ref
from support.problems import BACKENDS, GPU, Case, Inputs
from support.watches import WATCHES
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import vsa_jit
from vsa_jit.ops import attention, pooling, selection, video

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASE_OF_ORDER = {
    "plain": Case("plain", q_len=200, batch=2, heads=4, kv_heads=2, gate="full"),
    "tiled": Case("tiled", q_len=192, sizes=(64, 17, 40), gate="full"),
    "raster": Case("raster", grid=(5, 6, 7), layout="bshd", gate="per channel"),
    "ungated": Case("ungated", q_len=200),
    "fine only": Case("fine only", q_len=200, gate=0.0),
}


def leaf(*shape, device, dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def no_backend_runs(monkeypatch):
    for module in (attention, pooling):
        monkeypatch.setattr(module, "backend_for", None)
    monkeypatch.setattr(video, "backends_for", None)
    monkeypatch.setattr(selection, "selection_backend_for", None)


def shapes_of(layout: str) -> tuple[tuple, tuple]:
    return ((1, 4, 192, 32), (1, 2, 192, 32)) if layout == "bhsd" else ((1, 192, 4, 32), (1, 192, 2, 32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck_attend(device, layout):
    shape, kv_shape = shapes_of(layout)
    idx = torch.randint(0, 3, (1, 4, 3, 2), device=device, dtype=torch.int32)
    num = torch.tensor([2, 0, 1], device=device, dtype=torch.int32).expand(1, 4, 3)
    sizes = torch.tensor([64, 3, 64], device=device)
    q, k, v = leaf(*shape, device=device), leaf(*kv_shape, device=device), leaf(*kv_shape, device=device)
    library.opcheck(attention.attend.overload, (q, k, v, idx, num, sizes, sizes, [1, 1, 64], None, layout, 0.2, "auto"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("gate", ["tensor", 0.5, 0.0])
def test_opcheck_video_sparse_attn(device, layout, gate):
    """Its backward too, which opcheck compiles."""
    shape, kv_shape = shapes_of(layout)
    q, k, v = leaf(*shape, device=device), leaf(*kv_shape, device=device), leaf(*kv_shape, device=device)
    sizes = torch.tensor([64, 3, 64], device=device)
    weight = (leaf(*shape, device=device), 0.0) if gate == "tensor" else (None, gate)
    numbers = (weight[1], [2], False, torch.float32, False, [1, 1, 64], None, layout, 0.2, "auto")
    library.opcheck(video.video_sparse_attn.overload, (q, k, v, weight[0], sizes, sizes, *numbers))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_steps(device):
    q, k, v = leaf(1, 210, 4, 32, device=device), leaf(1, 210, 2, 32, device=device), leaf(1, 210, 2, 32, device=device)
    static = ([4, 4, 4], [0, 5, 6, 7], "bshd", 0.2, "auto")
    library.opcheck(pooling.block_means.overload, (q, k, v, None, None, *static))
    library.opcheck(pooling.block_means.overload, (q, k, None, None, None, *static))
    library.opcheck(
        video.select_key_blocks.overload, (q.detach(), k.detach(), None, None, [2], False, torch.bfloat16, *static)
    )
    block_map = torch.rand(1, 4, 8, 8, device=device) < 0.5
    library.opcheck(selection.map_to_indices.overload, (block_map, "auto"))
    means = torch.randn(1, 4, 8, 32, device=device)
    library.opcheck(pooling.block_mean_backward.overload, (means, q.detach(), None, *static))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASE_OF_ORDER)
def test_compile_whole_function(device, name):
    """fullgraph, forward and backward: the same bits as eager, since the same operators run."""
    case = CASE_OF_ORDER[name]
    results = []
    for compiled in (False, True):
        inputs = Inputs(case, device, torch.float32, seed=3)

        def call(q, k, v, gate, arguments=inputs.order):
            return vsa_jit.video_sparse_attn(q, k, v, topk=2, compress_attn_weight=gate, **arguments)

        run = torch.compile(call, fullgraph=True) if compiled else call
        out = run(inputs.q, inputs.k, inputs.v, inputs.gate)
        out.backward(inputs.dout)
        grads = [inputs.q.grad, inputs.k.grad, inputs.v.grad]
        if isinstance(inputs.gate, torch.Tensor):
            grads.append(inputs.gate.grad)
        results.append([out, *grads])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_dynamic_length(device):
    call = torch.compile(lambda q, k, v: vsa_jit.video_sparse_attn(q, k, v, sparsity=0.5), fullgraph=True, dynamic=True)
    for length in (200, 300, 450):
        inputs = Inputs(Case("dynamic", q_len=length), device, torch.float32)
        eager = vsa_jit.video_sparse_attn(inputs.q, inputs.k, inputs.v, sparsity=0.5)
        torch.testing.assert_close(call(inputs.q, inputs.k, inputs.v), eager, rtol=1e-5, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one():
    inputs = Inputs(Case("frozen", q_len=200, gate="full"), "cpu", torch.float32)
    for name in "kv":
        getattr(inputs, name).requires_grad_(False)
    out = inputs.video_sparse_attn("torch")
    out.backward(inputs.dout)
    assert inputs.q.grad is not None
    assert inputs.gate.grad is not None
    assert inputs.k.grad is None
    assert inputs.v.grad is None


@pytest.mark.parametrize("run", BACKENDS, ids=lambda run: "-".join(run))
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "marked"])
def test_compiled_map_of_changing_size(run, dynamic):
    """The number of blocks is computed from the length, so that both are symbolic from the second length on."""
    backend, device = run
    dtype = torch.float32 if device == "cpu" else torch.float16

    def call(q, k, v):
        blocks, kv_blocks = -(-q.shape[2] // 64), -(-k.shape[2] // 64)
        near = (torch.arange(blocks, device=q.device)[:, None] - torch.arange(kv_blocks, device=q.device)).abs() < 2
        block_map = near.expand(q.shape[1], blocks, kv_blocks)
        idx = torch.arange(kv_blocks, device=q.device).expand(*q.shape[:2], blocks, kv_blocks)
        num = torch.full((*q.shape[:2], blocks), 2, device=q.device)
        sizes = torch.full((kv_blocks,), 50, device=q.device)
        full = k.new_zeros((*k.shape[:2], kv_blocks * 64, k.shape[3]))
        return (
            vsa_jit.block_sparse_attn(q, k, v, block_map, backend=backend)[0],
            vsa_jit.block_sparse_attn_from_indices(q, k, v, idx, num, backend=backend)[0],
            vsa_jit.video_sparse_attn(q, full, full, sizes, topk=2, backend=backend),
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    for length in (200, 300, 450, 128, 777):
        q, k, v = (
            torch.randn(1, 2, size, 64, dtype=dtype, device=device) for size in (length, length + 64, length + 64)
        )
        for result, eager in zip(compiled(q, k, v), call(q, k, v), strict=True):
            torch.testing.assert_close(result, eager)
    assert counter.frame_count <= 3


def test_compiled_grid_that_comes_from_outside():
    """Its sizes are symbolic from the second video on."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, k, v, grid):
        return vsa_jit.video_sparse_attn(q, k, v, topk=2, grid=grid, block_size=(4, 4, 4))

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for grid in ((3, 5, 9), (4, 6, 7), (5, 3, 8), (2, 9, 10)):
        q, k, v = (torch.randn(1, 2, grid[0] * grid[1] * grid[2], 16) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v, grid), call(q, k, v, grid))
    assert counter.frame_count <= 3


NUMBERS = {
    "sparsity": lambda value, **others: {"sparsity": value, **others},
    "gate": lambda value, **others: {"topk": 2, "compress_attn_weight": value, **others},
}


@pytest.mark.parametrize("run", BACKENDS, ids=lambda run: "-".join(run))
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_schedule_of_numbers(run, number, backend):
    """Fifty values compile twice: once as a constant, once as whatever comes. Gradients too."""
    name, device = run
    dtype = torch.float32 if device == "cpu" else torch.float16

    def call(q, k, v, value):
        return vsa_jit.video_sparse_attn(q, k, v, backend=name, **NUMBERS[number](value))

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    leaves = [leaf(1, 2, 640, 64, device=device, dtype=dtype) for _ in range(3)]
    for i in range(50):
        value = i / 53 + 0.001
        results, eager = ([f(*leaves, value)] for f in (compiled, call))
        if i % 10 == 0:
            for outs in (results, eager):
                outs += torch.autograd.grad(outs[0].float().sum(), leaves)
        for result, expected in zip(results, eager, strict=True):
            assert ref.error(result, expected) <= (1e-5 if dtype == torch.float32 else 2e-3)
    assert counter.frame_count == 2


def test_compiled_schedule_of_a_module():
    """As a training loop has it: an attribute that changes, on a sequence whose length changes too."""

    class Attention(torch.nn.Module):
        sparsity, gate = 0.0, 1.0

        def forward(self, q):
            return vsa_jit.video_sparse_attn(q, q, q, sparsity=self.sparsity, compress_attn_weight=self.gate)

    module = Attention()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for i in range(30):
        module.sparsity, module.gate = i / 31, 1 / (1 + i)
        q = torch.randn(1, 2, 300 + 10 * (i // 10), 32)
        torch.testing.assert_close(compiled(q), module(q), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 5


@pytest.mark.parametrize("wrong", [90.0, -0.1, 1.0])
def test_a_wrong_number_in_a_schedule(wrong):
    """What the program says depends on PyTorch, which runs it eagerly or stops; nothing is computed."""
    q = torch.randn(1, 2, 200, 32)
    compiled = torch.compile(lambda q, value: vsa_jit.video_sparse_attn(q, q, q, sparsity=value), backend="aot_eager")
    for value in (0.1, 0.2):
        compiled(q, value)
    with pytest.raises(ValueError, match=r"sparsity: expected a number in \[0, 1\)"):
        compiled(q, wrong)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("arguments", [{"topk": 3}, {"sparsity": 0.6}, {"sparsity": 0.9}], ids=str)
def test_exported_with_lengths_of_its_own(strict, arguments):
    """Queries and keys of any lengths, equal ones too, and however few blocks are left to select."""

    class Attention(torch.nn.Module):
        def forward(self, q, k):
            return vsa_jit.video_sparse_attn(q, k, k, **arguments)

    dynamic = ({2: torch.export.Dim.DYNAMIC}, {2: torch.export.Dim.DYNAMIC})
    traced = torch.randn(1, 2, 640, 32), torch.randn(1, 2, 2048, 32)
    program = torch.export.export(Attention(), traced, dynamic_shapes=dynamic, strict=strict).module()
    for q_len, kv_len in ((640, 2048), (512, 512), (300, 257), (200, 1500)):
        q, k = torch.randn(1, 2, q_len, 32), torch.randn(1, 2, kv_len, 32)
        torch.testing.assert_close(program(q, k), Attention()(q, k), rtol=1e-5, atol=1e-6)


def test_compiled_block_sizes():
    q = torch.randn(1, 2, 512, 32)

    def call(q, block_size):
        return vsa_jit.video_sparse_attn(q, q, q, topk=2, block_size=block_size)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for block_size in (64, 128, 192, 256):
        torch.testing.assert_close(compiled(q, block_size), call(q, block_size), rtol=1e-5, atol=1e-6)


def test_a_gate_that_becomes_zero_while_compiled():
    q = torch.randn(1, 2, 200, 32)

    def call(q, gate):
        return vsa_jit.video_sparse_attn(q, q, q, topk=2, compress_attn_weight=gate)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for gate in (0.5, 0.25, 0.0, 0.75, -1.0):
        torch.testing.assert_close(compiled(q, gate), call(q, gate), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.int64(2), np.float32(0.5)], ids=["topk", "sparsity"])
def test_compiled_with_numbers_of_numpy(value):
    q = torch.randn(1, 2, 200, 32)

    def call(q):
        name = "topk" if value > 1 else "sparsity"
        return vsa_jit.video_sparse_attn(q, q, q, **{name: value}, compress_attn_weight=np.float32(0.5))

    compiled = torch.compile(call, backend="aot_eager")
    torch.testing.assert_close(compiled(q), call(q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", BACKENDS, ids=lambda run: "-".join(run))
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("gate", [None, 0.0, "full", "per head"])
def test_a_batch_of_nothing(run, layout, gate):
    """As of PyTorch's attention: empty results, and empty gradients; zeros for a gate that every element shares."""
    backend, device = run
    dtype = torch.float32 if device == "cpu" else torch.float16
    shape = (0, 4, 200, 64) if layout == "bhsd" else (0, 200, 4, 64)
    kv_shape = (0, 2, 200, 64) if layout == "bhsd" else (0, 200, 2, 64)
    q, k, v = (leaf(*size, device=device, dtype=dtype) for size in (shape, kv_shape, kv_shape))
    shared = (1, 4, 1, 1) if layout == "bhsd" else (1, 1, 4, 1)
    weight = {"full": shape, "per head": shared}.get(gate)
    weight = gate if weight is None else leaf(*weight, device=device, dtype=dtype)
    order = {"layout": layout, "backend": backend}
    out = vsa_jit.video_sparse_attn(q, k, v, topk=2, compress_attn_weight=weight, **order)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    out.sum().backward()
    leaves = [q, k, v] + ([weight] if isinstance(weight, torch.Tensor) else [])
    for x in leaves:
        assert x.grad.shape == x.shape
        assert x.grad.count_nonzero() == 0

    block_map = torch.ones(4, 4, dtype=torch.bool, device=device)
    idx = torch.zeros(0, 4, 4, 2, dtype=torch.int32, device=device)
    num = torch.zeros(0, 4, 4, dtype=torch.int32, device=device)
    for grad in (True, False, False):
        with torch.set_grad_enabled(grad):
            for results in (
                vsa_jit.block_sparse_attn(q, k, v, block_map, **order),
                vsa_jit.block_sparse_attn_from_indices(q, k, v, idx, num, **order),
            ):
                assert [x.shape for x in results] == [q.shape, (0, 4, 200)]
    assert vsa_jit.explain(q, k, v, **order).backend == backend


def test_a_batch_of_nothing_is_compiled():
    call = torch.compile(lambda q: vsa_jit.video_sparse_attn(q, q, q, topk=2), fullgraph=True, backend="aot_eager")
    for batch in (2, 0, 3):
        q = leaf(batch, 2, 200, 32, device="cpu")
        call(q).sum().backward()
        assert q.grad.shape == q.shape


def test_second_derivative_is_refused():
    inputs = Inputs(Case("twice", q_len=200), "cpu", torch.float32)
    out = inputs.video_sparse_attn("torch")
    (dq,) = torch.autograd.grad(out.sum(), inputs.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        dq.sum().backward()


def test_shapes_without_data(monkeypatch):
    """Whatever backend was asked for: none runs."""
    no_backend_runs(monkeypatch)
    q, k = torch.empty(2, 4, 300, 32, device="meta"), torch.empty(2, 2, 500, 32, device="meta")
    assert vsa_jit.video_sparse_attn(q, k, k, topk=2).shape == q.shape
    block_map = torch.empty(4, 5, 8, dtype=torch.bool, device="meta")
    out, lse = vsa_jit.block_sparse_attn(q, k, k, block_map)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def test_compile_under_autocast():
    inputs = Inputs(CASE_OF_ORDER["plain"], "cpu", torch.float32)

    def call(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return vsa_jit.video_sparse_attn(q, k, v, topk=2)

    eager = call(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(inputs.q, inputs.k, inputs.v), eager)


def test_a_program_runs_on_a_shorter_sequence_than_it_was_traced_with():
    """More blocks are asked for than there are then."""
    program = torch.jit.trace(
        lambda q: vsa_jit.video_sparse_attn(q, q, q, topk=4), torch.randn(1, 2, 256, 32), check_trace=False
    )
    q = torch.randn(1, 2, 128, 32)
    torch.testing.assert_close(program(q), vsa_jit.video_sparse_attn(q, q, q, topk=4))


def test_no_grad_keeps_nothing():
    inputs = Inputs(Case("inference", q_len=200, gate="full"), "cpu", torch.float32)
    with torch.no_grad():
        assert not inputs.video_sparse_attn("torch").requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASE_OF_ORDER)
def test_cuda_graph(name):
    """Captured forward and backward replay with new inputs; capturing at all shows that nothing waits for the GPU."""
    case = CASE_OF_ORDER[name]
    inputs = Inputs(case, "cuda", torch.float16)
    leaves = [x for x in (inputs.q, inputs.k, inputs.v, inputs.gate) if isinstance(x, torch.Tensor)]

    def step():
        out = inputs.video_sparse_attn("triton")
        return out, *torch.autograd.grad(out, leaves, inputs.dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    fresh = Inputs(case, "cuda", torch.float16)
    with torch.no_grad():
        for old, new in zip(leaves, (fresh.q, fresh.k, fresh.v, fresh.gate), strict=False):
            old.copy_(new)
        inputs.dout.copy_(fresh.dout)
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_never_waits_for_the_gpu():
    inputs = Inputs(CASE_OF_ORDER["plain"], "cuda", torch.float16)
    block_map = torch.rand(2, 4, 4, 4, device="cuda") < 0.5
    inputs.video_sparse_attn("triton").backward(inputs.dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.video_sparse_attn("triton").backward(inputs.dout)
        vsa_jit.block_sparse_attn(inputs.q, inputs.k, inputs.v, block_map, backend="triton")
        inputs.video_sparse_attn("torch").backward(inputs.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


OPERATORS = ["vsa_jit::video_sparse_attn"]


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_who_watches_a_call_sees_its_operators(device, watch):
    """Without gradients too, where nobody else needs them."""
    inputs = Inputs(Case("watched", q_len=200), device, torch.float32)
    for x in (inputs.q, inputs.k, inputs.v):
        x.requires_grad_(False)
    with torch.no_grad():
        assert watch(torch.no_grad()(lambda: inputs.video_sparse_attn("auto"))) == OPERATORS


def test_who_does_not_watch_does_not_wait_for_the_dispatcher(monkeypatch):
    """In a training step neither; its second derivative is asked for through the dispatcher, which refuses it."""
    inputs = Inputs(Case("unwatched", q_len=200), "cpu", torch.float32)
    leaves = inputs.q, inputs.k, inputs.v

    def results():
        out = inputs.video_sparse_attn("torch")
        return out, *torch.autograd.grad(out, leaves, inputs.dout)

    with torch.autograd.profiler.profile():
        expected = results()
    for operator in (video.video_sparse_attn, video.video_sparse_attn_backward):
        monkeypatch.setattr(operator, "overload", None)
    for _ in range(2):
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(inputs.video_sparse_attn("torch"), expected[0], rtol=0, atol=0)
    with pytest.raises(TypeError, match="not callable"), torch.autograd.profiler.profile():
        inputs.video_sparse_attn("torch")


@pytest.mark.parametrize("name", ["q", "gate"])
def test_a_view_that_pytorch_negates_when_it_is_read(name):
    inputs = Inputs(Case("lazy", q_len=200, gate="full"), "cuda" if GPU else "cpu", torch.float32)
    x = getattr(inputs, name).detach()
    with torch.no_grad():
        setattr(inputs, name, torch._neg_view(x))
        out = inputs.video_sparse_attn("triton")
        setattr(inputs, name, -x)
        torch.testing.assert_close(out, inputs.video_sparse_attn("triton"), rtol=0, atol=0)


def test_gradients_of_several_results_at_once():
    """PyTorch maps the backward by an older kind of vmap."""
    inputs = Inputs(Case("batched", q_len=200), "cpu", torch.float32)
    out = inputs.video_sparse_attn("torch")
    grads = torch.randn(2, *out.shape)
    together = torch.autograd.grad(out, inputs.q, grads, is_grads_batched=True, retain_graph=True)[0]
    apart = [torch.autograd.grad(out, inputs.q, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(together, torch.stack(apart))


def test_fake_tensors_run_no_kernel(monkeypatch):
    """Under their mode, and after it."""
    no_backend_runs(monkeypatch)
    with FakeTensorMode():
        q = torch.empty(1, 2, 200, 32)
        inside = vsa_jit.video_sparse_attn(q, q, q, topk=2)
    outside = vsa_jit.video_sparse_attn(q, q, q, topk=2)
    assert inside.shape == outside.shape == q.shape


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_recorded_for_one_that_needs_them(device, name):
    inputs = Inputs(Case("recorded", q_len=200), device, torch.float32)
    for other in {"q", "k", "v"} - {name}:
        getattr(inputs, other).requires_grad_(False)
    inputs.video_sparse_attn("auto").sum().backward()
    assert getattr(inputs, name).grad is not None
    with torch.no_grad():
        assert not inputs.video_sparse_attn("auto").requires_grad

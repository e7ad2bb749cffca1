"""Settings of PyTorch around a call change nothing of it: output, selection and gradients, eager and compiled."""

import importlib
from contextlib import contextmanager, nullcontext

import pytest
import torch
from support import reference as ref
from support.problems import BACKENDS, INTERPRETED, Case, Inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsa_jit
from vsa_jit.backends.torch import launches as torch_backend
from vsa_jit.problem import Coarse


def sdpa(*backends):
    return lambda device: sdpa_kernel(list(backends))


@contextmanager
def restored(get, change, put):
    before = get()
    change()
    try:
        yield
    finally:
        put(before)


def precision(value):
    return lambda device: restored(
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision(value),
        torch.set_float32_matmul_precision,
    )


def flag(owner, name, value):
    return lambda device: restored(
        lambda: getattr(owner, name), lambda: setattr(owner, name, value), lambda before: setattr(owner, name, before)
    )


def no_sdp(device):
    names = ("flash", "mem_efficient", "math", "cudnn")
    enabled = [getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in names]
    enable = [getattr(torch.backends.cuda, f"enable_{name}_sdp") for name in names]
    return restored(
        lambda: [get() for get in enabled],
        lambda: [put(False) for put in enable],
        lambda before: [put(value) for put, value in zip(enable, before, strict=True)],
    )


def default_dtype(device):
    return restored(torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64), torch.set_default_dtype)


def default_device(device):
    return torch.device("meta")


@contextmanager
def deterministic(device):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


def autocast(device):
    return torch.autocast(device, torch.bfloat16)


SETTINGS = {
    "cudnn attention": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash attention": sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient attention": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math attention": sdpa(SDPBackend.MATH),
    "no sdpa at all": no_sdp,
    "precision high": precision("high"),
    "precision medium": precision("medium"),
    "allow_tf32": flag(torch.backends.cuda.matmul, "allow_tf32", True),
    "tf32 of cuda": flag(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "bf16 of mkldnn": flag(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "tf32 of mkldnn": flag(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "reduced precision reductions": flag(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    "fp16 accumulation": flag(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    "default dtype": default_dtype,
    "default device": default_device,
    "deterministic": deterministic,
    "autocast": autocast,
}


@pytest.fixture(params=BACKENDS, ids=lambda run: "-".join(run))
def run(request):
    return request.param


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


def inputs_of(run, dtype) -> Inputs:
    """Large enough for PyTorch to use what it is allowed to use."""
    case = Case("ambient", q_len=640, heads=4, kv_heads=2, head_dim=64, topk=3, gate="full")
    return Inputs(case, run[1], dtype, seed=5)


def results_of(run, inputs: Inputs, call) -> list:
    """Output, gradients, and the output under ``inference_mode``."""
    leaves = (inputs.q, inputs.k, inputs.v, inputs.gate)
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    with torch.inference_mode():
        inferred = call(*leaves)
    return [out.detach(), *grads, inferred]


def video_sparse_attn(run):
    return lambda q, k, v, gate: vsa_jit.video_sparse_attn(q, k, v, topk=3, compress_attn_weight=gate, backend=run[0])


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_results(run, setting, half):
    if run[0] == "sm90" and not half:
        pytest.skip("its kernels are for half precision")
    inputs = inputs_of(run, torch.float16 if half else torch.float32)
    call = video_sparse_attn(run)
    expected = results_of(run, inputs, call)
    with setting(run[1]):
        results = results_of(run, inputs, call)
    # Where PyTorch may use less than fp32, the torch backend computes products in fp64.
    tolerance = 2e-3 if half else 2e-6
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert result.device == wanted.device
        if run[0] == "torch":
            assert ref.error(result, wanted) <= tolerance
        else:
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("compiled", [False, True], ids=["around", "inside"])
def test_results_of_a_compiled_region(setting, compiled):
    """With the setting around a region that was compiled before, or in force while it is compiled."""
    run = ("torch", "cpu")
    inputs = inputs_of(run, torch.float32)
    call = video_sparse_attn(run)
    expected = results_of(run, inputs, call)
    program = torch.compile(call, fullgraph=True, backend="aot_eager")
    if not compiled:
        results_of(run, inputs, program)
    with setting("cpu"):
        results = results_of(run, inputs, program)
    for result, wanted in zip(results, expected, strict=True):
        assert ref.error(result, wanted) <= 2e-6


def coarse_attend_of(run):
    return importlib.import_module(f"vsa_jit.backends.{run[0]}.launches").coarse_attend


def test_selection(run, setting):
    """Scores that TF32 and bf16 would tell apart in another order, and fp32 does not."""
    _, device = run
    near = torch.linspace(1, 1 + 2e-4, 10, device=device)[torch.randperm(10)]
    q_c = torch.randn(1, 4, 10, 64, device=device).abs()
    k_c = near[:, None].expand(1, 2, 10, 64) * torch.randn(1, 2, 1, 64, device=device).abs()
    expected = near.topk(3).indices.sort().values.int().cpu()
    with torch.no_grad(), setting(device):
        _, idx, num = coarse_attend_of(run)(Coarse(None, 0.125, torch.float32), q_c, k_c, None, None, [3], False)
    assert (num == 3).all()
    assert torch.equal(idx.cpu(), expected.expand(1, 4, 10, 3))


def test_selection_among_scores_that_are_equal_but_for_rounding(run, setting):
    """Sums of the same terms in two orders: which is larger depends on the arithmetic, and that on no setting."""
    k_c = torch.randn(1, 2, 5, 64, device=run[1])
    k_c = torch.cat([k_c, k_c.unflatten(-1, (32, 2)).flip(-1).flatten(-2)], 2)
    q_c = torch.randn(1, 4, 10, 32, device=run[1]).repeat_interleave(2, -1)
    selections = []
    for _ in range(2):
        with torch.no_grad(), setting(run[1]) if selections else nullcontext():
            coarse = Coarse(None, 0.125, torch.float32)
            selections.append(coarse_attend_of(run)(coarse, q_c, k_c, None, None, [3], False)[1])
    assert torch.equal(*selections)


by_product_run = pytest.mark.parametrize("product_run", [*BACKENDS, *INTERPRETED], ids=lambda run: "-".join(run))


@by_product_run
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 64, 64, 64), (3, 100, 33, 130)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-12, 1e12])
def test_products_are_as_exact_as_fp32(product_run, size, magnitude):
    """Operands of any strides, their values over many orders of magnitude."""
    from vsa_jit.backends.triton import launches as triton_backend

    module = torch_backend if product_run[0] == "torch" else triton_backend
    rows, m, k, n = size
    a, b = (
        torch.randn(shape, device=product_run[1]) * torch.logspace(-3, 3, shape[2], device=product_run[1]) * magnitude
        for shape in ((rows, m, k), (rows, n, k))
    )
    for left, right in ((a, b.mT), (a.mT.contiguous().mT, b.mT), (a, b.mT.contiguous()), (a[:, ::2], b[:, 1:].mT)):
        exact = left.double() @ right.double()
        error = (module.matmul(left, right).double() - exact).norm() / exact.norm()
        assert error <= 5e-7


@by_product_run
def test_products_of_infinite_values(product_run):
    from vsa_jit.backends.triton import launches as triton_backend

    module = torch_backend if product_run[0] == "torch" else triton_backend
    a = torch.randn(1, 4, 64, device=product_run[1]).abs()
    b = torch.randn(1, 64, 4, device=product_run[1]).abs()
    a[0, 0, 3] = float("inf")
    a[0, 1, 3] = float("nan")
    result = module.matmul(a, b)
    assert result[0, 0].isposinf().all()
    assert result[0, 1].isnan().all()
    assert result[0, 2:].isfinite().all()

"""The chooser: which backend runs, the reasons, the environment variable and what is logged."""

import logging
import re
from dataclasses import replace

import pytest
import torch

import vsa_jit
from vsa_jit.backends import choose as chooser
from vsa_jit.backends.base import OPERATORS, BackendSpec
from vsa_jit.backends.choose import choose
from vsa_jit.backends.sm90 import launches as sm90_launches
from vsa_jit.backends.sm90 import support
from vsa_jit.backends.triton import launches as triton_launches
from vsa_jit.backends.triton import support as triton_support
from vsa_jit.jit import engines, toolchain
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.errors import CacheError, CompileError, JitError, LoadError, Unavailable
from vsa_jit.problem import Problem

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


NOT_ON_CPU = {
    "sm90": "the kernels are for Hopper GPUs, and the tensors are on cpu",
    "triton": "Triton needs a CUDA device, and the tensors are on cpu",
}


def qkv(head_dim=32):
    return (torch.randn(1, 2, 128, head_dim) for _ in range(3))


def problem(head_dim=32):
    q, k, _ = qkv(head_dim)
    return Problem.of(q, k, (1, 1, 64), None, "bhsd", 0.1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for variable in ("TRITON_INTERPRET", "VSA_JIT_BACKEND", "VSA_JIT_ENGINE"):
        monkeypatch.delenv(variable, raising=False)
    for name, empty in (("_logged", set()), ("_failed", {}), ("_chosen", {})):
        monkeypatch.setattr(chooser, name, empty)
    support.why_no_engine.cache_clear()
    yield
    support.why_no_engine.cache_clear()


def has_capability(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a Hopper GPU, a driver and NVRTC."""
    has_capability(monkeypatch, 9, 0)
    monkeypatch.setattr(toolchain, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(engines, "choose", lambda kernels, arch, name="auto": engines.ENGINES[0])


def test_explain_on_a_cpu():
    choice = vsa_jit.explain(*qkv(), topk=1)
    assert (choice.backend, choice.engine) == ("torch", None)
    assert choice.reasons == NOT_ON_CPU
    lines = [f"not {name}: {reason}" for name, reason in NOT_ON_CPU.items()]
    assert str(choice).splitlines() == ["runs: torch", *lines]
    assert repr(choice) == str(choice)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_cuda_runs_triton(monkeypatch, capability):
    has_capability(monkeypatch, *capability)
    choice = choose(problem(), "auto", CUDA, torch.float16)
    assert (choice.backend, choice.engine) == ("triton", "triton")
    version = ".".join(map(str, capability))
    assert choice.reasons == {
        "sm90": f"the kernels are for compute capability 9.0, and cuda:0 has {version}",
        "torch": "slower than triton",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_runs_sm90(hopper, monkeypatch, dtype, head_dim):
    choice = choose(problem(head_dim=head_dim), "auto", CUDA, dtype)
    assert (choice.backend, choice.engine) == ("sm90", "nvrtc")
    assert choice.reasons == {"triton": "slower than sm90", "torch": "slower than sm90"}
    by_sm90 = {operator for operator, runner in choice.runners.items() if runner == "sm90"}
    assert by_sm90 == {"block_means", "coarse_attend", "coarse_attend_backward", "attend", "attend_backward"}
    assert set(OPERATORS) - set(choice.runners) == {"attend_tangent"}
    assert str(choice).splitlines()[0] == "runs: sm90 (engine: nvrtc); single steps: triton"

    loaded = []
    monkeypatch.setattr(support.module, "load", lambda kernels, device, engine: loaded.append((device, engine)))
    run = chooser._choose_and_prepare(problem(head_dim=head_dim), "auto", CUDA, dtype, ())
    # What is explained is what runs.
    assert loaded == [(0, choice.engine)]
    functions = {"sm90": sm90_launches, "triton": triton_launches}
    assert run == {operator: functions[runner] for operator, runner in choice.runners.items()}
    for name in ("auto", "sm90", "triton"):
        assert chooser.selection_backend_for("select", name, CUDA) is triton_launches


@pytest.mark.parametrize(("num_blocks", "runner"), [(16_384, "sm90"), (16_385, "triton")])
def test_who_runs_the_coarse_branch_of_many_blocks(hopper, num_blocks, runner):
    of_many = problem(head_dim=64)
    of_many = of_many._replace(keys=of_many.keys._replace(length=64 * num_blocks))
    choice = choose(of_many, "auto", CUDA, torch.bfloat16)
    assert choice.backend == choice.runners["attend"] == "sm90"
    assert choice.runners["coarse_attend"] == choice.runners["coarse_attend_backward"] == runner


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (96, torch.float16, "the kernels are for head dimensions 64 and 128, and q's is 96"),
        (64, torch.float32, "the kernels are for bf16 and fp16, and q is torch.float32"),
    ],
)
def test_what_the_hopper_kernels_do_not_cover(hopper, head_dim, dtype, reason):
    choice = choose(problem(head_dim=head_dim), "auto", CUDA, dtype)
    assert (choice.backend, choice.reasons["sm90"]) == ("triton", reason)


def test_tensors_that_tma_cannot_read(hopper):
    aligned = torch.randn(1, 2, 128, 64).half()
    odd_rows = torch.randn(1, 2, 128, 68).half()[..., :64]
    odd_start = torch.randn(1 + 2 * 128 * 64).half()[1:].view(1, 2, 128, 64)
    reason = "TMA needs strides that are multiples of 16 bytes, got 136"
    assert choose(problem(head_dim=64), "auto", CUDA, torch.float16, (aligned,)).backend == "sm90"
    assert choose(problem(head_dim=64), "auto", CUDA, torch.float16, (aligned, odd_rows)).reasons["sm90"] == reason
    reasons = choose(problem(head_dim=64), "auto", CUDA, torch.float16, (odd_start,)).reasons
    assert reasons["sm90"] == "TMA needs an address that is a multiple of 16 bytes"


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        ((12, 3), "the NVIDIA driver is of CUDA 12.3, older than 12.4 (install a newer NVIDIA driver)"),
        (Unavailable("no NVIDIA driver"), "no NVIDIA driver"),
    ],
)
def test_a_driver_that_does_not_do(hopper, monkeypatch, driver, reason):
    def version():
        if isinstance(driver, Unavailable):
            raise driver
        return driver

    monkeypatch.setattr(toolchain, "driver_version", version)
    choice = choose(problem(head_dim=64), "auto", CUDA, torch.float16)
    assert (choice.backend, choice.reasons["sm90"]) == ("triton", reason)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("no compiler: nvrtc: the package cupy is not installed (pip install cupy)"),
        PermissionError(13, "Permission denied", "/opt/cuda"),
    ],
)
def test_nothing_to_compile_with(hopper, monkeypatch, error):
    def choose_engine(kernels, arch, name="auto"):
        raise error

    monkeypatch.setattr(engines, "choose", choose_engine)
    assert choose(problem(head_dim=64), "auto", CUDA, torch.float16).backend == "triton"
    with pytest.raises(RuntimeError, match=re.escape(f"backend='sm90' cannot run this call: {error}")):
        choose(problem(head_dim=64), "sm90", CUDA, torch.float16)


ERRORS = {
    "compile": CompileError("block means", "a.cu(1): error: no"),
    "load": LoadError("block means could not be loaded: OSError: noexec"),
    "folder": CacheError("no folder for compiled kernels"),
}


@pytest.fixture(params=ERRORS)
def broken_entry(request, monkeypatch):
    """A backend made for the CPU, whose kernels do not compile or load."""

    def fail(problem, device, dtype, engine):
        raise ERRORS[request.param]

    broken = BackendSpec(
        name="sm90",
        is_native_on=lambda device: True,
        why_not_on=lambda device: None,
        why_not=lambda problem, dtype, tensors: None,
        engine_of=lambda problem, device, dtype: "nvrtc",
        runners=dict.fromkeys(OPERATORS, "torch"),
        prepare=fail,
    )
    specs = broken, *chooser.specs()[1:]
    monkeypatch.setattr(chooser, "specs", lambda: specs)
    return str(ERRORS[request.param])


def test_a_failed_compile_warns_once_and_runs_the_next_backend(broken_entry, caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        outputs = [vsa_jit.video_sparse_attn(q, k, v, topk=1) for _ in range(3)]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"not sm90: {broken_entry}" in record.getMessage()
    expected = vsa_jit.video_sparse_attn(q, k, v, topk=1, backend="torch")
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_a_failed_compile_is_an_error_where_the_backend_was_asked_for(broken_entry):
    q, k, v = qkv()
    with pytest.raises(JitError, match=re.escape(broken_entry)):
        vsa_jit.video_sparse_attn(q, k, v, topk=1, backend="sm90")


def test_a_failed_compile_concerns_its_own_kind_of_call(broken_entry):
    """Those of another dtype, head dimension or block may well compile; and who insists is told why, each time."""
    q, k, v = qkv()
    vsa_jit.video_sparse_attn(q, k, v, topk=1)
    assert vsa_jit.explain(q, k, v, topk=1).reasons["sm90"] == broken_entry
    assert vsa_jit.explain(q.half(), k.half(), v.half(), topk=1).backend == "sm90"
    assert vsa_jit.explain(*qkv(64), topk=1).backend == "sm90"
    assert vsa_jit.explain(q, k, v, topk=1, block_size=128).backend == "sm90"
    assert vsa_jit.explain(q, k, v, topk=1, backend="sm90").backend == "sm90"


NO_ENGINE = {
    "no folder": CacheError("no folder for compiled kernels"),
    "unreachable": PermissionError(13, "Permission denied", "/home/you"),
    "no sources": Unavailable("the CUDA sources were expected elsewhere", "install vsa-jit again"),
}


@pytest.mark.parametrize("error", NO_ENGINE.values(), ids=NO_ENGINE)
def test_what_keeps_the_engine_from_being_chosen_is_a_reason(hopper, monkeypatch, error):
    def fail(kernels, arch, name="auto"):
        if kernels:
            raise error
        return engines.ENGINES[0]

    monkeypatch.setattr(engines, "choose", fail)
    choice = choose(problem(head_dim=64), "auto", CUDA, torch.float16)
    assert (choice.backend, choice.engine, choice.reasons["sm90"]) == ("triton", "triton", str(error))
    with pytest.raises(RuntimeError, match=re.escape(f"backend='sm90' cannot run this call: {error}")):
        choose(problem(head_dim=64), "sm90", CUDA, torch.float16)


def test_a_wrong_cache_variable_is_no_reason_to_fall_back(hopper, monkeypatch):
    monkeypatch.setattr(engines, "choose", lambda kernels, arch, name="auto": engines.ENGINES[0])
    spec = replace(support.SPEC, engine_of=lambda problem, device, dtype: open_cache())
    monkeypatch.setattr(chooser, "specs", lambda: (spec,))
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", "relative")
    with pytest.raises(CacheError, match="VSA_JIT_CACHE_DIR: expected an absolute path"):
        choose(problem(head_dim=64), "auto", CUDA, torch.float16)


def test_old_gpu_runs_torch_and_says_why(monkeypatch):
    has_capability(monkeypatch, 7, 5)
    choice = choose(problem(), "auto", CUDA, torch.float16)
    assert choice.backend == "torch"
    assert choice.reasons["triton"] == "Triton needs compute capability 8.0, and cuda:0 has 7.5"


MISSING_TRITON = "the package triton is not installed (pip install triton)"


def test_without_triton(monkeypatch, hopper):
    monkeypatch.setattr(triton_support, "_is_installed", lambda: False)
    assert choose(problem(), "auto", CUDA, torch.float16).reasons["triton"] == MISSING_TRITON


def test_a_backend_asked_for_by_name_runs_or_raises():
    assert choose(problem(), "torch", CPU, torch.float32).backend == "torch"
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: Triton needs a CUDA device"):
        vsa_jit.video_sparse_attn(q, k, v, topk=1, backend="triton")
    with pytest.raises(RuntimeError, match="backend='sm90' cannot run this call: the kernels are for Hopper GPUs"):
        chooser.selection_backend_for("map_to_indices", "sm90", CPU)


def test_environment_variable(monkeypatch):
    has_capability(monkeypatch, 9, 0)
    monkeypatch.setenv("VSA_JIT_BACKEND", "torch")
    choice = choose(problem(), "auto", CUDA, torch.float16)
    assert (choice.backend, choice.reasons["triton"]) == ("torch", "torch was asked for")
    assert choose(problem(), "triton", CUDA, torch.float16).backend == "triton"
    monkeypatch.setenv("VSA_JIT_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"VSA_JIT_BACKEND: expected one of .*, got 'cuda'"):
        choose(problem(), "auto", CUDA, torch.float16)


def test_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(problem(), "auto", CPU, torch.float16).backend == "torch"
    assert choose(problem(), "triton", CPU, torch.float16).backend == "triton"


def test_each_choice_is_logged_once(caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        for _ in range(3):
            vsa_jit.video_sparse_attn(q, k, v, topk=1)
    reasons = "; ".join(f"not {name}: {reason}" for name, reason in NOT_ON_CPU.items())
    expected = f"backend torch runs on cpu ({reasons})"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", expected)]


def test_missing_the_backend_made_for_the_device_is_a_warning(hopper, monkeypatch, caplog):
    """What happens on a Hopper GPU whose own backend cannot run."""
    monkeypatch.setattr(toolchain, "driver_version", lambda: (12, 3))
    choice = choose(problem(head_dim=64), "auto", CUDA, torch.float16)
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        chooser._log_once(choice, "auto", CUDA)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "backend triton runs on cuda:0 (not sm90: the NVIDIA driver is of CUDA 12.3, older than 12.4 "
        "(install a newer NVIDIA driver))"
    )

"""The chooser: which backend runs, the reasons, the environment variable and what is logged."""

import logging

import pytest
import torch

import vsa_jit
from vsa_jit.backends import choose as chooser
from vsa_jit.backends.choose import Entry, choose
from vsa_jit.problem import Problem

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def qkv():
    return (torch.randn(1, 2, 128, 32) for _ in range(3))


def problem(backend="auto"):
    q, k, _ = qkv()
    return Problem.of(q, k, (1, 1, 64), None, "bhsd", 0.1, backend)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("VSA_JIT_BACKEND", raising=False)
    monkeypatch.setattr(chooser, "_logged", set())


def has_capability(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_explain_on_a_cpu():
    choice = vsa_jit.explain(*qkv(), topk=1)
    assert (choice.backend, choice.engine) == ("torch", None)
    assert choice.reasons == {"triton": "Triton needs a CUDA device, and the tensors are on cpu"}
    assert str(choice) == "runs: torch\nnot triton: Triton needs a CUDA device, and the tensors are on cpu"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_cuda_runs_triton(monkeypatch, capability):
    has_capability(monkeypatch, *capability)
    choice = choose(problem(), CUDA, torch.float16)
    assert (choice.backend, choice.engine, choice.reasons) == ("triton", "triton", {"torch": "slower than triton"})


def test_old_gpu_runs_torch_and_says_why(monkeypatch):
    has_capability(monkeypatch, 7, 5)
    choice = choose(problem(), CUDA, torch.float16)
    assert choice.backend == "torch"
    assert choice.reasons["triton"] == "Triton needs compute capability 8.0, and cuda:0 has 7.5"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(chooser, "_installed", lambda package: False)
    assert choose(problem(), CUDA, torch.float16).reasons["triton"] == "the package triton is not installed"


def test_a_backend_asked_for_by_name_runs_or_raises():
    assert choose(problem("torch"), CPU, torch.float32).backend == "torch"
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: Triton needs a CUDA device"):
        vsa_jit.video_sparse_attn(q, k, v, topk=1, backend="triton")


def test_environment_variable(monkeypatch):
    has_capability(monkeypatch, 9, 0)
    monkeypatch.setenv("VSA_JIT_BACKEND", "torch")
    choice = choose(problem(), CUDA, torch.float16)
    assert (choice.backend, choice.reasons) == ("torch", {"triton": "torch was asked for"})
    assert choose(problem("triton"), CUDA, torch.float16).backend == "triton"
    monkeypatch.setenv("VSA_JIT_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"VSA_JIT_BACKEND: expected one of .*, got 'cuda'"):
        choose(problem(), CUDA, torch.float16)


def test_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(problem(), CPU, torch.float16).backend == "torch"
    assert choose(problem("triton"), CPU, torch.float16).backend == "triton"


def test_each_choice_is_logged_once(caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        for _ in range(3):
            vsa_jit.video_sparse_attn(q, k, v, topk=1)
    expected = "backend torch runs on cpu (not triton: Triton needs a CUDA device, and the tensors are on cpu)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", expected)]


def test_missing_the_backend_made_for_the_device_is_a_warning(monkeypatch, caplog):
    """What happens on a Hopper GPU whose own backend cannot run."""
    has_capability(monkeypatch, 9, 0)
    hopper = Entry(
        "hopper", "nvrtc", lambda device: True, lambda problem, device, dtype: "CUDA 12.3 is older than 12.4"
    )
    monkeypatch.setattr(chooser, "ENTRIES", (hopper, *chooser.ENTRIES))
    choice = choose(problem(), CUDA, torch.float16)
    with caplog.at_level(logging.INFO, logger="vsa_jit"):
        chooser._log_once(choice, problem(), CUDA)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "backend triton runs on cuda:0 (not hopper: CUDA 12.3 is older than 12.4)"

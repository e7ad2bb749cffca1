"""The launches of the whole operator one after the other, against the backend's functions one by one."""

import copy

import pytest
import torch
from support import emulate
from support.problems import Case, Inputs
from torch.utils.checkpoint import checkpoint

from vsa_jit import api
from vsa_jit.backends.sm90 import launches
from vsa_jit.fastpath import CallCache
from vsa_jit.ops import video
from vsa_jit.problem import Coarse, Operands, Problem

pytestmark = emulate.NEEDS_COMPILER

GRID = (5, 6, 7)


@pytest.mark.parametrize(
    ("gate", "segments"),
    [("full", ((0, 0, 0, 70), (0, *GRID))), (0.5, None), (2.0, None), (0.0, None)],
    ids=["gate, segments", "0.5", "2", "fine only"],
)
def test_whole(monkeypatch, gate, segments):
    """The same bits, of the output and of all gradients, and of what a watched backward gets."""
    emulate.emulate(monkeypatch, 2)
    length = 210 if segments is None else 280
    numbers = [0, *GRID] if segments is None else [x for segment in segments for x in segment]
    q, dout = (torch.randn(1, length, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, length, 1, 64, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn_like(q) if gate == "full" else None
    value = 0.0 if gate == "full" else gate
    problem = Problem.of(q, k, (4, 4, 4), numbers, "bshd", 0.125)
    coarse = Coarse(problem.keys.segments, problem.softmax_scale, torch.float32)
    settings = (problem, (3,), False, torch.float32, value, weight is not None)
    has_coarse_output = gate != 0.0

    means = launches.block_means(problem, q, k, v if has_coarse_output else None, None, None)
    out_c, idx, num = launches.coarse_attend(coarse, *means, None, [3], False)
    operands = Operands(q, k, v, idx, num, None, None, out_c, weight, value)
    out, lse, out_s = launches.attend(problem, operands, gate in ("full", 2.0))

    def mean_gradients(dout_c):
        return launches.coarse_attend_backward(coarse, *means, None, dout_c)

    is_combined = gate == 0.5
    kept_out = out if out_s is None else out_s
    added = (is_combined, mean_gradients if has_coarse_output else None)
    expected = launches.attend_backward(problem, operands, kept_out, lse, dout, None, True, True, *added)

    tensors = q, k, v, weight, None, None
    inference, none, _ = launches.whole(*settings, False, -1).forward(*tensors)
    assert none is None
    assert torch.equal(inference, out)
    whole = launches.whole(*settings, True, -1)
    result, result_s, memory = whole.forward(*tensors)
    assert torch.equal(result, out)
    assert (result_s is None) == (out_s is None)
    gradients = whole.backward(tensors, result if result_s is None else result_s, memory, dout, True, True)
    for gradient, wanted in zip(gradients[:4], expected[:4], strict=True):
        assert (gradient is None) == (wanted is None)
        assert gradient is None or torch.equal(gradient, wanted)
    kept = (lse, idx, num, out_c, *means) if has_coarse_output else (lse, idx, num, *(None,) * 4)
    for view, wanted in zip(whole.tensors(memory), kept, strict=True):
        assert (view is None) == (wanted is None)
        assert view is None or torch.equal(view, wanted)


@pytest.mark.parametrize("gate", ["full", None])
def test_a_step_past_the_dispatcher_and_one_that_is_watched(monkeypatch, gate):
    """The same output and gradients: the forward may be watched, the backward, or neither of them."""
    emulate.emulate(monkeypatch, 2)
    monkeypatch.setattr(video, "backends_for", lambda *arguments: dict.fromkeys(STEPS, launches))
    case = Case("step", grid=GRID, q_len=210, layout="bshd", heads=2, kv_heads=1, head_dim=64, gate=gate)
    results = []
    for watches in ((), ("forward", "backward"), ("forward",), ("backward",)):
        inputs = Inputs(case, "cpu", torch.bfloat16, seed=1)
        for _ in range(2):
            with torch.autograd.profiler.profile(enabled="forward" in watches):
                out = inputs.video_sparse_attn("torch")
        leaves = [inputs.q, inputs.k, inputs.v, *([inputs.gate] if gate == "full" else [])]
        with torch.autograd.profiler.profile(enabled="backward" in watches):
            grads = torch.autograd.grad(out, leaves, inputs.dout)
        results.append((out, *grads))
    for others in results[1:]:
        for x, y in zip(results[0], others, strict=True):
            assert torch.equal(x, y)


def test_checkpoint(monkeypatch):
    """The first call of its kind and the next one save the same: the second is the first one's, computed again."""
    emulate.emulate(monkeypatch, 2)
    monkeypatch.setattr(video, "backends_for", lambda *arguments: dict.fromkeys(STEPS, launches))
    monkeypatch.setattr(api, "_known_calls", CallCache())
    case = Case("step", grid=GRID, q_len=210, layout="bshd", heads=2, kv_heads=1, head_dim=64, gate=None)
    inputs = Inputs(case, "cpu", torch.bfloat16, seed=1)
    leaves = inputs.q, inputs.k, inputs.v

    def call(q, k, v):
        return replace_qkv(inputs, q, k, v).video_sparse_attn("torch")

    out = checkpoint(call, *leaves, use_reentrant=False)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    plain = call(*leaves)
    for x, y in zip((out, *grads), (plain, *torch.autograd.grad(plain, leaves, inputs.dout)), strict=True):
        assert torch.equal(x, y)


def replace_qkv(inputs, q, k, v):
    inputs = copy.copy(inputs)
    inputs.q, inputs.k, inputs.v = q, k, v
    return inputs


STEPS = ("block_means", "coarse_attend", "coarse_attend_backward", "attend", "attend_backward")

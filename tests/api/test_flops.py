"""What PyTorch's counter of floating-point operations says of a call."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.problems import BACKENDS, Case, Inputs
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vsa_jit
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Problem


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(params=BACKENDS, ids=lambda run: "-".join(run))
def inputs(request) -> Inputs:
    backend, device = request.param
    case = Case("counted", q_len=200, kv_len=330, batch=2, heads=4, kv_heads=2, head_dim=64)
    made = Inputs(case, device, torch.float32 if device == "cpu" else torch.float16)
    made.backend = backend
    return made


def test_all_blocks_count_as_dense_attention(inputs):
    """A backward is counted as PyTorch counts that of its fused attention: five products for the forward's two."""
    q, k, v = inputs.q, inputs.k, inputs.v
    block_map = torch.ones(4, 4, 6, dtype=torch.bool, device=q.device)

    def sparse():
        return vsa_jit.block_sparse_attn(q, k, v, block_map, backend=inputs.backend)[0]

    def dense():
        # The one backend whose products PyTorch counts on every device.
        with sdpa_kernel(SDPBackend.MATH):
            keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
            return F.scaled_dot_product_attention(q, keys, values)

    forward = 4 * 2 * 4 * 200 * 330 * 64
    assert count(sparse) == count(dense) == forward
    assert count(lambda: sparse().sum().backward()) == forward * 7 // 2


def test_only_selected_keys_count(inputs):
    """Blocks that are cut count with the keys that they have."""
    idx, num, block_map = inputs.uneven_indices()
    pairs = inputs.mask(block_map).sum().item()

    def call():
        return vsa_jit.block_sparse_attn_from_indices(inputs.q, inputs.k, inputs.v, idx, num, backend=inputs.backend)[0]

    with torch.no_grad():
        assert count(call) == 4 * 64 * pairs
    assert count(lambda: call().sum().backward()) == 14 * 64 * pairs


@pytest.mark.parametrize(("needed", "products"), [("q", 3), ("k", 4), ("v", 4), ("qkv", 5)])
def test_a_backward_counts_what_it_computes(inputs, needed, products):
    idx, num, block_map = inputs.uneven_indices()
    for name in "qkv":
        getattr(inputs, name).requires_grad_(name in needed)
    out, _ = vsa_jit.block_sparse_attn_from_indices(inputs.q, inputs.k, inputs.v, idx, num, backend=inputs.backend)
    pairs = inputs.mask(block_map).sum().item()
    assert count(lambda: out.sum().backward()) == products * 2 * 64 * pairs


def test_the_whole_operator(inputs):
    """The selected blocks, the scores of the means, and the attention among them."""

    def call():
        return vsa_jit.video_sparse_attn(inputs.q, inputs.k, inputs.v, topk=2, backend=inputs.backend)

    problem = Problem.of(inputs.q, inputs.k, [1, 1, 64], None, "bhsd", 0.125)
    keys = (block_tokens(problem.keys, None, torch.device("cpu")) >= 0).sum(1)
    assert keys.tolist() == [64] * 5 + [10]
    pairs = inputs.mask(inputs.block_map()).sum().item()
    coarse = 2 * 2 * 4 * 4 * 6 * 64
    with torch.no_grad():
        assert count(call) == 4 * 64 * pairs + 2 * coarse
    assert count(lambda: call().sum().backward()) == 14 * 64 * pairs + 7 * coarse


def test_without_values_the_indices_have_room_for_topk():
    with FakeTensorMode():
        q, k = torch.empty(2, 4, 200, 64), torch.empty(2, 2, 330, 64)
        idx = torch.empty(2, 4, 4, 3, dtype=torch.int32)
        num = torch.empty(2, 4, 4, dtype=torch.int32)
        assert count(lambda: vsa_jit.block_sparse_attn_from_indices(q, k, k, idx, num)) == 4 * 2 * 4 * 200 * 192 * 64
        wide = torch.empty(2, 4, 4, 50, dtype=torch.int32)
        assert count(lambda: vsa_jit.block_sparse_attn_from_indices(q, k, k, wide, num)) == 4 * 2 * 4 * 200 * 330 * 64


def test_a_program_that_was_traced(inputs):
    inputs = Inputs(inputs.case, "cpu", torch.float32)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    program = make_fx(lambda q, k, v: vsa_jit.video_sparse_attn(q, k, v, topk=2))(q, k, v)
    assert count(lambda: program(q, k, v)) == count(lambda: vsa_jit.video_sparse_attn(q, k, v, topk=2)) > 0


@pytest.mark.parametrize("first", ["vsa_jit", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    """The counter's module brings Triton, which importing this package does not."""
    second = {"vsa_jit": "torch.utils.flop_counter", "torch.utils.flop_counter": "vsa_jit"}[first]
    program = f"""
import torch
import {first}
import {second}
# Each counter is made before any call that it could count; the first one is told while it counts.
for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
    with mode():
        q = torch.randn(1, 2, 128, 64)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            vsa_jit.block_sparse_attn(q, q, q, torch.ones(2, 2, 2, dtype=torch.bool))
    assert counter.get_total_flops() == 4 * 2 * 128 * 128 * 64, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True)

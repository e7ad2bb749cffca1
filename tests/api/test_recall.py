"""``recall`` against the probabilities of dense attention, summed over the blocks that selection takes."""

import dataclasses

import pytest
import torch
from support.problems import BACKENDS, CASES, Inputs

import vsa_jit

PICKED = (
    "cross, grouped heads",
    "tiled",
    "tiled, other query sizes",
    "raster, bshd",
    "raster 128",
    "own scale",
    "large logits",
)


def expected(inputs: Inputs, topk: int) -> torch.Tensor:
    """[B, H]: the mean over valid queries of the probability on the selected keys."""
    case = dataclasses.replace(inputs.case, topk=topk)
    inputs.case, given = case, inputs.case
    selected = inputs.mask(inputs.block_map())
    inputs.case = given
    tensors = inputs.clean(torch.float64)
    q, k = tensors["q"].detach(), tensors["k"].detach()
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * inputs.scale
    p = scores.masked_fill(~inputs.kv_valid.to(q.device), float("-inf")).softmax(-1)
    return (p * selected).sum(-1)[:, :, inputs.q_valid.to(q.device)].mean(-1)


@pytest.mark.parametrize("run", BACKENDS, ids=str)
@pytest.mark.parametrize("name", PICKED)
def test_shares_of_probability(run, name):
    backend, device = run
    case = next(case for case in CASES if case.name == name)
    head_dim = 64 if backend == "sm90" else case.head_dim
    inputs = Inputs(
        dataclasses.replace(case, head_dim=head_dim), device, torch.float32 if backend == "torch" else torch.bfloat16
    )
    counts = [1, 2, inputs.num_kv_blocks, inputs.num_kv_blocks + 7]
    shares = vsa_jit.recall(inputs.q, inputs.k, topk=counts, backend=backend, **inputs.order)
    assert shares.dtype == torch.float32
    assert not shares.requires_grad
    wanted = torch.stack([expected(inputs, count) for count in counts], dim=-1)
    torch.testing.assert_close(shares.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(shares[..., 2], shares[..., 3])
    assert (shares <= 1).all()


def test_sparsities_are_numbers_of_blocks():
    q, k = torch.randn(2, 1, 2, 640, 16)
    by_share = vsa_jit.recall(q, k, sparsity=[0.9, 0.75, 0.0])
    assert torch.equal(by_share, vsa_jit.recall(q, k, topk=[1, 3, 10]))
    assert (by_share[..., 0] < by_share[..., 1]).all()
    torch.testing.assert_close(by_share[..., 2], torch.ones(1, 2))


def test_selection_in_bf16_is_what_is_asked_about():
    """Means that differ by less than bf16 holds tie in it, and ties go to the lower block."""
    q = torch.ones(1, 1, 64, 16)
    k = torch.ones(1, 1, 192, 16)
    k[:, :, 64:] *= 1.001
    k[:, :, 64::2] += 3
    k[:, :, 65::2] -= 3
    lower = vsa_jit.recall(q, k, topk=[1], selection_dtype=torch.bfloat16)
    higher = vsa_jit.recall(q, k, topk=[1])
    assert lower.item() < 0.01 < 0.4 < higher.item()


def test_keys_that_all_are_padding_hold_nothing():
    q, k = torch.randn(2, 1, 2, 128, 16)
    empty = torch.zeros(2, dtype=torch.int32)
    shares = vsa_jit.recall(q, k, empty, torch.tensor([64, 64]), topk=[1])
    assert torch.equal(shares, torch.zeros(1, 2, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "topk, sparsity: expected exactly one of them, got neither"),
        ({"topk": [1], "sparsity": [0.5]}, ValueError, "topk, sparsity: expected exactly one of them, got both"),
        ({"topk": 3}, TypeError, "topk: expected a list of values, got 3"),
        ({"sparsity": []}, ValueError, "sparsity: expected at least one value, got none"),
        ({"topk": [1, 0]}, ValueError, "topk: expected at least 1, got 0"),
        ({"sparsity": [0.5, 1.0]}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"topk": [1], "grid": (2, 2, 2)}, ValueError, "grid: expected T·H·W to be q's sequence length 128"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    q, k = torch.randn(2, 1, 2, 128, 16)
    with pytest.raises(error, match=message):
        vsa_jit.recall(q, k, **arguments)

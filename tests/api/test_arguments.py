"""Every wrong argument is answered by an error that names it, what was expected and what came."""

import warnings
from fractions import Fraction
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from support.wrong_arguments import BLOCKS, WRONG_CALLS, WRONG_INDICES, B, D, H, S, indices, qkv

import vsa_jit
from vsa_jit.backends.choose import NAMES
from vsa_jit.checks import LAYOUTS, check_topk


def call_all(arguments):
    """Every public function with these arguments: all of them check alike."""
    yield lambda: vsa_jit.video_sparse_attn(**arguments, topk=2)
    yield lambda: vsa_jit.explain(**arguments, topk=2)
    yield lambda: vsa_jit.block_sparse_attn_from_indices(**arguments, **indices())
    yield lambda: vsa_jit.block_sparse_attn(**arguments, block_map=torch.ones(B, H, BLOCKS, BLOCKS, dtype=torch.bool))


@pytest.mark.parametrize(("argument", "changes", "error", "message"), WRONG_CALLS)
def test_arguments_of_every_function(argument, changes, error, message):
    for call in call_all(qkv(**changes)):
        with pytest.raises(error, match=message) as raised:
            call()
        assert str(raised.value).startswith(f"{argument}: expected")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "topk, sparsity: expected exactly one of them, got neither"),
        ({"topk": 2, "sparsity": 0.5}, ValueError, "topk, sparsity: expected exactly one of them, got both"),
        ({"topk": 0}, ValueError, "topk: expected at least 1, got 0"),
        ({"topk": -3}, ValueError, "topk: expected at least 1, got -3"),
        ({"topk": 2.0}, TypeError, "topk: expected an int, got float"),
        ({"topk": True}, TypeError, "topk: expected an int, got bool"),
        ({"sparsity": 1.0}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, r"sparsity: expected a number in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, ValueError, r"sparsity: expected a number in \[0, 1\), got nan"),
        ({"sparsity": "0.9"}, TypeError, "sparsity: expected a float, got str"),
        ({"sparsity": 90}, ValueError, r"sparsity: expected a number in \[0, 1\), got 90; did you mean 0.9\?$"),
        ({"sparsity": 87.5}, ValueError, r"sparsity: expected .*, got 87.5; did you mean 0.875\?$"),
        ({"sparsity": np.float32(95)}, ValueError, r"sparsity: expected .*, got 95.0; did you mean 0.95\?$"),
        ({"sparsity": 1.5}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1.5$"),
        ({"sparsity": np.True_}, TypeError, "sparsity: expected a float, got bool"),
        ({"sparsity": np.False_}, TypeError, "sparsity: expected a float, got bool"),
        ({"sparsity": 1}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1$"),
        ({"topk": np.float64(2)}, TypeError, "topk: expected an int, got float64"),
        ({"topk": np.True_}, TypeError, "topk: expected an int, got bool"),
        ({"topk": torch.tensor(2)}, TypeError, "topk: expected an int, got Tensor"),
        ({"topk": np.int32(0)}, ValueError, "topk: expected at least 1, got 0"),
    ],
)
def test_topk_and_sparsity(arguments, error, message):
    with pytest.raises(error, match=message):
        vsa_jit.video_sparse_attn(**qkv(), **arguments)


@pytest.mark.parametrize(
    ("dtype", "error", "got"), [("bfloat16", TypeError, "str"), (torch.float64, ValueError, "torch.float64")]
)
@pytest.mark.parametrize("function", [vsa_jit.video_sparse_attn, vsa_jit.explain])
def test_selection_dtype(function, dtype, error, got):
    expected = "selection_dtype: expected torch.bfloat16 or torch.float16 or torch.float32 or None, got " + got
    with pytest.raises(error, match=f"^{expected}$"):
        function(**qkv(), topk=2, selection_dtype=dtype)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ("0.5", TypeError, "compress_attn_weight: expected a tensor, a float or None, got str"),
        (np.False_, TypeError, "compress_attn_weight: expected a tensor, a float or None, got bool"),
        (float("inf"), ValueError, "compress_attn_weight: expected a finite number, got inf"),
        (
            torch.ones(B, H, S, D, dtype=torch.int32),
            TypeError,
            "compress_attn_weight: expected dtype .*, got torch.int32",
        ),
        (torch.ones(B, H, S - 1, D), ValueError, r"compress_attn_weight: expected q's shape .* got \(1, 2, 255, 32\)"),
        (torch.ones(1, B, H, S, D), ValueError, "compress_attn_weight: expected q's shape"),
        (torch.ones(B, H, S, D, device="meta"), ValueError, "compress_attn_weight: expected q's device cpu, got meta"),
    ],
)
def test_gate(gate, error, message):
    with pytest.raises(error, match=message):
        vsa_jit.video_sparse_attn(**qkv(), topk=2, compress_attn_weight=gate)


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_INDICES)
def test_indices(changes, error, message):
    with pytest.raises(error, match=message):
        vsa_jit.block_sparse_attn_from_indices(**qkv(), **indices(**changes))


@pytest.mark.parametrize(
    ("block_map", "error", "message"),
    [
        (torch.ones(B, H, BLOCKS, BLOCKS), TypeError, "block_map: expected dtype torch.bool, got torch.float32"),
        (
            torch.ones(B, H, BLOCKS, 3, dtype=torch.bool),
            ValueError,
            r"block_map: expected shape \(1, 2, 4, 4\) or one that broadcasts to it, such as .*, got \(1, 2, 4, 3\)",
        ),
        (torch.ones(2, 1, 4, 4, dtype=torch.bool), ValueError, r"block_map: .*broadcasts.*, got \(2, 1, 4, 4\)"),
        (torch.ones(1, B, H, BLOCKS, BLOCKS, dtype=torch.bool), ValueError, "block_map: .*broadcasts"),
        (torch.ones(BLOCKS, dtype=torch.bool), ValueError, r"block_map: .*broadcasts.*, got \(4,\)"),
        ([[True]], TypeError, "block_map: expected a tensor, got list"),
    ],
)
def test_block_map(block_map, error, message):
    with pytest.raises(error, match=message):
        vsa_jit.block_sparse_attn(**qkv(), block_map=block_map)


def test_no_indices_at_all_is_an_empty_map():
    none = indices(q2k_idx=torch.zeros(B, H, BLOCKS, 0, dtype=torch.int32))
    out, lse = vsa_jit.block_sparse_attn_from_indices(**qkv(), **none)
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.isneginf().all()


NUMBERS = [np.int64, np.int32, np.uint8, np.array, lambda value: torch.Size([value])[0]]


@pytest.mark.parametrize("number", NUMBERS)
def test_integers_of_every_kind(number):
    tensors = qkv()
    expected = vsa_jit.video_sparse_attn(**tensors, topk=2, block_size=64)
    result = vsa_jit.video_sparse_attn(**tensors, topk=number(2), block_size=number(64))
    assert torch.equal(result, expected)
    grid, tile = (4, 8, 8), (4, 4, 4)
    expected = vsa_jit.video_sparse_attn(**tensors, topk=2, grid=grid, block_size=tile)
    for of in (tuple, list, np.array):
        sizes = {"grid": of([number(side) for side in grid]), "block_size": of([number(side) for side in tile])}
        assert torch.equal(vsa_jit.video_sparse_attn(**tensors, topk=2, **sizes), expected)
    for _ in range(2):
        out, _ = vsa_jit.block_sparse_attn_from_indices(**tensors, **indices(), block_size=number(64))
        assert torch.equal(out, vsa_jit.block_sparse_attn_from_indices(**tensors, **indices())[0])


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, Fraction, np.array])
def test_real_numbers_of_every_kind(number):
    tensors = qkv()
    expected = vsa_jit.video_sparse_attn(**tensors, sparsity=0.5, softmax_scale=0.25, compress_attn_weight=0.5)
    result = vsa_jit.video_sparse_attn(
        **tensors, sparsity=number(0.5), softmax_scale=number(0.25), compress_attn_weight=number(0.5)
    )
    assert torch.equal(result, expected)


@pytest.mark.parametrize("blocks", [1, 7, 10, 100, 624, 1440, 10_001, 2_000_000])
def test_sparsity_is_the_same_in_every_precision(blocks):
    for thousandth in range(1000):
        expected = max(1, -(-(1000 - thousandth) * blocks // 1000))
        for kind in (float, np.float32, lambda value: Fraction(round(1000 * value), 1000)):
            assert check_topk(None, kind(thousandth / 1000), blocks) == expected
    for percent in range(100):
        assert check_topk(None, np.float16(percent / 100), blocks) == check_topk(None, percent / 100, blocks)


@pytest.mark.parametrize("where", ["idx", "num", "both"])
def test_indices_of_64_bits(where):
    """What does not fit into 32 bits names no block either."""
    tensors = qkv()
    idx = torch.tensor([[3, 0, 2, 1]], dtype=torch.int64).expand(B, H, BLOCKS, 4).contiguous()
    num = torch.tensor([2, 4, 0, 1], dtype=torch.int64).expand(B, H, BLOCKS).contiguous()
    given = (idx if where != "num" else idx.int(), num if where != "idx" else num.int())
    expected = vsa_jit.block_sparse_attn_from_indices(**tensors, q2k_idx=idx.int(), q2k_num=num.int())
    for _ in range(2):
        results = vsa_jit.block_sparse_attn_from_indices(**tensors, q2k_idx=given[0], q2k_num=given[1])
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
    if where == "num":
        return
    for wrong in (2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)):
        idx[0, 0, 0, 1] = wrong
        out, _ = vsa_jit.block_sparse_attn_from_indices(**tensors, q2k_idx=idx, q2k_num=given[1])
        assert out[0, 0, :64].isnan().all()
        assert torch.equal(out[0, 0, 64:], expected[0][0, 0, 64:])


def test_numbers_of_indices_of_64_bits_are_clamped():
    tensors, where = qkv(), indices()
    for number, same_as in ((2**32 + 1, 2), (-(2**32) + 1, 0)):
        num = torch.full((B, H, BLOCKS), number, dtype=torch.int64)
        expected = vsa_jit.block_sparse_attn_from_indices(
            **tensors, q2k_idx=where["q2k_idx"], q2k_num=torch.full((B, H, BLOCKS), same_as, dtype=torch.int32)
        )
        results = vsa_jit.block_sparse_attn_from_indices(**tensors, q2k_idx=where["q2k_idx"], q2k_num=num)
        torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "shape", [(1, 1, BLOCKS, BLOCKS), (BLOCKS, BLOCKS), (2, 1, BLOCKS, BLOCKS), (H, 1, BLOCKS), (BLOCKS, 1), (1, 1)]
)
def test_maps_that_broadcast(shape):
    tensors = {name: torch.randn(2, H, S, D) for name in "qkv"}
    block_map = torch.rand(shape) < 0.5
    expected = vsa_jit.block_sparse_attn(**tensors, block_map=block_map.expand(2, H, BLOCKS, BLOCKS).contiguous())
    torch.testing.assert_close(vsa_jit.block_sparse_attn(**tensors, block_map=block_map), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("shape", "warns"),
    [
        ((1, 256, 2, 64), True),
        ((1, 256, 1, 64), True),
        ((3, 40, 37, 64), True),
        ((1, 2, 37, 64), False),
        ((1, 300, 256, 64), False),
        ((1, 37, 37, 64), False),
        ((1, 1, 1, 64), False),
        ((0, 256, 2, 64), False),
    ],
)
def test_heads_in_the_place_of_tokens(layout, shape, warns):
    """Shapes are those of "bhsd"; a warning says what was understood, and points to the call."""
    q = torch.randn(shape)
    q = q if layout == "bhsd" else q.transpose(1, 2).contiguous()
    blocks = -(-shape[2] // 64)
    calls = [
        lambda: vsa_jit.video_sparse_attn(q, q, q, topk=1, layout=layout),
        lambda: vsa_jit.explain(q, q, q, layout=layout),
        lambda: vsa_jit.block_sparse_attn(q, q, q, torch.ones(blocks, blocks, dtype=torch.bool), layout=layout),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert len(caught) == warns
        if warns:
            other = {"bhsd": "bshd", "bshd": "bhsd"}[layout]
            assert f"layout={layout!r} makes q {shape[1]} heads of" in str(caught[0].message)
            assert f"pass layout={other!r}" in str(caught[0].message)
            assert caught[0].filename == __file__


def test_heads_in_the_place_of_tokens_in_a_compiled_call():
    q = torch.randn(1, 256, 2, 64)
    call = torch.compile(lambda q: vsa_jit.video_sparse_attn(q, q, q, topk=1), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="layout='bhsd' makes q 256 heads of 2 tokens"):
        call(q)


def test_few_queries_of_many_keys_are_no_mistake_of_the_keys():
    q, k = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 256, 64)
    with pytest.warns(UserWarning, match="makes q 2 heads of 1 token; pass layout='bshd' if it is 1 head of 2 tokens"):
        vsa_jit.video_sparse_attn(q, k, k, topk=1)


def test_types_name_what_is_allowed():
    for function in (vsa_jit.video_sparse_attn, vsa_jit.block_sparse_attn, vsa_jit.explain):
        hints = get_type_hints(function)
        assert get_args(hints["layout"]) == LAYOUTS
        assert get_args(hints["backend"]) == NAMES

"""Selection, compaction and inversion by themselves: ties, zeros of both signs, empty blocks, sizes of every kind."""

import os

import pytest
import reference as ref
import torch

import vsa_jit
from vsa_jit.backends import torch as torch_backend
from vsa_jit.backends import triton as triton_backend
from vsa_jit.problem import Problem

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"torch": (torch_backend, "cpu"), "triton": (triton_backend, TRITON_DEVICE)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def run_select(backend, scores, topk, sizes=None):
    module, device = backend
    idx = torch.full((*scores.shape[:-1], topk), -9, dtype=torch.int32, device=device)
    num = torch.full(scores.shape[:-1], -9, dtype=torch.int32, device=device)
    module.select(scores.to(device), None if sizes is None else sizes.to(device), topk, idx, num)
    return idx.cpu(), num.cpu()


def expected_indices(scores, topk, nonempty):
    chosen = ref.select(scores, topk, nonempty)
    num = chosen.sum(-1, dtype=torch.int32)
    idx = torch.where(chosen, torch.arange(scores.shape[-1]), scores.shape[-1]).sort(-1).values[..., :topk]
    return torch.where(idx < scores.shape[-1], idx, 0).int(), num


@pytest.mark.parametrize(("columns", "topk"), [(1, 1), (3, 2), (37, 5), (64, 64), (100, 1), (257, 100), (2500, 300)])
def test_select(backend, columns, topk):
    scores = torch.randn(2, 7, columns)
    everywhere = torch.ones(columns, dtype=torch.bool)
    for result, expected in zip(
        run_select(backend, scores, topk), expected_indices(scores, topk, everywhere), strict=True
    ):
        assert torch.equal(result, expected)


def test_ties_go_to_the_lower_index(backend):
    scores = torch.randint(-2, 3, (3, 50, 40)).float()
    for topk in (1, 7, 20, 39):
        idx, num = run_select(backend, scores, topk)
        expected, _ = expected_indices(scores, topk, torch.ones(40, dtype=torch.bool))
        assert torch.equal(idx, expected)
        assert (num == topk).all()


def test_zeros_of_both_signs_are_equal(backend):
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0, 1e-38]]])
    idx, _ = run_select(backend, scores, 3)
    assert idx.tolist() == [[[0, 1, 5]]]


def test_extreme_scores(backend):
    inf = float("inf")
    scores = torch.tensor([[[-inf, 3.4e38, -3.4e38, inf, -1e-45, 1e-45, -inf, 0.0]]])
    assert run_select(backend, scores, 3)[0].tolist() == [[[1, 3, 5]]]
    assert run_select(backend, scores, 7)[0].tolist() == [[[0, 1, 2, 3, 4, 5, 7]]]


def test_nan_scores_still_give_indices_in_range(backend):
    idx, num = run_select(backend, torch.full((1, 4, 10), float("nan")), 3)
    assert ((idx >= 0) & (idx < 10)).all()
    assert (num == 3).all()
    assert (idx.diff(dim=-1) > 0).all()


def test_empty_blocks_are_never_selected(backend):
    sizes = torch.tensor([0, 5, -3, 64, 0, 1])
    scores = torch.randn(2, 9, 6)
    scores[..., 0] = 100.0
    scores[0, 0] = -float("inf")
    for topk in (1, 3, 5):
        idx, num = run_select(backend, scores, topk, sizes)
        expected, expected_num = expected_indices(scores, topk, sizes > 0)
        assert torch.equal(num, expected_num)
        assert torch.equal(idx, expected)
    idx, num = run_select(backend, scores, 2, torch.zeros(6, dtype=torch.int32))
    assert num.count_nonzero() == 0
    assert idx.count_nonzero() == 0


@pytest.mark.parametrize("columns", [1, 5, 64, 100])
def test_compact(backend, columns):
    module, device = backend
    block_map = torch.rand(2, 3, 11, columns) < torch.rand(2, 3, 11, 1)
    idx = torch.full(block_map.shape, -9, dtype=torch.int32, device=device)
    num = torch.full(block_map.shape[:3], -9, dtype=torch.int32, device=device)
    module.compact(block_map.to(device), idx, num)
    for row_map, row_idx, row_num in zip(
        block_map.flatten(0, 2), idx.cpu().flatten(0, 2), num.cpu().flatten(), strict=True
    ):
        listed = row_map.nonzero().flatten().tolist()
        assert row_idx.tolist() == listed + [0] * (columns - len(listed))
        assert row_num == len(listed)


def inverse(idx, num, num_kv_blocks):
    """For each (head, key block), the query blocks that name it, in order and as often as they do."""
    heads, rows, _ = idx.shape
    lists = [[[] for _ in range(num_kv_blocks)] for _ in range(heads)]
    for head in range(heads):
        for row in range(rows):
            for kv_block in idx[head, row, : max(int(num[head, row]), 0)].tolist():
                if 0 <= kv_block < num_kv_blocks:
                    lists[head][kv_block].append(row)
    return lists


@pytest.mark.parametrize(
    ("num_q_blocks", "num_kv_blocks", "width"),
    [(1, 1, 1), (5, 9, 4), (40, 7, 7), (130, 20, 3), (3, 50, 33), (2, 400, 400), (2, 700, 650)],
)
def test_invert(num_q_blocks, num_kv_blocks, width):
    heads = 3
    idx = torch.rand(heads, num_q_blocks, num_kv_blocks).argsort(-1)[..., :width].int()
    if width > 2:
        idx[0, 0, :2] = idx[0, 0, 2]
        idx[1, -1, 1] = num_kv_blocks
        idx[1, -1, 0] = -1
    num = torch.randint(-1, width + 3, (heads, num_q_blocks), dtype=torch.int32)
    problem = Problem(
        batch=1,
        heads=heads,
        kv_heads=heads,
        q_len=num_q_blocks * 64,
        kv_len=num_kv_blocks * 64,
        head_dim=32,
        tile=(1, 1, 64),
        grid=None,
        layout="bhsd",
        softmax_scale=1.0,
        backend="triton",
    )
    ends, k2q_idx, chunks = triton_backend.invert(problem, idx.to(TRITON_DEVICE)[None], num.to(TRITON_DEVICE)[None])
    last = ends.view(heads * num_kv_blocks, chunks)[:, -1].cpu()
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), last[:-1]])
    lists = [k2q_idx[begin:end].tolist() for begin, end in zip(begins, last, strict=True)]
    assert lists == [kv_list for head in inverse(idx, num, num_kv_blocks) for kv_list in head]


def test_selection_in_parts_is_the_same(monkeypatch):
    q, k, v = (torch.randn(2, 4, 300, 32) for _ in range(3))
    whole = vsa_jit.video_sparse_attn(q, k, v, topk=2)
    monkeypatch.setattr("vsa_jit.ops.SCORES_AT_A_TIME", 60)
    torch.testing.assert_close(vsa_jit.video_sparse_attn(q, k, v, topk=2), whole)


@pytest.mark.gpu
def test_many_blocks():
    """4,096 key blocks: more than one warp's row."""
    scores = torch.randn(1, 300, 4096)
    result = run_select(BACKENDS["triton"], scores, 410)
    expected = expected_indices(scores, 410, torch.ones(4096, dtype=torch.bool))
    assert torch.equal(result[0], expected[0])


def test_interpreter_is_what_runs_without_a_gpu():
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"

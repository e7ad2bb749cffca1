"""The coarse branch's kernels on the CPU, against its composition of the torch backend's functions."""

import pytest
import torch
from support import emulate
from support.coarse import BACKENDS, PACKED, TEXT_AND_VIDEO, Case

from vsa_jit.backends.sm90 import coarse

pytestmark = emulate.NEEDS_COMPILER

CASES = [
    Case("few", 5, 5, topk=(1,)),
    Case("other keys, grouped heads", 70, 130, kv_heads=1, head_dim=128, topk=(40,)),
    Case("sizes, batch", 3, 300, heads=1, kv_heads=1, batch=2, sizes="some", topk=(50,)),
    Case("more than there are", 2, 40, sizes="some", topk=(1000,)),
    Case("all empty", 2, 40, sizes="none", topk=(5,)),
    Case("ties", 70, 257, heads=1, kv_heads=1, head_dim=128, exact=True, topk=(60,)),
    Case("negative scale", 5, 70, scale=-0.05),
    Case("not attended", 65, 33, exact=True, attended=False),
    Case("rounded to bf16", 10, 150, dtype=torch.bfloat16, exact=True, topk=(17,)),
    Case("rounded to fp16", 10, 150, dtype=torch.float16, exact=True, topk=(17,)),
    Case("context", 92, 92, head_dim=128, topk=(6,), segments=TEXT_AND_VIDEO),
    Case("packed", 119, 119, kv_heads=1, batch=2, topk=(0, 20, 0, 2), exact=True, segments=PACKED),
    Case("packed, not attended", 119, 119, kv_heads=1, batch=2, topk=(3, 20, 0, 2), segments=PACKED, attended=False),
    Case("packed, competing", 119, 119, topk=(3, 20, 0, 2), segments=PACKED, compete=True),
    Case("as wide as a warp, ties", 2, 1024, heads=1, kv_heads=1, exact=True, topk=(200,)),
    Case("one column more", 2, 1025, heads=1, kv_heads=1, topk=(200,)),
    Case("wide", 3, 2100, heads=1, kv_heads=1, topk=(100,)),
    Case("wide, ties", 2, 4500, heads=1, kv_heads=1, exact=True, topk=(300,), sizes="some"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attend(monkeypatch, case):
    emulate.emulate(monkeypatch, 1)
    case.check_forward("cpu", "torch")


# With so many that row tiles have 16 query blocks, or 32.
@pytest.mark.parametrize(("processors", "tile_rows", "head_dim"), [(40, 16, 128), (6, 32, 64)])
def test_low_row_tiles(monkeypatch, processors, tile_rows, head_dim):
    emulate.emulate(monkeypatch, processors)
    packed = Case("packed", 119, 119, head_dim, kv_heads=1, topk=(3, 20, 0, 2), segments=PACKED)
    packed.check_forward("cpu", "torch")
    case = Case("plain", 70, 130, head_dim, topk=(40,))
    case.check_forward("cpu", "torch")
    case.check_backward("cpu", "torch")
    shapes = (1, 2, 70, head_dim), (1, 2, 130, head_dim)
    launch = coarse._attend_launch(case.coarse, *shapes, -1, case.topk[0])
    assert launch.params.problem.tile_rows == tile_rows


BACKWARD_CASES = [
    Case("other keys, grouped heads", 70, 130, kv_heads=1, head_dim=128),
    Case("sizes, batch, grouped heads", 3, 70, heads=4, kv_heads=2, batch=2, sizes="some"),
    Case("all empty", 2, 40, sizes="none"),
    Case("rounded", 10, 150, dtype=torch.bfloat16),
    Case("packed", 119, 119, kv_heads=1, segments=PACKED),
    Case("wide", 3, 2100, heads=1, kv_heads=1),
]


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_backward(monkeypatch, case):
    emulate.emulate(monkeypatch, 1)
    if case.batch > 1:
        # A launch for each key/value head.
        monkeypatch.setattr(coarse, "SCORES_AT_A_TIME", 1)
    case.check_backward("cpu", "torch")


# Its bits are those of a GPU's: its key is as high as that of a column that every row takes.
NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


def test_a_row_of_nans_selects_as_many_as_any_other(monkeypatch):
    emulate.emulate(monkeypatch, 1)
    case = Case("NaN", 10, 10, topk=(3,), segments=(0, 0, 0, 70, 0, *(5, 6, 7)))
    q, k, *_ = case.means("cpu")
    q[:, :, 4] = NAN
    call = case.coarse, q, k, None, None, case.topk, False
    _, idx, num = coarse.coarse_attend(*call)
    _, expected_idx, expected_num = BACKENDS["torch"].coarse_attend(*call)
    assert torch.equal(idx, expected_idx)
    assert torch.equal(num, expected_num)


@pytest.mark.parametrize("cols", [70, 1100])
def test_of_more_nans_than_are_selected_the_first_are(monkeypatch, cols):
    """No key is above a NaN's."""
    emulate.emulate(monkeypatch, 1)
    case = Case("NaN", 2, cols, heads=1, kv_heads=1)
    q, k, *_ = case.means("cpu")
    k[:, :, 3:] = NAN
    _, idx, num = coarse.coarse_attend(case.coarse, q, k, None, None, (50,), False)
    assert torch.equal(idx, torch.arange(3, 53, dtype=torch.int32).expand_as(idx))
    assert torch.equal(num, torch.full_like(num, 50))


# As in test_emulated.py.
MISTAKES = {
    "a chunk is multiplied before it has landed": (
        "product.cuh",
        "kittens::wait_copies<kRingStages - 2>();",
        "if (!MISTAKE) kittens::wait_copies<kRingStages - 2>();",
    ),
    "a chunk of other threads is multiplied before it has landed, or loaded while it is read": (
        "product.cuh",
        "kittens::wait_copies<kRingStages - 2>();\n        __syncthreads();",
        "kittens::wait_copies<kRingStages - 2>();\n        if (!MISTAKE) __syncthreads();",
    ),
    "a product begins before what it reads is written": (
        "product.cuh",
        "    __syncthreads();\n#pragma unroll 1\n    for (int step = 0; step < kRingStages - 1;",
        "    if (!MISTAKE) __syncthreads();\n#pragma unroll 1\n    for (int step = 0; step < kRingStages - 1;",
    ),
    "rows are read before all scores are written": (
        "coarse_backward_q.cu",
        "__syncthreads();\n\n        shared.eligible.count_or_all",
        "if (!MISTAKE) __syncthreads();\n\n        shared.eligible.count_or_all",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulator_finds(monkeypatch, tmp_path_factory, name):
    """Each of these mistakes, in some of its runs. None leads the backward to other addresses."""
    sources = emulate.with_mistakes(MISTAKES, tmp_path_factory.mktemp("coarse"))
    case = Case("mistaken", 70, 40)
    q, k, v, _ = case.means("cpu")

    def backward(mistake):
        emulate.emulate(monkeypatch, 1, sources, mistake)
        return coarse.coarse_attend_backward(case.coarse, q, k, v, None, q)

    emulate.expect_to_find(backward, list(MISTAKES).index(name) + 1)

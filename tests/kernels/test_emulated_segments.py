"""The Hopper kernels for segments on the CPU, against the torch backend: text beside video, and samples in one row."""

import pytest
import torch
from support import emulate
from support import reference as ref
from support.added import MeanGradients, outputs_of_few_bits
from torch import Tensor

from vsa_jit.backends.sm90 import launches, segments
from vsa_jit.backends.torch import launches as plain
from vsa_jit.checks import check_problem
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Gradients, Operands
from vsa_jit.segments import order_of, selection_rows, selection_width

pytestmark = emulate.NEEDS_COMPILER

TEXT_AND_VIDEO = [77, (5, 6, 7)]
SEVERAL = [3, (4, 4, 4), 130, (5, 6, 7), (1, 1, 1), 64]
PACKED = [[77, (5, 6, 7)], [0, (2, 9, 5)], [1], [200, (3, 4, 8), 65]]
ALONE = [130]
CALLS = {
    "text beside video": (TEXT_AND_VIDEO, 64, "bhsd"),
    "several, bshd": (SEVERAL, 64, "bshd"),
    "packed": (PACKED, 64, "bhsd"),
    "text alone": (ALONE, 64, "bhsd"),
    "packed, 128": (PACKED, 128, "bhsd"),
    "several, 256, bshd": (SEVERAL, 256, "bshd"),
    "text beside video, 192": (TEXT_AND_VIDEO, (2, 8, 12), "bhsd"),
    "tiles a token wide, bshd": ([5, (5, 6, 7), (70, 2, 3)], (16, 4, 1), "bshd"),
    "many": ([[i % 70, (1 + i % 3, 2 + i % 5, 3)] for i in range(20)], 64, "bhsd"),
}
# With one multiprocessor a thread block takes all work tiles, and with many one.
KINDS = [(torch.bfloat16, 128, 1), (torch.float16, 64, 200)]


def length_of(segments) -> int:
    return sum(
        length_of(entry)
        if isinstance(entry, list)
        else entry
        if isinstance(entry, int)
        else entry[0] * entry[1] * entry[2]
        for entry in segments
    )


class Call:
    """Tensors of a call whose other tokens of the same memory are NaN, and a map: that of a selection by chance."""

    def __init__(self, name: str, dtype: torch.dtype, head_dim: int, heads: int = 2, kv_heads: int = 1, batch: int = 2):
        division, block_size, self.layout = CALLS[name]
        length = length_of(division)
        self.dtype = dtype

        def tensor(heads: int) -> Tensor:
            # Beside the tokens of the call there are others, which must not be read.
            shape = (
                (batch, heads, length + 150, head_dim)
                if self.layout == "bhsd"
                else (batch, length + 150, heads, head_dim)
            )
            x = torch.full(shape, float("nan"), dtype=dtype)
            x = x.narrow(2 if self.layout == "bhsd" else 1, 70, length)
            return x.copy_(torch.randn(x.shape))

        q, k, v, self.dout = tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads)
        self.problem = check_problem(
            q,
            k,
            v,
            block_size=block_size,
            grid=None,
            segments=division,
            layout=self.layout,
            softmax_scale=None,
            variable_block_sizes=None,
            q_variable_block_sizes=None,
        )
        of = self.problem.keys.segments
        assert of is not None
        topk = [min(2, sample.num_video_blocks) for sample in of.samples]
        scores = torch.randn(batch * heads, of.num_blocks, of.num_blocks)
        idx, num = plain.select_in_samples(scores, selection_rows(of, topk, False), selection_width(of, topk))
        idx, num = (x.unflatten(0, (batch, heads)) for x in (idx, num))
        self.operands = Operands(q, k, v, idx, num, None, None, None, None, 0.0)


def compare(name: str, found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounding to the dtype, of the result and of what it was computed from."""
    assert ref.error(found, exact) <= 3 * torch.finfo(dtype).eps, (name, ref.error(found, exact))


def run(backend, call: Call) -> tuple[Tensor, Tensor, Gradients]:
    out, lse, _ = backend.attend(call.problem, call.operands, False)
    gradients = backend.attend_backward(call.problem, call.operands, out, lse, call.dout, None, True, True)
    return out, lse, gradients


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "processors"), [(name, *KINDS[i % 2]) for i, name in enumerate(CALLS)], ids=str
)
def test_output_and_gradients(monkeypatch, name, dtype, head_dim, processors):
    emulate.emulate(monkeypatch, processors)
    call = Call(name, dtype, head_dim)
    out, lse, gradients = run(launches, call)
    exact_out, exact_lse, exact = run(plain, call)
    compare("out", out, exact_out, dtype)
    assert ref.error(lse, exact_lse) <= 1e-5
    for field in ("dq", "dk", "dv"):
        compare(field, getattr(gradients, field), getattr(exact, field), dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim"),
    [("several, bshd", torch.bfloat16, 128), ("packed, 128", torch.float16, 64)],
    ids=str,
)
def test_gradients_of_block_means_are_added(monkeypatch, name, dtype, head_dim):
    emulate.emulate(monkeypatch, 2)
    call = Call(name, dtype, head_dim)
    _, lse, _ = plain.attend(call.problem, call.operands, False)
    operands, out_s, out = outputs_of_few_bits(call.problem, call.operands)
    rest = lse, call.dout, None, True, True
    without = launches.attend_backward(call.problem, operands, out_s, *rest)
    of_means = MeanGradients(call.problem)
    found = launches.attend_backward(call.problem, operands, out, *rest, True, of_means)
    of_means.check(operands, found, without)


@pytest.mark.parametrize("block_size", [64, 128])
def test_rows_of_runs_and_of_entries(monkeypatch, block_size):
    """A negative number of entries stands for consecutive blocks, in any row; one of them that is none makes NaN."""
    emulate.emulate(monkeypatch, 2)
    call = Call("packed, 128" if block_size == 128 else "packed", torch.float16, 64, heads=1, batch=1)
    n = call.problem.keys.num_blocks
    idx = torch.stack([torch.randperm(n) for _ in range(n)]).int()[None, None, :, :3].contiguous()
    num = torch.randint(0, 4, (1, 1, n), dtype=torch.int32)
    runs = [(0, -n), (2, -1), (n - 2, -2), (0, 0), (1, -(n - 1))]
    for row, (first, count) in enumerate(runs):
        idx[0, 0, row, 0], num[0, 0, row] = first, count
    call.operands = call.operands._replace(q2k_idx=idx, q2k_num=num)
    for found, exact in zip(flat(run(launches, call)), flat(run(plain, call)), strict=True):
        assert ref.error(found, exact) <= 3 * torch.finfo(torch.float16).eps
    wrong = [(1, -n), (-1, -2), (n, -1), (0, -(2**31)), (2**31 - 1, -2)]
    for row, (first, count) in enumerate(wrong):
        idx[0, 0, row, 0], num[0, 0, row] = first, count
    _, lse, _ = launches.attend(call.problem, call.operands, False)
    tokens = block_tokens(call.problem.queries, None, torch.device("cpu"))
    is_wrong = torch.zeros(lse.shape[2], dtype=torch.bool)
    is_wrong[tokens[: len(wrong)][tokens[: len(wrong)] >= 0]] = True
    assert torch.equal(lse[0, 0].isnan(), is_wrong)


def flat(results: tuple[Tensor, Tensor, Gradients]) -> list[Tensor]:
    out, lse, gradients = results
    return [out, lse, gradients.dq, gradients.dk, gradients.dv]


@pytest.mark.parametrize(("dtype", "head_dim", "processors"), KINDS, ids=str)
@pytest.mark.parametrize("name", ["packed", "several, 256, bshd", "text beside video, 192", "tiles a token wide, bshd"])
def test_block_means(monkeypatch, name, dtype, head_dim, processors):
    emulate.emulate(monkeypatch, processors)
    call = Call(name, dtype, head_dim)
    q, k, v, *_ = call.operands
    for found, exact in zip(
        launches.block_means(call.problem, q, k, v, None, None),
        plain.block_means(call.problem, q, k, v, None, None),
        strict=True,
    ):
        assert ref.error(found, exact) <= 1e-6


def test_gate_and_coarse_output(monkeypatch):
    """The gate is read and its gradient stored where the tokens are; that of the coarse output sums over each block."""
    emulate.emulate(monkeypatch, 3)
    call = Call("several, bshd", torch.float16, 64)
    out_c = torch.randn(2, 2, call.problem.queries.num_blocks, 64)
    call.operands = call.operands._replace(out_c=out_c, gate=torch.randn_like(call.dout))
    gradients = []
    for backend in (launches, plain):
        out, lse, out_s = backend.attend(call.problem, call.operands, True)
        assert out_s is not None
        found = backend.attend_backward(call.problem, call.operands, out_s, lse, call.dout, None, True, True)
        gradients.append([out, *found])
    for found, exact in zip(*gradients, strict=True):
        compare("gate", found, exact, torch.float16)


def test_segments_that_are_too_large_for_the_table(monkeypatch):
    emulate.emulate(monkeypatch, 1)
    assert segments.why_not(order_of([0, 1, 1, 65535, 0, 0, 0, 1], (4, 4, 4)).segments) is None
    reason = segments.why_not(order_of([0, 1, 1, 65536, 0, 0, 0, 1], (4, 4, 4)).segments)
    assert "65535" in reason
    assert "(1, 1, 65536)" in reason

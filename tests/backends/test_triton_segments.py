"""Triton's kernels for segments beside plain PyTorch: videos of several sizes, context and packed samples."""

from dataclasses import dataclass

import pytest
import torch
from support import reference as ref
from support.added import MeanGradients, outputs_of_few_bits
from support.problems import INTERPRETED
from torch import Tensor

import vsa_jit
from vsa_jit.backends.coarse import Softmax
from vsa_jit.backends.torch import launches as plain
from vsa_jit.backends.triton import launches
from vsa_jit.backends.triton.blocks import block_table
from vsa_jit.checks import check_block_size
from vsa_jit.grid import block_tokens
from vsa_jit.ops.attention import attend
from vsa_jit.problem import Operands, Problem, Side
from vsa_jit.segments import Segments, selection_rows, selection_width

DEVICES = [*[device for _, device in INTERPRETED], pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
# Both backends compute in fp32 and round to the dtype, Triton the probabilities too.
BOUNDS = {torch.float16: 1e-3, torch.float32: 1e-6}


@dataclass(frozen=True)
class Call:
    name: str
    segments: list
    block_size: int | tuple[int, int, int] = 64
    heads: int = 1
    kv_heads: int = 1
    layout: str = "bhsd"
    context: str = "attend"
    topk: int = 1
    dtype: torch.dtype = torch.float16


# Small ones: the interpreter takes seconds for each.
CALLS = [
    Call("grouped heads", [45, (5, 4, 6)], heads=2, topk=2),
    Call("packed, bshd", [[30, (5, 4, 6)], [(3, 4, 5), 70]], layout="bshd"),
    Call("compete, 128 tokens", [[140, (3, 9, 8)], [(2, 8, 3)]], block_size=128, context="compete", topk=2),
    Call("tiles that are no shifted rows", [20, (5, 7, 3), (2, 6, 9)], block_size=(4, 6, 8)),
    Call("whole blocks, fp32", [[64, (4, 8, 4)], [(4, 4, 4)]], dtype=torch.float32),
]


def segments_of(segments: list, block_size=64) -> Segments:
    samples = segments if isinstance(segments[0], list) else [segments]
    numbers = []
    for sample, of_sample in enumerate(samples):
        for segment in of_sample:
            numbers += [sample, *((0, 0, segment) if isinstance(segment, int) else segment)]
    return Segments(numbers, check_block_size(block_size, with_grid=True))


def random_segments() -> Segments:
    numbers = []
    for sample in range(int(torch.randint(1, 4, ()))):
        for _ in range(int(torch.randint(1, 4, ()))):
            t, h, w = torch.randint(1, 20, (3,)).tolist()
            numbers += [sample, *((0, 0, t * h) if torch.rand(()) < 0.4 else (t, h, w))]
    tiles = [(4, 4, 4), (2, 8, 8), (4, 6, 8), (1, 1, 64), (3, 1, 64)]
    return Segments(numbers, tiles[int(torch.randint(len(tiles), ()))])


def random(call: Call, heads: int, device: str, width: int = 32) -> Tensor:
    x = torch.randn(1, heads, segments_of(call.segments, call.block_size).length, width)
    x = x.transpose(1, 2).contiguous() if call.layout == "bshd" else x
    return x.to(device, call.dtype)


def run(call: Call, tensors: list[Tensor], dout: Tensor, backend: str) -> list[Tensor]:
    """The output and the gradients of q, k, v and the gate, as [B, H, S, D]."""
    q, k, v, gate = leaves = [x.clone().requires_grad_() for x in tensors]
    out = vsa_jit.video_sparse_attn(
        q,
        k,
        v,
        topk=call.topk,
        block_size=call.block_size,
        compress_attn_weight=gate,
        segments=call.segments,
        context=call.context,
        layout=call.layout,
        backend=backend,
    )
    out.backward(dout)
    results = [out.detach(), *[x.grad for x in leaves]]
    return [x.transpose(1, 2) if call.layout == "bshd" else x for x in results]


def assert_all_close(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for i, (x, reference) in enumerate(zip(results, expected, strict=True)):
        assert ref.error(x, reference) < BOUNDS[dtype], f"result {i}"


@on_devices
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_output_and_gradients(call: Call, device):
    tensors = [random(call, heads, device) for heads in (call.heads, call.kv_heads, call.kv_heads, call.heads)]
    dout = random(call, call.heads, device)
    assert_all_close(run(call, tensors, dout, "triton"), run(call, tensors, dout, "torch"), call.dtype)


@on_devices
def test_nan_stays_in_its_sample(device):
    call = Call("", [[10, (2, 3, 6)], [20, (4, 5, 4)]])
    tensors = [random(call, 1, device) for _ in range(4)]
    dout = random(call, 1, device)
    expected = run(call, tensors, dout, "torch")
    first = 10 + 2 * 3 * 6
    for x in (*tensors, dout):
        x[:, :, :first] = float("nan")
    results = run(call, tensors, dout, "triton")
    assert_all_close([x[:, :, first:] for x in results], [x[:, :, first:] for x in expected], call.dtype)
    assert results[0][:, :, :first].isnan().all()


def attend_rows(call: Call, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, num: Tensor, backend: str):
    """The operator itself: users cannot name runs of blocks."""
    segments = segments_of(call.segments, call.block_size)
    static = list(segments.tile), list(segments.numbers), "bhsd", q.shape[3] ** -0.5, backend
    return attend(q, k, v, idx, num, None, None, *static)


def run_indices(call: Call, tensors, idx, num, dout, dlse, backend) -> list[Tensor]:
    q, k, v = leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = attend_rows(call, q, k, v, idx, num, backend)
    torch.autograd.backward([out, lse], [dout, dlse])
    return [out.detach(), lse.detach(), *[x.grad for x in leaves]]


@on_devices
def test_rows_of_runs_and_of_entries(device):
    """Runs in any rows, alike in some that are neighbours, beside rows of entries in any order and without any."""
    call = Call("", [[70, (3, 4, 6)], [(5, 4, 4)]])
    n = 6
    idx = torch.full((1, 1, n, 3), 2**31 - 1, dtype=torch.int32)
    num = torch.tensor([-3, -3, 2, 0, -1, -n], dtype=torch.int32)
    for row, entries in enumerate([[1], [1], [5, 0], [], [5], [0]]):
        idx[0, 0, row, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
    idx, num = idx.to(device), num.view(1, 1, n).to(device)
    tensors = [random(call, 1, device) for _ in range(3)]
    # A query without keys has a log-sum-exp that nothing depends on.
    dout, dlse = random(call, 1, device), random(call, 1, device, width=1)[..., 0].float()
    arguments = (call, tensors, idx, num, dout, dlse)
    assert_all_close(run_indices(*arguments, "triton"), run_indices(*arguments, "torch"), call.dtype)


@on_devices
def test_gradients_of_block_means_are_added(device):
    call = Call("", [20, (5, 3, 7)], dtype=torch.float32)
    segments = segments_of(call.segments)
    side = _side(segments)
    problem = Problem(1, 32, side._replace(heads=2), side, 0.2)
    q, k, v, dout = (random(call, heads, device) for heads in (2, 1, 1, 2))
    idx = torch.randint(5, (1, 2, 5, 2), dtype=torch.int32, device=device)
    num = torch.tensor([[-5, 2, 1, 0, 2], [-5, 1, 2, 2, 0]], dtype=torch.int32, device=device)[None]
    idx[:, :, 0, 0] = 0
    operands = Operands(q, k, v, idx, num, None, None, None, None, 0.0)
    operands, out_s, out = outputs_of_few_bits(problem, operands)
    _, lse, _ = plain.attend(problem, operands, False)
    without = plain.attend_backward(problem, operands, out_s, lse, dout, None, True, True)
    of_means = MeanGradients(problem, device)
    found = launches.attend_backward(problem, operands, out, lse, dout, None, True, True, True, of_means)
    of_means.check(operands, found, without)


@on_devices
@pytest.mark.parametrize(
    ("first", "num"), [(1, -3), (-1, -2), (0, -(2**31)), (2**31 - 1, -2)], ids=["end", "begin", "long", "far"]
)
def test_run_past_the_blocks_gives_nan(first, num, device):
    call = Call("", [40, (2, 4, 7)])
    idx = torch.tensor([0, first, 1], dtype=torch.int32, device=device).view(1, 1, 3, 1)
    nums = torch.tensor([-1, num, -2], dtype=torch.int32, device=device).view(1, 1, 3)
    q, k, v = (random(call, 1, device, width=16) for _ in range(3))
    out, lse = attend_rows(call, q, k, v, idx, nums, "triton")
    is_nan = block_tokens(_side(segments_of(call.segments)), None, torch.device("cpu"))[1]
    expected = torch.zeros(q.shape[2], dtype=torch.bool)
    expected[is_nan[is_nan >= 0]] = True
    assert torch.equal(lse.isnan().cpu(), expected[None, None])
    assert torch.equal(out.isnan().cpu(), expected[None, None, :, None].expand(out.shape))


@on_devices
def test_run_without_an_entry_counts_as_nothing(device):
    call = Call("", [40, (2, 4, 7)])
    idx = torch.empty((1, 1, 3, 0), dtype=torch.int32, device=device)
    num = torch.tensor([-1, 2, 0], dtype=torch.int32, device=device).view(1, 1, 3)
    tensors = [random(call, 1, device, width=16) for _ in range(3)]
    dout, dlse = random(call, 1, device, width=16), torch.ones(1, 1, tensors[0].shape[2], device=device)
    out, lse, *gradients = run_indices(call, tensors, idx, num, dout, dlse, "triton")
    assert (lse == float("-inf")).all()
    for x in (out, *gradients):
        assert (x == 0).all()


def _side(segments: Segments) -> Side:
    return Side(1, segments.length, segments.tile, None, "bhsd", segments)


def test_block_table():
    for _ in range(20):
        segments = random_segments()
        first, height, width, t_left, h_left, w_left, rows_left, num_tokens = (
            column[:, None] for column in block_table(segments, torch.device("cpu")).long().unbind(1)
        )
        _, tile_h, tile_w = segments.tile
        row = torch.arange(_side(segments).block)
        t, h, w = row // (tile_h * tile_w), row // tile_w % tile_h, row % tile_w
        exists = (t < t_left) & (h < h_left) & (w < w_left) & (row < rows_left)
        tokens = torch.where(exists, first + (t * height + h) * width + w, -1)
        assert torch.equal(tokens, block_tokens(_side(segments), None, torch.device("cpu")))
        assert torch.equal(exists.sum(1, keepdim=True), num_tokens)


@on_devices
@pytest.mark.parametrize("over_blocks", [False, True])
def test_matmul_in_samples(over_blocks, device):
    # One sample of more blocks than a tile has rows, one of a few, and one of a block.
    segments = segments_of([[64 * 130], [500], [3]])
    n, width = segments.num_blocks, 40
    a, b = torch.randn(2, n, n if over_blocks else width, device=device), torch.randn(2, n, width, device=device)
    samples = [slice(s.first_block, s.first_block + s.num_blocks) for s in segments.samples]
    a[:, samples[0], samples[0] if over_blocks else slice(None)] = float("nan")
    b[:, samples[0]] = float("nan")
    b = b if over_blocks else b.mT
    out, expected = (
        run.matmul_over_samples(a, b, segments) if over_blocks else run.matmul_of_samples(a, b, segments)
        for run in (launches, plain)
    )
    for own in samples:
        columns = slice(None) if over_blocks else own
        found = (x[:, own, columns] for x in (out, expected))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4, equal_nan=True)


@on_devices
@pytest.mark.parametrize("compete", [False, True])
def test_select_in_samples(compete, device):
    segments = segments_of([[100, (5, 9, 9), 30], [(4, 8, 9)], [200]])
    topk = (3, 2, 0)
    rows = selection_rows(segments, topk, compete).to(device)
    width, n = selection_width(segments, topk), segments.num_blocks
    # Whole numbers have ties, and -0 among them.
    scores = (torch.randn(2, 2 * n, n, device=device) * 1.5).round()
    scores[0, 0, 1] = float("inf")
    idx, num = launches.select_in_samples(scores, rows, width)
    expected_idx, expected_num = plain.select_in_samples(scores, rows, width)
    assert torch.equal(idx, expected_idx)
    assert torch.equal(num, expected_num)


@on_devices
@pytest.mark.parametrize("backend", [launches, plain], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_in_samples(dtype, backend, device):
    """And their gradient. What is between samples may be anything; rows of context have probabilities as others do."""
    segments = segments_of([[100, (5, 9, 9), 30], [(4, 8, 9)], [200]])
    topk, n, scale = (3, 2, 0), segments.num_blocks, 0.1
    rows, width = selection_rows(segments, topk, False), selection_width(segments, topk)
    same_sample = torch.zeros(n, n, dtype=torch.bool)
    for sample in segments.samples:
        own = slice(sample.first_block, sample.first_block + sample.num_blocks)
        same_sample[own, own] = True
    products, dp = torch.randn(1, 2, n, n) * 30, torch.randn(1, 2, n, n)
    expected = ref.probabilities(products, same_sample, scale, dtype)
    poisoned, dp_poisoned = (x.masked_fill(~same_sample, float("nan")).flatten(1, 2).to(device) for x in (products, dp))

    p = poisoned.clone()
    selected = backend.select_in_samples(p, rows.to(device), width, Softmax(scale, dtype))
    scores = products if dtype == torch.float32 else ref.scaled(products, scale, dtype)
    for found, wanted in zip(selected, plain.select_in_samples(scores.flatten(1, 2), rows, width), strict=True):
        assert torch.equal(found.cpu(), wanted)
    p_of_blocks = p.cpu().unflatten(1, (2, n))
    ref.assert_probabilities(p_of_blocks, expected, dtype)
    assert (p_of_blocks[..., ~same_sample] == 0).all()
    backend.softmax(poisoned, None, rows.to(device), Softmax(scale, dtype))
    assert torch.equal(poisoned, p)

    backend.softmax_backward(p, dp_poisoned, rows.to(device), scale)
    p_of_blocks = p_of_blocks.double()
    ds = p_of_blocks * (dp - (p_of_blocks * dp).sum(-1, keepdim=True)) * scale
    found = dp_poisoned.cpu().unflatten(1, (2, n))[..., same_sample]
    torch.testing.assert_close(found.double(), ds[..., same_sample], rtol=1e-5, atol=1e-7)


@on_devices
def test_ranges_of_runs(device):
    """Heads of more query blocks than are looked at together."""
    n = 1200
    num = -torch.randint(-1, 3, (1, 2, n // 40), dtype=torch.int32).repeat_interleave(40, -1)
    first = torch.randint(0, 3, (1, 2, n // 100), dtype=torch.int32).repeat_interleave(100, -1)
    idx = torch.stack([first, torch.zeros_like(first)], -1)
    ranges, num_ranges = launches.find_runs(idx.to(device), num.to(device), n)
    for head in range(2):
        expected = []
        for row in range(n):
            begin, length = int(first[0, head, row]), -int(num[0, head, row])
            if length <= 0:
                continue
            if expected and expected[-1][1:] == [row, begin, begin + length]:
                expected[-1][1] = row + 1
            else:
                expected.append([row, row + 1, begin, begin + length])
        assert ranges[head, : int(num_ranges[head])].tolist() == expected

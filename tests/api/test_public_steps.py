"""The steps of the operator by themselves: block means, selection, maps as indices; and the tables that they read."""

import pytest
import torch
from support import reference as ref
from support.problems import BACKENDS

import vsa_jit
from vsa_jit import tables
from vsa_jit.segments import order_of

ORDERS = {
    "plain": (300, {}),
    "grid": (210, {"grid": (5, 6, 7)}),
    "text and video": (287, {"segments": [77, (5, 6, 7)]}),
    "packed": (287 + 70 + 5 + 144, {"segments": [[77, (5, 6, 7)], [70, 5], [(4, 4, 9)]]}),
}


def tensors(length: int, device: str, count: int = 3) -> list[torch.Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return [torch.randn(2, 2, length, 64, device=device, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend[0])
@pytest.mark.parametrize("context", ["attend", "compete"])
@pytest.mark.parametrize("name", ORDERS)
def test_the_steps_make_the_operator(name, context, backend):
    length, order = ORDERS[name]
    backend, device = backend
    q, k, v = tensors(length, device)
    q_c, k_c = (vsa_jit.block_means(x, backend=backend, **order) for x in (q, k))
    assert q_c.dtype == torch.float32
    scores = q_c @ k_c.mT
    segments = order.get("segments")
    idx, num = vsa_jit.select_blocks(scores, 2, segments=segments, context=context, backend=backend)
    assert idx.dtype == num.dtype == torch.int32
    assert (idx >= 0).all()
    assert (num >= 1).all()
    out, _ = vsa_jit.block_sparse_attn_from_indices(q, k, v, idx, num, backend=backend, **order)
    expected = vsa_jit.video_sparse_attn(
        q, k, v, topk=2, context=context, compress_attn_weight=0.0, backend=backend, **order
    )
    # Rows that attend all of their sample name their blocks one by one here: the same sums.
    assert ref.error(out, expected) <= (1e-6 if device == "cpu" else 4e-3)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend[0])
def test_what_is_selected_by_hand(backend):
    """Blocks 0, 1 are text of the first sample, 2 to 4 its video, 5 and 6 the video of the second."""
    backend, device = backend
    segments = [[128, (4, 4, 12)], [(4, 4, 8)]]
    scores = torch.zeros(1, 1, 7, 7, device=device)
    scores[..., 3] = 1.0
    # Of another sample: as high as can be, and never looked at.
    scores[..., 5] = float("inf")
    scores[..., 6] = float("nan")
    scores[..., 5:, :5] = float("nan")
    scores[..., 5:, 5:] = torch.tensor([2.0, 1.0], device=device)
    idx, num = vsa_jit.select_blocks(scores, [1, 1], segments=segments, backend=backend)
    assert num[0, 0].tolist() == [5, 5, 3, 3, 3, 1, 1]
    rows = [idx[0, 0, row, : num[0, 0, row]].tolist() for row in range(7)]
    assert rows == [[0, 1, 2, 3, 4]] * 2 + [[0, 1, 3]] * 3 + [[5]] * 2
    idx, num = vsa_jit.select_blocks(scores, sparsity=[0.7, 0.0], segments=segments, context="compete", backend=backend)
    rows = [idx[0, 0, row, : num[0, 0, row]].tolist() for row in range(7)]
    # Ties go to the lower block.
    assert rows == [[0, 1, 2, 3, 4]] * 2 + [[0, 1, 3]] * 3 + [[5, 6]] * 2
    idx, num = vsa_jit.select_blocks(scores[..., :5], 2, backend=backend)
    assert idx[0, 0, 0].tolist() == [0, 3]


def test_gradients_of_block_means():
    x = torch.randn(1, 2, 287, 16, dtype=torch.float32, requires_grad=True)
    means = vsa_jit.block_means(x, segments=[77, (5, 6, 7)])
    weight = torch.randn(means.shape)
    (means * weight).sum().backward()
    # A block of 64 tokens, one of 13, and the first whole tile of the video.
    assert torch.allclose(x.grad[:, :, :64], (weight[:, :, :1] / 64).expand(-1, -1, 64, -1))
    assert torch.allclose(x.grad[:, :, 64:77], (weight[:, :, 1:2] / 13).expand(-1, -1, 13, -1))
    assert torch.allclose(x.grad[:, :, 77], weight[:, :, 2] / 64)


def test_a_map_as_indices():
    block_map = torch.rand(2, 3, 5, 9) < 0.4
    idx, num = vsa_jit.map_to_indices(block_map)
    assert torch.equal(num, block_map.sum(-1, dtype=torch.int32))
    for row, of_row, count in zip(block_map.flatten(0, 2), idx.flatten(0, 2), num.flatten(), strict=True):
        assert of_row[:count].tolist() == row.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: vsa_jit.select_blocks(s.int(), 2), TypeError, "scores: expected dtype"),
        (lambda s: vsa_jit.select_blocks(s[0], 2), ValueError, "scores: expected shape"),
        (lambda s: vsa_jit.select_blocks(s), ValueError, "topk, sparsity: expected exactly one"),
        (lambda s: vsa_jit.select_blocks(s, 0), ValueError, "topk: expected at least 1"),
        (lambda s: vsa_jit.select_blocks(s, 2, segments=[64]), ValueError, "segments: expected as many blocks"),
        (
            lambda s: vsa_jit.select_blocks(s, [2, 2], segments=[256]),
            ValueError,
            "topk: expected one value, or a list of 1",
        ),
        (lambda s: vsa_jit.select_blocks(s, 2, torch.ones(3)), TypeError, "variable_block_sizes: expected dtype"),
        (
            lambda s: vsa_jit.select_blocks(s, 2, torch.ones(3).int()),
            ValueError,
            "variable_block_sizes: expected shape",
        ),
        (
            lambda s: vsa_jit.select_blocks(s, 2, torch.ones(4).int(), segments=[256]),
            ValueError,
            "variable_block_sizes: expected None where segments",
        ),
        (lambda s: vsa_jit.select_blocks(s, 2, context="both"), ValueError, "context: expected one of"),
        (lambda s: vsa_jit.map_to_indices(s), TypeError, "block_map: expected dtype torch.bool"),
        (lambda s: vsa_jit.map_to_indices(s[0] > 0), ValueError, "block_map: expected 4 dimensions"),
        (lambda s: vsa_jit.block_means(s[0]), ValueError, "q: expected 4 dimensions"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(1, 1, 4, 4))


def test_a_table_is_made_once():
    made = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.arange(5)

    key = object()
    first, second = (tables.on_device(key, torch.device("cpu"), make) for _ in range(2))
    assert first is second
    assert made == [1]


def test_segments_that_are_equal_are_one_key():
    numbers = [0, 0, 0, 77, 0, 5, 6, 7]
    first, second = (order_of(list(numbers), (4, 4, 4)).segments for _ in range(2))
    assert first is second
    assert order_of(numbers, (2, 8, 8)).segments != first
    assert order_of([*numbers[:-1], 8], (4, 4, 4)).segments != first


@pytest.mark.gpu
def test_a_table_on_another_stream():
    """The copy is not waited for by the host; a stream that did not make it waits for it on the GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.randint(1000, (1 << 20,), dtype=torch.int32)
    key = object()
    torch.cuda._sleep(100_000_000)
    tables.on_device(key, device, lambda: values)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        found = tables.on_device(key, device, lambda: pytest.fail("made twice")) + 0
    other.synchronize()
    assert torch.equal(found.cpu(), values)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_graph_of_segments(backend):
    segments = [[77, (5, 6, 7)], [(4, 4, 9)]]
    q, k, v, gate = (
        torch.randn(1, 431, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4)
    )
    dout = torch.randn_like(q)

    def step() -> list[torch.Tensor]:
        out = vsa_jit.video_sparse_attn(
            q, k, v, topk=2, segments=segments, compress_attn_weight=gate, layout="bshd", backend=backend
        )
        return [out, *torch.autograd.grad(out, (q, k, v, gate), dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v, gate):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_graph_of_segments_that_are_new():
    q = torch.randn(1, 1, 101, 64, device="cuda", dtype=torch.bfloat16)
    vsa_jit.video_sparse_attn(q, q, q, topk=1, segments=[37, (4, 4, 4)])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the call once before the capture"), torch.cuda.graph(graph):
        vsa_jit.video_sparse_attn(q, q, q, topk=1, segments=[36, (1, 5, 13)])


@pytest.mark.gpu
def test_compiled_with_graphs():
    """The tables outlive what ``torch.compile`` puts into its own memory."""
    segments = [50, (5, 5, 5)]
    q, k, v = (torch.randn(1, 2, 175, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def call(q, k, v):
        return vsa_jit.video_sparse_attn(q, k, v, topk=1, segments=segments)

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        out = compiled(q, k, v).clone()
        assert torch.equal(out, call(q, k, v))

"""The stand-in for FastVideo's kernels by itself, and FastVideo's own attention classes on it, where there are some."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import fastvideo_kernel
import pytest
import torch
import vsa
from fastvideo_kernel import block_sparse_attn_256 as larger
from fastvideo_kernel.block_sparse_attn import block_sparse_attn, block_sparse_attn_from_indices
from fastvideo_kernel.triton_kernels.index import map_to_index
from support import fastvideo_cpu
from support import reference as ref
from support.problems import Case, Inputs

import vsa_jit

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "vsa_jit" / "integrations" / "fastvideo_stand_in"
needs_fastvideo = pytest.mark.skipif(
    importlib.util.find_spec("fastvideo") is None, reason="needs the package fastvideo, see .ci/run"
)

# Module → what FastVideo 0.2.1, SGLang and DiffSynth import from it.
NAMES = {
    "fastvideo_kernel": ["video_sparse_attn", "video_sparse_attn_bshd", "block_sparse_attn_sm100a"],
    "fastvideo_kernel.block_sparse_attn": ["block_sparse_attn"],
    "fastvideo_kernel.block_sparse_attn_256": ["block_sparse_attn_256_bshd", "block_sparse_attn_128"],
    "fastvideo_kernel.block_sparse_attn_varlen": ["block_sparse_attn_varlen"],
    "fastvideo_kernel.triton_kernels.index": ["map_to_index"],
    "vsa": ["video_sparse_attn", "block_sparse_attn", "torch_attention"],
    "vsa.block_sparse_attn_triton": ["triton_block_sparse_attn_forward"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_others_import(module):
    for name in NAMES[module]:
        scope = {}
        exec(f"from {module} import {name}", scope)
        assert STAND_IN in Path(sys.modules[module].__file__).parents
        assert callable(scope[name]) or name == "block_sparse_attn_sm100a"
    # How FastVideo asks whether there is Video Sparse Attention, and whether there is VMoBA.
    assert importlib.util.find_spec("fastvideo_kernel.ops") is not None
    assert importlib.util.find_spec("fastvideo_kernel.vmoba") is None


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from fastvideo_kernel import moba_attn_varlen", "moba_attn_varlen: expected the package fastvideo-kernel"),
        ("from fastvideo_kernel import sliding_tile_attention", "which has Video Sparse Attention alone"),
        ("from fastvideo_kernel import comm_ops", "fastvideo_kernel.comm_ops: expected"),
        ("from fastvideo_kernel.ops import sliding_tile_attention", "ops.sliding_tile_attention: expected the package"),
        ("import fastvideo_kernel.triton_kernels.attn_qat_train", "No module named .*attn_qat_train"),
    ],
)
def test_what_is_not_served_is_an_import_error(statement, message):
    with pytest.raises(ImportError, match=message):
        exec(statement)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'video_sparse_atn'"):
        _ = fastvideo_kernel.video_sparse_atn
    with pytest.raises(AttributeError, match=r"fastvideo_kernel\.ops' has no attribute 'video_sparse_atn'"):
        _ = fastvideo_kernel.ops.video_sparse_atn


def random_map(*shape):
    """With a row of none, a row of all, and some of both."""
    block_map = torch.rand(shape) < 0.5
    block_map[..., 0, :] = False
    block_map[..., 1, :] = True
    return block_map


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_map_to_index(dtype):
    block_map = random_map(2, 3, 7, 9)
    index, number = map_to_index(block_map.to(dtype) * (3 if dtype != torch.bool else 1))
    assert (index.dtype, number.dtype) == (torch.int32, torch.int32)
    for row, row_index, row_number in zip(block_map.flatten(0, 2), index.flatten(0, 2), number.flatten(), strict=True):
        columns = row.nonzero().flatten().tolist()
        assert row_index.tolist() == columns + [-1] * (9 - len(columns))
        assert row_number == len(columns)
    for x, whole in zip(map_to_index(block_map[0].to(dtype)), (index, number), strict=True):
        assert torch.equal(x, whole[:1])


def through_indices(q, k, v, block_map, sizes):
    return block_sparse_attn_from_indices(q, k, v, *map_to_index(block_map), sizes)


ATTENTIONS = {
    "64": (block_sparse_attn, 64, "bhsd"),
    "64, old name": (vsa.block_sparse_attn, 64, "bhsd"),
    "64, from indices": (
        lambda q, k, v, m, s: block_sparse_attn_from_indices(q, k, v, *map_to_index(m), s),
        64,
        "bhsd",
    ),
    "128": (larger.block_sparse_attn_128, 128, "bhsd"),
    "128, bshd": (larger.block_sparse_attn_128_bshd, 128, "bshd"),
    "256": (larger.block_sparse_attn_256, 256, "bhsd"),
    "256, bshd": (larger.block_sparse_attn_256_bshd, 256, "bshd"),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dims", [3, 4])
def test_block_sparse_attention(name, dims):
    """Every query counts, lse is of base 2, and finite where a query has no key."""
    attend, block, layout = ATTENTIONS[name]
    q_len, kv_len, sizes = 2 * block, 3 * block, torch.tensor([block, 5, block - 1])
    q, k, v = (torch.randn(1, 2, length, 32, requires_grad=True) for length in (q_len, kv_len, kv_len))
    block_map = random_map(1, 2, 2, 3)
    given = block_map.int() if dims == 4 else block_map[0]
    q_in, k_in, v_in = (x.transpose(1, 2).contiguous() if layout == "bshd" else x for x in (q, k, v))
    out, lse = attend(q_in, k_in, v_in, given, sizes)
    out = out.transpose(1, 2) if layout == "bshd" else out

    mask = ref.token_mask(
        block_map,
        torch.arange(q_len) // block,
        torch.arange(kv_len) // block,
        torch.ones(q_len, dtype=torch.bool),
        ref.valid_tokens(kv_len, block, sizes),
    )
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = ref.attention(*leaves, mask, 32**-0.5)
    assert ref.error(out, expected) < 1e-6
    dout = torch.randn(out.shape)
    out.backward(dout)
    expected.backward(dout.double())
    for x, leaf in zip((q, k, v), leaves, strict=True):
        assert ref.error(x.grad, leaf.grad) < 1e-6
    assert lse.shape == (1, 2, q_len)
    assert torch.equal(lse[:, :, :block], torch.full((1, 2, block), torch.finfo(torch.float32).min))
    torch.testing.assert_close(lse[:, :, block:], (expected_lse / math.log(2))[:, :, block:].float())


VIDEO_SPARSE_ATTENTIONS = {
    "bhsd": fastvideo_kernel.video_sparse_attn,
    "bshd": fastvideo_kernel.video_sparse_attn_bshd,
}
TILED = Case("tiled", q_len=640, sizes=(64, 64, 7, 64, 30, 64, 64, 1, 64, 64), topk=3, gate="full", batch=2)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("block_size", [(4, 4, 4), (2, 4, 8), 4])
def test_video_sparse_attention_selects_in_the_dtype_of_its_inputs(layout, block_size):
    inputs = Inputs(Case(**{**vars(TILED), "layout": layout}), "cpu", torch.bfloat16)

    def expected(selection_dtype):
        sizes = inputs.sizes
        return vsa_jit.video_sparse_attn(
            inputs.q,
            inputs.k,
            inputs.v,
            sizes,
            sizes,
            3,
            64,
            inputs.gate,
            layout=layout,
            selection_dtype=selection_dtype,
        )

    out = VIDEO_SPARSE_ATTENTIONS[layout](
        inputs.q, inputs.k, inputs.v, inputs.sizes, inputs.sizes, 3, block_size, compress_attn_weight=inputs.gate
    )
    assert torch.equal(out, expected(torch.bfloat16))
    assert not torch.equal(out, expected(None))


CROSS_SIZES = {"sizes": (64, 1, 63, 40, 7), "q_sizes": (64, 9, 33), "topk": 3, "gate": "full", "batch": 2}


@pytest.mark.parametrize("layout", VIDEO_SPARSE_ATTENTIONS)
@pytest.mark.parametrize("block_size", [(4, 4, 4), 4])
def test_cross_attention(layout, block_size):
    inputs = Inputs(Case("cross", q_len=192, kv_len=320, layout=layout, **CROSS_SIZES), "cpu", torch.float32)
    out = VIDEO_SPARSE_ATTENTIONS[layout](
        inputs.q, inputs.k, inputs.v, inputs.sizes, inputs.q_sizes, 3, block_size, inputs.gate
    )
    out.backward(inputs.dout)
    grads = {"dq": inputs.q.grad, "dk": inputs.k.grad, "dv": inputs.v.grad, "dgate": inputs.gate.grad}
    block_map = inputs.block_map()
    reference, plain = (inputs.expected(dtype, block_map) for dtype in (torch.float64, torch.float32))
    for name, x in {"out": out, **grads}.items():
        ref.assert_close(name, inputs.bhsd(x), reference[name], plain[name])


def test_the_older_package_takes_no_query_sizes():
    inputs = Inputs(TILED, "cpu", torch.bfloat16)
    tensors = inputs.q, inputs.k, inputs.v
    out = vsa.video_sparse_attn(
        *tensors,
        variable_block_sizes=inputs.sizes,
        topk=3,
        block_size=(4, 4, 4),
        compress_attn_weight=inputs.gate,
    )
    assert torch.equal(
        out, fastvideo_kernel.video_sparse_attn(*tensors, inputs.sizes, inputs.sizes, 3, (4, 4, 4), inputs.gate)
    )
    q_c, k_c, v_c = (torch.randn(1, 2, 5, 32) for _ in range(3))
    out_c, p = vsa.torch_attention(q_c, k_c, v_c)
    torch.testing.assert_close(out_c, torch.nn.functional.scaled_dot_product_attention(q_c, k_c, v_c))
    torch.testing.assert_close(p @ v_c, out_c)


def test_calls_compile_whole():
    inputs = Inputs(TILED, "cpu", torch.float32)
    q, k, v, gate, sizes = (x.detach().nan_to_num() for x in (inputs.q, inputs.k, inputs.v, inputs.gate, inputs.sizes))
    block_map = random_map(2, 2, 10, 10)

    def call(q, k, v, gate):
        out = fastvideo_kernel.video_sparse_attn(q, k, v, sizes, sizes, 3, (4, 4, 4), gate)
        return out, *block_sparse_attn(q, k, v, block_map, sizes), *through_indices(q, k, v, block_map, sizes)

    for x, expected in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, gate), call(q, k, v, gate), strict=True
    ):
        torch.testing.assert_close(x, expected)


def test_wrong_sizes_are_named():
    q = torch.randn(1, 1, 256, 32)
    with pytest.raises(ValueError, match=r"variable_block_sizes: expected shape \(4,\), .* got \(2,\)"):
        block_sparse_attn(q, q, q, torch.ones(1, 1, 4, 4), torch.tensor([128, 128]))
    with pytest.raises(ValueError, match="whole blocks of 262144 tokens"):
        fastvideo_kernel.video_sparse_attn(q, q, q, torch.tensor([64]), torch.tensor([64]), 1, 64)
    with pytest.raises(ValueError, match="topk: expected at least 1, got 0"):
        fastvideo_kernel.video_sparse_attn(q, q, q, torch.full((4,), 64), torch.full((4,), 64), 0, (4, 4, 4))


class Packed:
    """Sequences of several lengths, packed, with random maps."""

    def __init__(self, *, full_queries: bool):
        self.q_sizes = [torch.tensor([64, 64, 9]), torch.tensor([64])]
        if not full_queries:
            self.q_sizes = [torch.tensor([3, 64, 10]), torch.tensor([50])]
        self.sizes = [torch.tensor([64, 20]), torch.tensor([1, 64, 30, 64])]
        self.maps = [torch.rand(1, 2, len(q), len(k)) < 0.7 for q, k in zip(self.q_sizes, self.sizes, strict=True)]
        self.q_lens, self.kv_lens = ([int(x.sum()) for x in sizes] for sizes in (self.q_sizes, self.sizes))
        self.q = torch.randn(sum(self.q_lens), 2, 32, requires_grad=True)
        self.k, self.v = (torch.randn(sum(self.kv_lens), 2, 32, requires_grad=True) for _ in range(2))
        self.q_sizes_given = None if full_queries else self.q_sizes

    def attend(self, **changes):
        indices = [map_to_index(block_map) for block_map in self.maps]
        arguments = {
            "cu_seqlens_q": torch.tensor([0, *self.q_lens]).cumsum(0).int(),
            "cu_seqlens_kv": torch.tensor([0, *self.kv_lens]).cumsum(0).int(),
            "q2k_idx_list": [index for index, _ in indices],
            "q2k_num_list": [number for _, number in indices],
            "variable_block_sizes_list": self.sizes,
            "q_variable_block_sizes_list": self.q_sizes_given,
            **changes,
        }
        return fastvideo_kernel.block_sparse_attn_varlen(self.q, self.k, self.v, **arguments)

    def expected(self, q, k, v):
        parts = zip(q.split(self.q_lens), k.split(self.kv_lens), v.split(self.kv_lens), strict=True)
        outs = []
        for i, part in enumerate(parts):
            q_block, kv_block = (
                torch.arange(len(sizes)).repeat_interleave(sizes) for sizes in (self.q_sizes[i], self.sizes[i])
            )
            mask = self.maps[i][:, :, q_block][..., kv_block]
            out, _ = ref.attention(*(x.transpose(0, 1)[None] for x in part), mask, 32**-0.5)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)


@pytest.mark.parametrize("full_queries", [False, True])
def test_sequences_of_several_lengths(full_queries):
    packed = Packed(full_queries=full_queries)
    out = packed.attend()
    leaves = [x.detach().double().requires_grad_() for x in (packed.q, packed.k, packed.v)]
    expected = packed.expected(*leaves)
    assert ref.error(out, expected) < 1e-6
    dout = torch.randn(out.shape)
    out.backward(dout)
    expected.backward(dout.double())
    for x, leaf in zip((packed.q, packed.k, packed.v), leaves, strict=True):
        assert ref.error(x.grad, leaf.grad) < 1e-6


@pytest.mark.parametrize("q_sizes_given", [True, False])
def test_sequences_without_queries_or_keys(q_sizes_given):
    """In between add nothing, and a query without keys gets 0."""
    q_lens, kv_lens = [50, 0, 64, 0, 9], [64, 30, 0, 0, 64]
    q, k, v = (torch.randn(sum(lens), 2, 32, requires_grad=True) for lens in (q_lens, kv_lens, kv_lens))
    q_sizes, sizes = ([torch.tensor([n] if n else [], dtype=torch.int32) for n in lens] for lens in (q_lens, kv_lens))
    numbers = [torch.full((1, 2, len(a)), len(b), dtype=torch.int32) for a, b in zip(q_sizes, sizes, strict=True)]

    def attend(q_lens, kv_lens, q, k, v, sequences):
        return fastvideo_kernel.block_sparse_attn_varlen(
            q,
            k,
            v,
            torch.tensor([0, *q_lens]).cumsum(0).int(),
            torch.tensor([0, *kv_lens]).cumsum(0).int(),
            [torch.zeros(*numbers[i].shape, 1, dtype=torch.int32) for i in sequences],
            [numbers[i] for i in sequences],
            [sizes[i] for i in sequences],
            [q_sizes[i] for i in sequences] if q_sizes_given else None,
        )

    out = attend(q_lens, kv_lens, q, k, v, range(5))
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1)
        for part in [(q[:50], k[:64], v[:64]), (q[114:], k[94:], v[94:])]
    ]
    expected = torch.cat([parts[0], torch.zeros(64, 2, 32), parts[1]])
    torch.testing.assert_close(out, expected)
    dout = torch.randn(out.shape)
    grads = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected))
    for grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)

    none = attend([64], [0], q[50:114], k[:0], v[:0], [2])
    (grad,) = torch.autograd.grad(none.sum(), q)
    assert none.count_nonzero() == grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variable_block_sizes_list": [torch.tensor([64, 21]), torch.tensor([1, 64, 30, 64])]},
            "^variable_block_sizes_list: expected sizes that add up to 84 tokens, got 85",
        ),
        (
            {"q_variable_block_sizes_list": [torch.tensor([3, 64]), torch.tensor([50])]},
            "^q_variable_block_sizes_list: expected sizes that add up to 77 tokens, got 67",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 77, 120])},
            "^q: expected sequences that cover its 127 tokens, got 0 to 120",
        ),
    ],
)
def test_sequences_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Packed(full_queries=False).attend(**changes)


@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 8, 8), (4, 8, 8)])
def test_metadata_puts_a_video_into_tiles_and_back(tile):
    grid = (5, 9, 11)
    metadata = fastvideo_kernel.build_vsa_metadata(grid, tile, device="cpu")
    block = tile[0] * tile[1] * tile[2]
    block_of = ref.block_of_tokens(5 * 9 * 11, tile, grid)
    tiled = metadata["tile_partition_indices"]
    assert torch.equal(metadata["variable_block_sizes"], block_of.bincount().int())
    assert torch.equal(block_of[tiled], block_of.sort().values)
    assert (tiled.diff()[block_of[tiled].diff() == 0] > 0).all()
    assert torch.equal(tiled[metadata["reverse_tile_partition_indices"]], torch.arange(5 * 9 * 11))
    slots = metadata["non_pad_index"]
    assert torch.equal(slots // block, block_of[tiled])
    assert ref.valid_tokens(len(metadata["variable_block_sizes"]) * block, block, metadata["variable_block_sizes"])[
        slots
    ].all()
    with pytest.raises(ValueError, match=r"^tile_size: expected a tile of 64, .* got \(3, 3, 3\) with 27$"):
        fastvideo_kernel.build_vsa_metadata(grid, (3, 3, 3), device="cpu")


def test_example():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STAND_IN / "top-level"), str(ROOT)])}
    command = [sys.executable, str(ROOT / "vsa_jit" / "examples" / "fastvideo_attention.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "the same output without tiling: True" in run.stdout


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    fastvideo_cpu.load()
    fastvideo_cpu.start(0, 1, tmp_path_factory.mktemp("one_rank") / "store")
    yield
    fastvideo_cpu.stop()


def check(inputs, results, block_map):
    reference, plain = (inputs.expected(dtype, block_map) for dtype in (torch.float64, inputs.dtype))
    for name, x in results.items():
        ref.assert_close(name, x.transpose(1, 2), reference[name], plain[name])


def tensors_of(inputs):
    return inputs.q, inputs.k, inputs.v, inputs.gate, inputs.dout


@needs_fastvideo
@pytest.mark.parametrize(
    ("dtype", "sparsity", "topk"),
    # In floating point, 0.3 of 10 tiles are a little more than 3. In bf16, all, since means near a rounding may differ.
    [(torch.float32, 0.7, 4), (torch.bfloat16, 0.0, 10)],
)
def test_wan(one_rank, dtype, sparsity, topk):
    grid = (5, 3, 17)
    case = Case("Wan", grid=grid, block_size=(4, 4, 4), layout="bshd", head_dim=64, batch=2, topk=topk, gate="full")
    inputs = Inputs(case, "cpu", dtype)
    layer = fastvideo_cpu.attention("VIDEO_SPARSE_ATTN", case.heads, case.head_dim)
    metadata = fastvideo_cpu.wan_metadata(grid, sparsity)
    assert metadata.variable_block_sizes.numel() == 10
    check(inputs, fastvideo_cpu.run(layer, metadata, *tensors_of(inputs)), inputs.block_map())


class H3(Inputs):
    """Text, condition frames and audio before a video: blocks straddle no two of them."""

    def __init__(self, prefix, grid, tile, dtype, gate):
        tokens = sum(prefix) + grid[0] * grid[1] * grid[2]
        super().__init__(Case("H3", q_len=tokens, layout="bshd", head_dim=64, gate=gate), "cpu", dtype)
        block_of = [ref.block_of_tokens(length, tile) for length in prefix] + [
            ref.block_of_tokens(tokens - sum(prefix), tile, grid)
        ]
        starts = torch.tensor([0] + [int(x.max()) + 1 for x in block_of]).cumsum(0)
        self.q_block = self.kv_block = torch.cat([x + start for x, start in zip(block_of, starts, strict=False)])
        self.num_prefix, self.num_blocks = int(starts[-2]), int(starts[-1])
        self.kv_nonempty = torch.ones(self.num_blocks, dtype=torch.bool)

    def block_map(self, topk, exempt):
        q_c, k_c, _ = self.means({name: x.detach() for name, x in self.clean(torch.float64).items()})
        scores, video = q_c @ k_c.mT, torch.arange(self.num_blocks) >= self.num_prefix
        if exempt:
            block_map = ref.select(scores, topk, video) | ~video
        else:
            block_map = ref.select(scores, topk + self.num_prefix, self.kv_nonempty)
        return block_map | ~video[:, None]


@pytest.fixture
def enable_segments(one_rank, monkeypatch):
    """The function, which is undone after the test; without it FastVideo's own classes run."""
    from fastvideo.attention.backends.video_sparse_attn_h3 import MiniMaxH3VSABackend

    from vsa_jit.integrations import fastvideo

    for name in ("get_impl_cls", "get_builder_cls"):
        monkeypatch.setattr(MiniMaxH3VSABackend, name, getattr(MiniMaxH3VSABackend, name))
    return fastvideo.enable_segments


@pytest.fixture
def nothing_is_tiled(monkeypatch):
    """Fails a test in which FastVideo would scatter a sequence into tiles."""
    from fastvideo.attention.backends import video_sparse_attn_h3

    def scatter(*_):
        raise AssertionError("scattered into tiles")

    return lambda: monkeypatch.setattr(video_sparse_attn_h3, "scatter_into_tile_buf", scatter)


@needs_fastvideo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [None, "full"])
@pytest.mark.parametrize(("tile", "grid", "exempt"), [((4, 4, 4), (5, 3, 17), True), ((4, 8, 8), (3, 9, 30), False)])
@pytest.mark.parametrize("segments", [False, True])
def test_minimax_h3(enable_segments, nothing_is_tiled, dtype, gate, tile, grid, exempt, segments):
    if segments:
        enable_segments()
        nothing_is_tiled()
    prefix = (70, 5, 30)
    inputs = H3(prefix, grid, tile, dtype, gate)
    metadata = fastvideo_cpu.h3_metadata(grid, 0.6, prefix, math.prod(tile), exempt=exempt)
    assert metadata.num_prefix_tiles == inputs.num_prefix
    assert metadata.num_video_tiles == inputs.num_blocks - inputs.num_prefix
    layer = fastvideo_cpu.attention("VIDEO_SPARSE_ATTN_H3", 2, 64)
    results = fastvideo_cpu.run(layer, metadata, *tensors_of(inputs))
    # 0.4 of 10 tiles, and of 8.
    block_map = inputs.block_map(4, exempt)
    assert not block_map.all()
    if gate is None:
        # No coarse output at all, where a call of this package without a gate has one of weight 1.
        inputs.case = Case(**{**vars(inputs.case), "gate": 0.0})
    check(inputs, results, block_map)


@needs_fastvideo
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("tile_size", "exempt", "sparsity", "prefix", "dense_layers"),
    [
        # Of 10 tiles FastVideo keeps 4, which is its rounding, and of 6 it keeps 2.
        pytest.param(64, True, 0.7, (70, 0, 30), (), id="sparse, 64, attend"),
        pytest.param(64, False, 0.7, (70, 0, 30), (), id="sparse, 64, compete"),
        pytest.param(256, True, 0.7, (70, 5, 300), (), id="sparse, 256, attend"),
        pytest.param(256, False, 0.7, (70, 5, 300), (1, 2), id="sparse, 256, compete"),
        pytest.param(64, False, 0.7, (70, 5, 300), (0, 3), id="a dense layer"),
        pytest.param(256, True, 0.0, (70, 5, 30), (), id="a dense step"),
        pytest.param(64, False, 0.7, (0, 0, 0), (), id="a video alone"),
    ],
)
def test_segments_are_what_fastvideo_tiles(
    enable_segments, nothing_is_tiled, gate, tile_size, exempt, sparsity, prefix, dense_layers
):
    """The same outputs and gradients, from a batch of two."""
    grid = (5, 3, 17)
    tensors = [torch.randn(2, sum(prefix) + math.prod(grid), 2, 64) for _ in range(5)]
    if not gate:
        tensors[3] = None

    def results():
        layer = fastvideo_cpu.attention("VIDEO_SPARSE_ATTN_H3", 2, 64)
        schedule = {"exempt": exempt, "dense_layers": dense_layers}
        metadata = fastvideo_cpu.h3_metadata(grid, sparsity, prefix, tile_size, **schedule)
        return fastvideo_cpu.run(layer, metadata, *tensors)

    tiled = results()
    enable_segments()
    nothing_is_tiled()
    for name, x in results().items():
        torch.testing.assert_close(x, tiled[name], atol=1e-5, rtol=1e-4)


@needs_fastvideo
@pytest.mark.parametrize("variable", ["FASTVIDEO_H3_VSA_PROBE", "FASTVIDEO_VSA_SM100A"])
def test_what_needs_tiles_is_left_to_fastvideo(enable_segments, monkeypatch, tmp_path, variable):
    from fastvideo.forward_context import set_forward_context

    grid, prefix = (4, 8, 12), (70, 5, 30)
    q = torch.randn(1, sum(prefix) + math.prod(grid), 2, 64)

    def output():
        layer = fastvideo_cpu.attention("VIDEO_SPARSE_ATTN_H3", 2, 64)
        metadata = fastvideo_cpu.h3_metadata(grid, 0.6, prefix, 64)
        with torch.no_grad(), set_forward_context(0, metadata):
            return layer(q, q, q, original_seq_len=metadata.total_seq_length)[0]

    monkeypatch.setenv(variable, str(tmp_path) if variable.endswith("PROBE") else "1")
    tiled = output()
    enable_segments()
    assert torch.equal(output(), tiled)
    assert len(list(tmp_path.iterdir())) == variable.endswith("PROBE")


SCRIPT = """
from multiprocessing import get_context

from support import fastvideo_cpu

fastvideo_cpu.load()
from vsa_jit.integrations.fastvideo import enable_segments

enable_segments()


def main():
    # What FastVideo's worker does: nothing of the script is named in it.
    worker = get_context("spawn").Process(target=fastvideo_cpu.print_h3_implementation)
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
"""


@needs_fastvideo
def test_segments_reach_spawned_workers(tmp_path):
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [STAND_IN / "top-level", ROOT, ROOT / "tests"])),
    }
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "SegmentsImpl"


@needs_fastvideo
def test_two_ranks_equal_one(one_rank, tmp_path):
    """Sequence parallelism of a sequence that two ranks cannot share evenly: FastVideo pads it."""
    grid, sparsity = (5, 3, 17), 0.7
    tokens = 5 * 3 * 17
    inputs = [torch.randn(1, tokens + 1, 2, 64) for _ in range(5)]
    for x in inputs:
        x[:, tokens:] = 0.0
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(fastvideo_cpu.run_rank, (2, str(tmp_path), grid, sparsity), nprocs=2)
    parts = [torch.load(tmp_path / f"results{rank}.pt") for rank in range(2)]
    metadata = fastvideo_cpu.wan_metadata(grid, sparsity)
    expected = fastvideo_cpu.run(fastvideo_cpu.attention("VIDEO_SPARSE_ATTN", 2, 64), metadata, *inputs)
    for name, x in expected.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts], 1), x)
        assert x[:, :tokens].abs().sum(-1).all()


@needs_fastvideo
def test_fastvideo_warns_and_goes_on_where_its_blackwell_kernel_was_asked_for(one_rank, monkeypatch):
    from fastvideo.attention.backends import video_sparse_attn_h3

    warnings = []
    monkeypatch.setenv(video_sparse_attn_h3.VSA_SM100A_ENV, "1")
    monkeypatch.setattr(video_sparse_attn_h3.logger, "warning_once", warnings.append)
    metadata = fastvideo_cpu.h3_metadata((4, 4, 8), 0.5, (70, 30), 64)
    q = torch.randn(1, metadata.total_seq_length, 2, 64)
    layer = fastvideo_cpu.attention("VIDEO_SPARSE_ATTN_H3", 2, 64)
    from fastvideo.forward_context import set_forward_context

    with torch.no_grad(), set_forward_context(0, metadata):
        out, _ = layer(q, q, q, original_seq_len=metadata.total_seq_length)
        monkeypatch.delenv(video_sparse_attn_h3.VSA_SM100A_ENV)
        expected, _ = layer(q, q, q, original_seq_len=metadata.total_seq_length)
    assert torch.equal(out, expected)
    (warning,) = warnings
    assert "is_supported returned False" in warning

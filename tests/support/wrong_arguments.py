"""Wrong arguments of the public functions, each with the error that answers it, and right ones to put them into."""

import numpy as np
import torch

B, H, S, D = 1, 2, 256, 32
BLOCKS = S // 64


def qkv(**changes):
    tensors = {name: torch.randn(B, H, S, D) for name in "qkv"}
    return {**tensors, **changes}


def indices(**changes):
    tensors = {
        "q2k_idx": torch.zeros(B, H, BLOCKS, 2, dtype=torch.int32),
        "q2k_num": torch.ones(B, H, BLOCKS, dtype=torch.int32),
    }
    return {**tensors, **changes}


SIZES = torch.full((BLOCKS,), 64)

WRONG_CALLS = [
    ("q", {"q": "q"}, TypeError, "q: expected a tensor, got str"),
    ("q", {"q": torch.randn(B, H, S, D).double()}, TypeError, "q: expected dtype .*bfloat16.*, got torch.float64"),
    ("k", {"k": torch.randn(B, H, S, D).half()}, TypeError, "k: expected q's dtype torch.float32, got torch.float16"),
    ("q", {"q": torch.randn(H, S, D)}, ValueError, r"q: expected 4 dimensions \(bhsd\), got shape \(2, 256, 32\)"),
    ("q", {"q": torch.randn(B, H, 0, D)}, ValueError, r"q: expected no empty dimension, got shape \(1, 2, 0, 32\)"),
    (
        "k",
        {"k": torch.randn(B, H, D, S).mT},
        ValueError,
        r"k: expected a contiguous last dimension \(stride 1\), got stride 256",
    ),
    ("k", {"k": torch.randn(B, H, S, D, device="meta")}, ValueError, "k: expected q's device cpu, got meta"),
    ("v", {"v": torch.randn(B, H, S + 1, D)}, ValueError, r"v: expected k's shape \(1, 2, 256, 32\), got"),
    (
        "k",
        {"k": torch.randn(2, H, S, D), "v": torch.randn(2, H, S, D)},
        ValueError,
        "k: expected q's batch size 1, got 2",
    ),
    (
        "k",
        {"k": torch.randn(B, H, S, 64), "v": torch.randn(B, H, S, 64)},
        ValueError,
        "k: expected q's head dimension 32, got 64",
    ),
    (
        "q",
        {"q": torch.randn(B, 3, S, D)},
        ValueError,
        "q: expected a number of heads that is a multiple of k's 2, got 3",
    ),
    (
        "q",
        {name: torch.randn(B, H, S, 8) for name in "qkv"},
        ValueError,
        "q: expected a head dimension from 16 to 256, got 8",
    ),
    (
        "q",
        {name: torch.randn(B, H, S, 257) for name in "qkv"},
        ValueError,
        "q: expected a head dimension from 16 to 256, got 257",
    ),
    ("q", {"q": torch.randn(B, H, S, D).to_sparse()}, TypeError, "q: expected a dense tensor, got .* torch.sparse_coo"),
    ("layout", {"layout": 3}, TypeError, "layout: expected a string, got int"),
    ("backend", {"backend": None}, TypeError, "backend: expected a string, got NoneType"),
    ("grid", {"grid": b"\4\10\10"}, TypeError, "grid: expected three ints, got bytes"),
    (
        "softmax_scale",
        {"softmax_scale": 10**400},
        ValueError,
        "softmax_scale: expected a number from 1.18e-38 to 2.36e",
    ),
    ("softmax_scale", {"softmax_scale": 3e38}, ValueError, "softmax_scale: expected a number from .*, got 3e.38"),
    ("softmax_scale", {"softmax_scale": 1e-46}, ValueError, "softmax_scale: expected a number from .*, got 1e-46"),
    ("layout", {"layout": "sbhd"}, ValueError, r"layout: expected one of \('bhsd', 'bshd'\), got 'sbhd'"),
    ("softmax_scale", {"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number or None, got str"),
    ("softmax_scale", {"softmax_scale": 0.0}, ValueError, "softmax_scale: expected a number from .*, got 0.0"),
    ("softmax_scale", {"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a number .*, got nan"),
    ("backend", {"backend": "cuda"}, ValueError, "backend: expected one of .*'triton', 'torch'.*, got 'cuda'"),
    ("block_size", {"block_size": 96}, ValueError, "block_size: expected a positive multiple of 64 tokens, got 96"),
    (
        "block_size",
        {"block_size": 4},
        ValueError,
        r"block_size: expected a positive multiple of 64 tokens, got 4; did you mean \(4, 4, 4\)\?$",
    ),
    (
        "block_size",
        {"block_size": 8, "grid": (4, 8, 8)},
        ValueError,
        r"block_size: expected a tile .* where grid is given, got 8; did you mean \(8, 8, 8\)\?$",
    ),
    ("block_size", {"block_size": 2**70}, ValueError, "block_size: expected at most 16777216 tokens, got 118"),
    ("block_size", {"block_size": (2**40,) * 3}, ValueError, "block_size: expected at most 16777216 tokens, got"),
    ("softmax_scale", {"softmax_scale": np.True_}, TypeError, "softmax_scale: expected .*, got bool"),
    ("block_size", {"block_size": 32}, ValueError, "block_size: expected a positive multiple of 64 tokens, got 32$"),
    ("block_size", {"block_size": 5}, ValueError, "block_size: expected a positive multiple of 64 tokens, got 5$"),
    ("block_size", {"block_size": "64"}, TypeError, "block_size: expected an int or three ints .*, got str"),
    (
        "block_size",
        {"block_size": torch.tensor(64)},
        TypeError,
        "block_size: expected an int or three ints .*, got Tensor",
    ),
    (
        "block_size",
        {"block_size": np.float32(64)},
        TypeError,
        "block_size: expected an int or three ints .*, got float32",
    ),
    ("grid", {"grid": np.array([4.0, 8.0, 8.0])}, TypeError, "grid: expected three ints, got float64"),
    ("grid", {"grid": torch.tensor([4, 8, 8])}, TypeError, "grid: expected three ints, got Tensor"),
    ("softmax_scale", {"softmax_scale": np.float32("nan")}, ValueError, "softmax_scale: expected a number .*, got nan"),
    ("softmax_scale", {"softmax_scale": 1j}, TypeError, "softmax_scale: expected a number or None, got complex"),
    ("softmax_scale", {"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale: expected .*, got Tensor"),
    ("block_size", {"block_size": 0}, ValueError, "block_size: expected a positive multiple of 64 tokens, got 0"),
    ("block_size", {"block_size": (4, 4, 5)}, ValueError, r"block_size: .* multiple of 64 .*\(4, 4, 5\) with 80"),
    ("block_size", {"block_size": (8, 8)}, ValueError, "block_size: expected three ints, got 2"),
    ("block_size", {"block_size": (4, -4, -4)}, ValueError, "block_size: expected three positive ints"),
    ("block_size", {"block_size": 64.0}, TypeError, "block_size: expected an int or three ints .*, got float"),
    ("block_size", {"block_size": True}, TypeError, "block_size: expected an int or three ints"),
    ("grid", {"grid": (4, 8, 9)}, ValueError, r"grid: expected T·H·W to be q's sequence length 256, got \(4, 8, 9\)"),
    ("grid", {"grid": (4, 64)}, ValueError, "grid: expected three ints, got 2"),
    ("grid", {"grid": (4, 8.0, 8)}, TypeError, r"grid: expected three ints, got float in \(4, 8.0, 8\)"),
    (
        "block_size",
        {"grid": (4, 8, 8), "block_size": 192},
        ValueError,
        r"block_size: expected a tile \(t, h, w\) or one of \(64, 128, 256\) where grid is given, got 192",
    ),
    (
        "grid",
        {"grid": (4, 8, 8), "k": torch.randn(B, H, 128, D), "v": torch.randn(B, H, 128, D)},
        ValueError,
        "grid: expected T·H·W to be k's sequence length 128",
    ),
    (
        "variable_block_sizes",
        {"grid": (4, 8, 8), "variable_block_sizes": SIZES},
        ValueError,
        "variable_block_sizes: expected None where grid is given",
    ),
    (
        "variable_block_sizes",
        {"variable_block_sizes": SIZES.float()},
        TypeError,
        "variable_block_sizes: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    ("variable_block_sizes", {"variable_block_sizes": [64] * 4}, TypeError, "expected a tensor, got list"),
    (
        "variable_block_sizes",
        {"variable_block_sizes": SIZES[:3]},
        ValueError,
        r"variable_block_sizes: expected shape \(4,\), one size for each block, got \(3,\)",
    ),
    (
        "variable_block_sizes",
        {"variable_block_sizes": SIZES, **{name: torch.randn(B, H, 250, D) for name in "qkv"}},
        ValueError,
        "variable_block_sizes: expected a sequence of whole blocks of 64 tokens .* got length 250",
    ),
    (
        "q_variable_block_sizes",
        {"q_variable_block_sizes": SIZES[:2]},
        ValueError,
        r"q_variable_block_sizes: expected shape \(4,\)",
    ),
    (
        "variable_block_sizes",
        {"variable_block_sizes": torch.full((BLOCKS,), 64, device="meta")},
        ValueError,
        "variable_block_sizes: expected q's device cpu, got meta",
    ),
]

WRONG_INDICES = [
    (
        {"q2k_idx": torch.zeros(B, H, BLOCKS, 2)},
        TypeError,
        "q2k_idx: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    (
        {"q2k_idx": torch.zeros(B, H, BLOCKS, 2, dtype=torch.int16)},
        TypeError,
        "q2k_idx: expected dtype torch.int32 or torch.int64, got torch.int16",
    ),
    (
        {"q2k_idx": torch.zeros(B, H, BLOCKS + 1, 2, dtype=torch.int32)},
        ValueError,
        r"q2k_idx: expected shape \(1, 2, 4, m\) for any m, got \(1, 2, 5, 2\)",
    ),
    ({"q2k_num": torch.ones(B, H, BLOCKS)}, TypeError, "q2k_num: expected dtype .*, got torch.float32"),
    (
        {"q2k_num": torch.ones(H, BLOCKS, dtype=torch.int32)},
        ValueError,
        r"q2k_num: expected shape \(1, 2, 4\), got \(2, 4\)",
    ),
    (
        {"q2k_num": torch.ones(B, H, BLOCKS, dtype=torch.int32, device="meta")},
        ValueError,
        "q2k_num: expected q's device cpu, got meta",
    ),
]

LENGTHS_OF_PACKED = [[100, (2, 3, 4)], [32, (4, 5, 5)]]

WRONG_SEGMENTS = [
    ({"segments": [100]}, ValueError, "segments: expected lengths that add up to q's sequence length 256, got 100"),
    ({"segments": [57, (10, 4, 5)]}, ValueError, "segments: .* q's sequence length 256, got 257"),
    ({"segments": [[57], [(10, 4, 5)]]}, ValueError, "segments: .* q's sequence length 256, got 257"),
    ({"segments": []}, ValueError, "segments: .* q's sequence length 256, got 0"),
    ({"segments": [[], [0]]}, ValueError, "segments: .* q's sequence length 256, got 0"),
    ({"segments": [[4, 8, 8]]}, ValueError, "segments: .* 256, got 20; .* a video is a tuple"),
    (
        {"segments": [S], "k": torch.randn(B, H, 128, D), "v": torch.randn(B, H, 128, D)},
        ValueError,
        "segments: .* k's sequence length 128, got 256",
    ),
    ({"segments": [-1, 257]}, ValueError, "segments: expected no negative length, got -1"),
    ({"segments": [0, (-4, -8, 8)]}, ValueError, r"segments: expected no negative size, got \(-4, -8, 8\)"),
    ({"segments": [[S], [(0, -1, 2)]]}, ValueError, r"segments: expected no negative size, got \(0, -1, 2\)"),
    ({"segments": [256.0]}, TypeError, "segments: expected a number of tokens or a grid .*, got float"),
    ({"segments": ["256"]}, (TypeError, ValueError), "segments: expected a number of tokens or a grid"),
    ({"segments": "256"}, TypeError, "segments: expected a list of lengths and grids .*, got str"),
    ({"segments": S}, TypeError, "segments: expected a list of lengths and grids .*, got int"),
    ({"segments": [True]}, TypeError, "segments: expected a number of tokens or a grid .*, got bool"),
    ({"segments": [None, S]}, TypeError, "segments: expected a number of tokens or a grid .*, got NoneType"),
    ({"segments": [torch.tensor(256)]}, TypeError, "segments: expected a number of tokens or a grid .*, got Tensor"),
    ({"segments": [(4, 8.0, 8)]}, TypeError, "segments: expected a number of tokens or a grid .*, got float"),
    ({"segments": [(4, "8", 8)]}, TypeError, "segments: expected a number of tokens or a grid .*, got str"),
    ({"segments": [128, (4, 32)]}, ValueError, r"segments: expected .* a grid \(T, H, W\) .*, got \(4, 32\)"),
    ({"segments": [[128], [(4, 32)]]}, ValueError, r"segments: expected .* a grid \(T, H, W\) .*, got \(4, 32\)"),
    ({"segments": [128, (2, 4, 4, 4)]}, ValueError, r"segments: expected .*, got \(2, 4, 4, 4\)"),
    ({"segments": [[[128, (2, 8, 8)]]]}, ValueError, "segments: expected a number of tokens or a grid"),
    (
        {"segments": [(4, 8, 8)], "grid": (4, 8, 8)},
        ValueError,
        "grid, segments: expected at most one of them, got both",
    ),
    (
        {"segments": [S], "variable_block_sizes": SIZES},
        ValueError,
        "variable_block_sizes: expected None where segments are given",
    ),
    (
        {"segments": [S], "q_variable_block_sizes": SIZES},
        ValueError,
        "q_variable_block_sizes: expected None where segments are given",
    ),
    ({"segments": [S], "block_size": 192}, ValueError, "block_size: expected a tile .*, got 192"),
    ({"segments": [S], "block_size": 8}, ValueError, r"block_size: .*, got 8; did you mean \(8, 8, 8\)\?$"),
]

WRONG_TOPK_OF_SEGMENTS = [
    (
        {"segments": LENGTHS_OF_PACKED, "topk": [1, 2, 3]},
        ValueError,
        "topk: expected one value, or a list of 2, one for each sample of segments, got 3",
    ),
    ({"segments": LENGTHS_OF_PACKED, "topk": [1]}, ValueError, "topk: expected one value, or a list of 2.*, got 1"),
    ({"segments": LENGTHS_OF_PACKED, "topk": []}, ValueError, "topk: expected one value, or a list of 2.*, got 0"),
    (
        {"segments": LENGTHS_OF_PACKED, "sparsity": [0.5]},
        ValueError,
        "sparsity: expected one value, or a list of 2, one for each sample of segments, got 1",
    ),
    ({"segments": [128, (2, 8, 8)], "topk": [1, 2]}, ValueError, "topk: expected one value, or a list of 1.*, got 2"),
    ({"topk": [1]}, TypeError, "topk: expected an int, got list"),
    ({"sparsity": [0.5]}, TypeError, "sparsity: expected a float, got list"),
    ({"grid": (4, 8, 8), "topk": [1]}, TypeError, "topk: expected an int, got list"),
    ({"segments": LENGTHS_OF_PACKED, "topk": [1, 0]}, ValueError, "topk: expected at least 1, got 0"),
    ({"segments": [S], "topk": 0}, ValueError, "topk: expected at least 1, got 0"),
    ({"segments": LENGTHS_OF_PACKED, "topk": [1, 2.0]}, TypeError, "topk: expected an int, got float"),
    ({"segments": LENGTHS_OF_PACKED, "topk": [1, True]}, TypeError, "topk: expected an int, got bool"),
    ({"segments": LENGTHS_OF_PACKED, "topk": [1, None]}, (TypeError, ValueError), "topk"),
    ({"segments": LENGTHS_OF_PACKED, "sparsity": [0.5, 1.0]}, ValueError, r"sparsity: .* in \[0, 1\), got 1.0"),
    ({"segments": LENGTHS_OF_PACKED, "sparsity": [0.5, "0"]}, TypeError, "sparsity: expected a float, got str"),
    (
        {"segments": LENGTHS_OF_PACKED, "topk": [1, 1], "sparsity": [0.5, 0.5]},
        ValueError,
        "topk, sparsity: .*, got both",
    ),
    (
        {"segments": [S], "topk": 1, "context": "ignore"},
        ValueError,
        r"context: expected one of \('attend', 'compete'\), got 'ignore'",
    ),
    ({"segments": [S], "topk": 1, "context": None}, TypeError, "context: expected a string, got NoneType"),
    ({"topk": 1, "context": 1}, TypeError, "context: expected a string, got int"),
]

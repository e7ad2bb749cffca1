"""Compiles every kernel for a GPU architecture without having one, and prints what each needs.

Run as ``python compile_triton.py CAPABILITY``: a line of JSON for each kernel with its shared memory in bytes and its
columns of tensor memory. It is a program of its own because Triton's interpreter, which the tests use, and its compiler
exclude each other in a process.
"""

import json
import os
import sys
from typing import NamedTuple
from unittest.mock import patch

# The table of source lines is no part of the code, and takes time.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from vsa_jit.backends.triton import config
from vsa_jit.backends.triton.backward import (
    attend_backward_kv_kernel,
    attend_backward_q_kernel,
    prepare_backward_kernel,
)
from vsa_jit.backends.triton.forward import attend_forward_kernel
from vsa_jit.backends.triton.means import block_mean_backward_kernel, block_means_kernel
from vsa_jit.backends.triton.product import matmul_kernel
from vsa_jit.backends.triton.runs import find_runs_kernel
from vsa_jit.backends.triton.select import map_to_indices_kernel, select_kernel, transpose_index_kernel
from vsa_jit.backends.triton.softmax import softmax_backward_kernel, softmax_kernel

# Shared memory that a thread block may use, in bytes, from NVIDIA's table of compute capabilities.
ARCHITECTURES = {
    80: config.Architecture(163 * 1024, wgmma=False),
    86: config.Architecture(99 * 1024, wgmma=False),
    89: config.Architecture(99 * 1024, wgmma=False),
    90: config.Architecture(227 * 1024, wgmma=True),
    100: config.Architecture(227 * 1024, wgmma=False),
    120: config.Architecture(99 * 1024, wgmma=False),
}
# Of Blackwell's tensor memory, which the other architectures do not have.
TENSOR_MEMORY_COLUMNS = 512
# These have tensor cores of the same kind. What is not usual is compiled for the reference alone where tiles are the
# same: it has the smallest shared memory, and Triton leaves no optimisation of its code out.
REFERENCE, LIKE_REFERENCE = 86, (80, 89, 120)
MAKE_LLIR = CUDABackend.make_llir
# The last pass that allocates memory for a kernel without clusters.
ADD_ALLOCATION = nvidia.passes.ttnvgpuir.add_allocate_tensor_memory
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MEANS = {"QMean", "KMean", "VMean", "DMean", "DQMean", "DKMean", "DVMean", "OutC", "DOutC"}
FP32 = {"Lse", "DLse", "Shift", "Delta", "Scores", "Probs", "DProbs", "A", "B"} | MEANS
INT32 = {"Q2kIdx", "Q2kNum", "K2qIdx", "QSizes", "KSizes", "Sizes", "Blocks", "Ranges", "NumRanges", "Rows", "Tiles"}
BOOL = {"BlockMap"}
INT64 = {"K2qEnd", "Counts"}
INT64_SCALARS = {"inverse_hw", "inverse_w"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {"Q", "K", "V", "A", "B"}
FLOATS = {"gate_value", "scale", "scale_log2"}
TILES = {64: (4, 4, 4), 128: (2, 8, 8), 192: (4, 6, 8), 256: (4, 8, 8)}
PLAIN, RASTER, SEGMENTS = "plain", "raster", "segments"
# Block size, head dimension, dtype, order of tokens, mask. These are compiled to machine code for every architecture,
# and those of the reference for it. What else is unusual is compiled until its memory is known.
USUAL = (
    (64, 128, torch.bfloat16, PLAIN, False),
    (256, 128, torch.bfloat16, RASTER, True),
)
USUAL_OF_REFERENCE = (
    *USUAL,
    (64, 64, torch.float32, PLAIN, False),
    (64, 256, torch.bfloat16, PLAIN, False),
    (192, 96, torch.bfloat16, RASTER, True),
    (64, 128, torch.bfloat16, SEGMENTS, True),
)
# What between them takes every choice of tiles.
EVERY = (
    *USUAL_OF_REFERENCE,
    (128, 128, torch.bfloat16, PLAIN, False),
    (256, 64, torch.bfloat16, PLAIN, False),
    (128, 256, torch.bfloat16, PLAIN, False),
    (64, 128, torch.float32, PLAIN, False),
    (128, 256, torch.float32, PLAIN, False),
    (64, 128, torch.float16, RASTER, True),
    (256, 128, torch.bfloat16, PLAIN, True),
    (256, 128, torch.bfloat16, SEGMENTS, True),
)
# For the reference alone: they have the tiles of a raster, and need at most a few words more.
EVERY_SEGMENTS = (
    (256, 128, torch.bfloat16, SEGMENTS, False),
    (192, 96, torch.float16, SEGMENTS, True),
    (64, 256, torch.bfloat16, SEGMENTS, True),
    (64, 128, torch.float32, SEGMENTS, True),
)
# Where a loop over the rows of a block is unrolled, a larger block is the same code more often: one of 256 is enough.
EVERY_ROWS = (
    (64, 128, torch.bfloat16, PLAIN, False),
    (128, 64, torch.bfloat16, PLAIN, False),
    (64, 256, torch.bfloat16, PLAIN, False),
    (64, 128, torch.float32, PLAIN, False),
    (64, 256, torch.float32, PLAIN, False),
    (192, 96, torch.bfloat16, RASTER, True),
    (256, 128, torch.bfloat16, RASTER, True),
    (64, 128, torch.float16, RASTER, True),
    (128, 128, torch.bfloat16, PLAIN, True),
    (64, 128, torch.bfloat16, SEGMENTS, True),
    (192, 96, torch.float32, SEGMENTS, True),
)
USUAL_ROWS = (
    (64, 128, torch.bfloat16, PLAIN, False),
    (64, 128, torch.float16, RASTER, True),
)
USUAL_ROWS_OF_REFERENCE = (*USUAL_ROWS, (64, 128, torch.bfloat16, SEGMENTS, True))
# What the backward does without where there is nothing to add to its gradients.
NO_MEANS = {"DQMean": None, "DKMean": None, "DVMean": None}
# What the kernels do without where the tokens are not segments.
NO_SEGMENTS = {"Blocks": None, "Ranges": None, "NumRanges": None}
# Columns and warps.
USUAL_SELECTION = ((1024, 1),)
EVERY_SELECTION = (*USUAL_SELECTION, (4096, 2))


def constants_of(block: int, head_dim: int, dtype: torch.dtype, order: str, masked: bool) -> dict:
    """What the backend takes from the problem."""
    tile_t, tile_h, tile_w = TILES[block]
    has_sizes = masked and order == PLAIN
    return {
        **({} if order == SEGMENTS else NO_SEGMENTS),
        **(NO_MEANS if dtype == torch.float16 else {}),
        "GROUP": 2,
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "BLOCK": block,
        "TILE_T": tile_t,
        "TILE_H": tile_h,
        "TILE_W": tile_w,
        "RASTER": order != PLAIN,
        "HAS_Q_SIZES": has_sizes,
        "HAS_K_SIZES": has_sizes,
        "HAS_SIZES": has_sizes,
        "MASK": masked,
        "MASK_Q": masked,
        "MASK_K": masked,
        "HAS_DLSE": True,
        "COMBINE": True,
        # A weight that is a number is compiled with fp16.
        "HAS_GATE": dtype != torch.float16,
        "IS_COMBINED": dtype == torch.float16,
        "KEEP_OUT_S": True,
        "ALIKE": True,
        "OFFSET": tl.int32,
        "EXACT": dtype == torch.float32,
        "stride_gd": 1,
    }


def attend_kernels(arch: config.Architecture, block: int, head_dim: int, dtype: torch.dtype, order: str, masked: bool):
    """Those whose tiles depend on the architecture."""
    common, work = constants_of(block, head_dim, dtype, order, masked), (block, head_dim, dtype.itemsize, arch)
    tiled = order != PLAIN
    yield attend_forward_kernel, common | config.forward(*work).launch
    yield attend_backward_q_kernel, common | config.backward_q(*work).launch
    yield attend_backward_kv_kernel, common | config.backward_kv(*work, tiled, tiled and masked).launch


def row_kernels(*variant):
    """Those whose tiles are the same everywhere."""
    common = constants_of(*variant)
    yield prepare_backward_kernel, common | {"BLOCK_M": 32, "num_warps": 4}
    for kernel in (block_means_kernel, block_mean_backward_kernel):
        yield kernel, common | {"ROWS": 32, "num_warps": 1}
    if variant == USUAL_ROWS[0]:
        # The same code as with V, less that of V.
        yield block_means_kernel, common | {"V": None, "ROWS": 32, "num_warps": 1}


def selection_kernels(is_reference: bool):
    for columns, warps in EVERY_SELECTION if is_reference else USUAL_SELECTION:
        shape = {"COLUMNS": columns, "WIDTH_PAD": 64, "num_warps": warps}
        samples = {"HAS_SIZES": False, "Sizes": None}
        yield select_kernel, shape | samples | {"DTYPE": tl.float32}
        yield softmax_kernel, shape | {"HAS_SIZES": True, "Rows": None, "DTYPE": tl.bfloat16}
        yield softmax_backward_kernel, shape
        yield map_to_indices_kernel, shape
        yield transpose_index_kernel, shape | {"PLACE": True}
        if is_reference:
            # Less of the same code.
            yield select_kernel, shape | {"HAS_SIZES": True, "Rows": None, "DTYPE": tl.float16}
            yield transpose_index_kernel, shape | {"PLACE": False}


def product_kernels():
    for along_sum in (False, True):
        tiles, depth = config.matmul(along_sum)
        strides = {"stride_ak": 1, "stride_bk" if along_sum else "stride_bn": 1}
        common = strides | {"BLOCK_K": depth} | tiles.launch
        yield matmul_kernel, common | {"Tiles": None, "num_tiles": None, "OVER_BLOCKS": False}
        for over_blocks in (False, True):
            yield matmul_kernel, common | {"OVER_BLOCKS": over_blocks}


class Memory(NamedTuple):
    """What a thread block needs: bytes of shared memory, columns of tensor memory."""

    shared: int
    tensor: int


class Allocated(Exception):
    """The memory of a kernel is known before it is lowered to LLVM's dialect, which takes most of the time."""


def allocate_only(backend, module, metadata, options, capability):
    """Instead of ``CUDABackend.make_llir``."""

    def add_last_pass(pass_manager):
        ADD_ALLOCATION(pass_manager)
        pass_manager.run(module, "allocate_only")
        raise Allocated(module.get_int_attr("ttg.shared"), module.get_int_attr("ttg.tensor_memory_size"))

    with patch.object(nvidia.passes.ttnvgpuir, "add_allocate_tensor_memory", add_last_pass):
        MAKE_LLIR(backend, module, metadata, options, capability)


def memory(kernel, constants: dict, dtype: torch.dtype, capability: int, whole: bool) -> Memory:
    """That of a kernel, which is compiled to machine code, or until its memory is known."""
    if whole:
        metadata = compile_kernel(kernel, constants, dtype, capability).metadata
        return Memory(metadata.shared, metadata.tmem_size)
    with patch.object(CUDABackend, "make_llir", allocate_only), pytest.raises(Allocated) as allocated:
        compile_kernel(kernel, constants, dtype, capability)
    return Memory(*allocated.value.args)


def compile_kernel(kernel, constants: dict, dtype: torch.dtype, capability: int):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in POINTERS or (name[0].isupper() and len(name) > 1):
            elements = {"fp32": FP32, "i32": INT32, "i64": INT64, "i1": BOOL}
            element = next((element for element, names in elements.items() if name in names), TYPE_NAMES[dtype])
            signature[name] = f"*{element}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if name in INT64_SCALARS else "i32"
            if name.startswith("stride"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    options = {name: constants[name] for name in OPTIONS if name in constants}
    constexprs = {name: value for name, value in constants.items() if signature.get(name) == "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled_for_others(capability: int, variant: tuple) -> list:
    """What another architecture compiles, and would be the same code for this one."""
    others = [REFERENCE] if capability in LIKE_REFERENCE else []
    if variant[2] == torch.float32 and capability != REFERENCE:
        # Its products are multiply-adds everywhere.
        others = [REFERENCE, *(other for other in ARCHITECTURES if other < capability)]
    return [kernel for other in others for kernel in attend_kernels(ARCHITECTURES[other], *variant)]


def main(capability: int) -> None:
    is_reference = capability == REFERENCE
    for variant in (*EVERY, *EVERY_SEGMENTS) if is_reference else EVERY:
        compiled = [] if variant in USUAL else compiled_for_others(capability, variant)
        kernels = [kernel for kernel in attend_kernels(ARCHITECTURES[capability], *variant) if kernel not in compiled]
        report_all(kernels, variant, capability, variant in (USUAL_OF_REFERENCE if is_reference else USUAL))
    for variant in EVERY_ROWS if is_reference else USUAL_ROWS:
        report_all(row_kernels(*variant), variant, capability, variant in USUAL_ROWS_OF_REFERENCE)
    for kernel, constants in selection_kernels(is_reference):
        report(kernel, constants, torch.float32, capability, f"{constants['COLUMNS']} columns", whole=True)
    report(find_runs_kernel, {"ROWS": 512, "num_warps": 4}, torch.float32, capability, "512 rows", whole=True)
    for kernel, constants in () if capability in LIKE_REFERENCE else product_kernels():
        report(kernel, constants, torch.float32, capability, f"depth {constants['BLOCK_K']}", whole=True)


def report_all(kernels, variant: tuple, capability: int, whole: bool) -> None:
    block, head_dim, dtype, order, _ = variant
    for kernel, constants in kernels:
        report(kernel, constants, dtype, capability, f"block {block}, D {head_dim}, {dtype}, {order}", whole)


def report(kernel, constants: dict, dtype: torch.dtype, capability: int, variant: str, whole: bool) -> None:
    needed = memory(kernel, constants, dtype, capability, whole)
    print(json.dumps({"kernel": f"{kernel.__name__}, {variant}", **needed._asdict()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

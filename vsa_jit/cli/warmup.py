"""The command ``vsa-jit warmup``: compiles ahead of time."""

from __future__ import annotations

import argparse

import torch

import vsa_jit
from vsa_jit.backends.warmup import check_persistent
from vsa_jit.cli import parse
from vsa_jit.jit import engines
from vsa_jit.jit.toolchain import ARCHS, arch_named
from vsa_jit.text import counted

SUMMARY = "compile kernels ahead of time, on any machine"
DESCRIPTION = """\
Compiles the CUDA kernels of this package and keeps them, so that no later process compiles. With --arch no GPU is
needed, for images and login nodes; `vsa-jit cache export` then takes the result elsewhere. Triton's own kernels are
compiled at the first call, whatever this command does.
"""
SEGMENTS = {"with": True, "without": False, "both": None}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--arch", type=arch_named, choices=tuple(ARCHS), help="GPU architecture; default: that of the GPU here"
    )
    parser.add_argument(
        "--dtype", nargs="+", type=parse.dtype_named, choices=tuple(DTYPES), default=list(DTYPES), help="default: all"
    )
    parser.add_argument("--head-dim", nargs="+", type=parse.head_dim, metavar="D", help="default: all, 64 and 128")
    parser.add_argument(
        "--block-size",
        nargs="+",
        type=parse.block_size,
        metavar="SIZE",
        help="tokens, or a tile such as 4x4x4; default: all",
    )
    parser.add_argument(
        "--segments",
        choices=tuple(SEGMENTS),
        default="both",
        help="kernels of calls with segments (text beside video, packed samples); default: both",
    )
    parser.add_argument("--engine", choices=engines.NAMES, default="auto", help="what compiles; default: auto")


def run(args: argparse.Namespace) -> int:
    try:
        folders = vsa_jit.warmup(
            args.arch,
            dtype=[DTYPES[name] for name in args.dtype],
            head_dim=args.head_dim,
            block_size=args.block_size,
            segments=SEGMENTS[args.segments],
            engine=args.engine,
        )
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from None
    if folders:
        check_persistent(folders)
    for folder in folders:
        print(folder)
    print(f"{counted(len(folders), 'kernel')} {'is' if len(folders) == 1 else 'are'} ready")
    return 0

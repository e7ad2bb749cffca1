"""Arguments of the command line: each function gives the value or says what was expected and what came."""

from __future__ import annotations

import math
import re
from argparse import ArgumentError, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection

import torch

from vsa_jit.bench.cases import DTYPES, BlockSize, Samples, num_tokens
from vsa_jit.checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_sparsity, fault_of_tile, hint_of_cube

# Sizes beyond it exist on no device, and PyTorch cannot even take them.
LARGEST_INT = 2**31 - 1
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def positive_int(text: str) -> int:
    if not _is_int(text, 1, LARGEST_INT):
        raise ArgumentTypeError(f"expected a positive int, at most {LARGEST_INT}, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not _is_int(text, 0, 2**63 - 1):
        raise ArgumentTypeError(f"expected an int from 0 to {2**63 - 1}, got {text!r}")
    return int(text)


def _is_int(text: str, least: int, most: int) -> bool:
    return text.isdecimal() and len(text) < 20 and least <= int(text) <= most


def head_dim(text: str) -> int:
    if not _is_int(text, MIN_HEAD_DIM, MAX_HEAD_DIM):
        raise ArgumentTypeError(f"expected an int from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {text!r}")
    return int(text)


def sparsity(text: str) -> float:
    value = _float(text)
    try:
        check_sparsity(value, "", repr(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return value


def seconds(text: str) -> float:
    value = _float(text)
    if not 0.0 < value < math.inf:
        raise ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def _float(text: str) -> float:
    """NaN where the text is no number: it then fails every comparison."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def triple(text: str) -> tuple[int, int, int]:
    parts = re.split(r"[x,]\s*", text.lower().strip("() "))
    if len(parts) != 3 or not all(_is_int(part, 1, LARGEST_INT) for part in parts):
        raise ArgumentTypeError(f"expected three positive ints such as 21x30x52, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def segments(text: str) -> Samples:
    try:
        return tuple(tuple(_segment(part) for part in sample.split("+")) for sample in text.split(","))
    except ArgumentTypeError:
        raise ArgumentTypeError(
            "expected numbers of tokens and videos TxHxW such as 77+21x30x52, with a comma between packed samples, "
            f"got {text!r}"
        ) from None


def _segment(text: str) -> int | tuple[int, int, int]:
    return positive_int(text) if text.isdecimal() else triple(text)


def block_size(text: str) -> BlockSize:
    size: BlockSize = positive_int(text) if text.isdecimal() else triple(text)
    fault = fault_of_tile((1, 1, size) if isinstance(size, int) else size)
    if fault is not None:
        what = hint_of_cube(size, "{0}x{0}x{0}") if isinstance(size, int) else f" with {num_tokens(size)}"
        raise ArgumentTypeError(f"{fault}, got {text!r}{what}")
    return size


def device(text: str) -> torch.device:
    try:
        value = torch.device(text)
    except RuntimeError:
        value = torch.device("meta")
    if value.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if value.type == "cuda" else 1
    if (value.index or 0) >= count:
        raise ArgumentTypeError(
            f"expected a device of this machine, which has {count} of type {value.type}, got {text!r}"
        )
    return value


def dtype_named(text: str) -> str:
    """A dtype by its short name, whichever of its usual names was given; another text as it is."""
    name = text.lower().removeprefix("torch.")
    return DTYPE_NAMES.get(name, name if name in DTYPES else text)


def dtype(text: str) -> str:
    return one_of(DTYPES)(dtype_named(text))


def one_of(names: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def refuse_beside(flag: str, args: Namespace, others: Collection[str]) -> None:
    """Raises ``ArgumentError`` where an argument was given that has no meaning beside ``--flag``."""
    for name in others:
        if getattr(args, name) not in (None, False):
            other = name.replace("_", "-")
            raise ArgumentError(None, f"argument --{other}: not allowed with argument --{flag}")

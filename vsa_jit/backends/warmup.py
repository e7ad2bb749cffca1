"""Compiles ahead of time what calls of the given kinds would compile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vsa_jit.backends.sm90.specialise import DTYPES, HEAD_DIMS, kernels_of
from vsa_jit.checks import check_block_size, check_choice, check_int
from vsa_jit.jit import engines, module
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.errors import CacheError
from vsa_jit.jit.toolchain import ARCHS, CAPABILITIES, arch_named
from vsa_jit.problem import TILE_OF_TOKENS


def warmup(
    arch: str | None, dtype: Any, head_dim: Any, block_size: Any, segments: bool | None, engine: str
) -> list[Path]:
    """As ``vsa_jit.warmup``, which says what the arguments are."""
    here = _arch_here()
    if arch is None and here is None:
        if torch.cuda.is_available():
            return []
        raise ValueError(f"arch: expected one of {tuple(ARCHS)} where there is no GPU, got None")
    asked = here if arch is None else arch
    arch = check_choice("arch", arch_named(asked) if isinstance(asked, str) else asked, tuple(ARCHS))
    dtypes = _several("dtype", dtype, torch.dtype, tuple(DTYPES))
    head_dims = _several("head_dim", head_dim, int, HEAD_DIMS)
    blocks = [math.prod(check_block_size(size, with_grid=False)) for size in _block_sizes(block_size)]
    if segments is not None and not isinstance(segments, bool):
        raise TypeError(f"segments: expected True, False or None, got {type(segments).__name__}")
    orders = (False, True) if segments is None else (segments,)
    check_choice("engine", engine, engines.NAMES)

    kinds = product(dtypes, head_dims, blocks, orders)
    kernels = list(dict.fromkeys(kernel for kind in kinds for kernel in kernels_of(*kind)))
    chosen = engines.choose(kernels, arch, engine)
    entries = entries_of(kernels, arch, chosen, target=f"compute capability {arch}")
    if arch == here:
        module.load(kernels, torch.cuda.current_device(), chosen.name)
    else:
        check_persistent([entry.folder for entry in entries])
    return [entry.folder for entry in entries]


def check_persistent(folders: Sequence[Path]) -> None:
    """Raises ``CacheError`` where kernels in these folders end with this process."""
    cache = open_cache()
    if not cache.persistent or not all(folder.is_relative_to(cache.root) for folder in folders):
        raise CacheError(f"the kernels cannot be kept: {cache.root} cannot be written to, or ends with this process")


def _arch_here() -> str | None:
    """The architecture of the current GPU, if there are kernels for it."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return CAPABILITIES.get(torch.cuda.get_device_capability())


def _several(name: str, given: Any, kind: type, allowed: tuple) -> tuple:
    if given is None:
        return allowed
    values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if kind is int:
        values = tuple(check_int(name, value, "int or several") for value in values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__} or several, got {type(value).__name__}")
        if value not in allowed:
            raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {value}")
    if not values:
        raise ValueError(f"{name}: expected at least one, got none")
    return values


def _block_sizes(given: Any) -> Sequence[Any]:
    """A tile is a tuple, several sizes are a list."""
    if given is None:
        return tuple(TILE_OF_TOKENS)
    if isinstance(given, list) and not given:
        raise ValueError("block_size: expected at least one, got none")
    return given if isinstance(given, list) else [given]

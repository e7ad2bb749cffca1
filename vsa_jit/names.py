"""Names that users give: a backend, an engine, an architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_name(source: str, name: Any, allowed: Sequence[str]) -> str:
    """The name, if it is one of those allowed.

    Args:
        source: the argument or environment variable that it came from.

    Raises:
        TypeError, ValueError: it is not; the message names the source, what was expected and what came.
    """
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected a string, got {type(name).__name__}")
    if name not in allowed:
        raise ValueError(f"{source}: expected one of {tuple(allowed)}, got {name!r}")
    return name

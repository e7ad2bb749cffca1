"""Where the CUDA sources are: inside the installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def kernels_dir() -> Path:
    """The folder ``kernels_src``.

    Raises:
        FileNotFoundError: it is in neither place; the message names both.
    """
    package = Path(__file__).resolve().parent.parent
    places = (package / "kernels_src", package.parent / "kernels_src")
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"kernels_src: expected at {places[0]} or {places[1]}, found at neither; reinstall vsa-jit")

"""The optional packages of the benchmark."""

from __future__ import annotations

import importlib.util

INSTALL = "pip install 'vsa-jit[bench]'"
DIFFUSERS_INSTALL = "pip install 'vsa-jit[diffusers]'"


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None

"""A cache of its own for a test, and what is compiled for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.caches import forget

from vsa_jit.jit import compile as compiling


@pytest.fixture
def forgotten() -> Iterator[Callable[[], None]]:
    """What one process remembers is not what the next test's would."""
    forget()
    yield forget
    forget()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("VSA_JIT_CACHE_DIR", str(path))
    return path


@pytest.fixture
def compiles(tmp_path, monkeypatch) -> Callable[[], int]:
    """How many compilers ran, in this process and in its children."""
    log = tmp_path / "compiles"
    log.touch()
    run = compiling.run_worker

    def counted(*arguments):
        with log.open("a") as file:
            file.write("x")
        run(*arguments)

    monkeypatch.setattr(compiling, "run_worker", counted)
    return lambda: len(log.read_text())

"""Without a GPU the Triton kernels run in Triton's interpreter, which must be told before they are first imported."""

import atexit
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Workers share the cores: more threads each would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Which vector instructions a machine has is not what is tested, and takes torch.compile ten seconds to find out.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import torch
from support import caches, interpreter, toys

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.patch()
# Workers share what the tests compile, but no later run does: torch.compile finds what it keeps on disk by the graph of
# the forward, whatever has changed in a backward since.
if "PYTEST_XDIST_WORKER" not in os.environ or "VSA_JIT_TEST_CACHE" not in os.environ:
    compile_cache = tempfile.mkdtemp(prefix="vsa_jit-tests-")
    atexit.register(shutil.rmtree, compile_cache, ignore_errors=True)
    os.environ["VSA_JIT_TEST_CACHE"] = compile_cache
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["VSA_JIT_TEST_CACHE"], "inductor")


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """The folder of a small kernel, which the engines then take for that of the package's."""
    root = toys.write_sources(tmp_path / "src")
    toys.use_sources(monkeypatch, root)
    return root


@pytest.fixture(scope="session")
def cache_of_two(tmp_path_factory) -> Path:
    """A cache with two small kernels, ``toy(1)`` and ``toy(2)``: to copy, since compiling them takes a second."""
    root = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        toys.use_sources(patch, toys.write_sources(root / "src"))
        patch.setenv("VSA_JIT_CACHE_DIR", str(root / "cache"))
        caches.forget()
        for addend in (1, 2):
            caches.get(toys.toy(addend))
        caches.forget()
    return root / "cache"


@pytest.fixture
def lose_home(tmp_path, monkeypatch) -> Callable[[], None]:
    """Leaves the user no folder to keep kernels in."""

    def lose():
        for variable in ("VSA_JIT_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))

    return lose


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What an earlier test compiled counts for no later one: functions of the same code share a limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def log_level():
    """What the tests of a module, or what they import, let be logged is logged in no other one."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def seed():
    """Fresh random inputs in every run; a failing test prints the seed that repeats it."""
    value = int(os.environ.get("VSA_JIT_TEST_SEED") or random.SystemRandom().randrange(2**31))
    torch.manual_seed(value)
    print(f"VSA_JIT_TEST_SEED={value}")


def pytest_collection_modifyitems(items):
    # The longest first, so that no worker is left alone with them.
    items.sort(key=lambda item: "test_kernels_fit_memory" not in item.name)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

"""The package as installed: import cost, what an import touches, what the wheel carries."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import vsa_jit
from vsa_jit.jit.errors import Unavailable
from vsa_jit.jit.source import kernels_dir

ROOT = Path(__file__).parents[2]

IMPORT_COST = """
import time, torch
start = time.process_time()
import vsa_jit
print(time.process_time() - start)
"""

IMPORT_EFFECTS = """
import sys, torch
modules, opened = set(sys.modules), []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        opened.append(arguments[0])
    if event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen"):
        opened.append(event)
sys.addaudithook(hook)
import vsa_jit
new = {name.partition(".")[0] for name in set(sys.modules) - modules}
assert not new & {"triton", "cupy", "matplotlib", "rich"}, new
assert not torch.cuda.is_initialized()
assert not opened, opened
"""


WITHOUT_DEPENDENCIES = """
import importlib, sys, torch
for name in ("triton", "cupy"):
    sys.modules[name] = None
for module in (
    "base", "choose", "torch.launches", "torch.support", "triton.config", "triton.support", "sm90.launches",
    "sm90.layout", "sm90.schedule", "sm90.specialise", "sm90.structs", "sm90.support", "sm90.tma", "warmup",
):
    importlib.import_module("vsa_jit.backends." + module)
assert not torch.cuda.is_initialized()
"""


def python(code: str, path: Path = ROOT, cwd: Path = ROOT, keep_bytecode: bool = False) -> str:
    without = "" if keep_bytecode else "1"
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": without}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_costs_little(tmp_path):
    """Seconds of the processor's time; a machine that is busy with other tests needs a few tries to show it."""
    # With bytecode, which pip compiles as it installs: here the first try leaves it to the others.
    shutil.copytree(ROOT / "vsa_jit", tmp_path / "vsa_jit", ignore=shutil.ignore_patterns("__pycache__"))
    assert any(float(python(IMPORT_COST, tmp_path, tmp_path, keep_bytecode=True)) < 0.05 for _ in range(12))


def test_import_touches_no_gpu_no_compiler_and_no_disk():
    python(IMPORT_EFFECTS)


def test_what_needs_no_triton_and_no_cupy_imports_without():
    python(WITHOUT_DEPENDENCIES)


def test_sources_of_a_checkout():
    assert kernels_dir() == ROOT / "kernels_src"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_is_pure_python_and_carries_all(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"vsa_jit/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels_src").rglob("*.*")}
    assert sources <= set(names)
    assert {"vsa_jit/py.typed", "vsa_jit/api.py", "vsa_jit/cli/main.py"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vsa_jit"}


def test_sources_of_an_installed_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from vsa_jit.jit.source import kernels_dir; print(kernels_dir())"
    assert python(code, path=tmp_path, cwd=tmp_path).strip() == str(tmp_path / "vsa_jit" / "kernels_src")


def test_stand_in_is_carried_and_no_part_of_the_package(wheel, tmp_path):
    """The README's command installs it from where the wheel was installed."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    folder = Path("vsa_jit") / "integrations" / "fastvideo_stand_in"
    carried, sources = (
        {path.relative_to(root) for path in (root / folder).rglob("*.*") if "__pycache__" not in path.parts}
        for root in (tmp_path, ROOT)
    )
    assert carried == sources
    assert folder / "pyproject.toml" in carried
    code = "import pkgutil, vsa_jit; print([m.name for m in pkgutil.walk_packages(vsa_jit.__path__, 'vsa_jit.')])"
    modules = python(code, path=tmp_path, cwd=tmp_path)
    assert "vsa_jit.api" in modules
    assert "fastvideo_stand_in" not in modules
    for name in ("fastvideo_kernel", "vsa"):
        assert PathFinder.find_spec(name, [str(tmp_path)]) is None
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / folder, check=True, capture_output=True)
    (stand_in,) = tmp_path.glob("vsa_jit_fastvideo_kernel-*-py3-none-any.whl")
    modules = {name for name in zipfile.ZipFile(stand_in).namelist() if ".dist-info/" not in name}
    assert modules == {path.relative_to(folder / "top-level").as_posix() for path in sources if path.suffix == ".py"}


def test_missing_sources_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("vsa_jit.jit.source.__file__", str(tmp_path / "vsa_jit" / "jit" / "source.py"))
    expected = r"CUDA sources were expected at .*vsa_jit.kernels_src or .*\(install vsa-jit again\)"
    with pytest.raises(Unavailable, match=expected):
        kernels_dir()


def test_version_is_that_of_the_package():
    assert vsa_jit.__version__ == importlib.metadata.version("vsa-jit")

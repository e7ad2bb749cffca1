"""``vsa-jit bench --first-call``: its arguments, a first call on a CPU, and a run on a Hopper GPU."""

import json
from dataclasses import replace

import pytest
import torch
from support.problems import ON_HOPPER

from vsa_jit.bench import first_call
from vsa_jit.cli.main import main
from vsa_jit.jit import engines
from vsa_jit.jit.errors import Unavailable

CPU = torch.device("cpu")


def bench(*arguments: str) -> int:
    return main(["bench", "--first-call", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", "1"), "argument --seconds: not allowed with argument --first-call"),
        (("--seed", "1"), "argument --seed: not allowed with argument --first-call"),
        (("--topk", "2"), "argument --topk: not allowed with argument --first-call"),
        (("--mode", "eager"), "argument --mode: not allowed with argument --first-call"),
        (("--device", "cpu"), "argument --first-call: expected a Hopper GPU: backend='sm90' cannot run this call"),
    ],
)
def test_wrong_arguments_beside_first_call(capsys, arguments, message):
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


def test_the_first_call_of_a_process(monkeypatch, capsys):
    monkeypatch.setattr(first_call, "CASE", replace(first_call.CASE, backend="torch"))
    first_call.run_here("cpu", "json")
    kernels, whole_call = json.loads(capsys.readouterr().out)
    assert 0 < kernels < whole_call


def test_a_first_call_that_fails_says_why():
    with pytest.raises(RuntimeError, match="the kernels are for Hopper GPUs, and the tensors are on cpu"):
        first_call._run("nvcc", CPU, "/nowhere")


def test_each_engine_is_measured_cold_and_warm(monkeypatch):
    nvrtc, nvcc = engines.ENGINES
    monkeypatch.setattr(
        engines, "why_not", lambda engine: Unavailable("no nvcc", "install it") if engine is nvcc else None
    )
    caches = []

    def run(engine, device, cache):
        assert (engine, device) == (nvrtc.name, CPU)
        is_cold = cache not in caches
        caches.append(cache)
        return (2.0, 5.0) if is_cold else (0.5, 1.0)

    monkeypatch.setattr(first_call, "_run", run)
    cold, warm, other = first_call.measure(CPU)
    assert str(cold) == "nvrtc cold: kernels 2.000 s, whole call 5.000 s"
    assert str(warm) == "nvrtc warm: kernels 0.500 s, whole call 1.000 s"
    assert str(other) == "nvcc: no nvcc (install it)"
    assert len(caches) == 1 + first_call.COLD_RUNS + first_call.WARM_RUNS


@pytest.mark.parametrize("cold_runs", [pytest.param(1, marks=ON_HOPPER)])
def test_first_calls_on_a_hopper_gpu(monkeypatch, capsys, tmp_path, cold_runs):
    monkeypatch.setattr(first_call, "COLD_RUNS", cold_runs)
    monkeypatch.setattr(first_call, "WARM_RUNS", 1)
    path = tmp_path / "first.json"
    assert bench("--json", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(path.read_text())["rows"]
    assert {row["engine"] for row in rows} == {"nvrtc", "nvcc"}
    measured = [row for row in rows if "cache" in row]
    assert measured
    for cold, warm in zip(measured[::2], measured[1::2], strict=True):
        assert (cold["cache"], warm["cache"]) == ("cold", "warm")
        assert 0 < warm["kernels_s"] < cold["kernels_s"] < cold["whole_call_s"]
        assert any(line.startswith(f"{cold['engine']} cold: kernels ") for line in lines)
        assert any(line.startswith(f"{warm['engine']} warm: kernels ") for line in lines)

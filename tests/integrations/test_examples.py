"""The examples run, as a user runs them."""

import pytest

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'vsa-jit[diffusers]'")

from vsa_jit.examples import diffusers_wan


def test_diffusers_wan(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    diffusers_wan.main(["--steps", "2", "--sparsity", "0.5"])
    printed = capsys.readouterr().out
    assert "all steps dense: " in printed
    assert "sparsity 0.5, after dense steps: 1: " in printed
    assert "layer  2" in printed
    assert (tmp_path / "wan.png").stat().st_size > 10_000

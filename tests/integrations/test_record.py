"""``record``: what selection would hold of a model's own attention, over a run."""

import json

import matplotlib.image
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'vsa-jit[diffusers]'")

from diffusers.models.transformers import transformer_wan
from support.wan import GRID, HEADS, difference, gate_weights, inputs, run, tiny

import vsa_jit
from vsa_jit.integrations.diffusers import disable_vsa, enable_vsa, record


def test_shares_are_those_of_the_queries_and_keys_of_the_model(monkeypatch):
    """Against ``recall`` of what diffusers' own processor attends."""
    model, first, second = tiny(layers=3), inputs(), inputs(grid=(1, 9, 10))
    with record(model, sparsity=(0.75, 0.4)) as recording:
        out = run(model, first)
        run(model, second)
    assert not model.rope._forward_hooks

    attended = []
    dispatch = transformer_wan.dispatch_attention_fn

    def watch(query, key, value, **kwargs):
        if query.shape[1] == key.shape[1]:
            attended.append((query, key))
        return dispatch(query, key, value, **kwargs)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", watch)
    assert difference(out, run(model, first)) < 1e-5, "nothing but the recording"
    shares = recording.shares()
    assert shares.shape == (2, 3, HEADS, 2)
    assert recording.grids == {"transformer": [GRID, (1, 9, 10)]}
    for layer, (q, k) in enumerate(attended):
        wanted = vsa_jit.recall(q, k, sparsity=[0.75, 0.4], grid=GRID, block_size=(4, 4, 4), layout="bshd").mean(0)
        torch.testing.assert_close(shares[0, layer], wanted, rtol=1e-4, atol=1e-5)


def test_what_is_enabled_stays_enabled():
    model, arguments = tiny(), inputs()
    enable_vsa(model, topk=2, gates=gate_weights(), block_size=(2, 8, 8))
    wanted = run(model, arguments)
    with record(model) as recording:
        assert torch.equal(run(model, arguments), wanted)
    assert recording.block_size == (2, 8, 8)
    assert torch.equal(run(model, arguments), wanted)
    assert recording.shares().shape == (1, 2, HEADS, 5), "nothing is recorded after the end"


def test_outputs(tmp_path):
    model = tiny(layers=3)
    with record(model, sparsity=(0.9, 0.5, 0.7)) as recording:
        run(model, inputs())
        run(model, inputs())
    shares = recording.shares()

    recording.write_json(tmp_path / "recording.json")
    content = json.loads((tmp_path / "recording.json").read_text())
    assert content["sparsities"] == [0.9, 0.5, 0.7]
    assert content["block_size"] == [4, 4, 4]
    assert content["transformers"]["transformer"]["grids"] == [list(GRID)] * 2
    torch.testing.assert_close(torch.tensor(content["transformers"]["transformer"]["shares"]), shares)

    header, *rows = [line.split() for line in str(recording).splitlines()[1:]]
    assert header == ["sparsity", "0.9", "0.5", "0.7"]
    printed = torch.tensor([[float(cell) for cell in row[2:]] for row in rows])
    torch.testing.assert_close(printed, shares.mean((0, 2)), rtol=0, atol=5.1e-4)

    recording.plot(tmp_path / "middle.png")
    recording.plot(tmp_path / "chosen.png", sparsity=0.9)
    middle, chosen = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("middle", "chosen"))
    assert middle.shape == chosen.shape
    assert (middle != chosen).any()
    with pytest.raises(ValueError, match=r"sparsity: expected one of \(0.9, 0.5, 0.7\), got 0.6"):
        recording.plot(tmp_path / "none.png", sparsity=0.6)


def test_what_cannot_be_recorded_is_named(tmp_path):
    model = tiny()
    with (
        pytest.raises(ValueError, match=r"sparsity: expected a number in \[0, 1\), got 1"),
        record(model, sparsity=[1]),
    ):
        pass
    with pytest.raises(TypeError, match="expected a WanTransformer3DModel"), record(torch.nn.Linear(1, 1)):
        pass
    with record(model) as recording:
        pass
    with pytest.raises(ValueError, match="expected a recording of at least one call"):
        recording.plot(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="name: expected one of those that ran"):
        recording.shares()
    with pytest.raises(TypeError, match="sparsity: expected a list of values, got None"), record(model, sparsity=None):
        pass
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="record: expected a model that is not compiled"), record(model):
        run(model, inputs())
    assert not model.rope._forward_hooks


def test_what_happens_inside(monkeypatch):
    model = tiny()
    with record(model), pytest.raises(ValueError, match="expected a model that is not being recorded"), record(model):
        pass
    gates = gate_weights()
    with pytest.raises(RuntimeError, match="expected no enable_vsa or disable_vsa inside"), record(model):
        enable_vsa(model, topk=2, gates=gates)
    assert torch.equal(model.blocks[0].to_gate_compress.bias, gates["blocks.0.to_gate_compress.bias"]), (
        "it stays enabled"
    )
    with pytest.raises(RuntimeError, match="expected no enable_vsa or disable_vsa inside"), record(model):
        disable_vsa(model)
    assert not model.rope._forward_hooks

    asked = []
    recall = vsa_jit.recall
    monkeypatch.setattr(vsa_jit, "recall", lambda *args, **kwargs: asked.append(kwargs) or recall(*args, **kwargs))
    enable_vsa(model, topk=2, selection_dtype=torch.bfloat16)
    with record(model):
        run(model, inputs())
    assert {call["selection_dtype"] for call in asked} == {torch.bfloat16}


def test_layers_that_a_cache_leaves_out(tmp_path):
    """The first call attends in all three layers, the second in the first alone."""
    model = tiny(layers=3)
    with record(model, sparsity=(0.5,)) as recording:
        run(model, inputs())
        monkeyed = model.blocks
        model.blocks = monkeyed[:1]
        run(model, inputs())
        model.blocks = monkeyed
        run(model, inputs())
    shares = recording.shares()
    assert shares.isnan().flatten(2).all(-1).tolist() == [[False] * 3, [False, True, True], [False] * 3]
    assert "nan" not in str(recording)
    recording.write_json(tmp_path / "recording.json")
    written = json.loads((tmp_path / "recording.json").read_text())["transformers"]["transformer"]["shares"]
    assert written[1][1] == [[None]] * HEADS
    recording.plot(tmp_path / "recording.png")


def test_an_error_ends_the_recording():
    model = tiny()
    with pytest.raises(ZeroDivisionError), record(model):
        _ = 1 / 0
    disable_vsa(model)
    assert not model.rope._forward_hooks

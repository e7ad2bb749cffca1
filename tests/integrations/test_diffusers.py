"""``enable_vsa`` in diffusers' Wan: tiny models with random weights, on a CPU."""

import copy
import gc
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from support import reference as ref
from torch import Tensor

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'vsa-jit[diffusers]'")

from diffusers import (
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers import transformer_wan
from safetensors.torch import save_file
from support.wan import GRID, HEADS, KINDS, as_fp32, difference, gate_weights, inputs, run, tiny

import vsa_jit
from vsa_jit.integrations.diffusers import checkpoint, disable_vsa, enable_vsa, load_fastwan

TILE = (4, 4, 4)
TOLERANCE = 1e-5


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which attention ran, "sparse" or "dense", without those to the text."""
    made = []
    attend, dispatch = vsa_jit.video_sparse_attn, transformer_wan.dispatch_attention_fn

    def sparse(*args, **kwargs):
        made.append("sparse")
        return attend(*args, **kwargs)

    def dense(query, key, value, *args, **kwargs):
        if query.shape[1] == key.shape[1]:
            made.append("dense")
        return dispatch(query, key, value, *args, **kwargs)

    monkeypatch.setattr(vsa_jit, "video_sparse_attn", sparse)
    monkeypatch.setattr("vsa_jit.integrations.diffusers.wan.dispatch_attention_fn", dense)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [GRID, (1, 7, 9), (5, 4, 4)])
def test_all_blocks_are_the_unmodified_model(calls, kind, grid):
    model, arguments = tiny(kind), inputs(kind, grid)
    wanted = run(model, arguments)
    enable_vsa(model, topk=1000)
    assert difference(run(model, arguments), wanted) < TOLERANCE
    enable_vsa(model, sparsity=0.0, gates={})
    assert difference(run(model, arguments), wanted) < TOLERANCE
    assert calls == ["sparse"] * 4
    enable_vsa(model, topk=1)
    assert difference(run(model, arguments), wanted) > 100 * TOLERANCE
    disable_vsa(model)
    assert torch.equal(run(model, arguments), wanted)


def test_all_blocks_in_bf16():
    model = tiny().to(torch.bfloat16)
    arguments = inputs(dtype=torch.bfloat16)
    exact = run(copy.deepcopy(model).float(), as_fp32(arguments))
    plain = run(model, arguments)
    enable_vsa(model, topk=1000, gates={})
    out = run(model, arguments)
    assert out.dtype == torch.bfloat16
    assert difference(out, exact) < 2 * difference(plain, exact)


def dense_vsa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, topk: int, grid) -> Tensor:
    """Video sparse attention of [B, S, H, D] computed densely."""
    q, k, v, gate = (x.transpose(1, 2) for x in (q, k, v, gate))
    block = ref.block_of_tokens(q.shape[2], TILE, grid)
    every = torch.ones_like(block, dtype=torch.bool)
    q_c, k_c, v_c = (ref.block_means(x, block, every) for x in (q, k, v))
    blocks = torch.ones(k_c.shape[2], dtype=torch.bool)
    chosen = ref.select((q_c @ k_c.mT).detach(), topk, blocks)
    out, _ = ref.attention(q, k, v, ref.token_mask(chosen, block, block, every, every), q.shape[-1] ** -0.5)
    out_c = ref.coarse(q_c, k_c, v_c, blocks, q.shape[-1] ** -0.5)[:, :, block]
    return (out + gate * out_c).transpose(1, 2)


def test_sparse_output_and_gradients_against_a_dense_computation(monkeypatch):
    """diffusers' own processor, whose attention is replaced by a dense computation of the same, beside ours."""
    weights, arguments = gate_weights(), inputs()
    model = tiny()
    reference = copy.deepcopy(model)
    enable_vsa(model, topk=3, gates=weights)

    gates = []
    for layer, block in enumerate(reference.blocks):
        block.to_gate_compress = torch.nn.Linear(HEADS * 24, HEADS * 24)
        block.to_gate_compress.load_state_dict(
            {kind: weights[f"blocks.{layer}.to_gate_compress.{kind}"] for kind in ("weight", "bias")}
        )
        block.attn1.register_forward_pre_hook(
            lambda attn, args, linear=block.to_gate_compress: gates.append(linear(args[0]).unflatten(-1, (HEADS, -1)))
        )
    dispatch = transformer_wan.dispatch_attention_fn

    def attend(query, key, value, **kwargs):
        if query.shape[1] != key.shape[1]:
            return dispatch(query, key, value, **kwargs)
        return dense_vsa(query, key, value, gates.pop(), 3, GRID)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", attend)
    wanted = reference(**arguments)[0]
    dout = torch.randn_like(wanted)
    wanted.backward(dout)
    out = model(**arguments)[0]
    out.backward(dout)
    assert difference(out, wanted) < TOLERANCE
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert difference(parameter.grad, expected[name].grad) < 1e-4, name


def gradients(model, losses) -> dict[str, Tensor]:
    model.zero_grad()
    outs = [model(**arguments)[0] for arguments, _ in losses]
    sum((out * dout).sum() for out, (_, dout) in zip(outs, losses, strict=True)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_checkpointing_computes_each_video_again_as_it_was():
    """Two videos of as many tokens, both forwards before either backward."""
    model = tiny()
    enable_vsa(model, topk=2, gates=gate_weights())
    losses = [
        (arguments, torch.randn(2, 4, *arguments["hidden_states"].shape[2:]))
        for arguments in (inputs(grid=(3, 5, 6)), inputs(grid=(2, 9, 5)))
    ]
    wanted = gradients(model, losses)
    model.enable_gradient_checkpointing()
    model.train()
    for name, gradient in gradients(model, losses).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_gates_of_zero_train():
    model = tiny()
    enable_vsa(model, topk=2, gates={})
    out = model(**inputs())[0]
    out.square().mean().backward()
    optimizer = torch.optim.SGD([block.to_gate_compress.weight for block in model.blocks], lr=1.0)
    for block in model.blocks:
        assert block.to_gate_compress.weight.grad.abs().sum() > 0
    optimizer.step()
    trained = model.blocks[0].to_gate_compress.weight
    enable_vsa(model, topk=3)
    assert model.blocks[0].to_gate_compress.weight is trained, "a change of settings keeps what was trained"
    enable_vsa(model, topk=3, gates={})
    assert not model.blocks[0].to_gate_compress.weight.any()


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
def test_compiled_in_full_graphs(whole):
    model = tiny()
    enable_vsa(model, topk=2, gates=gate_weights(), dense_layers=(0,))
    videos = [inputs(grid=grid) for grid in (GRID, (2, 6, 7), (4, 3, 9))]
    wanted = [run(model, video) for video in videos]
    if whole:
        model.compile(fullgraph=True, backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for video, out in zip(videos, wanted, strict=True):
        assert difference(run(model, video), out) < TOLERANCE


def test_adapters_on_projections_and_gates():
    from peft import LoraConfig

    model, arguments = tiny(), inputs()
    enable_vsa(model, topk=2, gates=gate_weights())
    merged = copy.deepcopy(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["attn1.to_q", "to_gate_compress"]))
    adapted = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            with torch.no_grad():
                delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
                merged.get_submodule(name).weight += delta
            adapted += 1
    assert adapted == 4
    assert difference(run(model, arguments), run(merged, arguments)) < TOLERANCE


def test_fused_projections():
    model, arguments = tiny(), inputs()
    enable_vsa(model, topk=2)
    wanted = run(model, arguments)
    for block in model.blocks:
        block.attn1.fuse_projections()
    assert difference(run(model, arguments), wanted) < TOLERANCE


@pytest.mark.parametrize("how", ["group", "sequential"])
def test_offloading_by_parts(how):
    from accelerate import cpu_offload

    def offload(model):
        if how == "group":
            model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        else:
            cpu_offload(model, execution_device=torch.device("cpu"))

    model, late, arguments = tiny(), tiny(), inputs()
    enable_vsa(model, topk=2, gates=gate_weights())
    wanted = run(model, arguments)
    offload(model)
    assert difference(run(model, arguments), wanted) < TOLERANCE
    offload(late)
    with pytest.raises(ValueError, match="enable VSA with gates before offloading"):
        enable_vsa(late, topk=2, gates=gate_weights())
    wanted = run(late, arguments)
    enable_vsa(late, topk=1000)
    assert difference(run(late, arguments), wanted) < TOLERANCE


def test_settings_reach_the_operator(monkeypatch):
    given = []
    attend = vsa_jit.video_sparse_attn

    def watch(*args, **kwargs):
        given.append(kwargs)
        return attend(*args, **kwargs)

    monkeypatch.setattr(vsa_jit, "video_sparse_attn", watch)
    model = tiny(layers=1)
    enable_vsa(model, sparsity=0.7, block_size=128, selection_dtype=torch.bfloat16, backend="torch")
    run(model, inputs())
    (call,) = given
    assert call["sparsity"] == 0.7
    assert call["block_size"] == (2, 8, 8)
    assert call["selection_dtype"] == torch.bfloat16
    assert call["backend"] == "torch"
    assert call["compress_attn_weight"] == 0.0, "without gates the coarse output is not computed"


def test_a_copy_is_independent():
    model, arguments = tiny(), inputs()
    dense = run(model, arguments)
    enable_vsa(model, topk=2, gates=gate_weights())
    other = copy.deepcopy(model)
    wanted = run(model, arguments)
    disable_vsa(model)
    assert torch.equal(run(model, arguments), dense)
    assert torch.equal(run(other, arguments), wanted)
    disable_vsa(other)
    assert torch.equal(run(other, arguments), dense)


def test_disable_leaves_nothing():
    model = tiny()
    keys, processors = set(model.state_dict()), dict(model.attn_processors)
    disable_vsa(model)
    enable_vsa(model, topk=2, gates=gate_weights())
    assert set(model.state_dict()) - keys == set(gate_weights())
    enable_vsa(model, topk=1)
    disable_vsa(model)
    assert set(model.state_dict()) == keys
    assert dict(model.attn_processors) == processors
    assert not model.rope._forward_hooks


def pipeline(scheduler=None, two: bool = False) -> WanPipeline:
    scheduler = scheduler or UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=tiny(),
        transformer_2=tiny() if two else None,
        boundary_ratio=0.5 if two else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: WanPipeline, steps: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 7, 16, generator=generator)
    return pipe(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        height=80,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=4.0,
        output_type="latent",
        generator=generator,
    ).frames


@pytest.mark.parametrize("scheduler", [None, FlowMatchEulerDiscreteScheduler()], ids=["UniPC", "Euler"])
def test_dense_steps_and_layers_of_a_pipeline(calls, scheduler):
    pipe = pipeline(scheduler)
    wanted = generate(pipe)
    calls.clear()
    enable_vsa(pipe, topk=1000, dense_steps=2, dense_layers=(-1,))
    for _ in range(2):
        # Each step calls the transformer with the prompt and without it, and it has two layers.
        assert difference(generate(pipe), wanted) < 1e-4
        assert calls == ["dense"] * 8 + ["sparse", "dense"] * 4
        calls.clear()


def test_dense_steps_follow_the_scheduler(calls):
    pipe = pipeline()
    enable_vsa(pipe, topk=2, dense_steps=1)
    with pytest.raises(RuntimeError, match="dense_steps: expected a step of the pipeline"):
        run(pipe.transformer, inputs())
    # Another scheduler, another pipeline with it, and a copy.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    copied = copy.deepcopy(pipe)
    for each in (pipe, copied):
        generate(each, steps=2)
        assert calls == ["dense"] * 4 + ["sparse"] * 4
        calls.clear()
    del pipe
    generate(other, steps=2)
    assert calls == ["dense"] * 4 + ["sparse"] * 4


def test_dense_steps_of_a_run_that_begins_later(calls):
    """As from a video that is given some noise: the first steps are those that run."""
    pipe = pipeline()
    enable_vsa(pipe, topk=2, dense_steps=2)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(5)
    arguments = inputs()
    latents = arguments["hidden_states"]
    for t in scheduler.timesteps[5:]:
        noise = run(pipe.transformer, arguments)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    assert calls == ["dense"] * 4 + ["sparse"] * 6


def test_dense_steps_of_a_compiled_pipeline():
    pipe = pipeline()
    enable_vsa(pipe, topk=2, dense_steps=2)
    wanted = generate(pipe, steps=12)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert difference(generate(pipe, steps=12), wanted) < 1e-4
    pipe.transformer.compile(fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="dense_steps: expected compile_repeated_blocks"):
        generate(pipe)


def test_both_transformers_of_a_pipeline(calls):
    pipe = pipeline(two=True)
    first, second = gate_weights(), gate_weights()
    enable_vsa(pipe, topk=2, gates={"transformer": first, "transformer_2": second})
    for model, weights in ((pipe.transformer, first), (pipe.transformer_2, second)):
        for key, value in weights.items():
            assert torch.equal(model.get_parameter(key), value)
    generate(pipe)
    assert set(calls) == {"sparse"}
    disable_vsa(pipe)
    calls.clear()
    generate(pipe)
    assert calls == []
    with pytest.raises(
        ValueError, match="expected state dicts of transformer, transformer_2, got those of transformer"
    ):
        enable_vsa(pipe, topk=2, gates={"transformer": first})
    with pytest.raises(ValueError, match="a state dict for each of transformer, transformer_2 by its name, got one"):
        enable_vsa(pipe, topk=2, gates=first)
    assert not pipe.transformer.rope._forward_hooks, "nothing changes where something is wrong"


def saved(folder, weights, shards: int = 1):
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(weights)
    for shard in range(shards):
        part = {key: weights[key].contiguous() for key in keys[shard::shards]}
        number = f"-{shard}" if shards > 1 else ""
        save_file(part, folder / f"diffusion_pytorch_model{number}.safetensors")


@pytest.mark.parametrize(
    "source", ["state dict", "file", "transformer", "pipeline, two files", "hub", "saved by diffusers"]
)
def test_where_gates_come_from(tmp_path, monkeypatch, source):
    weights, arguments = gate_weights(), inputs()
    model = tiny()
    everything = {**model.state_dict(), **weights}
    gates = {
        "state dict": everything,
        "file": tmp_path / "diffusion_pytorch_model.safetensors",
        "transformer": str(tmp_path),
        "pipeline, two files": tmp_path,
        "hub": "owner/FastWan-Tiny",
        "saved by diffusers": tmp_path,
    }[source]
    if source in ("file", "transformer"):
        saved(tmp_path, everything)
    elif source in ("pipeline, two files", "hub"):
        saved(tmp_path / "transformer", everything, shards=2)
    if source == "hub":

        def download(repository, allow_patterns):
            assert repository == "owner/FastWan-Tiny"
            assert allow_patterns == ["transformer/*.safetensors"]
            return tmp_path

        monkeypatch.setattr(checkpoint, "snapshot_download", download)
    if source == "saved by diffusers":
        enable_vsa(model, topk=2, gates=weights)
        model.save_pretrained(tmp_path)
        disable_vsa(model)
    enable_vsa(model, topk=2, gates=gates)
    for key, value in weights.items():
        assert torch.equal(model.get_parameter(key), value), key
    out = run(model, arguments)
    enable_vsa(model, topk=2, gates={})
    assert difference(run(model, arguments), out) > 1e-3


def test_names_of_gates_are_mapped_or_named():
    weights = gate_weights()
    wrapped = {
        "module.transformer._orig_mod." + key.replace(".to_gate", "._fsdp_wrapped_module.attn1.to_gate"): value
        for key, value in weights.items()
    }
    model = tiny()
    enable_vsa(model, topk=2, gates=wrapped)
    for key, value in weights.items():
        assert torch.equal(model.get_parameter(key), value), key

    strangers = {
        "blocks.2.to_gate_compress.weight": torch.zeros(48, 48),
        "blocks.0.to_gate_compress.scale": torch.zeros(1),
    }
    listed = re.escape(", ".join(strangers))
    with pytest.raises(
        ValueError, match=rf"keys blocks.N.to_gate_compress.weight and .bias with N from 0 to 1, got {listed}"
    ):
        enable_vsa(model, topk=2, gates=weights | strangers)
    with pytest.raises(ValueError, match=r"blocks.1.to_gate_compress.bias of shape \(48,\), got \(3,\)"):
        enable_vsa(model, topk=2, gates=weights | {"blocks.1.to_gate_compress.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"expected one value for blocks.0.to_gate_compress.bias, got two, blocks.0"):
        enable_vsa(model, topk=2, gates=weights | {"module.blocks.0.to_gate_compress.bias": torch.zeros(48)})

    partly = {key: value for key, value in weights.items() if "blocks.1" not in key}
    message = "gates of transformer that were not found are zero.*: blocks.1.to_gate_compress.bias, blocks.1"
    with pytest.warns(UserWarning, match=message):
        enable_vsa(model, topk=2, gates=partly)
    assert not model.blocks[1].to_gate_compress.weight.any()
    assert torch.equal(model.blocks[0].to_gate_compress.weight, weights["blocks.0.to_gate_compress.weight"])


def fastvideo_name(key: str) -> str:
    """The name that FastVideo gives a weight of diffusers' Wan."""
    for old, new in (
        ("patch_embedding.", "patch_embedding.proj."),
        ("text_embedder.linear_1", "text_embedder.fc_in"),
        ("text_embedder.linear_2", "text_embedder.fc_out"),
        ("time_embedder.linear_1", "time_embedder.mlp.fc_in"),
        ("time_embedder.linear_2", "time_embedder.mlp.fc_out"),
        ("time_proj", "time_modulation.linear"),
        ("image_embedder.ff.net.0.proj", "image_embedder.ff.fc_in"),
        ("image_embedder.ff.net.2", "image_embedder.ff.fc_out"),
        ("attn1.to_out.0", "to_out"),
        ("attn1.", ""),
        ("attn2.to_out.0", "attn2.to_out"),
        (".ffn.net.0.proj", ".ffn.fc_in"),
        (".ffn.net.2", ".ffn.fc_out"),
    ):
        key = key.replace(old, new)
    return re.sub(r"(blocks\.\d+)\.norm2", r"\1.self_attn_residual_norm.norm", key)


def test_weights_that_diffusers_leaves_out_are_filled(tmp_path):
    """``from_pretrained`` of names that it does not know gives weights on the device "meta"."""
    trained = tiny()
    trained.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    saved(tmp_path, {fastvideo_name(key): value for key, value in trained.state_dict().items()} | gate_weights())
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    absent = [name for name, x in model.named_parameters() if x.is_meta]
    assert absent
    load_fastwan(model, tmp_path)
    assert all(x.dtype in (torch.bfloat16, torch.float32) and x.requires_grad for x in model.parameters())
    exact = trained.state_dict()
    for name, x in model.named_parameters():
        torch.testing.assert_close(x, exact[name].to(x.dtype))
    enable_vsa(model, topk=2, gates=tmp_path, selection_dtype=torch.bfloat16)
    assert run(model, inputs(dtype=torch.bfloat16)).isfinite().all()

    from accelerate import cpu_offload

    cpu_offload(trained, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="got one that is offloaded"):
        load_fastwan(trained, tmp_path)


@pytest.mark.parametrize("kind", ["text to video", "image to video"])
def test_a_checkpoint_half_in_the_names_of_fastvideo(tmp_path, kind):
    trained, model, arguments = tiny(kind), tiny(kind), inputs(kind)
    weights = trained.state_dict()
    renamed = {fastvideo_name(key) if layer % 3 else key: value for layer, (key, value) in enumerate(weights.items())}
    assert len(renamed) == len(weights)
    assert len(renamed.keys() - weights.keys()) > len(weights) / 3
    saved(tmp_path / "transformer", renamed | gate_weights(), shards=2)
    load_fastwan(model, tmp_path)
    enable_vsa(model, topk=2, gates=tmp_path)
    enable_vsa(trained, topk=2, gates=gate_weights())
    for layer, block in enumerate(trained.blocks):
        block.to_gate_compress.load_state_dict(model.blocks[layer].to_gate_compress.state_dict())
    assert torch.equal(run(model, arguments), run(trained, arguments))

    lost = next(iter(renamed))
    with pytest.raises(ValueError, match=f"a checkpoint that lacks {re.escape(next(iter(weights)))}$"):
        load_fastwan(model, {key: value for key, value in renamed.items() if key != lost})
    with pytest.raises(ValueError, match=r"a checkpoint that has beside them blocks.0.stranger"):
        load_fastwan(model, renamed | {"blocks.0.stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected one value for blocks.0.attn1.to_q.weight, got two"):
        load_fastwan(model, weights | {"blocks.0.to_q.weight": torch.zeros(48, 48)})
    with pytest.raises(ValueError, match=r"source: expected proj_out.bias of shape \(16,\), got \(2,\)"):
        load_fastwan(model, weights | {"proj_out.bias": torch.zeros(2)})
    # diffusers leaves these out too.
    load_fastwan(model, weights | {"blocks.0.attn2.norm_added_q.weight": torch.zeros(48)})
    assert torch.equal(model.proj_out.bias, weights["proj_out.bias"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "topk, sparsity: expected exactly one of them, got neither"),
        ({"topk": 2, "sparsity": 0.5}, ValueError, "got both"),
        ({"sparsity": 90}, ValueError, r"sparsity: expected a number in \[0, 1\), got 90; did you mean 0.9"),
        ({"topk": 2, "block_size": (3, 4, 4)}, ValueError, "block_size: expected a positive multiple of 64 tokens"),
        ({"topk": 2, "dense_layers": (2,)}, ValueError, "dense_layers: expected indices from -2 to 1, got 2"),
        ({"topk": 2, "dense_layers": 1}, TypeError, "dense_layers: expected indices of layers, got int"),
        ({"topk": 2, "dense_layers": ("0",)}, TypeError, "dense_layers: expected indices of layers, got str"),
        ({"topk": 2, "dense_steps": -1}, ValueError, "dense_steps: expected at least 0, got -1"),
        ({"topk": 2, "dense_steps": 3}, ValueError, "dense_steps: expected 0 for a transformer alone, got 3"),
        ({"topk": 2, "selection_dtype": torch.float64}, ValueError, "selection_dtype: expected torch.bfloat16 or"),
        ({"topk": 2, "backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"topk": 2, "gates": 3}, TypeError, "gates: expected a path, a repository or a state dict, got int"),
        (
            {"topk": 2, "gates": {"blocks.0.to_gate_compress.bias": 3}},
            TypeError,
            "gates: expected tensors by their names",
        ),
        (
            {"topk": 2, "gates": {3: torch.zeros(1)}},
            TypeError,
            "expected tensors by their names, got Tensor at 3",
        ),
        (
            {"topk": 2, "gates": {"other": {}}},
            ValueError,
            "expected state dicts of transformer, got those of other",
        ),
        ({"topk": 2, "gates": __file__}, ValueError, "gates: expected a .safetensors file or a folder with some"),
        ({"topk": 2, "gates": "no such"}, ValueError, "gates: expected a file, a folder or a repository owner/name"),
        ({"topk": 2, "gates": "."}, ValueError, "gates: expected a .safetensors file or a folder with some, got ."),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    with pytest.raises(error, match=message):
        enable_vsa(model, **arguments)
    assert not model.rope._forward_hooks
    assert set(model.state_dict()) == set(tiny().state_dict())


def test_what_is_no_supported_model_is_named():
    models = (
        "WanTransformer3DModel, HunyuanVideoTransformer3DModel, HunyuanVideo15Transformer3DModel or "
        "CogVideoXTransformer3DModel"
    )
    with pytest.raises(TypeError, match=f"expected a {models}, or a pipeline with one, got Linear"):
        enable_vsa(torch.nn.Linear(2, 2), topk=2)
    with pytest.raises(TypeError, match="got int"):
        disable_vsa(3)
    wrapped = torch.nn.Sequential(tiny())
    enable_vsa(wrapped, topk=2)
    assert wrapped[0].rope._forward_hooks
    with pytest.raises(ValueError, match="expected one model, got ModuleList with 2"):
        enable_vsa(torch.nn.ModuleList([tiny(), tiny()]), topk=2)


def test_attention_that_the_processor_cannot_do_is_refused():
    model = tiny()
    enable_vsa(model, topk=2)
    attention, hidden = model.blocks[0].attn1, torch.randn(1, 90, 48)
    with pytest.raises(RuntimeError, match="call enable_vsa again"):
        attention(hidden, None, None, (torch.ones(1), torch.ones(1)))
    with pytest.raises(ValueError, match="expected self-attention without a mask"):
        attention(hidden, None, torch.ones(1), None)


def test_what_is_refused_changes_nothing():
    class Other:
        pass

    model, arguments = tiny(), inputs()
    wanted = run(model, arguments)
    original = model.blocks[1].attn1.processor
    model.blocks[1].attn1.set_processor(Other())
    with pytest.raises(ValueError, match="expected self-attention by WanAttnProcessor, got Other"):
        enable_vsa(model, topk=2)
    model.blocks[1].attn1.set_processor(original)
    assert torch.equal(run(model, arguments), wanted)


def test_processors_that_were_put_back_by_hand():
    model, arguments = tiny(), inputs()
    wanted = run(model, arguments)
    before = dict(model.attn_processors)
    enable_vsa(model, topk=2, gates={})
    model.set_attn_processor(before)
    disable_vsa(model)
    assert torch.equal(run(model, arguments), wanted)
    enable_vsa(model, topk=2)
    model.blocks[0].attn1.set_processor(transformer_wan.WanAttnProcessor())
    enable_vsa(model, topk=1000)
    assert difference(run(model, arguments), wanted) < TOLERANCE
    disable_vsa(model)
    assert torch.equal(run(model, arguments), wanted)


def test_a_model_that_nobody_holds_is_gone():
    model = tiny()
    enable_vsa(model, topk=2, gates={})
    weight = weakref.ref(model.blocks[0].to_gate_compress.weight)
    gc.disable()
    try:
        del model
        assert weight() is None, "memory is free without a search for cycles"
    finally:
        gc.enable()


def test_a_saved_model(tmp_path):
    pipe, arguments = pipeline(), inputs()
    generate(pipe)
    enable_vsa(pipe, topk=2, gates=gate_weights(), dense_steps=1)
    wanted = run(pipe.transformer, arguments)
    torch.save(pipe.transformer, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(loaded, arguments), wanted)


def test_gates_come_before_data_parallelism_and_adapters():
    from peft import LoraConfig

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = tiny()
    with pytest.raises(ValueError, match="not in DistributedDataParallel or FSDP yet"):
        enable_vsa(DistributedDataParallel(model), topk=2, gates={})
    enable_vsa(DistributedDataParallel(model), topk=2)
    enable_vsa(model, topk=2, gates={})
    enable_vsa(DistributedDataParallel(model), topk=3)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_gate_compress"]))
    with pytest.raises(ValueError, match="gates have adapters"):
        enable_vsa(model, topk=2, gates={})


def test_settings_of_attention_reach_the_dense_layers():
    model, arguments = tiny(), inputs()
    enable_vsa(model, topk=2, dense_layers=(0, 1))
    wanted = run(model, arguments)
    model.set_attention_backend("native")
    assert difference(run(model, arguments), wanted) < TOLERANCE
    disable_vsa(model)
    assert model.blocks[0].attn1.processor._attention_backend == "native"


def _two_ranks(rank: int, meeting: str, weights, gates, arguments, wanted, wanted_gradient) -> None:
    torch.set_num_threads(1)
    # diffusers counts accelerators, of which a CPU has none.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        model = tiny(layers=3)
        model.load_state_dict(weights)
        enable_vsa(model, topk=2, gates=gates, dense_layers=(1,))
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        out = model(**arguments)[0]
        assert difference(out, wanted) < TOLERANCE
        out.backward(torch.ones_like(out))
        gradient = model.blocks[0].to_gate_compress.weight.grad
        # Each rank has the part of its own tokens.
        dist.all_reduce(gradient)
        assert difference(gradient, wanted_gradient) < 1e-4

        later = tiny(layers=3)
        later.load_state_dict(weights)
        later.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        enable_vsa(later, topk=2, gates=gates, dense_layers=(1,))
        assert difference(run(later, arguments), wanted) < TOLERANCE

        refused = tiny()
        enable_vsa(refused, topk=2)
        with pytest.raises(ValueError, match="ring_degree: expected 1, got 2"):
            refused.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        refused = tiny()
        refused.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
        before = run(refused, arguments)
        with pytest.raises(ValueError, match="ulysses_anything: expected False"):
            enable_vsa(refused, topk=2)
        assert torch.equal(run(refused, arguments), before), "nothing changes where something is refused"
    finally:
        dist.destroy_process_group()


def test_ulysses_on_two_ranks(tmp_path):
    model = tiny(layers=3)
    weights, gates, arguments = copy.deepcopy(model.state_dict()), gate_weights(3), inputs()
    enable_vsa(model, topk=2, gates=gates, dense_layers=(1,))
    out = model(**arguments)[0]
    out.backward(torch.ones_like(out))
    gradient = model.blocks[0].to_gate_compress.weight.grad
    meeting = str(tmp_path / "meeting")
    torch.multiprocessing.spawn(_two_ranks, (meeting, weights, gates, arguments, out.detach(), gradient), nprocs=2)

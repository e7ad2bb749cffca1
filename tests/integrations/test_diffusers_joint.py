"""``enable_vsa`` in models that attend video and text together: tiny ones with random weights, on a CPU."""

import copy
import math

import pytest
import torch
from support import reference as ref
from torch import Tensor

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'vsa-jit[diffusers]'")

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers import transformer_hunyuan_video, transformer_hunyuan_video15
from support.joint import (
    COGVIDEOX,
    GRID,
    HEADS,
    HUNYUAN,
    HUNYUAN_15,
    KINDS,
    NUM_TEXT,
    inputs,
    num_text,
    text_lengths,
    tiny,
)
from support.wan import as_fp32, difference, run

import vsa_jit
from vsa_jit.integrations.diffusers import disable_vsa, enable_vsa, load_fastwan, record
from vsa_jit.integrations.diffusers.joint import ValidTokens
from vsa_jit.integrations.diffusers.models import family_of

TILE = (4, 4, 4)
TOLERANCE = 1e-5
# Prompts without padding, with as much of it in each row, and with some of it in one.
LENGTHS = [(NUM_TEXT, NUM_TEXT), (4, 4), (NUM_TEXT, 3)]
ONE_OF_EACH = ("hunyuan_video", "hunyuan_video15 with an image", "cogvideox")


def attentions(model) -> list:
    return family_of(model).attentions(model)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[tuple, dict]]:
    """The arguments of each call of ``video_sparse_attn``."""
    made = []
    attend = vsa_jit.video_sparse_attn

    def watch(*args, **kwargs):
        made.append((args, kwargs))
        return attend(*args, **kwargs)

    monkeypatch.setattr(vsa_jit, "video_sparse_attn", watch)
    return made


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_blocks_are_the_unmodified_model(calls, kind, lengths):
    model = tiny(kind)
    for grid in (GRID, (1, 7, 9)):
        arguments = inputs(kind, lengths, grid)
        wanted = run(model, arguments)
        enable_vsa(model, sparsity=0.0)
        calls.clear()
        assert difference(run(model, arguments), wanted) < TOLERANCE
        assert len(calls) == len(attentions(model))
        enable_vsa(model, topk=1)
        assert difference(run(model, arguments), wanted) > 100 * TOLERANCE
        disable_vsa(model)
        assert torch.equal(run(model, arguments), wanted)


@pytest.mark.parametrize("lengths", LENGTHS[::2], ids=str)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_all_blocks_in_bf16(kind, lengths):
    model = tiny(kind).to(torch.bfloat16)
    arguments = inputs(kind, lengths, dtype=torch.bfloat16)
    exact = run(copy.deepcopy(model).float(), as_fp32(arguments))
    plain = run(model, arguments)
    enable_vsa(model, topk=1000)
    out = run(model, arguments)
    assert out.dtype == torch.bfloat16
    assert difference(out, exact) < 2 * difference(plain, exact)


def gradients(model, losses) -> dict[str, Tensor]:
    """Of the parameters that have one; all forwards come before the backward."""
    model.zero_grad()
    outs = [model(**arguments)[0] for arguments, _ in losses]
    sum((out * dout).sum() for out, (_, dout) in zip(outs, losses, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_and_checkpointing(kind):
    """Videos of as many tokens and prompts of other lengths, each computed again in the backward as it was."""
    model = tiny(kind).train()
    losses = []
    for lengths, grid in (((NUM_TEXT, 3), GRID), ((4, 4), (2, 9, 5))):
        arguments = inputs(kind, lengths, grid)
        losses.append((arguments, torch.randn_like(arguments["hidden_states"])))
    wanted = gradients(model, losses)
    enable_vsa(model, topk=1000)
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        found = gradients(model, losses)
        assert found.keys() == wanted.keys()
        scale = max(gradient.norm() for gradient in wanted.values())
        for name, gradient in found.items():
            assert (gradient - wanted[name]).norm() < 1e-4 * wanted[name].norm() + 1e-6 * scale, name


def dense_mask(q: Tensor, k: Tensor, grid, topk: int, first: int) -> Tensor:
    """Which of q and k [H, S, D] attend each other: a video whose tokens begin at ``first``, and text around it."""
    video = slice(first, first + math.prod(grid))
    mask = torch.ones(q.shape[0], q.shape[1], q.shape[1], dtype=torch.bool)
    block = ref.block_of_tokens(math.prod(grid), TILE, grid)
    every = torch.ones_like(block, dtype=torch.bool)
    q_c, k_c = (ref.block_means(x[None, :, video], block, every) for x in (q, k))
    chosen = ref.select(q_c @ k_c.mT, topk, torch.ones(k_c.shape[2], dtype=torch.bool))
    mask[:, video, video] = ref.token_mask(chosen, block, block, every, every)[0]
    return mask


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_output_against_a_dense_computation(monkeypatch, kind, lengths):
    """diffusers' own processors, whose attention takes a dense mask of the selected blocks, beside ours."""
    model, arguments = tiny(kind), inputs(kind, lengths)
    wanted_model = copy.deepcopy(model)
    enable_vsa(model, topk=2)
    out = run(model, arguments)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, **_):
        first = NUM_TEXT if kind in COGVIDEOX else 0
        outs = torch.zeros_like(q)
        for row, valid in enumerate(text_lengths(kind, lengths)):
            x, y, z = (t[row, :, : math.prod(GRID) + valid] for t in (q, k, v))
            outs[row, :, : x.shape[1]] = sdpa(x, y, z, attn_mask=dense_mask(x, y, GRID, 2, first))
        return outs

    def dispatch(q, k, v, **_):
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    if kind in COGVIDEOX:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for module in (transformer_hunyuan_video, transformer_hunyuan_video15):
        monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    assert difference(out, run(wanted_model, arguments)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_each_call(calls, kind):
    model, text = tiny(kind), num_text(kind)
    enable_vsa(model, sparsity=0.7, block_size=128, selection_dtype=torch.bfloat16, backend="torch")
    for lengths in LENGTHS:
        calls.clear()
        run(model, inputs(kind, lengths))
        valid = text_lengths(kind, lengths)
        if kind in COGVIDEOX:
            segments = [text, GRID]
        elif valid[0] == valid[1]:
            segments = [GRID, valid[0]]
        else:
            segments = []
            for length in valid:
                segments += [[GRID, length]] + [[text - length]] * (length < text)
        assert len(calls) == len(attentions(model))
        for (q, k, v), given in calls:
            assert given["segments"] == segments
            assert given["sparsity"] == 0.7
            assert given["block_size"] == (2, 8, 8)
            assert given["selection_dtype"] == torch.bfloat16
            assert given["backend"] == "torch"
            assert given["compress_attn_weight"] == 0.0
            assert q.shape == k.shape == v.shape
            assert q._base is not None or kind in COGVIDEOX, "a view of the tokens of all rows, not a copy"


@pytest.mark.parametrize("lengths", [(4, 4), (NUM_TEXT, 3), (0, 2)], ids=str)
def test_valid_tokens_are_views(lengths):
    x = torch.randn(2, math.prod(GRID) + NUM_TEXT, HEADS, 16)
    valid = ValidTokens(GRID, NUM_TEXT, lengths)
    view = valid.view(x)
    assert view.data_ptr() == x.data_ptr()
    video, text = valid.split(view)
    assert video.data_ptr() == x.data_ptr()
    assert torch.equal(video, x[:, : math.prod(GRID)])
    for row, length in enumerate(lengths):
        assert torch.equal(text[row, :length], x[row, math.prod(GRID) :][:length])
    assert text.shape == (2, NUM_TEXT, HEADS, 16)


@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
@pytest.mark.parametrize("kind", [*HUNYUAN, *HUNYUAN_15])
def test_padding_changes_nothing(kind, lengths):
    model, arguments = tiny(kind), inputs(kind, lengths)
    enable_vsa(model, topk=1)
    is_finite = []
    for attention in attentions(model):
        attention.register_forward_hook(
            lambda module, args, out: is_finite.extend(bool(x.isfinite().all()) for x in out)
        )
    wanted = run(model, arguments)
    assert is_finite
    assert all(is_finite)
    padding = arguments["encoder_attention_mask"] == 0
    arguments["encoder_hidden_states"][padding] = 100 * torch.randn_like(arguments["encoder_hidden_states"][padding])
    assert difference(run(model, arguments), wanted) < TOLERANCE


@pytest.mark.parametrize("kind", [HUNYUAN[0], HUNYUAN_15[0]])
def test_a_mask_with_holes_is_what_the_model_takes_it_for(kind):
    model, arguments = tiny(kind), inputs(kind)
    arguments["encoder_attention_mask"][0, 2:4] = 0
    arguments["encoder_attention_mask"][1, 0] = 0
    wanted = run(model, arguments)
    enable_vsa(model, topk=1000)
    assert difference(run(model, arguments), wanted) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_read_once_for_all_layers(monkeypatch, kind):
    model, arguments = tiny(kind), inputs(kind, (NUM_TEXT, 3))
    enable_vsa(model, topk=1)
    reads = []
    read = Tensor.tolist
    monkeypatch.setattr(vsa_jit, "video_sparse_attn", lambda q, k, v, **_: q)
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.append(x) or read(x))
    with torch.no_grad():
        # Arguments have names in the hook also where the caller gives none.
        model(arguments.pop("hidden_states"), **arguments)
    assert len(reads) == (kind not in COGVIDEOX)


def test_a_whole_model_compiled_in_a_full_graph():
    """CogVideoX has no mask, so that nothing is read."""
    model = tiny("cogvideox", num_layers=1)
    enable_vsa(model, topk=2)
    videos = [inputs("cogvideox", grid=grid) for grid in (GRID, (2, 6, 7))]
    wanted = [run(model, video) for video in videos]
    model.compile(fullgraph=True, backend="eager")
    for video, out in zip(videos, wanted, strict=True):
        assert difference(run(model, video), out) < TOLERANCE


def test_repeated_blocks_compiled_in_full_graphs():
    model = tiny("hunyuan_video15", num_layers=1)
    enable_vsa(model, topk=2)
    prompts = [inputs("hunyuan_video15", lengths, grid) for lengths, grid in (((4, 4), GRID), ((4, 3), (2, 6, 7)))]
    wanted = [run(model, prompt) for prompt in prompts]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for prompt, out in zip(prompts, wanted, strict=True):
        assert difference(run(model, prompt), out) < TOLERANCE


def test_fused_projections():
    model, arguments = tiny("cogvideox"), inputs("cogvideox")
    wanted = run(model, arguments)
    model.fuse_qkv_projections()
    enable_vsa(model, topk=1000)
    assert difference(run(model, arguments), wanted) < TOLERANCE
    disable_vsa(model)
    assert difference(run(model, arguments), wanted) < TOLERANCE
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, arguments), wanted)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_dense_layers_and_steps(calls, kind):
    class Pipeline:
        pass

    model, arguments = tiny(kind), inputs(kind, (NUM_TEXT, 3))
    wanted = run(model, arguments)
    layers = len(attentions(model))
    enable_vsa(model, topk=1, dense_layers=range(layers))
    assert torch.equal(run(model, arguments), wanted)
    enable_vsa(model, topk=1, dense_layers=(-1,))
    run(model, arguments)
    assert len(calls) == layers - 1

    pipe = Pipeline()
    pipe.components, pipe.scheduler = {"transformer": model}, FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(4)
    enable_vsa(pipe, topk=1, dense_steps=1)
    calls.clear()
    for step in range(2):
        out = run(model, arguments)
        assert len(calls) == step * layers
        assert torch.equal(out, wanted) == (step == 0)
        pipe.scheduler.step(torch.zeros(1), pipe.scheduler.timesteps[step], torch.zeros(1))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_shares_are_those_of_the_queries_and_keys_of_the_model(calls, kind):
    model, arguments = tiny(kind), inputs(kind, (NUM_TEXT, 3))
    wanted = run(model, arguments)
    with record(model, sparsity=(0.75, 0.4)) as recording:
        assert torch.equal(run(model, arguments), wanted), "the model attends as it does by itself"
    assert torch.equal(run(model, arguments), wanted)
    shares = recording.shares()
    assert shares.shape == (1, len(attentions(model)), HEADS, 2)
    assert recording.grids == {"transformer": [GRID]}

    enable_vsa(model, topk=1000)
    run(model, arguments)
    for layer, ((q, k, _), given) in enumerate(calls):
        found = vsa_jit.recall(q, k, sparsity=[0.75, 0.4], segments=given["segments"], block_size=TILE, layout="bshd")
        torch.testing.assert_close(shares[0, layer], found.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_copies_and_what_disabling_leaves(tmp_path, kind):
    model, arguments = tiny(kind), inputs(kind, (NUM_TEXT, 3))
    dense, processors = run(model, arguments), dict(model.attn_processors)
    enable_vsa(model, topk=2)
    sparse = run(model, arguments)
    other = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    enable_vsa(model, topk=1)
    disable_vsa(model)
    assert dict(model.attn_processors) == processors
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
    assert torch.equal(run(model, arguments), dense)
    for enabled in (other, loaded):
        assert torch.equal(run(enabled, arguments), sparse)
        disable_vsa(enabled)
        assert torch.equal(run(enabled, arguments), dense)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_what_is_refused_is_named_and_changes_nothing(kind):
    class Other:
        pass

    class Parallel:
        context_parallel_config = object()

    model, arguments = tiny(kind), inputs(kind)
    name = type(model).__name__
    wanted = run(model, arguments)
    with pytest.raises(ValueError, match=f"gates: expected None for {name}, got dict"):
        enable_vsa(model, topk=2, gates={})
    with pytest.raises(TypeError, match=f"expected a WanTransformer3DModel, or a pipeline with one, got {name}"):
        load_fastwan(model, {})
    original = attentions(model)[-1].processor
    attentions(model)[-1].set_processor(Other())
    with pytest.raises(ValueError, match=r"expected self-attention by \w+ or \w+, got Other"):
        enable_vsa(model, topk=2)
    attentions(model)[-1].set_processor(original)
    assert torch.equal(run(model, arguments), wanted)
    enable_vsa(model, topk=2)
    with pytest.raises(ValueError, match="expected a model on one device, got one with context parallelism"):
        attentions(model)[0].processor._parallel_config = Parallel()
    hidden = torch.randn(1, 90, 48)
    with pytest.raises(RuntimeError, match="does not tell the size of the video: call enable_vsa again"):
        attentions(model)[0](hidden, encoder_hidden_states=hidden)


def test_masks_that_are_missing_or_not_attended_are_named():
    model, arguments = tiny("cogvideox"), inputs("cogvideox")
    enable_vsa(model, topk=2)
    with pytest.raises(ValueError, match="attention_mask: expected None, got a Tensor"):
        run(model, arguments | {"attention_kwargs": {"attention_mask": torch.ones(1)}})
    model, arguments = tiny("hunyuan_video"), inputs("hunyuan_video")
    enable_vsa(model, topk=2)
    with pytest.raises(TypeError, match="encoder_attention_mask: expected a Tensor, got NoneType"):
        run(model, arguments | {"encoder_attention_mask": None})

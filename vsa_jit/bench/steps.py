"""The step of a whole model: diffusers' transformer with random weights, dense and with Video Sparse Attention."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library
from torch.nn.attention import SDPBackend, sdpa_kernel

from vsa_jit.bench.attention import SDPA_NAMES, fastest_dense
from vsa_jit.bench.cases import DTYPES, BlockSize, Inputs, Selection, Shape, format_size
from vsa_jit.bench.measure import peak_mib, times_ms
from vsa_jit.fastpath import compiling_at_most
from vsa_jit.problem import BackendName

STEPS = {"forward": "inference", "backward": "training"}
MODES = ("eager", "compiled")
DENSE = "dense"
ENABLED = "dense, in the processor of enable_vsa"
LIMIT = "left out"
TEXT_TOKENS = 512
# The least that two right results may differ by, where PyTorch's backends show no difference or one alone runs.
TOLERANCE = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 1e-5}
# A block is compiled for each kind of attention, with gradients and without.
MOST_COMPILED = 256


@dataclass(frozen=True)
class Model:
    """A transformer of diffusers by its configuration, and the video that it makes, in tokens."""

    about: str
    config: dict[str, Any]
    grid: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.about}, {format_size(self.grid)} tokens, {self.config['num_layers']} layers"


def _wan(heads: int, ffn_dim: int, layers: int) -> dict[str, Any]:
    return {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn_dim, "num_layers": layers}


MODELS = {
    "wan-1.3b": Model("Wan2.1-1.3B, 81 frames of 480p", _wan(12, 8960, 30), (21, 30, 52)),
    "wan-14b": Model("Wan2.1-14B, 81 frames of 720p", _wan(40, 13824, 40), (21, 45, 80)),
}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: str
    layers: int
    grid: tuple[int, int, int]
    batch: int
    dtype: str
    gate: bool
    backend: BackendName
    variants: tuple[tuple[BlockSize, Selection], ...]
    directions: tuple[str, ...]
    modes: tuple[str, ...]

    @property
    def shape(self) -> Shape:
        """Of one layer's self-attention."""
        config = MODELS[self.model].config
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return Shape(tokens, self.grid, self.batch, heads, head_dim, self.dtype, "bshd")


@dataclass(frozen=True)
class StepRow:
    """One kind of attention in one step and mode.

    ``speedup`` is over the dense model in that step and mode, ``share_of_limit`` how much that is of the speed-up of
    the model whose self-attention is left out.
    """

    attention: str
    step: str
    mode: str
    ms: float
    speedup: float
    share_of_limit: float
    peak_mib: float | None


@dataclass(frozen=True)
class StepCheck:
    """A model whose blocks are all selected against the dense one, in one step and mode.

    ``error`` is the relative error of the worst of a few tensors: the output of self-attention, or the gradients of its
    projections, in the first and the last layer. ``bound`` is twice what the dense model differs by between PyTorch's
    backends, and at least that of rounding.
    """

    block_size: str
    step: str
    mode: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


class Bench:
    """A model with its inputs, and a copy for each kind of attention that shares its weights."""

    def __init__(self, plan: Plan, device: torch.device, seed: int) -> None:
        _define_operators()
        self.plan, self.device = plan, device
        torch.manual_seed(seed)
        dense = _build(plan, device)
        config = dense.config
        dtype = DTYPES[plan.dtype]
        t, h, w = (tokens * side for tokens, side in zip(plan.grid, config.patch_size, strict=True))
        self.inputs = (
            torch.randn(plan.batch, config.in_channels, t, h, w, device=device, dtype=dtype),
            torch.full((plan.batch,), 500, device=device),
            torch.randn(plan.batch, TEXT_TOKENS, config.text_dim, device=device, dtype=dtype),
        )
        self.dout = torch.randn_like(self.inputs[0])
        enabled = self._sparse(dense, plan.variants[0][0], Selection(topk=1), dense_layers=range(plan.layers))
        self.models = {DENSE: dense, ENABLED: enabled, LIMIT: _without_attention(_sharing(dense))}
        for block_size, selection in plan.variants:
            self.models[f"{format_size(block_size)}, {selection}"] = self._sparse(dense, block_size, selection)
        every = Selection(topk=plan.shape.seq_len)
        self._checked = {DENSE: _observed(_sharing(dense))} | {
            format_size(block_size): _observed(self._sparse(dense, block_size, every))
            for block_size in dict.fromkeys(block_size for block_size, _ in plan.variants)
        }
        self._bounds: dict[str, list[float]] = {}

    def check(self, direction: str, mode: str, sdpa: SDPBackend) -> Iterator[StepCheck]:
        """Compares the models whose blocks are all selected with the dense one; in eager mode first."""
        with only(sdpa), compiling_at_most(MOST_COMPILED):
            values = {name: self._observe(model, direction) for name, model in self._checked.items()}
        wanted = values.pop(DENSE)
        if direction not in self._bounds:
            self._bounds[direction] = self._bounds_of(direction, sdpa, wanted)
        for block_size, found in values.items():
            errors = map(_difference, found, wanted)
            error, bound = max(zip(errors, self._bounds[direction], strict=True), key=lambda pair: pair[0] / pair[1])
            yield StepCheck(block_size, STEPS[direction], mode, error, bound)

    def _bounds_of(self, direction: str, sdpa: SDPBackend, wanted: Sequence[Tensor]) -> list[float]:
        bounds = [TOLERANCE[self.plan.dtype]] * len(wanted)
        for backend in SDPA_NAMES:
            # All scores of a long video do not fit into memory.
            if backend not in (sdpa, SDPBackend.MATH):
                with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
                    others = self._observe(self._checked[DENSE], direction)
                    differences = map(_difference, others, wanted)
                    bounds = [max(bound, 2 * x) for bound, x in zip(bounds, differences, strict=True)]
        return bounds

    def _observe(self, model: Any, direction: str) -> list[Tensor]:
        """What is compared of a step."""
        _kept.clear()
        self._call(model, direction)()
        if direction == "forward":
            return list(_kept)
        gradients = [
            getattr(model.blocks[layer].attn1, name).weight.grad
            for layer in (0, -1)
            for name in ("to_q", "to_k", "to_v")
        ]
        model.zero_grad()
        return gradients

    def measure(self, direction: str, mode: str, sdpa: SDPBackend, seconds: float) -> Iterator[StepRow]:
        """Times the step of every kind of attention, in turn."""
        calls = [self._call(model, direction) for model in self.models.values()]
        with only(sdpa), compiling_at_most(MOST_COMPILED):
            times = times_ms(calls, self.device, seconds)
            peaks = [peak_mib(call, self.device) for call in calls]
        ms = dict(zip(self.models, map(statistics.median, times), strict=True))
        for name, peak in zip(self.models, peaks, strict=True):
            yield StepRow(name, STEPS[direction], mode, ms[name], ms[DENSE] / ms[name], ms[LIMIT] / ms[name], peak)

    def compile(self) -> None:
        """From now on the blocks of all models run compiled."""
        for model in (*self.models.values(), *self._checked.values()):
            model.compile_repeated_blocks(fullgraph=True)

    def _call(self, model: Any, direction: str) -> Callable[[], object]:
        def infer() -> Tensor:
            with torch.no_grad(), _left_out():
                return model(*self.inputs, return_dict=False)[0]

        def train() -> None:
            model.zero_grad()
            with _left_out():
                model(*self.inputs, return_dict=False)[0].backward(self.dout)

        return infer if direction == "forward" else train

    def _sparse(self, dense: Any, block_size: BlockSize, selection: Selection, dense_layers: Sequence[int] = ()) -> Any:
        from vsa_jit.integrations.diffusers import enable_vsa

        model = _sharing(dense)
        enable_vsa(
            model,
            topk=selection.topk,
            sparsity=selection.sparsity,
            block_size=block_size,
            gates={} if self.plan.gate else None,
            dense_layers=dense_layers,
            backend=self.plan.backend,
        )
        return model


def best_sdpa(plan: Plan, device: torch.device, seed: int, seconds: float) -> dict[str, SDPBackend]:
    """The backend of PyTorch's that is fastest for the model's self-attention, for each direction."""
    inputs = Inputs.random(plan.shape, device, seed)
    backends = {name: backend for backend, name in SDPA_NAMES.items()}
    fastest = {direction: fastest_dense(inputs, direction, seconds) for direction in plan.directions}
    return {direction: backends[result.name] for direction, result in fastest.items() if result is not None}


@contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """Makes a backend PyTorch's first choice; what it cannot run, such as a cross-attention's shape, takes others."""
    with sdpa_kernel([backend, *(other for other in SDPA_NAMES if other != backend)], set_priority=True):
        yield


def _build(plan: Plan, device: torch.device) -> Any:
    from diffusers import WanTransformer3DModel

    with device:
        model = WanTransformer3DModel(**(MODELS[plan.model].config | {"num_layers": plan.layers}))
    # As a checkpoint is loaded in a dtype: some parts stay in fp32.
    kept = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(DTYPES[plan.dtype])
    model.enable_gradient_checkpointing()
    return model


def _sharing(model: Any) -> Any:
    """A copy with the same weights."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _without_attention(model: Any) -> Any:
    """Marks the self-attention that ``_left_out`` leaves out."""
    for block in model.blocks:
        block.attn1.processor._attention_backend = LIMIT
    return model


def _left_out() -> AbstractContextManager[object]:
    """Leaves the attention of marked layers out, and nothing else that the model does for it."""
    from diffusers.models.transformers import transformer_wan

    return mock.patch.object(transformer_wan, "dispatch_attention_fn", _attend_unless_marked())


@functools.cache
def _attend_unless_marked() -> Callable[..., Tensor]:
    """One function for all calls: what was compiled for it is compiled for no other."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["backend"] == LIMIT:
            return _Nothing.apply(query, key, value)
        return dispatch_attention_fn(query, key, value, *args, **kwargs)

    return attend


class _Nothing(torch.autograd.Function):
    """Gives v as the output, and the output's gradient to q, k and v, so that all that makes them keeps its work.

    It takes no time, or, where PyTorch's compiler must not see that q and k do not matter, that of a copy.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.vsa_jit_bench.copy_last(q, k, v) if torch.compiler.is_compiling() else v.view_as(v)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dout, dout, dout


def _observed(model: Any) -> Any:
    """Makes a model keep the outputs of its first and last self-attention, before they are projected."""
    for layer in (0, -1):
        to_out = model.blocks[layer].attn1.to_out
        to_out[0] = _Observed(to_out[0])
    return model


class _Observed(torch.nn.Module):
    """A layer that keeps its input. No hook: what is compiled for a layer with one also runs for layers without."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.ops.vsa_jit_bench.keep(x))


# What ``keep`` was given, in order.
_kept: list[Tensor] = []


@functools.cache
def _define_operators() -> None:
    """Operators that PyTorch's compiler cannot see into."""

    @library.custom_op("vsa_jit_bench::copy_last", mutates_args=())
    def copy_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.clone()

    copy_last.register_fake(lambda q, k, v: torch.empty_like(v))

    @library.custom_op("vsa_jit_bench::keep", mutates_args=())
    def keep(x: Tensor) -> Tensor:
        _kept.append(x.detach().clone())
        return x.clone()

    keep.register_fake(torch.empty_like)
    keep.register_autograd(lambda ctx, dout: dout)


def _difference(x: Tensor, wanted: Tensor) -> float:
    x, wanted = x.double(), wanted.double()
    return ((x - wanted).norm() / wanted.norm()).item()

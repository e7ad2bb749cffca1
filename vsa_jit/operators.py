"""How a function becomes an operator of PyTorch: its schema, the way past the dispatcher, its derivatives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, library

from vsa_jit import flops
from vsa_jit.fastpath import (
    SingleLevelFunction,
    allow_single_level_function,
    are_plain,
    are_transforms_active,
    autocast_off,
    can_bypass_dispatcher,
    has_tangent,
    needs_gradient,
    recording_derivatives,
    redispatch_below_autograd,
    tree_map,
    without_tangent,
)

_LIBRARY = library.Library("vsa_jit", "DEF")
# Of every tensor that belongs to an element of the batch: the others are sizes of blocks, numbers, and empty.
MIN_BATCHED_DIMS = 3


class Operator:
    """A function as an operator of its name, with the schema of its annotations, on every device.

    The same as PyTorch's ``custom_op`` but for that one's checks at every call, which cost more than a launch. So does
    the way through PyTorch's dispatcher, which only those calls take that somebody else has to see. There a result that
    is None is empty, of the dtype of the first argument. Inside, autocast is off: an operator computes in the dtype of
    its inputs and in fp32, whatever surrounds the call.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function
        self._fake: Callable | None = None
        # The ``torch.autograd.Function`` of calls past the dispatcher.
        self._recorded: Any = None
        name = function.__name__
        schema = library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._run_for_dispatcher, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.vsa_jit, name).default
        library.register_vmap(self.overload, self._map, lib=_LIBRARY)

    def fake(self, function: Callable) -> Callable:
        """Takes a function that makes the operator's results without their values, for tracing."""
        self._fake = function
        return library.register_fake(self.overload, function, lib=_LIBRARY)

    def _run(self, *args: Any) -> Any:
        if args[0].shape[0] == 0 and self._fake is not None:
            # A batch of nothing: no result has an element.
            return self._fake(*args)
        with autocast_off(args[0].device):
            return self._function(*args)

    def _run_for_dispatcher(self, *args: Any) -> Any:
        results = self._run(*args)
        if not isinstance(results, tuple):
            return results
        return tuple([args[0].new_empty(0) if x is None else x for x in results])

    def __call__(self, *args: Any) -> Any:
        if can_bypass_dispatcher() and are_plain(args):
            return self.call_directly(needs_gradient(args), *args)
        if not torch.compiler.is_compiling():
            flops.tell_counters_at_work()
        return self.overload(*args)

    def call_directly(self, recorded: bool, *args: Any) -> Any:
        """The call past the dispatcher, where ``can_bypass_dispatcher`` and ``are_plain`` hold.

        Args:
            recorded: whether a tensor among the arguments needs a gradient, and gradients are recorded.
        """
        # Without derivatives, results carry none.
        return self._recorded.apply(*args) if recorded and self._recorded is not None else self._run(*args)

    def call_in_backward(self, ctx: Any, grads: Sequence[Tensor | None], *args: Any) -> Any:
        """The call in the backward of an operator. Where that went past the dispatcher, only the gradients among the
        arguments are not known to be plain."""
        is_direct = getattr(ctx, "is_direct", False) and not torch.is_grad_enabled()
        if is_direct and can_bypass_dispatcher() and are_plain(grads):
            return self._run(*args)
        return self(*args)

    def _map(self, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        """The rule of ``torch.vmap``: one call with a larger batch or, where that cannot be, one after the other."""
        mapped = [isinstance(x, Tensor) and dim is not None for x, dim in zip(args, in_dims, strict=True)]
        first = [x.movedim(dim, 0) if of_call else x for of_call, x, dim in zip(mapped, args, in_dims, strict=True)]
        # Sizes of blocks belong to all of a batch, and tensors that are the same in all calls would have to be copied.
        if any(
            [
                of_call != (x.dim() - of_call >= MIN_BATCHED_DIMS)
                for of_call, x in zip(mapped, first, strict=True)
                if isinstance(x, Tensor)
            ]
        ):

            def one(call: Callable, take: Callable[[Tensor], Tensor]) -> Any:
                return call(*[take(x) if of_call else x for of_call, x in zip(mapped, first, strict=True)])

            calls = [one(self.overload, operator.itemgetter(i)) for i in range(info.batch_size)]
            if not calls:
                assert self._fake is not None
                shapes = one(self._fake, lambda x: x.new_empty(x.shape[1:]))
                none = tree_map(lambda x: x.new_empty((0, *x.shape)), shapes)
                return none, tree_map(lambda x: 0, none)
            stacked = tree_map(lambda *results: torch.stack(results), calls[0], *calls[1:])
            return stacked, tree_map(lambda x: 0, stacked)

        calls_and_batch = next(x.shape[:2] for x in first if isinstance(x, Tensor))

        def apart(x: Tensor) -> Tensor:
            return x.unflatten(0, calls_and_batch) if x.dim() >= MIN_BATCHED_DIMS else x

        results = self.overload(*[x.flatten(0, 1) if of_call else x for of_call, x in zip(mapped, first, strict=True)])
        return tree_map(apart, results), tree_map(lambda x: 0 if x.dim() >= MIN_BATCHED_DIMS else None, results)

    def count_flops(self, formula: Callable[..., int]) -> None:
        """Takes a formula for the operator's floating-point operations, which PyTorch's counter then counts."""
        flops.register(self.overload.overloadpacket, formula)

    def differentiate(
        self,
        setup_context: Callable[[Any, tuple, Any], None],
        backward: Callable[..., tuple],
        jvp: Callable[..., Any] | None = None,
        recorded: Callable[[tuple], tuple] | None = None,
        first_alone: bool = False,
    ) -> None:
        """Registers derivatives, which are those of ``torch.autograd.Function``.

        What PyTorch's ``register_autograd`` does, and more: forward mode, PyTorch's function transforms
        (``torch.func.grad``, ``jvp``, ``vmap`` of them), and arguments that depend on whether gradients are recorded.
        That is known only here, where the operator runs: a traced or exported program may run with other tensors than
        it was traced with, and tensors of a function transform do not show that they need a gradient.

        Args:
            setup_context, backward: as of ``Function``; a gradient that nobody needs is None in ``backward``.
            jvp: as of ``Function``, with the saved tensors after the context. None: a call with a tangent raises.
            recorded: gives the arguments to run with where gradients are recorded.
            first_alone: whether only the first result has a gradient, and the others are kept for the backward alone:
                past the dispatcher PyTorch then does not see them, and they are None.
        """
        overload, name = self.overload, self._function.__name__

        def forward(*args: Any) -> Any:
            inputs, keyset = args[:-1], args[-1]
            inputs = inputs if recorded is None else recorded(inputs)
            # An outer transform records derivatives too; for this level PyTorch has turned that off by now.
            with recording_derivatives() if are_transforms_active() else nullcontext():
                return redispatch_below_autograd(overload, keyset, inputs)

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs[:-1], output)

        def tangent(ctx: Any, *tangents: Any) -> Any:
            if jvp is None:
                raise NotImplementedError(f"vsa_jit: forward-mode differentiation (jvp) does not go through {name}")
            if not are_transforms_active():
                return jvp(ctx, ctx.saved_tensors, *tangents[:-1])
            # For an outer transform, as in ``forward``; at this level a saved tensor still has its tangent.
            saved = [None if x is None else without_tangent(x) for x in ctx.saved_tensors]
            with recording_derivatives():
                return jvp(ctx, saved, *tangents[:-1])

        # The level of a function transform is one of autograd, and the dispatcher comes here once for each: what
        # ``torch.autograd.Function`` itself does about levels must not happen again.
        function: Any = type(
            f"vsa_jit_{name}",
            (SingleLevelFunction,),
            {
                "forward": staticmethod(forward),
                "setup_context": staticmethod(setup),
                "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),
                "jvp": staticmethod(tangent),
            },
        )

        def run(keyset: Any, *args: Any) -> Any:
            flops.tell_counters_at_work()
            if not (needs_gradient(args) or has_tangent(args)):
                return redispatch_below_autograd(overload, keyset, args)
            transformed = are_transforms_active()
            with allow_single_level_function() if transformed else nullcontext():
                return function.apply(*args, keyset)

        _LIBRARY.impl(name, run, "Autograd", with_keyset=True)

        # Without a ``setup_context`` of its own, for which PyTorch would look at the signature at every call.
        def forward_directly(ctx: Any, *args: Any) -> Any:
            output = self._run(*(args if recorded is None else recorded(args)))
            ctx.set_materialize_grads(False)
            ctx.is_direct = True
            setup_context(ctx, args, output)
            return (output[0], *(None,) * (len(output) - 1)) if first_alone else output

        methods = {"forward": staticmethod(forward_directly), "backward": staticmethod(backward)}
        self._recorded = type(f"vsa_jit_{name}", (torch.autograd.Function,), methods)

    def differentiate_once(self) -> None:
        """Makes every derivative of this operator, which computes one, an error."""
        self.differentiate(lambda ctx, inputs, output: None, _refuse_second_derivative)


def save_tensors(ctx: Any, *tensors: Tensor | None) -> None:
    """Of a ``setup_context``, for both kinds of derivatives."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def tangent_or_zeros(tangent: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The tangent of a tensor, if there is one, as an operator may take it."""
    if x is None:
        return None
    # Kernels read a contiguous last dimension, which was checked of ``x`` alone.
    return torch.zeros_like(x) if tangent is None else tangent.contiguous()


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> tuple:
    raise NotImplementedError("vsa_jit: the gradients of sparse attention cannot be differentiated again")

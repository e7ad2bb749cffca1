"""Calls that skip PyTorch's dispatcher, and every name that PyTorch keeps private and this package needs.

PyTorch may rename such a name in any release. So they stand in this file alone, each with what it is for, and a test
looks all of them up. Those that every call needs are bound to a name, since a function around one costs as much again.
"""

from __future__ import annotations

import functools
import marshal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch._functorch.autograd_function
import torch._guards
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor
from torch.autograd import forward_ad, profiler

T = TypeVar("T")

# Types of tensors that are no more than that.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# Calls that differ in more than settings and shapes, before the oldest is forgotten, and all calls, before all are.
_MOST_OF_A_KIND = 8
_MOST_KEPT = 1024

# Modes of this thread that see each operator, such as FlopCounterMode, FakeTensorMode and make_fx: how many, and which.
num_dispatch_modes = torch._C._len_torch_dispatch_stack
dispatch_modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
# Modes of this thread that see each of PyTorch's functions that Python calls: how many.
_num_function_modes = torch._C._len_torch_function_stack
# Whether ``torch.func.grad``, ``jvp`` or ``vmap`` surrounds the call, whose tensors are then wrapped.
are_transforms_active = torch._C._are_functorch_transforms_active
# Whether a profiler records this thread, the legacy one too, which ``profiler`` below does not tell.
_is_thread_profiled = torch.autograd._profiler_enabled
# What a tensor needs besides its memory shows in its dispatch keys: a lazy negation, sparsity, a wrapper.
_dispatch_keys = torch._C._dispatch_keys

# The base of ``torch.autograd.Function`` that does nothing about levels of function transforms, and the permission to
# use it while one is active: the dispatcher itself enters an operator's kernel for autograd once for each level.
SingleLevelFunction = torch.autograd.function._SingleLevelFunction
allow_single_level_function = torch._functorch.autograd_function.enable_single_level_autograd_function
# Applies a function to one or several results of an operator, as ``torch.vmap`` itself takes them apart.
tree_map = torch.utils._pytree.tree_map

# Tells who traces a program what holds for a symbolic number; documented, though named as if private.
assume = torch._check
# The context of the program that is being compiled, if there is one, as an operator's fake implementation can ask.
tracing_context = torch._guards.TracingContext.try_get

if torch.backends.cuda.is_built():
    # As PyTorch and Triton ask inside: the public ways see first whether CUDA has started, and make objects.
    current_device = torch._C._cuda_getDevice
    current_raw_stream = torch._C._cuda_getCurrentRawStream


def can_bypass_dispatcher() -> bool:
    """Whether nobody traces, transforms or watches what this thread does."""
    return not (
        torch.compiler.is_compiling()
        or num_dispatch_modes() > 0
        or _num_function_modes() > 0
        or are_transforms_active()
        # The level of forward mode, -1 where there is none.
        or forward_ad._current_level >= 0
        # Whether any thread is profiled: a profiler may record all of them.
        or profiler._is_profiler_enabled
        or _is_thread_profiled()
        or torch.jit.is_tracing()
    )


def are_plain(args: Sequence[Any]) -> bool:
    """Whether the tensors among arguments are what their memory holds."""
    others = _keys_of_others()
    # A loop, which is quicker than a generator: this runs at every call.
    for x in args:
        if isinstance(x, Tensor) and (type(x) not in PLAIN_TYPES or _dispatch_keys(x).raw_repr() & others):
            return False
    return True


def needs_gradient(args: Sequence[Any]) -> bool:
    """Whether gradients are recorded, and a tensor among arguments needs one."""
    return torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in args])


@functools.cache
def _keys_of_others() -> int:
    """PyTorch's dispatch keys but those of a tensor whose values are what its memory holds."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for key in (
        torch._C.DispatchKey.CUDA,
        torch._C.DispatchKey.ADInplaceOrView,
        torch._C.DispatchKey.AutogradCPU,
        torch._C.DispatchKey.AutogradCUDA,
        torch._C.DispatchKey.AutocastCPU,
        torch._C.DispatchKey.AutocastCUDA,
    ):
        keys = keys | torch._C.DispatchKeySet(key)
    return ~keys.raw_repr()


def is_autocast_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager:
    """Where autocast is on for a device, turns it off."""
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


class CallCache(Generic[T]):
    """A value for each call, by its settings, by what its tensors look like and by whether gradients are recorded.

    Two tensors look alike that have the same type, dtype, device, shape, strides, need of a gradient and dispatch keys:
    all that a check may depend on but the values. Tensors of a call are told apart by their order. Calls are not kept
    that have a tensor of a subclass, one tensor twice, or settings that are not plain numbers, strings, None and
    sequences of those. No tensor is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, list[tuple[Callable[..., bool], T]]] = {}
        self._count = 0

    def find(self, settings: tuple, tensors: Sequence[Any]) -> T | None:
        """What is kept for a call that looks like this one, or None."""
        for looks_alike, value in self._kept.get(_key(settings, tensors), ()):
            if looks_alike(*tensors):
                return value
        return None

    def keep(self, settings: tuple, tensors: Sequence[Tensor], value: T) -> None:
        """Keeps a value for calls that look like this one."""
        key, guards = _key(settings, tensors), _tensor_guards()
        if key == () or guards is None or len(set(map(id, tensors))) < len(tensors):
            return
        if self._count >= _MOST_KEPT:
            self._kept.clear()
            self._count = 0
        sizes, strides = ([list(of(x)) for x in tensors] for of in (Tensor.size, Tensor.stride))
        looks_alike = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        kept = self._kept.get(key, [])
        self._kept[key] = [*kept[1 - _MOST_OF_A_KIND :], (looks_alike, value)]
        self._count += len(self._kept[key]) - len(kept)


def plain_key(settings: Any) -> bytes | None:
    """Settings as bytes: 64 differs from 64.0 there, and 1 from True. None where they are not plain numbers, strings,
    None and sequences of those, which could change later or claim to be what they are not, or a program is compiled.
    NumPy's numbers and arrays become their bytes alone."""
    if torch.compiler.is_compiling():
        return None
    try:
        return marshal.dumps(settings, 2)
    except ValueError:
        return None


def value_of_key(key: bytes) -> Any:
    """The settings of ``plain_key``."""
    return marshal.loads(key)


def _key(settings: tuple, tensors: Sequence[Any]) -> tuple:
    """The first-level cache key, or () where the call cannot be cached."""
    shapes = []
    for x in tensors:
        if type(x) not in PLAIN_TYPES:
            return ()
        shapes.append(x.shape)
    key = plain_key(settings)
    return () if key is None else (torch.is_grad_enabled(), key, *shapes)


@functools.cache
def _tensor_guards() -> Callable[..., Any] | None:
    """PyTorch's own test whether tensors look like others, which its compiler runs at every call of what it compiled.

    In Python the same takes longer than a launch. Where a PyTorch has none, nothing is kept.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    return TensorGuards


def redispatch_below_autograd(overload: Any, keyset: Any, args: tuple) -> Any:
    """Goes on with an operator's call from its kernel for autograd, recording nothing.

    What PyTorch's own kernels for autograd do in C++, and its ``register_autograd`` in Python with these names.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def has_tangent(args: Sequence[Any]) -> bool:
    """Whether a tensor among arguments has a tangent of forward mode that this call is to carry on."""
    if not torch._C._is_fwd_grad_enabled():
        return False
    # A compiled program opens levels of forward mode through function transforms alone.
    if forward_ad._current_level < 0 and not are_transforms_active():
        return False
    return any(isinstance(x, Tensor) and _unpack_dual(x)[1] is not None for x in args)


def without_tangent(x: Tensor) -> Tensor:
    """A tensor as the next outer level of forward mode sees it."""
    return _unpack_dual(x)[0]


def _unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    # The public one finds nothing at a level that a compiled program opened.
    return torch._VF._unpack_dual(x, level=0)


@contextmanager
def recording_derivatives() -> Iterator[None]:
    """Derivatives of both modes are recorded inside, for an outer function transform."""
    # As ``torch.enable_grad`` for forward mode, which has no public one.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def reading_symbolic_ints() -> AbstractContextManager:
    """While a program is traced, an integer that is read from a tensor stays symbolic inside.

    The only way to set that from within what is traced.
    """
    return torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True)


def compiling_at_most(programs: int) -> AbstractContextManager:
    """Inside, PyTorch's compiler makes so many programs of a function before it gives up."""
    return torch._dynamo.config.patch(recompile_limit=programs)

"""Makes Triton's interpreter faster, and lets it round to bf16 as a GPU does; else it computes what it did.

Where Triton's internals are not as they are expected here, it runs as it is.
"""

import dataclasses
import functools
import inspect
from typing import Any

import torch


def patch() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _patch_once_a_launch(interpreter)
    _skip_unread_checks(interpreter)
    _remember_dtypes(interpreter)
    _remember_types(interpreter.tl.core)
    _round_to_bf16(interpreter)


def _patch_once_a_launch(interpreter: Any) -> None:
    """A launch replaces the functions of ``triton.language`` by interpreted ones, and restores them at its end. Every
    call of a device function in between would search the module for them again.
    """
    patch = getattr(interpreter, "_patch_lang", None)
    scope_class = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or not hasattr(scope_class, "restore"):
        return
    # Modules whose functions are replaced, until the launch ends.
    patched: set[str] = set()

    @functools.cache
    def language_modules(fn: Any) -> frozenset[str]:
        """Those that the function sees: Triton replaces only them."""
        names = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value)}
        return frozenset(names & {"triton.language", "triton.language.core"})

    class LaunchScope(scope_class):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_lang(fn: Any) -> Any:
        modules = language_modules(fn)
        if modules and modules <= patched:
            return scope_class()
        scope = patch(fn)
        if type(scope) is scope_class:
            scope.__class__ = LaunchScope
            patched.update(modules)
        return scope

    interpreter._patch_lang = patch_lang


def _skip_unread_checks(interpreter: Any) -> None:
    """Without the option ``debug`` the interpreter computes whether integers overflow, and asserts nothing."""
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "debug", True) or not hasattr(options, "sanitize_overflow"):
        return
    builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _remember_dtypes(interpreter: Any) -> None:
    """NumPy's dtype of a scalar type is looked up in a table that every call makes anew."""
    look_up = getattr(interpreter, "_get_np_dtype", None)
    if look_up is None:
        return
    scalar = interpreter.tl.dtype
    remembered = functools.cache(look_up)
    interpreter._get_np_dtype = lambda dtype: remembered(dtype) if type(dtype) is scalar else look_up(dtype)


def _remember_types(core: Any) -> None:
    """Every operation makes block types, and tensors whose shape is built from their type: few different ones, of which
    each is built once. Pointers are left out: each of them has a type of its own.
    """
    block_type, tensor = core.block_type, core.tensor
    build_type, build_tensor = block_type.__init__, tensor.__init__
    try:
        scalar, block = tensor(None, core.float32), tensor(None, block_type(core.float32, [2]))
    except (AttributeError, TypeError):
        return
    expected = {"handle", "shape", "numel", "type", "dtype"}, {"element_ty", "shape", "numel", "name"}
    if (set(vars(block)), set(vars(block.type))) != expected or type(block.shape) is not getattr(core, "tuple", None):
        return
    attributes: dict[tuple, dict] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        dims = shape.values if type(shape) is core.tuple else shape
        is_usual = type(self) is block_type and type(element_ty) is core.dtype and type(dims) is list
        if not is_usual or any(type(dim) is not int for dim in dims):
            return build_type(self, element_ty, shape)
        key = (element_ty.name, *dims)
        if key not in attributes:
            build_type(self, element_ty, shape)
            build_tensor(of_type := object.__new__(tensor), None, self)
            attributes[key] = {**vars(self), "of_tensors": (of_type.shape, of_type.numel)}
        self.__dict__.update(attributes[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        of_tensors = vars(type).get("of_tensors") if type.is_block() else (scalar.shape, scalar.numel)
        if of_tensors is None:
            return build_tensor(self, handle, type)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors

    block_type.__init__, tensor.__init__ = init_type, init_tensor


def _round_to_bf16(interpreter: Any) -> None:
    """The interpreter cuts off the low half of fp32."""
    convert = getattr(interpreter, "_convert_float", None)
    if convert is None:
        return
    fp32, bf16 = interpreter.tl.float32, interpreter.tl.bfloat16

    def convert_float(data: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        if (from_dtype, to_dtype) == (fp32, bf16):
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
        return convert(data, from_dtype, to_dtype, rounding_mode)

    interpreter._convert_float = convert_float

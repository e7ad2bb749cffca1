"""Makes Triton's interpreter faster, and changes nothing of what it computes.

Where Triton's internals are not as they are expected here, it runs as it is.
"""

import dataclasses
import functools
import inspect
from typing import Any


def speed_up() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _patch_once_a_launch(interpreter)
    _skip_unread_checks(interpreter)
    _remember_dtypes(interpreter)


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

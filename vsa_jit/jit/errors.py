"""What goes wrong while kernels are compiled, kept or loaded."""

from __future__ import annotations

from pathlib import Path


class JitError(RuntimeError):
    """What all errors of run-time compilation are."""


class CompileError(JitError):
    """A kernel could not be compiled.

    Attributes:
        first_error: the compiler's first error, or what became of the compiler.
        command: a shell command that compiles the same again, or None where its files could not be kept.
        log: the compiler's whole output, or None where it could not be kept.
    """

    def __init__(self, kernel: str, first_error: str, command: str | None = None, log: Path | None = None) -> None:
        self.first_error = first_error
        self.command = command
        self.log = log
        lines = [f"{kernel} could not be compiled: {first_error}"]
        if command is not None:
            lines.append(f"compile it again with: {command}")
        if log is not None:
            lines.append(f"the compiler's whole output: {log}")
        super().__init__("\n".join(lines))


class CacheError(JitError):
    """The folder of compiled kernels, or an archive of them, cannot be used; the message says which and why."""


class Unavailable(JitError):
    """A part of the toolchain is missing or too old.

    Attributes:
        reason: what is wrong.
        mend: the command or step that mends it, or None.
    """

    def __init__(self, reason: str, mend: str | None = None) -> None:
        self.reason = reason
        self.mend = mend
        super().__init__(reason if mend is None else f"{reason} ({mend})")


class NotWarmError(JitError):
    """A kernel that is not loaded was called while a CUDA graph is captured."""

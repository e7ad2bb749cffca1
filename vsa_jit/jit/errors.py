"""What goes wrong while kernels are compiled, kept or loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


class JitError(RuntimeError):
    """What all errors of run-time compilation are."""


class CompileError(JitError):
    """A kernel could not be compiled.

    Attributes:
        kernel: its label.
        first_error: the compiler's first error, or what became of the compiler.
        program: what compiles the files in ``folder``, or None where no compiler ran.
        folder: sources, job and the compiler's whole output, or None where no compiler ran.
    """

    LOG = "log.txt"

    def __init__(
        self, kernel: str, first_error: str, program: Sequence[str] | None = None, folder: Path | None = None
    ) -> None:
        self.kernel = kernel
        self.first_error = first_error
        self.program = program
        self.folder = folder
        lines = [f"{kernel} could not be compiled: {first_error}"]
        if self.command is not None:
            lines += [f"compile it again with: {self.command}", f"the compiler's whole output: {self.log}"]
        super().__init__("\n".join(lines))

    @property
    def command(self) -> str | None:
        """A shell command that compiles the same again."""
        if self.program is None or self.folder is None:
            return None
        return shlex.join([*self.program, str(self.folder)])

    @property
    def log(self) -> Path | None:
        """The file with the compiler's whole output."""
        return None if self.folder is None else self.folder / self.LOG

    def moved_to(self, folder: Path) -> CompileError:
        """The same error, after its folder was moved; the log names the new place."""
        old = str(self.folder)
        log = folder / self.LOG
        log.write_text(log.read_text(errors="replace").replace(old, str(folder)))
        return CompileError(self.kernel, self.first_error.replace(old, str(folder)), self.program, folder)


class CacheError(JitError):
    """The folder of compiled kernels, or an archive of them, cannot be used; the message says which and why."""


class SettingError(CacheError):
    """An environment variable names a folder that cannot be used: a mistake to fix, never a reason to fall back."""


class LoadError(JitError):
    """A compiled kernel could not be loaded."""


class Unavailable(JitError):
    """A part of the toolchain is missing or too old.

    Attributes:
        reason: what is wrong.
        fix: the command or step that fixes it, or None.
    """

    def __init__(self, reason: str, fix: str | None = None) -> None:
        self.reason = reason
        self.fix = fix
        super().__init__(reason if fix is None else f"{reason} ({fix})")


class NotWarmError(JitError):
    """A kernel that is not loaded was called while a CUDA graph is captured."""

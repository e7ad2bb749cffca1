"""What a user sees while kernels are compiled: one line, and how far it is, in a terminal and in a notebook."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from vsa_jit.text import counted

REFRESH_S = 0.2
BAR_WIDTH = 24

_logger = logging.getLogger("vsa_jit")


def is_interactive() -> bool:
    """Whether somebody looks on: a terminal, or a notebook."""
    if "ipykernel" in sys.modules:
        return True
    with contextlib.suppress(AttributeError, ValueError):
        return sys.stderr.isatty()
    return False


def _show(text: str) -> None:
    # A terminal may go away while a compiler runs: that is no reason to fail.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


class Compiling:
    """Says what is compiled, then shows a bar on standard error until it ends; logs at INFO where nobody looks on."""

    def __init__(self, labels: Sequence[str], target: str, compiler: str, seconds: int, where: Path | None) -> None:
        count = counted(len(labels), "kernel")
        kept = "not kept" if where is None else f"kept in {where}"
        self._line = f"compiling {count} ({', '.join(labels)}) for {target} with {compiler}, about {seconds} s, {kept}"
        self._total = len(labels)
        self._done = 0
        self._start = 0.0
        self._interactive = is_interactive()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Compiling:
        self._start = time.monotonic()
        if self._interactive:
            _show(f"vsa_jit: {self._line}\n")
            self._thread.start()
        else:
            _logger.info("%s", self._line)
        return self

    def advance(self) -> None:
        """One more kernel is ready."""
        self._done += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._interactive:
            self._ended.set()
            self._thread.join()
            _show(f"\r{self._bar()}\n")
        elif value is None:
            _logger.info("compiled in %.1f s", time.monotonic() - self._start)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_S):
            _show(f"\r{self._bar()}")

    def _bar(self) -> str:
        full = BAR_WIDTH * self._done // self._total
        elapsed = time.monotonic() - self._start
        return f"vsa_jit: [{'#' * full}{'.' * (BAR_WIDTH - full)}] {self._done}/{self._total}, {elapsed:.1f} s"

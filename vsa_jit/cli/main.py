"""The command line, ``vsa-jit``: one entry of ``COMMANDS`` for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from vsa_jit.cli import bench, cache, doctor, warmup
from vsa_jit.jit.errors import JitError


class Command(NamedTuple):
    """``run`` gives the exit code for the parsed arguments, or raises ``argparse.ArgumentError``."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "bench": Command(bench.SUMMARY, bench.add_arguments, bench.run),
    "warmup": Command(warmup.SUMMARY, warmup.add_arguments, warmup.run),
    "cache": Command(cache.SUMMARY, cache.add_arguments, cache.run),
    "doctor": Command(doctor.SUMMARY, doctor.add_arguments, doctor.run),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit code: 0, 1 where the command failed, 2 where an argument is wrong.
    """
    parser = _Parser(prog="vsa-jit", description="Video Sparse Attention, compiled for the GPU that is found.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.summary))
    try:
        args = parser.parse_args(argv)
        return COMMANDS[args.command].run(args)
    except argparse.ArgumentError as error:
        print(f"vsa-jit: error: {error}", file=sys.stderr)
        return 2
    except JitError as error:
        print(f"vsa-jit: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

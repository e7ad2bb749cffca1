"""The command ``vsa-jit cache``: what is kept of compiled kernels."""

from __future__ import annotations

import argparse
from pathlib import Path

from vsa_jit.jit.archive import export_entries, import_entries
from vsa_jit.jit.cache.entry import BadEntry
from vsa_jit.jit.cache.location import open_cache
from vsa_jit.text import counted

SUMMARY = "list, clear, export or import compiled kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="show every kernel that is kept")
    actions.add_parser("clear", help="remove them, and what failed compiles left")
    for name, text in (("export", "write them to an archive"), ("import", "check and take in an archive")):
        actions.add_parser(name, help=text).add_argument("file", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    cache = open_cache()
    if args.action == "list":
        entries = list(cache.entries())
        for folder, entry in entries:
            if isinstance(entry, BadEntry):
                print(f"{folder.parent.name}  {folder.name[:12]}  BAD: {entry}")
            else:
                spec = entry.spec
                print(f"{spec.arch}  {spec.key[:12]}  {spec.label}  {spec.compiler}  {entry.size / 1024:.0f} KiB")
        print(f"{counted(len(entries), 'kernel')} in {cache.root}")
    elif args.action == "clear":
        print(f"removed {counted(cache.clear(), 'kernel')} from {cache.root}")
    elif args.action == "export":
        print(f"wrote {counted(export_entries(cache, args.file), 'kernel')} to {args.file}")
    else:
        new, present = import_entries(cache, args.file)
        there = f"{present} {'was' if present == 1 else 'were'} there already"
        print(f"took {counted(new, 'kernel')} into {cache.root}; {there}")
    return 0

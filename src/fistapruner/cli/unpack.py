"""Restore the dense checkpoint of a packed one.

The packed folder is checked: its checksums before the first byte is written, masks and offsets of each operator as it
is written. A damaged folder leaves nothing behind.

  fistapruner unpack packed dense
"""

from __future__ import annotations

import argparse

SUMMARY = "restore the dense checkpoint of a packed one"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", metavar="MODEL", help="folder that 'fistapruner pack' wrote")
    parser.add_argument("out", metavar="OUT", help="folder to make")


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..sparse.pack import unpack

    print(f"dense checkpoint: {unpack(arguments.packed, arguments.out, progress=listener.tick)}")
    return 0

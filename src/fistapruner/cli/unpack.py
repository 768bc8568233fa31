"""Restore the dense checkpoint of a packed one.

The packed folder is checked: its checksums before the first byte is written, masks and offsets of each operator as it
is written. A damaged folder leaves nothing behind. Of a model with a low-rank part (prune --low-rank) the sparse
checkpoint comes back, with the part as OUT/adapter.

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
    from ..models.low_rank import FOLDER
    from ..packed.pack import unpack

    out = unpack(arguments.packed, arguments.out, progress=listener.tick)
    print(f"dense checkpoint: {out}")
    if (out / FOLDER).is_dir():
        print(f"its low-rank part: {out / FOLDER}")
    return 0

"""Restore the dense checkpoint of a packed one.

The whole packed folder is checked (checksums, masks, offsets) before the first byte is written.
"""

from __future__ import annotations

import argparse

SUMMARY = "restore the dense checkpoint of a packed one"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", help="folder that 'fistapruner pack' wrote")
    parser.add_argument("out", help="folder to make")


def run(arguments: argparse.Namespace) -> int:
    from ..sparse.pack import unpack

    print(f"dense checkpoint: {unpack(arguments.packed, arguments.out)}")
    return 0

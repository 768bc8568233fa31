"""Write a pruned checkpoint without its zeros.

Every pruned operator is stored as a bit mask (n:m patterns as a shorter index) and its kept values; the rest as it is.
The result loads in transformers after 'import fistapruner', and 'fistapruner unpack' brings the dense checkpoint back,
bit for bit unless values were rounded (--values bf16 of wider weights, --values int8). A low-rank part (prune
--low-rank) is copied as it is, and the packed model is the sum of both.

  fistapruner pack runs/first/model packed
  fistapruner pack runs/first/model packed-int8 --values int8
"""

from __future__ import annotations

import argparse

from .arguments import add_pickle_argument

SUMMARY = "write a pruned checkpoint without its zeros"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a pruned Hugging Face model")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--values",
        choices=["same", "bf16", "int8"],
        default="same",
        help="how kept values are stored (default: same, lossless)",
    )
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        metavar="COLUMNS",
        help="columns that share an int8 scale (default: the whole row)",
    )
    add_pickle_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..sparse.pack import pack

    settings = {"values": arguments.values, "group": arguments.group, "allow_pickle": arguments.allow_pickle}
    print(pack(arguments.checkpoint, arguments.out, **settings, progress=listener.tick))
    return 0

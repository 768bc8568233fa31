"""Write a pruned checkpoint without its zeros.

Every pruned operator is stored as a bit mask and its kept values (bf16, or int8); the rest as it is, but for embedding
and head, which become int8 with --values int8.
The result loads in transformers after 'import fistapruner', and 'fistapruner unpack' brings the dense checkpoint back,
bit for bit unless values were rounded (--values bf16 of wider weights, --values int8). A low-rank part (prune
--low-rank) is copied as it is, and the packed model is the sum of both.

  fistapruner pack runs/first packed
  fistapruner pack runs/first packed-int8 --values int8
"""

from __future__ import annotations

import argparse

from .arguments import add_pickle_argument

SUMMARY = "write a pruned checkpoint without its zeros"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN|MODEL", help="run directory, or folder of a pruned model")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--values",
        choices=["same", "bf16", "int8"],
        default="same",
        help="how kept values are stored (default: same, lossless, of bf16 values)",
    )
    add_pickle_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..packed.pack import pack

    settings = {"values": arguments.values, "allow_pickle": arguments.allow_pickle}
    print(pack(arguments.checkpoint, arguments.out, **settings, progress=listener.tick))
    return 0

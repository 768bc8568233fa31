"""The verbs pack, unpack and export."""

from __future__ import annotations

import argparse

from .arguments import add_common
from .progress import choose_listener


def configure_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN|MODEL", help="run directory, or folder of a pruned model")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--values", default="same", choices=("same", "bf16", "int8"), help="how kept values are stored (default: same)"
    )
    add_common(parser, quiet=False, as_json=False, code=False)


def pack(arguments: argparse.Namespace) -> int:
    """Write a pruned checkpoint without its zeros.

    Every pruned operator is stored as a bit mask and its kept values (bf16, or int8); the rest as it is, but for
    embedding and head, which become int8 with --values int8. The result loads in transformers after 'import
    fistapruner', and 'fistapruner unpack' brings the dense checkpoint back, bit for bit unless values were rounded
    (--values bf16 of wider weights, --values int8). A low-rank part is copied as it is, and the packed model is the sum
    of both.

      fistapruner pack runs/first packed
      fistapruner pack runs/first packed-int8 --values int8
    """
    listener = choose_listener(arguments)
    from ..packed.pack import pack as run_pack

    settings = {"values": arguments.values, "allow_pickle": arguments.allow_pickle}
    print(run_pack(arguments.checkpoint, arguments.out, **settings, progress=listener.tick))
    return 0


def configure_unpack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", metavar="MODEL", help="folder that 'fistapruner pack' wrote")
    parser.add_argument("out", metavar="OUT", help="folder to make")


def unpack(arguments: argparse.Namespace) -> int:
    """Restore the dense checkpoint of a packed one.

    The packed folder is checked: its checksums before the first byte is written, masks and offsets of each operator as
    it is written. A damaged folder leaves nothing behind. Of a model with a low-rank part the sparse checkpoint comes
    back, with the part as OUT/adapter.

      fistapruner unpack packed dense
    """
    listener = choose_listener(arguments)
    from ..packed.pack import unpack as run_unpack

    print(run_unpack(arguments.packed, arguments.out, progress=listener.tick))
    return 0


def configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run directory, or folder of a Hugging Face model")
    parser.add_argument("out", metavar="OUT", help="the .gguf file to write")
    parser.add_argument(
        "--values",
        default="bf16",
        choices=("bf16", "f16", "f32", "q8_0"),
        help="how matrices are stored (default: bf16; llama.cpp's own tool makes smaller ones of it)",
    )
    add_common(parser, quiet=False, as_json=False, code=False)


def export(arguments: argparse.Namespace) -> int:
    """Write a model as a GGUF file for llama.cpp.

    For Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi-3, Granite, OLMo 2 and Qwen 3 MoE; other models by llama.cpp's
    own convert_hf_to_gguf.py. A model with fewer channels or heads is faster there; zeros are stored like other
    weights.

      fistapruner export runs/small small.gguf
      fistapruner export runs/small small-q8.gguf --values q8_0
      fistapruner export ./pruned pruned.gguf
    """
    listener = choose_listener(arguments)
    from ..packed.export import export as run_export

    settings = {"allow_pickle": arguments.allow_pickle, "progress": listener.tick}
    print(run_export(arguments.model, arguments.out, arguments.values, **settings))
    return 0

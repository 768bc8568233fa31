"""Write the model of a run as a GGUF file, which llama.cpp runs.

For Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi-3, Granite, OLMo 2 and Qwen 3 MoE; other models by llama.cpp's own
convert_hf_to_gguf.py. A model with fewer channels or heads is faster there; zeros are stored like other weights.

  fistapruner export runs/small small.gguf
  fistapruner export runs/small small-q8.gguf --values q8_0
  fistapruner export ./pruned pruned.gguf
"""

from __future__ import annotations

import argparse

from ..runtime.show import size
from .arguments import add_pickle_argument

SUMMARY = "write a model as a GGUF file for llama.cpp"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run directory, or folder of a Hugging Face model")
    parser.add_argument("out", metavar="OUT", help="the .gguf file to write")
    parser.add_argument(
        "--values",
        choices=["bf16", "f16", "f32", "q8_0"],
        default="bf16",
        help="how matrices are stored (default: bf16; llama.cpp's own tool makes smaller ones of it)",
    )
    add_pickle_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..packed.export import export

    settings = {"allow_pickle": arguments.allow_pickle, "progress": listener.tick}
    out = export(arguments.model, arguments.out, arguments.values, **settings)
    print(f"{out}: {size(out.stat().st_size)}")
    return 0

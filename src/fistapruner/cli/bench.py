"""Measure speed, memory and size of a pruned model: dense, packed, packed int8.

Every variant runs in its own process, in interleaved rounds. The dense forms are the pruned checkpoint with its zeros,
since the speed of a dense product does not depend on its values. A run that removed channels or heads is measured as
the smaller model beside the dense one that it was. fp32 and bf16 are both measured, because which of them is faster
depends on the processor. Packed forms of a model with a low-rank part (prune --low-rank) compute the sum of both parts,
and their sizes count both.

Of a run directory the checkpoint is measured, and the figures are added to RUN/report.json, the page and the model
card. GGUF files, such as the dense model quantised, are measured beside it in llama.cpp, and evaluated on the text that
the run was evaluated on.

  fistapruner bench runs/first
  fistapruner bench runs/first --gguf dense-Q4_K_M.gguf dense-Q8_0.gguf
  fistapruner bench packed-folder --batch 4 --json
"""

from __future__ import annotations

import argparse

from ..runtime.show import finite
from .arguments import add_json_argument, add_pickle_argument

SUMMARY = "measure tokens per second, memory and size of a pruned model"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="RUN|MODEL", help="run directory, or folder of a pruned model, ordinary or packed"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default: 1)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens in a run (default: 128)")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's, within a CPU quota)")
    parser.add_argument(
        "--gguf", nargs="+", default=[], metavar="FILE", help="GGUF files to measure beside the model, in llama.cpp"
    )
    add_pickle_argument(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    import json

    from ..measure.run import bench_run
    from ..measure.speed import Speeds, bench, record
    from ..reporting.measured import QUANTISE_FIRST
    from ..runs.listener import Listener
    from ..runs.records import is_run
    from .progress import PlainListener

    names = ("batch", "prompt", "tokens", "runs", "threads", "gguf", "allow_pickle")
    settings = {name: getattr(arguments, name) for name in names}
    listener = Listener() if arguments.json else PlainListener()
    if is_run(arguments.model):
        speeds = bench_run(arguments.model, listener=listener, **settings)
    else:
        speeds = Speeds(bench(arguments.model, tick=listener.tick, **settings))
    found = record(speeds)
    if arguments.json:
        print(json.dumps(finite(found), indent=2))
        return 0
    print(speeds)
    print()
    print(found["sentence"])
    print(QUANTISE_FIRST)
    return 0

"""Train a pruned model on preference pairs, with every zero kept.

MODEL is a run directory of prune, recover or align, or a checkpoint with zeros. DATA is a .jsonl file in the format of
TRL: chosen, rejected and perhaps prompt, each a text or a list of messages. One tenth of the prompts is held out, to
choose the step that is kept, and one tenth measures the result. The finished checkpoint is in RUN/model.

  fistapruner align runs/recovered --data pairs.jsonl --out runs/aligned
  fistapruner align runs/recovered --data pairs.jsonl --out runs/both --loss geometric --weights held-out
  fistapruner align runs/recovered --data pairs.jsonl --out runs/kept --anchor 0.1
  fistapruner align ./pruned --dense meta-llama/Llama-3.2-1B --data pairs.jsonl --out runs/mine --parameters full
"""

from __future__ import annotations

import argparse
import shlex
import sys

from ..recipes.align_settings import AlignRecipe
from .arguments import (
    add_evaluation_of_result,
    add_output_arguments,
    add_training_arguments,
    add_trust_arguments,
    align_settings,
)

SUMMARY = "train a pruned model on preference pairs, every zero kept"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run directory, or a checkpoint with zeros")
    parser.add_argument(
        "--out", required=True, metavar="RUN", help="run directory; an unfinished run of the same recipe is continued"
    )
    parser.add_argument("--dense", metavar="MODEL", help="the dense model (default: the one that was pruned)")
    add_training_arguments(parser, AlignRecipe)
    add_evaluation_of_result(parser)
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.align import align
    from .progress import choose_listener
    from .prune import show

    report = align(
        arguments.model,
        arguments.out,
        recipe=AlignRecipe.build(align_settings(arguments)),
        dense=arguments.dense,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
        evaluate=None if arguments.evaluate == "none" else arguments.evaluate,
        evaluate_windows=arguments.evaluate_windows,
        listener=choose_listener(quiet=arguments.quiet or arguments.json),
        command=shlex.join(["fistapruner", *sys.argv[1:]]),
    )
    show(report, arguments.out, as_json=arguments.json)
    return 1 if any(warning.startswith("training stopped") for warning in report.warnings) else 0

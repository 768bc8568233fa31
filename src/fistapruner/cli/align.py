"""Train a pruned model on preference pairs, with every zero kept.

MODEL is a run directory of prune, recover or align, or a pruned checkpoint. DATA is a .jsonl file in the format of
TRL: chosen, rejected and perhaps prompt, each a text or a list of messages. One tenth of the prompts is held out, to
choose the step that is kept, and one tenth measures the result. The finished checkpoint is in RUN/model.

  fistapruner align runs/recovered --data pairs.jsonl --out runs/aligned
  fistapruner align runs/recovered --data pairs.jsonl --out runs/both --loss geometric --weights held-out
  fistapruner align runs/recovered --data pairs.jsonl --out runs/kept --anchor 0.1
  fistapruner align ./pruned --dense meta-llama/Llama-3.2-1B --data pairs.jsonl --out runs/mine --parameters full
"""

from __future__ import annotations

import argparse

from ..settings.align_settings import AlignRecipe
from .arguments import (
    add_dense_argument,
    add_evaluation_of_result,
    add_model_and_run,
    add_output_arguments,
    add_training_arguments,
    add_trust_arguments,
    read_recipe,
)
from .recover import train_or_plan

SUMMARY = "train a pruned model on preference pairs, every zero kept"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_and_run(parser, "run directory, or a pruned checkpoint")
    add_dense_argument(parser)
    parser.add_argument("--plan", action="store_true", help="print memory, disk and time, and exit")
    add_training_arguments(parser, AlignRecipe)
    add_evaluation_of_result(parser)
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..training.run import align, plan_recovery

    return train_or_plan(arguments, read_recipe(arguments, AlignRecipe), listener, align, plan_recovery)

"""Predict what pruning a model needs, without doing it.

Memory, disk and time are predicted from the model's sizes and a short measurement, with the choices that a run would
make to fit the memory. A run makes the same plan before its first layer; its report compares it with what was measured.
A hub model is downloaded, and a GGUF file converted, first, as for a run: the time is measured on it. Gated models:
'hf auth login'. 'fistapruner recover --plan' and
'align --plan' do the same for training.

  fistapruner plan smollm2 --sparsity 50%
  fistapruner plan meta-llama/Llama-3.1-8B --memory-limit 12GiB --method wanda --calibration c4
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from ..runtime.formatting import align_columns, finite, size
from ..settings.settings import Recipe
from .arguments import (
    add_json_argument,
    add_recipe_arguments,
    add_trust_arguments,
    read_recipe,
    trust,
)

SUMMARY = "predict memory, disk and time of a run"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, local folder, run directory, GGUF file, or smollm2",
    )
    parser.add_argument(
        "--out", default=".", metavar="RUN", help="run directory, whose disk must have the space (default: here)"
    )
    add_json_argument(parser)
    add_recipe_arguments(parser)
    add_trust_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.plan import plan_model

    recipe = read_recipe(arguments, Recipe)
    plan = plan_model(arguments.model, recipe, arguments.out, **trust(arguments))
    if arguments.json:
        rows = [row.model_dump(mode="json", exclude={"actual"}) for row in plan.rows]
        print(json.dumps(finite({"rows": rows, "stages": dict(plan.stages), "says": list(plan.says)})))
        return 0
    for sentence in plan.says:
        print(sentence)
    _print_stages(plan.stages)
    return 0


def _print_stages(stages: Mapping[str, int]) -> None:
    """Print the memory of every stage, the largest first."""
    ordered = sorted(stages.items(), key=lambda item: -item[1])
    print(align_columns([("", size(nbytes), stage) for stage, nbytes in ordered], right=(1,)))

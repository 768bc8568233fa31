"""Predict what pruning a model needs, without pruning it.

Memory, disk and time are predicted from the model's sizes and a short measurement, with the choices that a run would
make to fit the memory. A run makes the same plan before its first layer; its report compares it with what was measured.

  fistapruner plan smollm2 --sparsity 50%
  fistapruner plan meta-llama/Llama-3.1-8B --memory-limit 12GiB --method wanda
"""

from __future__ import annotations

import argparse
import json

from .arguments import add_recipe_arguments, add_trust_arguments, recipe_settings

SUMMARY = "predict memory, disk and time of a run"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, GGUF file, or smollm2")
    parser.add_argument(
        "--out", default=".", metavar="RUN", help="run directory, whose disk must have the space (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")
    add_recipe_arguments(parser)
    add_trust_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.plan import plan_model
    from ..recipes.settings import Recipe
    from ..runtime.formatting import align_columns, size

    recipe = Recipe.build(recipe_settings(arguments))
    plan = plan_model(
        arguments.model,
        recipe,
        arguments.out,
        allow_pickle=arguments.allow_pickle,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        rows = [row.model_dump(mode="json", exclude={"actual"}) for row in plan.rows]
        print(json.dumps({"rows": rows, "stages": dict(plan.stages), "says": list(plan.says)}))
        return 0
    for sentence in plan.says:
        print(sentence)
    stages = sorted(plan.stages.items(), key=lambda item: -item[1])
    print(align_columns([("", size(nbytes), stage) for stage, nbytes in stages], right=(1,)))
    return 0

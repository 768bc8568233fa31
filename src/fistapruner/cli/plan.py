"""Predict what pruning, recovering or aligning a model needs, without doing it.

Memory, disk and time are predicted from the model's sizes and a short measurement, with the choices that a run would
make to fit the memory. A run makes the same plan before its first layer; its report compares it with what was measured.
A hub model is downloaded, and a GGUF file converted, first, as for a run: the time is measured on it. Gated models:
'hf auth login'. With --recover or --align MODEL is a run or a pruned checkpoint, and the settings are those of that
verb.

  fistapruner plan smollm2 --sparsity 50%
  fistapruner plan meta-llama/Llama-3.1-8B --memory-limit 12GiB --method wanda --calibration c4
  fistapruner plan runs/first --recover --tokens 1M --memory-limit 16GiB
  fistapruner plan runs/first --align --data pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from ..errors import FistaPrunerError
from ..recipes.align_settings import AlignRecipe
from ..recipes.recover_settings import RecoverRecipe
from ..recipes.settings import Recipe
from ..runtime.formatting import align_columns, duration, finite, size
from .arguments import (
    add_json_argument,
    add_recipe_arguments,
    add_training_beside,
    add_trust_arguments,
    read_recipe,
    refuse_other_flags,
    trust,
)

SUMMARY = "predict memory, disk and time of a run"

TRAINING = {
    RecoverRecipe: "a setting of recovery, planned with --recover",
    AlignRecipe: "a setting of alignment, planned with --align",
}
"""Why flags of these recipes are refused where another is planned."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, local folder, run directory, GGUF file, or smollm2",
    )
    parser.add_argument(
        "--out", default=".", metavar="RUN", help="run directory, whose disk must have the space (default: here)"
    )
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument(
        "--recover", action="store_true", help="plan the recovery of MODEL, which is pruned, with each form"
    )
    verbs.add_argument(
        "--align", action="store_true", help="plan the alignment of MODEL, which is pruned, with each form"
    )
    parser.add_argument(
        "--dense",
        metavar="MODEL",
        help="with --recover or --align: the dense model (default: the one that was pruned)",
    )
    add_json_argument(parser)
    add_recipe_arguments(parser)
    add_training_beside(parser)
    add_trust_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.plan import plan_model

    if arguments.recover or arguments.align:
        return _training(arguments)
    if arguments.dense is not None:
        raise FistaPrunerError("--dense: the dense model of a run that trains, planned with --recover or --align")
    refuse_other_flags(arguments, Recipe, TRAINING)
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


def _training(arguments: argparse.Namespace) -> int:
    """Plan a recovery or an alignment: one line for each form, then what a run would choose."""
    from ..pipeline.plan_training import plan_alignment_of, plan_recovery_of

    pruning = f"a setting of pruning, and --{'recover' if arguments.recover else 'align'} plans a run that trains"
    if arguments.quality:
        raise FistaPrunerError(f"--quality: {pruning}")
    common = {"dense": arguments.dense, **trust(arguments)}
    recipe = RecoverRecipe if arguments.recover else AlignRecipe
    refuse_other_flags(arguments, recipe, {Recipe: pruning, **TRAINING})
    model, out = arguments.model, arguments.out
    if arguments.recover:
        chosen, forms = plan_recovery_of(model, read_recipe(arguments, RecoverRecipe), out, **common)
    else:
        chosen, forms = plan_alignment_of(model, read_recipe(arguments, AlignRecipe), out, **common)
    says = chosen.says if chosen.fits else [str(chosen.refusal)]
    if arguments.json:
        print(
            json.dumps(finite({"says": says, "chosen": chosen.to_json(), "forms": [form.to_json() for form in forms]}))
        )
        return 0 if chosen.fits else 2
    rows = [("form", "memory", "disk", "a step", "in all", "")]
    for form in forms:
        needs, choice = form.needs, form.choice
        rows.append(
            (
                form.parameters,
                size(needs.peak(choice)),
                size(sum(needs.disk(choice).values())),
                duration(needs.step_seconds(choice)),
                duration(needs.seconds_in_all(choice)),
                ", ".join(choice.words()) if form.fits else "does not fit",
            )
        )
    print(align_columns(rows, right=(1, 2, 3, 4)))
    print(f"\n{chosen.parameters}, by stage:")
    _print_stages(chosen.stages)
    if not chosen.fits:
        raise FistaPrunerError(str(chosen.refusal))
    for sentence in says:
        print(sentence)
    return 0


def _print_stages(stages: Mapping[str, int]) -> None:
    """Print the memory of every stage, the largest first."""
    ordered = sorted(stages.items(), key=lambda item: -item[1])
    print(align_columns([("", size(nbytes), stage) for stage, nbytes in ordered], right=(1,)))

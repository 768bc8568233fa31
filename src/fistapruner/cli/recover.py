"""Train a pruned model to win back what pruning lost, with every zero kept.

MODEL is a run directory of prune or recover, or a pruned checkpoint. The dense model and the training text are
those of the run unless --dense and --data say otherwise. Only surviving weights change, so the sparsity pattern stays
bit for bit. Held-out documents decide which step is kept. The finished checkpoint is in RUN/model.

  fistapruner recover runs/first --out runs/recovered
  fistapruner recover runs/first --out runs/recovered-c4 --tokens 1M --data c4
  fistapruner recover ./pruned --dense meta-llama/Llama-3.2-1B --data text.jsonl --out runs/mine --parameters full
  fistapruner recover runs/first --out runs/spp --recipe spp --data alpaca.jsonl
  fistapruner recover runs/first --out runs/tasks --data sql=sql.jsonl --data chat=chat.jsonl --per-round 1

An adapter that was trained elsewhere, masked; OUT is then a plain model folder:

  fistapruner recover runs/first --merge adapter --out merged        a PEFT adapter (LoRA, HiRA, IA3)
"""

from __future__ import annotations

import argparse
import json

from ..errors import FistaPrunerError
from ..recipes.recover_settings import RecoverRecipe
from ..runtime.formatting import finite
from .arguments import (
    add_dense_argument,
    add_evaluation_of_result,
    add_model_and_run,
    add_output_arguments,
    add_training_arguments,
    add_trust_arguments,
    given_flags,
    read_recipe,
    run_options,
    this_command,
    trust,
)
from .prune import show

SUMMARY = "train a pruned model, every zero kept"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_and_run(parser, "run directory, or a pruned checkpoint")
    parser.add_argument("--merge", metavar="ADAPTER", help="merge a PEFT adapter, every zero kept; nothing is trained")
    add_dense_argument(parser)
    parser.add_argument("--plan", action="store_true", help="print memory, disk and time, and exit")
    add_training_arguments(parser, RecoverRecipe)
    add_evaluation_of_result(parser)
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..models.source import Permissions
    from ..training.adapters import merge_adapter
    from ..training.run import plan_recovery, recover

    if arguments.merge is not None:
        _refuse_training_flags(arguments)
        merged = merge_adapter(
            arguments.model, arguments.merge, arguments.out, command=this_command(), **trust(arguments)
        )
        print(json.dumps(merged.to_json()) if arguments.json else merged)
        return 0
    recipe = read_recipe(arguments, RecoverRecipe)
    if arguments.plan:
        allowed = Permissions(**trust(arguments))
        plan = plan_recovery(arguments.model, recipe, arguments.out, dense=arguments.dense, permissions=allowed)
        print(json.dumps(finite(plan.to_json())) if arguments.json else plan)
        if plan.refusal:
            raise FistaPrunerError(plan.refusal)
        return 0
    report = recover(
        arguments.model,
        arguments.out,
        recipe=recipe,
        dense=arguments.dense,
        **run_options(arguments, listener),
    )
    return show(report, arguments.out, as_json=arguments.json)


def _refuse_training_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that have no effect where nothing is trained, and an empty --merge.

    Raises:
        FistaPrunerError: names the first one.
    """
    given = given_flags(arguments, RecoverRecipe)
    for name in ("recipe", "dense", "evaluate", "evaluate_windows"):
        if getattr(arguments, name) not in (None, "auto"):
            given.append(f"--{name.replace('_', '-')}")
    if not arguments.merge:
        raise FistaPrunerError("--merge '' is empty: name the folder of an adapter")
    for flag in given:
        raise FistaPrunerError(f"{flag}: --merge trains and evaluates nothing, so it has no effect; leave it out")

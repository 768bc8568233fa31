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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import FistaPrunerError
from ..runtime.show import finite
from ..settings.recover_settings import RecoverRecipe
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

if TYPE_CHECKING:
    from ..runs.listener import Listener
    from ..runs.records import Report
    from ..training.plan import Plan

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
    from ..training.adapters import merge_adapter
    from ..training.run import plan_recovery, recover

    if arguments.merge is not None:
        _refuse_training_flags(arguments)
        merged = merge_adapter(
            arguments.model, arguments.merge, arguments.out, command=this_command(), **trust(arguments)
        )
        print(json.dumps(merged.to_json()) if arguments.json else merged)
        return 0
    return train_or_plan(arguments, read_recipe(arguments, RecoverRecipe), listener, recover, plan_recovery)


def train_or_plan(
    arguments: argparse.Namespace,
    recipe: Any,
    listener: Listener,
    train: Callable[..., Report],
    plan: Callable[..., Plan],
) -> int:
    """Do what recover and align do: train, or print the plan."""
    from ..models.source import Permissions

    model, out, dense = arguments.model, arguments.out, arguments.dense
    if arguments.plan:
        planned = plan(model, recipe, out, dense=dense, permissions=Permissions(**trust(arguments)))
        print(json.dumps(finite(planned.to_json())) if arguments.json else planned)
        if planned.refusal:
            raise FistaPrunerError(planned.refusal)
        return 0
    report = train(model, out, recipe=recipe, dense=dense, **run_options(arguments, listener))
    return show(report, out, as_json=arguments.json)


def _refuse_training_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that have no effect where nothing is trained, and an empty --merge.

    Raises:
        FistaPrunerError: names the first one.
    """
    given = given_flags(arguments, RecoverRecipe) + ["--set"] * bool(arguments.set)
    for name in ("recipe", "dense", "evaluate", "evaluate_windows"):
        if getattr(arguments, name) not in (None, "auto"):
            given.append(f"--{name.replace('_', '-')}")
    if not arguments.merge:
        raise FistaPrunerError("--merge '' is empty: name the folder of an adapter")
    for flag in given:
        raise FistaPrunerError(f"{flag}: --merge trains and evaluates nothing, so it has no effect; leave it out")

"""Train a pruned model to win back what pruning lost, with every zero kept.

MODEL is a run directory of prune or recover, or a pruned checkpoint. The dense model and the training text are
those of the run unless --dense and --data say otherwise. Only surviving weights change, so the sparsity pattern stays
bit for bit. Held-out documents decide which step is kept. The finished checkpoint is in RUN/model.

  fistapruner recover runs/first --out runs/recovered
  fistapruner recover runs/first --out runs/recovered-c4 --tokens 1M --data c4
  fistapruner recover ./pruned --dense meta-llama/Llama-3.2-1B --data text.jsonl --out runs/mine --parameters full
  fistapruner recover runs/first --out runs/spp --recipe spp --data alpaca.jsonl
  fistapruner recover runs/first --out runs/tasks --data sql=sql.jsonl --data chat=chat.jsonl --per-round 1

Two more ways to a checkpoint with the same zeros, without training here; OUT is then a plain model folder:

  fistapruner recover runs/first --merge adapter --out merged        a PEFT adapter (LoRA, HiRA, IA3), masked
  fistapruner recover runs/first --replay steps.jsonl --out again    the journal of a run with mezo or subzero
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

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
    recipe_settings,
    run_options,
    this_command,
    trust,
)
from .prune import show

if TYPE_CHECKING:
    from ..runs.listener import Listener

SUMMARY = "train a pruned model, every zero kept"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_and_run(parser, "run directory, or a pruned checkpoint")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--merge", metavar="ADAPTER", help="merge a PEFT adapter, every zero kept; nothing is trained")
    others.add_argument(
        "--replay", metavar="STEPS", help="take the steps of a steps.jsonl of mezo or subzero again; nothing is trained"
    )
    add_dense_argument(parser)
    add_training_arguments(parser, RecoverRecipe)
    add_evaluation_of_result(parser)
    add_trust_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from .progress import choose_listener

    listener = choose_listener(arguments)
    from ..pipeline.recover import recover

    if arguments.merge is not None or arguments.replay is not None:
        return _without_training(arguments, listener)
    report = recover(
        arguments.model,
        arguments.out,
        recipe=read_recipe(arguments, RecoverRecipe),
        dense=arguments.dense,
        **run_options(arguments, listener),
    )
    return show(report, arguments.out, as_json=arguments.json)


def _without_training(arguments: argparse.Namespace, listener: Listener) -> int:
    """Merge an adapter or replay a journal."""
    from ..pipeline.merge import merge_adapter
    from ..pipeline.replay import replay

    _refuse_training_flags(arguments)
    common = {"command": this_command(), **trust(arguments)}
    if arguments.replay is not None:
        device = recipe_settings(arguments, RecoverRecipe).get("execution", {}).get("device") or "auto"
        out = replay(
            arguments.model,
            arguments.replay,
            arguments.out,
            device=device,
            say=listener.say,
            **common,
        )
        print(json.dumps({"out": str(out)}) if arguments.json else out)
    else:
        report = merge_adapter(arguments.model, arguments.merge, arguments.out, **common)
        print(json.dumps(finite(report.to_json())) if arguments.json else report)
    return 0


def _refuse_training_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that have no effect where nothing is trained, and an empty --merge or --replay.

    Raises:
        FistaPrunerError: names the first one.
    """
    given = given_flags(arguments, RecoverRecipe)
    for name in ("recipe", "dense", "evaluate", "evaluate_windows"):
        if getattr(arguments, name) not in (None, "auto"):
            given.append(f"--{name.replace('_', '-')}")
    way, what = ("--replay", "a steps.jsonl") if arguments.merge is None else ("--merge", "the folder of an adapter")
    if "" in (arguments.merge, arguments.replay):
        raise FistaPrunerError(f"{way} '' is empty: name {what}")
    for flag in given:
        if (way, flag) != ("--replay", "--device"):
            raise FistaPrunerError(f"{flag}: {way} trains and evaluates nothing, so it has no effect; leave it out")

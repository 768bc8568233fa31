"""Align a pruned model: train it on preference pairs, with every zero kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..evaluation.preferences import accuracy_error, preference_figures
from ..execution.align_context import AlignContext
from ..models.source import Permissions
from ..recipes.align_settings import PREFERENCE_LOSSES, AlignRecipe
from ..reporting.advice import length_setting
from ..runs.align_directory import AlignDirectory
from ..runs.arguments import checked_arguments
from ..runs.listener import Listener
from ..runs.records import Report
from ..runs.training_records import Alignment
from ..runtime.numerics import mean_and_error
from ..tuning.preference import accuracy, margins_of
from ..tuning.trained import Trained
from .prepare_align import make_text, prepare
from .result import add_warning
from .training import TrainingVerb, train
from .training_inputs import TrainingRequest

LOWEST_REWARD = -1.0
"""Mean reward of the chosen answers below which a warning says that they have become less likely."""

RESULT = "aligned"


@checked_arguments
def align(
    model: str | Path,
    out: str | Path,
    *,
    recipe: AlignRecipe | Mapping[str, Any] | str | Path | None = None,
    dense: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    evaluate: str | Path | None = "auto",
    evaluate_windows: int | None = None,
    **settings: Any,
) -> Report:
    """Train a pruned model on preference pairs, with every zero kept.

    Args:
        model: run directory of ``fistapruner.prune``, ``fistapruner.recover`` or of this function, or a
            pruned checkpoint.
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings: an AlignRecipe, a mapping, or the name of a YAML file; None is the default recipe.
        dense: the dense model; None takes the one that the run or the checkpoint's record names.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: receives progress.
        command: shell line that reproduces the run, for the report; None leaves it out.
        evaluate: text for the perplexity, as ``fistapruner.evaluate`` takes it; ``auto`` is that of the input's
            run, or ``python`` where a checkpoint goes in that is of no run; None evaluates nothing.
        evaluate_windows: only its first so many windows.
        **settings: single settings over the recipe, as in a recipe file: ``data={"pairs": "pairs.jsonl"}``,
            ``loss="harmonic"``, ``beta=0.05``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    recipe = AlignRecipe.of(recipe).changed(settings)
    recipe.refuse_idle()
    request = TrainingRequest.of(
        model,
        recipe,
        dense=dense,
        permissions=Permissions(allow_pickle, trust_remote_code),
        command=command,
        evaluate=evaluate,
        evaluate_windows=evaluate_windows,
    )
    return train(ALIGN, out, request, listener)


def add_results(context: AlignContext, trained: Trained, report: Report, listener: Listener) -> None:
    """Measure what the trained model prefers on the test pairs, and add it to the report."""
    text = context.text
    listener.say(f"log-probabilities of {len(text.windows('test')) // 2} test pairs under the aligned model")
    own = context.test_log_probabilities(trained)
    with context.passes() as store:
        references = context.references(store, listener)
    if context.decision.dense is not None and "dense" not in references:
        gone = f"no preferences of the dense model, which is not at {context.decision.dense} any more"
        add_warning(report, gone, listener)
    windows = text.windows("test")
    places = [window // 2 for window in windows[::2]]
    mixture = context.mixture(references)
    tokens = text.marks[windows].sum(1).view(-1, 2)
    models: dict[str, Tensor] = {name: references[name][places] for name in ("dense", "pruned") if name in references}
    rewards = context.recipe.beta * (own - mixture.mixed[places])
    margins = margins_of(rewards)
    weights = mixture.weights[:, context.trained_pairs].mean(1).tolist()
    used = context.recipe.resolved_references
    chosen, rejected = rewards.mean(0).tolist()
    report.alignment = Alignment(
        pairs=len(text.windows("trained")) // 2,
        held_out_pairs=len(text.windows("held_out")) // 2,
        test_pairs=len(places),
        left_out=next(iter(text.facts["tasks"].values()))["too_long"],
        references=dict(zip(mixture.names, weights, strict=True)) if used else {},
        test=preference_figures({**models, RESULT: own}, tokens, RESULT),
        reward_accuracy=float(accuracy(margins)),
        reward_accuracy_error=accuracy_error(margins),
        margin=float(margins.mean()),
        margin_error=mean_and_error(margins)[1],
        chosen_reward=chosen,
        chosen_reward_error=mean_and_error(rewards[:, 0])[1],
        rejected_reward=rejected,
        rejected_reward_error=mean_and_error(rewards[:, 1])[1],
    )
    if chosen < LOWEST_REWARD:
        report.warnings.append(_less_likely(chosen, context.recipe, length_setting(report)))


def _less_likely(reward: float, recipe: AlignRecipe, length: str) -> str:
    """Say what to do about chosen answers that have become much less likely, which depends on the loss."""
    than, more = "the model that went in", f"or fewer {length}"
    if recipe.loss in PREFERENCE_LOSSES:
        than, more = f"the references, as {recipe.loss} may do", "a larger --beta, or --anchor 0.1"
    return (
        f"the mean reward of the chosen answers is {reward:.2f}: they have become much less likely than under {than}; "
        f"try a lower --lr, {more}"
    )


ALIGN = TrainingVerb(
    AlignRecipe, AlignDirectory, AlignContext, prepare, make_text, "the pairs have changed", add_results
)
"""What alignment does in its own way."""

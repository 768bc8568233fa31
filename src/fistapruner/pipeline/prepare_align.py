"""Prepare an alignment run: check pairs and models, plan, record it all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..activations.check import check_model
from ..calibration.pairs import Pair, Pairs, pair_order, read_pairs, tokenise_pairs
from ..errors import FistaPrunerError
from ..execution.align_context import reference_windows
from ..execution.context import open_model
from ..planning.training_task import Task
from ..recipes.align_settings import AlignRecipe
from ..runs.directory import RunDirectory
from ..runs.listener import Listener
from ..runs.training_directory import TrainingDirectory
from ..runtime.files import sha256_file
from ..tuning.pair_objective import DIVERGENCE, LENGTHS, LIKELIHOOD
from ..tuning.teacher import TOP
from .prepare_training import choose_plan, describe_text, record
from .training_inputs import TrainingInputs, TrainingRequest, check_training_inputs, find_input

LONGEST = "data.max_length"
"""How messages call the tokens of prompt and answer."""


def prepare(run: TrainingDirectory, request: TrainingRequest[AlignRecipe], listener: Listener) -> None:
    """Check the input, then decide and record what the whole run will use.

    Args:
        run: the run directory, made.
        request: what to do.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named.
    """
    pairs, says = check_pairs(request.recipe)  # before anything is loaded
    inputs = check_inputs(run, request, listener)
    for sentence in says:
        inputs.warn(listener, sentence)
    text = write_pairs(run, request, inputs, pairs, listener)
    recipe, task = inputs.recipe, task_of(run.folder, inputs, text)
    plan = choose_plan(task, listener)
    sources = {str(recipe.data.pairs): sha256_file(Path(str(recipe.data.pairs)))}
    facts = describe_text(text, Path(str(recipe.data.pairs)).name, text.tokens.shape[1])
    record(run, request, inputs, text, plan, task.steps, sources, facts)


def check_pairs(recipe: AlignRecipe) -> tuple[list[Pair], list[str]]:
    """Read the file of pairs, and what is to be said of it.

    Raises:
        FistaPrunerError: no file is named, or it has a fault.
    """
    if recipe.data.pairs is None:
        raise FistaPrunerError("say what to train on with --data: a .jsonl file of preference pairs")
    return read_pairs(recipe.data.pairs, recipe.data.prompt_ends)


def check_inputs(
    run: TrainingDirectory, request: TrainingRequest[AlignRecipe], listener: Listener
) -> TrainingInputs[AlignRecipe]:
    """Check everything but the pairs that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """
    inputs = check_training_inputs(run, request, listener, resolve, (request.recipe.data.max_length, LONGEST))
    references = [
        name if name in ("pruned", "dense") else _find_reference(name, inputs, request)
        for name in inputs.recipe.references
    ]
    return replace(inputs, recipe=inputs.recipe.model_copy(update={"references": tuple(references)}))


def _find_reference(name: str, inputs: TrainingInputs[AlignRecipe], request: TrainingRequest[AlignRecipe]) -> str:
    """Find another reference model; return its folder.

    Raises:
        FistaPrunerError: no model, or one of another tokenizer or vocabulary.
    """
    try:
        source = find_input(name, request.permissions, verb="align --references")
    except FistaPrunerError as error:
        raise FistaPrunerError(f"--references: {error}") from None
    model = open_model(source, inputs.recipe)
    if (
        model.vocabulary != inputs.model.vocabulary
        or source.tokenizer().get_vocab() != inputs.source.tokenizer().get_vocab()
    ):
        raise FistaPrunerError(
            f"--references {name}: its tokens are not those of {inputs.source.folder}; name models that share its "
            "tokenizer"
        )
    check_model(model)
    return str(source.folder.absolute())


def resolve(recipe: AlignRecipe, origin: RunDirectory | None) -> AlignRecipe:
    """Return the recipe with ``auto`` resolved and absolute paths."""
    changes = {
        "references": recipe.resolved_references,
        "shares": recipe.resolved_shares,
        "anchor": recipe.resolved_anchor,
    }
    return recipe.with_absolute_files().model_copy(update=changes)


def cut_pairs(inputs: TrainingInputs[AlignRecipe], pairs: list[Pair], listener: Listener) -> Pairs:
    """Tokenise the pairs, and split them.

    Raises:
        FistaPrunerError: the tokenizer refuses a text, or too few pairs are left.
    """
    warn = partial(inputs.warn, listener)
    text = tokenise_pairs(pairs, inputs.recipe.data, inputs.tokenizer, inputs.seqlen, warn)
    counts = [len(text.windows(side)) // 2 for side in ("trained", "held_out", "test")]
    listener.say(f"{counts[0]} pairs to train on, {counts[1]} held out, {counts[2]} to test")
    inputs.model.check_tokens(text.tokens)
    return text


def write_pairs(
    run: TrainingDirectory,
    request: TrainingRequest[AlignRecipe],
    inputs: TrainingInputs[AlignRecipe],
    pairs: list[Pair],
    listener: Listener,
) -> Pairs:
    """Tokenise the pairs, and store them in the run directory."""
    text, data = cut_pairs(inputs, pairs, listener), inputs.recipe.data
    run.write_text(text, json.dumps(data.model_dump(mode="json")))
    return text


def make_text(run: TrainingDirectory, request: TrainingRequest[AlignRecipe], listener: Listener) -> None:
    """Tokenise the pairs of a begun run again.

    Raises:
        FistaPrunerError: the file has a fault, or is gone.
    """
    pairs, _ = check_pairs(request.recipe)
    inputs = check_inputs(run, request, listener)
    write_pairs(run, request, inputs, pairs, listener)


def task_of(out: Path, inputs: TrainingInputs[AlignRecipe], text: Pairs) -> Task:
    """Return what is to be planned, for a run in ``out``."""
    recipe, anchored = inputs.recipe, inputs.recipe.resolved_anchor > 0
    trained = len(text.windows("trained")) // 2
    steps = recipe.steps or math.ceil(trained * recipe.epochs / recipe.pairs_per_step)
    order = pair_order(text, steps, recipe.pairs_per_step, recipe.data.seed)
    longest, most = text.lengths[order].amax(1), text.tokens.shape[1]
    known = {"pruned", *recipe.resolved_references, *(() if inputs.dense is None else ("dense",))}
    references = (len(reference_windows(name, recipe, text, order)) for name in sorted(known))
    passed = (longest / LENGTHS).ceil() * LENGTHS
    return Task(
        inputs.model,
        inputs.layout,
        inputs.dense if anchored else None,
        recipe,
        inputs.survivors,
        most,
        out,
        DIVERGENCE if anchored else LIKELIHOOD,
        TOP.get(recipe.teacher),
        steps=steps,
        step_windows=recipe.step_windows,
        windows=2 * trained,
        held_out=len(text.windows("held_out")),
        test=len(text.windows("test")),
        fill=float(passed.clamp_max(most).mean()) / most,
        together=2,
        answers=(*references, len(text.windows("test"))),
    )

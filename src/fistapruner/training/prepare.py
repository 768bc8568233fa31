"""Prepare a run that trains: check the input, cut the text, plan, and record it all in ``run.json``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError
from ..execution.context import open_model
from ..execution.executors import default_threads
from ..measure.data import evaluation_documents
from ..models.whole import load_whole, require_whole, whole_bytes
from ..papers.mamf import Mixture
from ..passes.check import check_model
from ..pipeline.find_model import absolute
from ..pipeline.record import common_fields, numerics_of
from ..runs.decision import TrainingDecision, TrainingRecord
from ..runs.directory import RunDirectory
from ..runs.identity import stamps
from ..runs.listener import Listener
from ..runs.records import CalibrationFacts
from ..runs.training_directory import TrainingDirectory
from ..runs.training_records import Recovery
from ..runs.training_runs import input_run
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.formatting import count
from ..runtime.memory import release_memory
from ..runtime.numerics import dtype_name
from ..settings.align_settings import AlignRecipe
from ..settings.recover_settings import RecoverRecipe
from ..settings.training_settings import TrainingRecipe
from ..text import SELF
from ..text.generate import generation_bytes
from ..text.packing import PURPOSE
from ..text.pairs import Pair, Pairs, read_pairs, tokenise_pairs
from ..text.sources import check_source
from ..text.training import MAX_HELD_OUT_WINDOWS, TrainingText, shared_documents, training_text
from .context import identity
from .inputs import TrainingInputs, TrainingRequest, asked, check_training_inputs, find_input, named_dense
from .plan import Plan, Task, plan_training


def prepare_recovery(run: TrainingDirectory, request: TrainingRequest[RecoverRecipe], listener: Listener) -> None:
    """Check the input of a recovery, then decide and record what the whole run will use.

    Raises:
        FistaPrunerError: bad input, named.
    """
    inputs = check_recovery(run, request, listener)
    recipe, data = inputs.recipe, inputs.recipe.data
    check_mixture(recipe, inputs.seqlen)  # too few steps for the tasks show now
    steps = recipe.steps_of(inputs.seqlen)
    plan = _plan(recovery_task(inputs), listener)
    text = _cut_text(run, inputs, listener)
    passes = steps * recipe.windows_per_step / len(text.windows("trained"))
    if passes >= 2:
        listener.say(
            f"the text is passed {round(passes)} times in {steps} steps; --tokens sets how much of it is taken"
        )
    facts = _describe_text(text, data.source or ", ".join(data.tasks), inputs.seqlen)
    _record(run, request, inputs, text, plan, steps, facts)


def prepare_alignment(run: TrainingDirectory, request: TrainingRequest[AlignRecipe], listener: Listener) -> None:
    """Check pairs and models of an alignment, then decide and record what the whole run will use.

    Raises:
        FistaPrunerError: bad input, named.
    """
    pairs = check_pairs(request.recipe)  # before anything is loaded
    inputs = check_alignment(run, request, listener)
    recipe, text = inputs.recipe, cut_pairs(inputs, pairs, listener)
    run.write_text(text, json.dumps(recipe.data.model_dump(mode="json")))
    source = Path(str(recipe.data.pairs))
    task = alignment_task(inputs, text)
    facts = _describe_text(text, source.name, text.tokens.shape[1])
    _record(run, request, inputs, text, _plan(task, listener), task.steps, facts)


def check_recovery(
    run: TrainingDirectory, request: TrainingRequest[RecoverRecipe], listener: Listener
) -> TrainingInputs[RecoverRecipe]:
    """Check everything of a recovery that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """
    for text in request.recipe.data.texts:
        check_source(text, PURPOSE)
    inputs = check_training_inputs(run, request, listener, _with_text, (request.recipe.data.seqlen, "data.seqlen"))
    if inputs.recipe.loss != "auto":
        return inputs
    if inputs.dense is None:
        named, _ = named_dense(input_run(request.model), inputs.source)
        dense = "the dense model is not known" if named is None else f"the dense model is not found, which was {named}"
        inputs.warn(listener, f"{dense}: the loss is that of the text (ce); better give --dense MODEL")
    loss = "ce" if inputs.dense is None else "kl"
    return replace(inputs, recipe=inputs.recipe.model_copy(update={"loss": loss}))


def recovery_task(inputs: TrainingInputs[RecoverRecipe]) -> Task:
    """Describe a recovery for its plan."""
    recipe = inputs.recipe
    return Task(
        inputs.model,
        inputs.layout,
        None if recipe.loss == "ce" else inputs.dense,
        recipe,
        inputs.seqlen,
        recipe.steps_of(inputs.seqlen),
        recipe.windows_per_step,
        recipe.windows_of(inputs.seqlen) + MAX_HELD_OUT_WINDOWS,
        MAX_HELD_OUT_WINDOWS,
    )


def _with_text(recipe: RecoverRecipe, origin: RunDirectory | None) -> RecoverRecipe:
    """Return the recipe with its text named: that of the input's run where the user names none.

    Raises:
        FistaPrunerError: the text is not said and the input is no run that names one.
    """
    data = recipe.data
    if data.source is None and not data.tasks:
        known = known_text(origin)
        if origin is None or known is None:
            raise FistaPrunerError("say what to train on with --data: self, python, c4, or a text file")
        data = data.model_copy(update=known)
        try:
            for text in data.texts:
                check_source(text, PURPOSE)
        except FistaPrunerError as error:
            raise FistaPrunerError(
                f"the text of the run in {origin.folder}: {error}; name it where it is, or another, with --data"
            ) from None
    return recipe.model_copy(update={"data": data}).with_absolute_files()


def known_text(origin: RunDirectory | None) -> dict[str, Any] | None:
    """Return the settings of the text that the input's run names; None where it names none."""
    record = origin.record() if origin is not None else None
    if record is None or record.calibration is None or record.kind == "align":  # pairs are no text
        return None
    tasks = {name: str(task.source) for name, task in record.calibration.tasks.items()}
    return {"tasks": tasks} if len(tasks) > 1 else {"source": next(iter(tasks.values()), record.calibration.source)}


def check_mixture(recipe: RecoverRecipe, seqlen: int) -> None:
    """Refuse too few steps or tokens for the tasks of a mixture, in windows of ``seqlen`` tokens.

    Raises:
        FistaPrunerError: names the windows that it needs, and the steps or tokens that make them.
    """
    data = recipe.data
    if len(data.tasks) > 1:
        windows = min(recipe.steps_of(seqlen) * recipe.windows_per_step, recipe.windows_of(seqlen))
        mixture = Mixture(len(data.tasks), data.per_round, data.seed)
        steps = -(-mixture.least // recipe.windows_per_step)
        more = [f"at least {steps} steps"] if recipe.steps is not None and recipe.steps < steps else []
        if recipe.steps is None:
            more = [f"at least {steps * recipe.windows_per_step * seqlen} tokens"]
        elif -(-data.tokens // seqlen) < mixture.least:
            more.append(f"at least {mixture.least * seqlen} tokens")
        mixture.draw(windows, " and ".join(more))


def _cut_text(run: TrainingDirectory, inputs: TrainingInputs[RecoverRecipe], listener: Listener) -> TrainingText:
    """Read the text, hold documents out, cut windows, and store them."""
    data, generator = inputs.recipe.data, inputs.dense or inputs.model
    windows = inputs.recipe.windows_of(inputs.seqlen)
    files = {text: sha256_file(Path(text)) for text in data.texts if Path(text).is_file()}
    tokenizer = {name: sha256_file(inputs.source.folder / name) for name in inputs.model.checkpoint.companions}
    place = [inputs.seqlen, generator.device.type, dtype_name(generator.dtype), files, tokenizer]
    if SELF in data.texts:
        place += [stamps(generator.checkpoint), windows]
    drawing = json.dumps([data.model_dump(mode="json"), *place])
    text = run.text(drawing)  # it may take long: an attempt that was stopped after it has left it
    if new := text is None:
        tokens = min(data.tokens, windows * inputs.seqlen)
        texts = ", ".join(data.texts)
        listener.say(f"training text: {count(tokens)} tokens in windows of {inputs.seqlen} from {texts}")

        def load_model() -> Any:
            nbytes = whole_bytes(generator.checkpoint, generator.dtype)
            nbytes += generation_bytes(generator, windows + MAX_HELD_OUT_WINDOWS, inputs.seqlen)
            require_whole(nbytes, generator.device, inputs.recipe.execution.memory_limit, "--data")
            source = inputs.dense_source or inputs.source
            trusted = source.trust_remote_code
            return load_whole(source.folder, generator.device, generator.dtype, trust_remote_code=trusted)

        with cpu_threads(default_threads(inputs.recipe.execution)):
            text = training_text(data, inputs.tokenizer, inputs.seqlen, load_model, listener.say, windows)
    if inputs.evaluation is not None:
        name = inputs.evaluation.data
        if warning := shared_documents(text.documents, evaluation_documents(name), name):
            inputs.warn(listener, warning)
    inputs.model.check_tokens(text.tokens)
    if new:
        run.write_text(text, drawing)
    release_memory()  # documents
    return text


def check_pairs(recipe: AlignRecipe) -> list[Pair]:
    """Read the file of pairs.

    Raises:
        FistaPrunerError: no file is named, or it has a fault.
    """
    if recipe.data.pairs is None:
        raise FistaPrunerError("say what to train on with --data: a .jsonl file of preference pairs")
    return read_pairs(recipe.data.pairs)


def check_alignment(
    run: TrainingDirectory, request: TrainingRequest[AlignRecipe], listener: Listener
) -> TrainingInputs[AlignRecipe]:
    """Check everything of an alignment but the pairs that can be checked before any long work.

    Raises:
        FistaPrunerError: bad input, named.
    """

    def resolve(recipe: AlignRecipe, origin: RunDirectory | None) -> AlignRecipe:
        changes = {
            "references": recipe.resolved_references,
            "shares": recipe.resolved_shares,
            "anchor": recipe.resolved_anchor,
        }
        return recipe.with_absolute_files().model_copy(update=changes)

    inputs = check_training_inputs(run, request, listener, resolve, (request.recipe.data.max_length, "data.max_length"))
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


def alignment_task(inputs: TrainingInputs[AlignRecipe], text: Pairs) -> Task:
    """Describe an alignment for its plan."""
    recipe, trained = inputs.recipe, len(text.windows("trained")) // 2
    dense = inputs.dense if recipe.resolved_anchor > 0 or "dense" in recipe.resolved_references else None
    return Task(
        inputs.model,
        inputs.layout,
        dense,
        recipe,
        text.tokens.shape[1],
        recipe.steps or math.ceil(trained * recipe.epochs / recipe.pairs_per_step),
        recipe.step_windows,
        len(text.tokens) if recipe.resolved_anchor > 0 else 0,
        len(text.windows("held_out")),
        together=2,
    )


def _plan(task: Task, listener: Listener) -> Plan:
    """Plan the run, and say what was planned.

    Raises:
        FistaPrunerError: it does not fit; names what is too large.
    """
    listener.tick("planning", 0, 1)
    with cpu_threads(default_threads(task.recipe.execution)):
        plan = plan_training(task)
    if plan.refusal:
        raise FistaPrunerError(plan.refusal)
    listener.say(str(plan))
    return plan


def _record(
    run: TrainingDirectory,
    request: TrainingRequest[Any],
    inputs: TrainingInputs[Any],
    text: TrainingText,
    plan: Plan,
    steps: int,
    calibration: CalibrationFacts,
) -> None:
    """Write ``recipe.yaml`` and ``run.json`` with all decisions: from here on the run can be resumed.

    Args:
        run: the run directory.
        request: what was asked for.
        inputs: checked.
        text: what is trained on; ``calibration``: describes it.
        plan: of the run.
        steps: of training.
    """
    recipe: TrainingRecipe = inputs.recipe
    numerics = numerics_of(inputs.model, recipe.execution, plan.batch_size)
    decision = TrainingDecision(
        model=absolute(request.model),
        folder=inputs.source.folder.absolute(),
        stamps=tuple(stamps(inputs.model.checkpoint)),
        numerics=numerics,
        evaluation=inputs.evaluation,
        asked=asked(request.recipe),
        dense=inputs.dense_source and inputs.dense_source.folder.absolute(),
        dense_stamps=tuple(stamps(inputs.dense.checkpoint)) if inputs.dense else (),
        checkpointing=plan.checkpointing,
        operators=inputs.claims,
        zeros=inputs.zeros,
        low_rank=None if inputs.low_rank is None else inputs.low_rank.sampled,
        windows_sha256=sha256_file(run.windows_file),
        steps=steps,
    )
    recovery = Recovery(
        parameters=recipe.parameters,
        optimizer=recipe.optimizer,
        loss=recipe.loss,
        asked_steps=steps,
        windows=len(text.windows("trained")),
        held_out_windows=len(text.windows("held_out")),
        documents=_count_documents(text, "trained"),
        held_out_documents=_count_documents(text, "held_out"),
    )
    run.write_recipe(recipe.to_yaml())
    run.write_record(
        TrainingRecord(
            kind=run.verb,
            **common_fields(request, inputs, recipe, numerics.threads),
            fingerprint=identity(recipe, inputs.model, text, decision),
            calibration=calibration,
            plan=plan.rows,
            recovery=recovery,
            decision=decision,
        )
    )


def _describe_text(text: TrainingText, source: str, seqlen: int) -> CalibrationFacts:
    """Describe what is trained on, for the report."""
    return CalibrationFacts.model_validate(
        {
            **text.facts,
            "source": source,
            "how": "; ".join(dict.fromkeys(task["how"] for task in text.facts["tasks"].values())),
            "samples": len(text.tokens),
            "seqlen": seqlen,
            "tokens": text.tokens.numel(),
        }
    )


def _count_documents(text: TrainingText, side: str) -> int | None:
    """Count the documents of one side, ``trained`` or ``held_out``; None where a text has none."""
    counts = [task[side]["documents"] for task in text.facts["tasks"].values()]
    return None if None in counts else sum(counts)

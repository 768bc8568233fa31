"""Prepare a recovery run: check input, plan, cut the text, record it all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..calibration import SELF
from ..calibration.self_generated import generation_bytes
from ..calibration.training_text import MAX_HELD_OUT_WINDOWS, TrainingText, shared_documents, training_text
from ..evaluation.data import evaluation_documents
from ..models.whole import load_whole, require_whole, whole_bytes
from ..planning.training_task import Task
from ..recipes.recover_settings import RecoverRecipe
from ..runs.identity import stamps
from ..runs.listener import Listener
from ..runs.training_directory import TrainingDirectory
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.formatting import count
from ..runtime.memory import release_memory
from ..runtime.numerics import dtype_name
from .prepare_training import choose_plan, describe_text, record
from .recover_inputs import check_inputs, check_mixture
from .training_inputs import TrainingInputs, TrainingRequest


def prepare(run: TrainingDirectory, request: TrainingRequest[RecoverRecipe], listener: Listener) -> None:
    """Check the input, then decide and record what the whole run will use.

    Args:
        run: the run directory, made.
        request: what to do.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named.
    """
    inputs = check_inputs(run, request, listener)
    recipe, task = inputs.recipe, task_of(run.folder, inputs)
    data = recipe.data
    check_mixture(recipe, inputs.seqlen)  # too few steps for the tasks show now
    plan = choose_plan(task, listener)
    text, sources = cut_text(run, inputs, listener, plan.numerics.threads)
    passes = task.steps * recipe.windows_per_step / len(text.windows("trained"))
    if passes >= 2:
        listener.say(
            f"the text is passed {round(passes)} times in {task.steps} steps; --tokens sets how much of it is taken"
        )
    facts = describe_text(text, data.source or ", ".join(data.tasks), inputs.seqlen)
    record(run, request, inputs, text, plan, task.steps, sources, facts)


def task_of(out: Path, inputs: TrainingInputs[RecoverRecipe]) -> Task:
    """Return what is to be planned, for a run in ``out``."""
    recipe, dense = inputs.recipe, inputs.dense
    teacher, generator = None if recipe.loss == "ce" else dense, dense if recipe.generates_text else None
    task = Task.of_recovery(
        inputs.model, inputs.layout, teacher, recipe, inputs.survivors, inputs.seqlen, out, generator
    )
    return replace(task, low_rank=inputs.low_rank)


def cut_text(
    run: TrainingDirectory, inputs: TrainingInputs[RecoverRecipe], listener: Listener, threads: int
) -> tuple[TrainingText, dict[str, str]]:
    """Read the text, hold documents out, cut windows, and store them.

    Args:
        run: the run directory.
        inputs: checked.
        listener: receives progress.
        threads: of the CPU, on which text is generated.

    Returns:
        The text, and SHA-256 of the files that it comes from.
    """
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

        with cpu_threads(threads):
            text = training_text(data, inputs.tokenizer, inputs.seqlen, load_model, listener.say, windows)
    if inputs.evaluation is not None:
        name = inputs.evaluation.data
        if warning := shared_documents(text.documents, evaluation_documents(name), name):
            inputs.warn(listener, warning)
    inputs.model.check_tokens(text.tokens)
    if new:
        run.write_text(text, drawing)
    release_memory()  # documents
    return text, files


def make_text(run: TrainingDirectory, request: TrainingRequest[RecoverRecipe], listener: Listener) -> None:
    """Cut the windows of a begun run again.

    Raises:
        FistaPrunerError: the text is gone.
    """
    threads = run.begun_record().decision.numerics.threads
    cut_text(run, check_inputs(run, request, listener), listener, threads)

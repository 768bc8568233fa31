"""Prepare a recovery run: find the dense model, check input, plan, cut the text, record it all."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..calibration import SELF
from ..calibration.training_text import TrainingText, order, shared_documents, training_text
from ..errors import FistaPrunerError
from ..evaluation.data import evaluation_documents
from ..execution.executors import default_threads
from ..execution.recovery import identity
from ..models.whole import load_whole, require_whole
from ..planning.recover_plan import plan_recovery
from ..planning.recover_sizes import RecoverChoice, Task
from ..recipes.recover_settings import RecoverRecipe
from ..runs.decision import Numerics, RecoverDecision, RecoverRecord
from ..runs.identity import stamps
from ..runs.lineage import begin_lineage
from ..runs.listener import Listener
from ..runs.records import CalibrationFacts, PlanRow, Recovery
from ..runs.recover_directory import RecoverDirectory
from ..runtime.devices import available_cores, cpu_threads
from ..runtime.files import disk_errors, sha256_file
from ..runtime.machine import describe_machine, now, versions
from ..runtime.memory import free_memory, release_memory
from ..runtime.numerics import dtype_name
from ..runtime.ranks import Ranks
from .begun import absolute
from .prepare import describe_model
from .recover_inputs import (
    Inputs,
    RecoverRequest,
    asked,
    check_inputs,
)


def prepare(run: RecoverDirectory, request: RecoverRequest, listener: Listener) -> None:
    """Check the input, then decide and record what the whole run will use.

    Args:
        run: the run directory, made.
        request: what to do.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named.
    """
    inputs = check_inputs(run, request, listener)
    numerics, choice, rows = choose_plan(run.folder, share_of(inputs, request.ranks), listener)
    text, sources = cut_text(run, inputs, listener)
    steps = steps_of(inputs)
    order(text, steps, inputs.recipe.windows_per_step, inputs.recipe.data)  # too few steps for the tasks show now
    decision = RecoverDecision(
        model=absolute(request.model),
        folder=inputs.source.folder.absolute(),
        stamps=tuple(stamps(inputs.model.checkpoint)),
        numerics=numerics,
        evaluation=inputs.evaluation,
        asked=asked(request.recipe),
        dense=inputs.dense_source and inputs.dense_source.folder.absolute(),
        dense_stamps=tuple(stamps(inputs.dense.checkpoint)) if inputs.dense else (),
        resident=choice.resident,
        states_on_disk=choice.states_on_disk,
        hidden_on_disk=choice.hidden_on_disk,
        keep_graphs=choice.keep_graphs,
        teacher_windows=choice.teacher_windows,
        operators=inputs.claims,
        windows_sha256=sha256_file(run.windows_file),
        text_sha256=sources,
        steps=steps,
    )
    record(run, request, inputs, text, decision, rows)


def choose_plan(out: Path, inputs: Inputs, listener: Listener) -> tuple[Numerics, RecoverChoice, list[PlanRow]]:
    """Plan the run: what sets the last bits, and how memory and disk are used.

    Raises:
        FistaPrunerError: it does not fit; names what is too large.
    """
    execution = inputs.recipe.execution
    with cpu_threads(default_threads(execution)):
        found = plan_recovery(task_of(out, inputs))
    release_memory()  # what the measurement has freed
    for sentence in found.says:
        listener.say(sentence)
    numerics = Numerics(
        batch_size=found.choice.batch_size,
        by_operator=False,
        threads=default_threads(execution),
        device=inputs.model.device.type,
        dtype=dtype_name(inputs.model.dtype),
    )
    return numerics, found.choice, found.rows


def task_of(out: Path, inputs: Inputs) -> Task:
    """Return what is to be planned, for a run in ``out``."""
    return Task.of_recovery(
        inputs.model, inputs.layout, inputs.dense, inputs.recipe, inputs.survivors, inputs.seqlen, out
    )


def share_of(inputs: Inputs, ranks: Ranks) -> Inputs:
    """Return what one of several processes has to do, to plan it.

    Raises:
        FistaPrunerError: there are more processes than windows in a step.
    """
    if ranks.size == 1:
        return inputs
    recipe, execution = inputs.recipe, inputs.recipe.execution
    if recipe.windows_per_step < ranks.size:
        raise FistaPrunerError(
            f"windows_per_step is {recipe.windows_per_step} for {ranks.size} processes: each needs at least one window "
            "of a step"
        )
    limit = execution.memory_limit or free_memory() // ranks.local_size
    threads = execution.threads or max(1, available_cores() // ranks.local_size)
    changes = {
        "windows_per_step": recipe.windows_per_step // ranks.size,
        "steps": steps_of(inputs),
        "execution": execution.model_copy(update={"memory_limit": limit, "threads": threads}),
    }
    return replace(inputs, recipe=recipe.model_copy(update=changes))


def steps_of(inputs: Inputs) -> int:
    """Return the number of optimizer steps."""
    return inputs.recipe.steps or max(1, round(inputs.recipe.data.tokens / step_tokens(inputs)))


def step_tokens(inputs: Inputs) -> int:
    """Return the tokens of one step."""
    return inputs.recipe.windows_per_step * inputs.seqlen


def cut_text(run: RecoverDirectory, inputs: Inputs, listener: Listener) -> tuple[TrainingText, dict[str, str]]:
    """Read the text, hold documents out, cut windows, and store them.

    Returns:
        The text, and SHA-256 of the files that it comes from.
    """
    data, generator = inputs.recipe.data, inputs.dense or inputs.model
    texts = list(data.tasks.values()) or [str(data.source)]
    files = {text: sha256_file(Path(text)) for text in texts if Path(text).is_file()}
    place = [inputs.seqlen, generator.device.type, dtype_name(generator.dtype), files]
    if SELF in texts:
        place.append(stamps(generator.checkpoint))
    drawing = json.dumps([data.model_dump(mode="json"), *place])
    kept = run.text(drawing)  # it may take long: an attempt that was stopped after it has left it
    if kept is not None:
        return kept, files
    listener.say(f"training text: {data.tokens} tokens in windows of {inputs.seqlen} from {', '.join(texts)}")

    def load_model() -> Any:
        require_whole(generator.checkpoint, generator.device, inputs.recipe.execution.memory_limit, "--data self")
        source = inputs.dense_source or inputs.source
        trusted = source.trust_remote_code
        return load_whole(source.folder, generator.device, generator.dtype, trust_remote_code=trusted)

    text = training_text(data, inputs.tokenizer, inputs.seqlen, load_model, listener.say)
    if inputs.evaluation is not None:
        name = inputs.evaluation.data
        if warning := shared_documents(text, evaluation_documents(name), name):
            listener.say(warning)
            inputs.warnings.append(warning)
    inputs.model.check_tokens(text.tokens)
    run.write_text(text, drawing)
    release_memory()  # documents
    return text, files


def restore_text(run: RecoverDirectory, begun: RecoverRecord, request: RecoverRequest, listener: Listener) -> None:
    """Cut the windows of a run again if they are gone or damaged.

    Raises:
        FistaPrunerError: the text has changed since, or is gone.
    """
    decision = begun.decision
    if run.windows_file.is_file() and sha256_file(run.windows_file) == decision.windows_sha256:
        return
    listener.say(f"{run.windows_file} is gone or damaged: the windows are cut again")
    with disk_errors(run.windows_file):
        run.windows_file.unlink(missing_ok=True)
    recipe = RecoverRecipe.build(begun.recipe, str(run.run_file))
    dense = None if decision.dense is None else str(decision.dense)
    same = replace(request, model=decision.model, recipe=recipe, dense=dense, evaluation=None, evaluates=False)
    cut_text(run, check_inputs(run, same, listener), listener)
    if sha256_file(run.windows_file) != decision.windows_sha256:
        raise FistaPrunerError(
            f"{run.windows_file} is gone or damaged, and the text has changed since: name another --out"
        )


def record(
    run: RecoverDirectory,
    request: RecoverRequest,
    inputs: Inputs,
    text: TrainingText,
    decision: RecoverDecision,
    rows: list[PlanRow],
) -> None:
    """Write ``recipe.yaml`` and ``run.json``: from here on the run can be resumed."""
    recipe, model = inputs.recipe, inputs.model
    facts = describe_model(inputs.source, request.model, model)
    lineage, warning = begin_lineage(inputs.source.folder, facts)
    run.write_recipe(recipe.to_yaml())
    run.write_record(
        RecoverRecord(
            kind="recover",
            command=request.command or shlex.join(sys.argv),
            started=now(),
            recipe=recipe.model_dump(mode="json"),
            fingerprint=identity(recipe, model, text, decision),
            versions=versions(),
            machine=describe_machine(model.device),
            model=facts,
            lineage=lineage,
            warnings=[*inputs.warnings, *([warning] if warning else [])],
            calibration=CalibrationFacts.model_validate(
                {
                    **text.facts,
                    "source": recipe.data.source or ", ".join(recipe.data.tasks),
                    "how": "; ".join(dict.fromkeys(task["how"] for task in text.facts["tasks"].values())),
                    "samples": len(text.tokens),
                    "seqlen": inputs.seqlen,
                    "tokens": text.tokens.numel(),
                    "seed": recipe.data.seed,
                }
            ),
            plan=rows,
            recovery=Recovery(
                parameters=recipe.parameters,
                optimizer=recipe.optimizer,
                loss=recipe.loss,
                asked_steps=decision.steps,
                windows=int((~text.held_out).sum()),
                held_out_windows=int(text.held_out.sum()),
                documents=_documents(text, "trained"),
                held_out_documents=_documents(text, "held_out"),
            ),
            decision=decision,
        )
    )


def _documents(text: TrainingText, side: str) -> int | None:
    """Count the documents of one side, ``trained`` or ``held_out``; None where a text has none."""
    counts = [task[side]["documents"] for task in text.facts["tasks"].values()]
    return None if None in counts else sum(counts)

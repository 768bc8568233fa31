"""Decide and record what a run that trains will use: memory and disk, numerics, models, text."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.training_text import TrainingText
from ..execution.executors import default_threads
from ..execution.training_context import identity
from ..planning.training_plan import plan_training
from ..planning.training_task import Task, TrainingChoice
from ..recipes.training_settings import TrainingRecipe
from ..runs.decision import Numerics, TrainingDecision, TrainingRecord
from ..runs.identity import stamps
from ..runs.listener import Listener
from ..runs.records import CalibrationFacts, PlanRow
from ..runs.training_directory import TrainingDirectory
from ..runs.training_records import Recovery
from ..runtime.devices import cpu_threads
from ..runtime.files import sha256_file
from ..runtime.memory import release_memory
from .find_model import absolute
from .record import common_fields, numerics_of
from .training_inputs import R, TrainingInputs, TrainingRequest, asked


@dataclass(frozen=True)
class PlannedTraining:
    """What a run that trains has decided before its long work.

    Args:
        numerics: what sets the last bits.
        choice: how memory and disk are used.
        rows: predictions for the report.
    """

    numerics: Numerics
    choice: TrainingChoice
    rows: list[PlanRow]


def choose_plan(task: Task, listener: Listener) -> PlannedTraining:
    """Plan the run.

    Raises:
        FistaPrunerError: it does not fit; names what is too large.
    """
    listener.tick("planning", 0, 1)
    execution = task.recipe.execution
    with cpu_threads(default_threads(execution)):
        found = plan_training(task)
    release_memory()  # what the measurement has freed
    for sentence in found.says:
        listener.say(sentence)
    numerics = numerics_of(task.model, execution, found.choice.batch_size)
    return PlannedTraining(numerics, found.choice, found.rows)


def record(
    run: TrainingDirectory,
    request: TrainingRequest[R],
    inputs: TrainingInputs[R],
    text: TrainingText,
    plan: PlannedTraining,
    steps: int,
    sources: dict[str, str],
    calibration: CalibrationFacts,
) -> None:
    """Write ``recipe.yaml`` and ``run.json`` with all decisions: from here on the run can be resumed.

    Args:
        run: the run directory.
        request: what was asked for.
        inputs: checked.
        text: what is trained on; ``calibration``: describes it.
        plan: from :func:`choose_plan`.
        steps: of training.
        sources: SHA-256 of the text's files.
    """
    recipe: TrainingRecipe = inputs.recipe
    model, numerics, choice = inputs.model, plan.numerics, plan.choice
    decision = TrainingDecision(
        model=absolute(request.model),
        folder=inputs.source.folder.absolute(),
        stamps=tuple(stamps(model.checkpoint)),
        numerics=numerics,
        evaluation=inputs.evaluation,
        asked=asked(request.recipe),
        dense=inputs.dense_source and inputs.dense_source.folder.absolute(),
        dense_stamps=tuple(stamps(inputs.dense.checkpoint)) if inputs.dense else (),
        keep_graphs=choice.keep_graphs,
        teacher_windows=choice.teacher_windows,
        operators=inputs.claims,
        zeros=inputs.zeros,
        low_rank=None if inputs.low_rank is None else inputs.low_rank.sampled,
        windows_sha256=sha256_file(run.windows_file),
        text_sha256=sources,
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
            fingerprint=identity(recipe, model, text, decision),
            calibration=calibration,
            plan=plan.rows,
            recovery=recovery,
            decision=decision,
        )
    )


def describe_text(text: TrainingText, source: str, seqlen: int) -> CalibrationFacts:
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

"""What ``run.json`` says of runs of all verbs alike: model, machine, versions, numerics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..execution.executors import default_threads
from ..models.layerwise import LayerwiseModel
from ..models.source import ModelSource
from ..runs.decision import Numerics
from ..runs.lineage import begin_lineage
from ..runs.records import ModelFacts
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import dtype_name
from ..settings.execution_settings import Execution
from ..settings.settings import Recipe
from ..settings.training_settings import TrainingRecipe
from .prune_inputs import PruneInputs, RunRequest

if TYPE_CHECKING:
    from ..training.settle import Inputs, Request


def common_fields(
    request: RunRequest | Request[Any],
    inputs: PruneInputs | Inputs[Any],
    recipe: Recipe | TrainingRecipe,
    threads: int,
) -> dict[str, Any]:
    """Collect the fields of a record that runs of all verbs fill in alike.

    Args:
        request: what a command asks.
        inputs: checked.
        recipe: all settings, resolved.
        threads: CPU threads of each worker.
    """
    facts = describe_model(inputs.source, request.model, inputs.model)
    lineage, warning = begin_lineage(inputs.source.folder, facts)
    return {
        "command": request.command,
        "started": now(),
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions(),
        "machine": describe_machine(inputs.model.device, threads),
        "model": facts,
        "lineage": lineage,
        "warnings": [*inputs.warnings, *([warning] if warning else [])],
    }


def describe_model(source: ModelSource, name: str, model: LayerwiseModel) -> ModelFacts:
    """Describe the model that a run changes.

    Args:
        source: its folder.
        name: as the user named it.
        model: the opened model.
    """
    checkpoint = model.checkpoint
    return ModelFacts(
        source=name,
        revision=source.revision(),
        architecture=type(model.model).__name__,
        layers=len(model),
        hidden_size=model.width,
        parameters=model.parameter_count(),
        dtype=dtype_name(checkpoint.dtype),
        bytes=checkpoint.file_bytes,
        license=source.license(),
        own_code=source.own_code(),
    )


def numerics_of(model: LayerwiseModel, execution: Execution, batch_size: int) -> Numerics:
    """Collect what decides the last bits of a run."""
    return Numerics(
        batch_size=batch_size,
        threads=default_threads(execution),
        device=model.device.type,
        dtype=dtype_name(model.dtype),
    )

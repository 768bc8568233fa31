"""Check the input of a pruning run: everything that can be checked before any long work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import Constraint
from ..errors import FistaPrunerError, explain
from ..execution.context import open_model
from ..execution.ray_pool import require_ray
from ..measure.data import evaluation_documents, load_windows
from ..models.discovery import discover
from ..models.files.low_rank import refuse_low_rank
from ..models.layerwise import LayerwiseModel
from ..models.layout import Layout
from ..models.source import UNTRUSTED, ModelSource, Permissions
from ..passes.check import check_model
from ..runs.decision import EvaluationRequest, PruneRecord
from ..runs.identity import changed_files
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import CalibrationFacts
from ..runtime.devices import device_title
from ..runtime.machine import versions
from ..runtime.numerics import dtype_name
from ..settings.settings import Recipe
from ..structure.smaller import Widths
from ..text import calibration_length
from ..text.sources import source_documents
from ..text.training import document_hash, shared_documents, training_documents
from .begun import began_on, refuse_other, refuse_overlap, say_other_versions
from .find_model import find_source
from .new_widths import change_widths, say_warnings, say_widths
from .patterns import allocate
from .plan import tokens_after

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class RunRequest:
    """What a command asks of a pruning run.

    Args:
        model: as the user named it.
        recipe: all settings, resolved.
        permissions: what the model's files may do.
        command: shell line that reproduces the run; None where there is none.
        evaluation: the text to evaluate on after the run.
        drawn: calibration windows that were drawn before with the same settings, and how.
        source: the model where it was found before; None finds it.
    """

    model: str
    recipe: Recipe
    permissions: Permissions = UNTRUSTED
    command: str | None = None
    evaluation: EvaluationRequest | None = None
    drawn: tuple[Tensor, dict[str, Any]] | None = None
    source: ModelSource | None = None


def check_tokens(tokens: Any) -> None:
    """Refuse what are no calibration windows.

    Raises:
        FistaPrunerError: says what they are.
    """
    match tokens:
        case None:
            return
        case (Tensor() as ids, Mapping() as how) if ids.ndim == 2 and ids.dtype in INTEGERS:
            try:
                CalibrationFacts.model_validate(dict(how))
                json.dumps(dict(how))
            except (ValueError, TypeError) as error:
                raise FistaPrunerError(f"tokens, how they were drawn: {explain(error)}") from None
            return
    given = tokens if isinstance(tokens, (tuple, list)) and len(tokens) == 2 else [tokens]
    found = " and ".join(
        f"a tensor {tuple(one.shape)} of {dtype_name(one.dtype)}" if isinstance(one, Tensor) else type(one).__name__
        for one in given
    )
    raise FistaPrunerError(
        f"tokens is {found}, and two are expected: a tensor (samples, seqlen) of whole numbers, and a mapping with the "
        "source that they were drawn from"
    )


@dataclass(frozen=True)
class PruneInputs:
    """The checked input of a run.

    Args:
        source: the dense model's folder.
        model: the dense model.
        layout: operators to prune.
        smaller: the same in the shapes that they are to have; ``widths``: whose channels are removed, None where none.
        sparsity: the recipe's pattern of every one of them, by full name.
        tokenizer: of the model.
        seqlen: tokens in a calibration window.
        planned: what an earlier attempt has recorded of this very model; None where none was, or the model has changed.
        warnings: for the report.
        after: tokens that are evaluated and that continue sample prompts after the run.
    """

    source: ModelSource
    model: LayerwiseModel
    layout: Layout
    smaller: Layout
    widths: Widths | None
    sparsity: Mapping[str, Constraint]
    tokenizer: Any
    seqlen: int
    planned: PruneRecord | None = None
    warnings: tuple[str, ...] = ()
    after: tuple[int, int] = (0, 0)


def check_inputs(
    run: PruneDirectory, request: RunRequest, begun: PruneRecord | None, listener: Listener
) -> PruneInputs:
    """Check everything that can be checked before any long work.

    Args:
        run: the run directory.
        request: what to do.
        begun: what an earlier attempt has recorded.
        listener: receives progress.

    Raises:
        FistaPrunerError: bad input, named.
    """
    recipe = request.recipe
    if recipe.execution.executor == "ray":
        require_ray(recipe.execution.address)
    source = request.source or find_source(request.model, begun, request.permissions)
    refuse_overlap(source.folder, run.folder)
    refuse_low_rank(source.folder, "prune")
    listener.say(f"model {request.model}: {source.folder}")
    listener.tick("opening and checking the model", 0, 1)
    planned = None if begun is None or changed_files(begun.decision.stamps, source) else begun
    model = open_model(source, recipe, dtype=planned.decision.numerics.dtype if planned else None)
    if recipe.dtype == "auto" and model.dtype != model.checkpoint.dtype:
        stored, used = dtype_name(model.checkpoint.dtype), dtype_name(model.dtype)
        listener.say(f"passes in {used}: this device has no matrix units for the checkpoint's {stored}")
    layout = discover(model).select(recipe)
    if planned is None or not _was_checked(planned, model):
        check_model(model)
    smaller, widths = change_widths(model, layout, recipe, source.permissions)
    sparsity = allocate(recipe, smaller, model.config.model_type)
    warnings = () if widths is None else say_warnings(model, smaller, recipe, sparsity, widths)
    if widths is not None and begun is None:
        for sentence in (say_widths(model, widths), *warnings):
            listener.say(sentence)
    if widths is None and begun is None and not any(pattern.fraction for pattern in recipe.patterns):
        listener.say("sparsity 0% and no structure: no weight becomes zero")
    if begun is not None:
        refuse_other(run, begun, request.model, recipe, request.permissions)
        if not run.model.is_dir():
            say_other_versions(begun.versions, listener)
    tokenizer, seqlen = source.tokenizer(), calibration_length(recipe.calibration, model)
    if request.drawn is not None and request.drawn[0].shape != (recipe.calibration.samples, seqlen):
        raise FistaPrunerError(
            f"tokens has the shape {tuple(request.drawn[0].shape)}, and the recipe's (samples, seqlen) are "
            f"{(recipe.calibration.samples, seqlen)}"
        )
    after = (0, 0)
    if request.evaluation is not None:  # a fault in the text shows now
        text = load_windows(request.evaluation.data, tokenizer, seqlen, request.evaluation.windows)
        model.check_tokens(text.tokens)
        after = tokens_after(text)
        if shared := shared_text(recipe.calibration.sources.values(), request.evaluation.data):
            listener.say(shared)
            warnings = (*warnings, shared)
    return PruneInputs(source, model, layout, smaller, widths, sparsity, tokenizer, seqlen, planned, warnings, after)


def _was_checked(begun: PruneRecord, model: LayerwiseModel) -> bool:
    """Check that a run has compared this model's logits already: with these versions, on this device.

    A model's own code may have changed: of its files only config and weights are compared with those of the run. Nor is
    it known whether that code ran then, where its class is named like one of ``transformers``.
    """
    alike = begun.versions == versions() and began_on(begun) == device_title(model.device)
    built = type(model.model)
    plain = built.__module__.startswith("transformers.") and "auto_map" not in model.checkpoint.config
    return alike and plain and built.__name__ == begun.model.architecture


def shared_text(sources: Iterable[str], data: str, *, training: bool = False) -> str | None:
    """Warn that evaluation text has documents of calibration text; None where it has none.

    Known data sets, and Python's language reference, have parts of their own for both, so only files are compared.

    Args:
        sources: of the calibration text.
        data: the evaluation text.
        training: the sources are of training text.
    """
    files = [source for source in sources if Path(source).is_file()]
    if not files or not Path(data).is_file():
        return None
    read = training_documents if training else source_documents
    known = {document_hash(document) for file in files for document in read(file)}
    return shared_documents(known, evaluation_documents(data), data, "training" if training else "calibration")

"""What a run decides before its long work, for all of its processes: stored in ``run.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..settings.prune import SparsitySetting
from .records import Report


class Frozen(BaseModel):
    """Base of the decisions: they do not change during a run."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Numerics(Frozen):
    """Settings that decide the order of sums, and so the last bits; part of the run's identity.

    Args:
        batch_size: windows in one forward pass.
        threads: CPU threads of each worker.
        device: kind of device, ``cpu`` or ``cuda``.
        dtype: precision of forward passes, such as ``bfloat16``.
    """

    batch_size: int
    threads: int
    device: str
    dtype: str


class EvaluationRequest(Frozen):
    """The text on which a run evaluates its result.

    Args:
        data: name of a data set, or a file, as for :func:`fistapruner.evaluate`.
        windows: only its first so many windows; None takes all.
        seqlen: tokens in a window; None is that of the run's own text.
    """

    data: str
    windows: int | None = None
    seqlen: int | None = None


class RunDecision(Frozen):
    """What the runs of all verbs decide.

    Args:
        model: the model as the user named it; a path is absolute, so that the run can go on from another folder.
        folder: the folder of its weights.
        stamps: names and hashes of its config and weight files, so that a change is found.
        numerics: what decides the last bits.
        evaluation: the text to evaluate on; None evaluates nothing.
    """

    model: str
    folder: Path
    stamps: tuple[tuple[str, str], ...] = ()
    numerics: Numerics
    evaluation: EvaluationRequest | None = None


class PruneDecision(RunDecision):
    """What a pruning run decides.

    Args:
        sparsity: pattern of every operator, by full name.
        on_disk: hidden states are kept in files; ``on_device``: in the GPU's memory. Main memory otherwise.
        calibration_sha256: of the calibration text; None where it is not a file.
        metrics_sha256: of ``metrics.safetensors``; None where nothing was measured on the dense model.
        seconds: of drawing calibration text (``calibration``) and measuring the dense model (``sensitivity``).
        structure: record of what is removed (:class:`fistapruner.structure.smaller.Widths`); None where nothing is.
    """

    sparsity: dict[str, SparsitySetting]
    on_disk: bool
    on_device: bool = False
    calibration_sha256: str | None = None
    metrics_sha256: str | None = None
    seconds: dict[str, float] = {}
    structure: dict[str, Any] | None = None


class TrainingDecision(RunDecision):
    """What a run that trains decides.

    Args:
        asked: settings of the recipe as they were asked for, with ``auto`` unresolved; ``execution`` is left out.
        dense: folder of the dense model; None where it is not known; ``dense_stamps``: of its files.
        checkpointing: decoder layers run twice for a gradient, which needs less memory. It is no part of the run's
            identity, as it changes no bit.
        operators: operators that are trained, by full name, and the sparsity that the input's record claims.
        zeros: of all pruned operators of the input; None where that was not noted.
        low_rank: checksum of the low-rank part that belongs to the input; None where it has none.
        windows_sha256: of ``windows.safetensors``.
        steps: optimizer steps to take.
    """

    asked: dict[str, Any] = {}
    dense: Path | None = None
    dense_stamps: tuple[tuple[str, str], ...] = ()
    checkpointing: bool = False
    operators: dict[str, str] = {}
    zeros: int | None = None
    low_rank: str | None = None
    windows_sha256: str = ""
    steps: int


class RunRecord(Report):
    """The content of ``run.json``: what is known of the report before the first result, and the decision."""

    decision: RunDecision

    def report(self) -> Report:
        """The report alone."""
        return Report.model_validate(self.model_dump(mode="json", exclude={"decision"}))


class PruneRecord(RunRecord):
    """The content of a pruning run's ``run.json``."""

    decision: PruneDecision


class TrainingRecord(RunRecord):
    """The content of the ``run.json`` of a run that trains."""

    decision: TrainingDecision

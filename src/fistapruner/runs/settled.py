"""What a run decides before its long work: all of ``run.json``, and the rule of going on.

The same settings, model files, texts and versions go on where they stopped, and end with the same bytes. Anything else
is another run, and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import A_TEXT, FistaPrunerError, explain, path_text, with_name
from ..models.checkpoint import Checkpoint
from ..models.source import ModelSource
from ..runtime.files import json_sha256, sampled_sha256, sha256_file
from ..runtime.machine import versions
from ..runtime.show import shell_line
from ..settings.prune import Recipe, SparsitySetting
from ..settings.train import TrainingRecipe
from .records import Report

if TYPE_CHECKING:
    from .directory import RunDirectory

SECTIONS = ("data", "calibration", "structure")
"""Sections of a recipe whose settings messages name one by one."""


class Frozen(BaseModel):
    """Base of the decisions: they do not change during a run."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Numerics(Frozen):
    """What decides the order of sums, and so the last bits: windows in a pass, threads, device, precision."""

    batch_size: int
    threads: int
    device: str
    dtype: str


class EvaluationRequest(Frozen):
    """The text on which a run evaluates its result, as for :func:`fistapruner.evaluate`.

    Without ``windows`` all are taken; without ``seqlen`` a window has as many tokens as one of the run's own text.
    """

    data: str
    windows: Annotated[int, Field(strict=True, ge=1)] | None = None
    seqlen: int | None = None


class RunDecision(Frozen):
    """What the runs of all verbs decide.

    Args:
        model: the model as the user named it; a path is absolute, so that the run can go on from another folder.
        folder: the folder of its weights; ``stamps``: names and hashes of its config and weight files.
        evaluation: the text to evaluate on; None evaluates nothing.
        dense, dense_stamps: those of the dense model behind it, which may be the same; None where it is not known.
    """

    model: str
    folder: Path
    stamps: tuple[tuple[str, str], ...] = ()
    numerics: Numerics
    evaluation: EvaluationRequest | None = None
    dense: Path | None = None
    dense_stamps: tuple[tuple[str, str], ...] = ()


class PruneDecision(RunDecision):
    """What a pruning run decides.

    Args:
        sparsity: pattern of every operator, by full name.
        on_disk, on_device: hidden states are kept in files, or in the GPU's memory; main memory otherwise.
        calibration_sha256: of the calibration text; None where it is not a file.
        metrics_sha256: of ``metrics.safetensors``; None where nothing was measured on the dense model.
        seconds: of drawing calibration text (``calibration``) and measuring the dense model (``sensitivity``).
        structure: record of what is removed (:class:`fistapruner.structure.smaller.Widths`).
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
        asked: settings of the recipe as they were asked for, with ``auto`` unresolved.
        operators: operators that are trained, by full name, and the sparsity that the input's record claims.
        zeros: of all pruned operators of the input.
        low_rank: checksum of the low-rank part that belongs to the input; None where it has none.
    """

    asked: dict[str, Any] = {}
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
    """What ``run.json`` holds of a pruning run."""

    decision: PruneDecision


class TrainingRecord(RunRecord):
    """What ``run.json`` holds of a run that trains."""

    decision: TrainingDecision


# --- the identity of a run: what decides its results, bit for bit


def fingerprint(
    recipe: Recipe | TrainingRecipe, checkpoint: Checkpoint, tokens: Tensor, numerics: Numerics, *more: Any
) -> str:
    """Hash what decides a run's result: settings, model files, (samples, seqlen) tokens, JSON values."""
    identity = [recipe.fingerprint(), stamps(checkpoint), numerics.model_dump(), *more]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(tokens.to(torch.int64).contiguous().flatten().numpy().data)
    return digest.hexdigest()[:16]


def stamps(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Identify a checkpoint: a hash of its config, and for every weight file one of samples of its bytes."""
    weights = ((name, sampled_sha256(file.path)) for name, file in checkpoint.files.items())
    return [("config.json", json_sha256(checkpoint.config)), *weights]


def changed_files(before: Iterable[tuple[str, str]], source: ModelSource) -> str | None:
    """Say which file of a model is not what its :func:`stamps` were before; None where all are."""
    old, new = dict(before), dict(stamps(source.checkpoint()))
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            was, now = (str(found.get(name, "missing"))[:12] for found in (old, new))
            return f"{source.folder / name} has changed: its checksum was {was} and is {now}"
    return None


def text_sha256(recipe: Recipe) -> str | None:
    """Hash the calibration files, several as one; None where there is none, or one is gone."""
    files = [path for text in recipe.calibration.sources.values() if (path := Path(text)).suffix]
    if not files or not all(file.is_file() for file in files):
        return None
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


# --- the rule of going on; each of these refuses with a FistaPrunerError that says what differs


def refuse_another(run: RunDirectory, difference: str, advice: str = "") -> None:
    """Refuse to go on with another run than the one that is asked for."""
    raise FistaPrunerError(f"--out {run.folder} holds a run {difference}: name another folder{advice}")


def refuse_other_settings(run: RunDirectory, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on where a setting that is asked for ``now`` differs from what the run had ``before``."""
    before, now = flat_settings(before), flat_settings(now)
    for key in now:
        if before.get(key) != now[key]:
            difference = f"with {key} = {json.dumps(before.get(key))}, this one has {json.dumps(now[key])}"
            refuse_another(run, difference, f" ('{shell_line('resume', run.folder)}' goes on with that one)")


def refuse_other_model(run: RunDirectory, record: RunRecord, source: ModelSource) -> None:
    """Refuse to continue a run of a model with other files, wherever they are."""
    if changed := changed_files(record.decision.stamps, source):
        refuse_another(run, f"of the model {record.decision.model}, and {changed}")


def refuse_other_versions(run: RunDirectory, record: RunRecord) -> None:
    """Refuse to compute more of a run that other versions began: its last bits would be others."""
    here = versions()
    for name in ("fistapruner", "torch", "transformers"):
        if (began := record.versions.get(name)) != here[name]:
            refuse_another(run, f"that began with {name} {began} (now {here[name]})")


def refuse_overlap(source: str | Path, out: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read."""
    inner, outer = Path(source).resolve(), out.resolve()
    if inner.exists() and (inner == outer or outer in inner.parents):
        raise FistaPrunerError(f"--out {out} holds the model {source} itself: name a folder outside of it")


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings of sections as in messages."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": each for name, each in (value or {}).items()} if key in SECTIONS else {key: value}
    return flat


def evaluation_on(evaluate: str | Path | None, windows: Any) -> EvaluationRequest | None:
    """Return the request to evaluate on a text, a file by its absolute path; None for ``none``."""
    if evaluate in (None, "none"):
        if windows is not None:
            raise FistaPrunerError(f"evaluate_windows {windows} has no effect: evaluate names no text")
        return None
    text = path_text("evaluate", evaluate, A_TEXT)
    try:
        return EvaluationRequest(data=absolute(text) if Path(text).is_file() else text, windows=windows)
    except ValidationError as error:
        raise FistaPrunerError(f"evaluate_{explain(error)}") from None


def absolute(name: str) -> str:
    """Make a path that exists absolute, so that a run can continue from another folder; keep other names.

    Its last part stays if it is a link: where the link points, a file may have another suffix, as in the hub's cache.
    """
    if not Path(name).exists():
        return name
    path = with_name(Path(name))
    return str(path.parent.resolve() / path.name)


@contextmanager
def interrupted_with(say: Callable[[], str]) -> Iterator[None]:
    """Let an interruption of the block carry what ``say`` returns then: what is done, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(say()) from None

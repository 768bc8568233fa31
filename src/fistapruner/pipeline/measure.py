"""Measure what a run has made, at its end, and write the figures into report, card and page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..measure.data import evaluation_documents, load_windows
from ..measure.evaluate import evaluate as run_evaluation
from ..measure.generations import generate_side_by_side
from ..models.source import Permissions
from ..reporting.model_card import model_card
from ..reporting.quality import gain_text
from ..reporting.write import write_page
from ..runs.continuation import absolute
from ..runs.decision import EvaluationRequest
from ..runs.directory import CARD, RunDirectory
from ..runs.labels import DONE
from ..runs.lineage import update_stage, write_lineage
from ..runs.listener import Listener
from ..runs.prune_directory import PruneDirectory
from ..runs.records import Report, load_run
from ..runs.results import Evaluation
from ..runs.training_runs import dense_of, input_run
from ..runtime.devices import choose_device
from ..runtime.files import write_text_atomic
from ..runtime.formatting import shell_line
from ..runtime.numerics import windows_at_once
from ..settings.execution import Execution
from ..settings.train import RecoverRecipe
from ..settings.prune import Recipe
from ..text.sources import source_documents
from ..text.training import document_hash, shared_documents, training_documents
from .kept_evaluations import add_scores, same_comparison, same_text
from .result import add_warning


@dataclass(frozen=True)
class Compared:
    """The models that the result of a run is compared with.

    Args:
        dense: folder of the dense model, which may be gone; None where it is not known.
        before: folder of the pruned model that a recovery run began with; None for a pruning run.
    """

    dense: Path | None
    before: Path | None = None

    @classmethod
    def of(cls, run: RunDirectory) -> Compared:
        """Find them in what the run has decided."""
        record, dense = run.record(), dense_of(run)
        before = None if record is None or record.kind == "prune" else record.decision.folder
        return cls(None if dense is None else dense.folder, before)


def measure(
    run: RunDirectory,
    report: Report,
    request: EvaluationRequest | None,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
) -> Report:
    """Evaluate ``RUN/model`` beside the dense model, and write report, model card and page.

    The model that a recovery run began with is evaluated on the same windows. What the report already holds of these
    is not measured again.

    Args:
        run: the run directory, with a finished checkpoint.
        report: of the finished run.
        request: the text to evaluate on; None evaluates nothing.
        execution: names the device and the most memory; a run may end on another machine than it began on.
        permissions: what the models' files may do.
        listener: receives progress.

    Raises:
        FistaPrunerError: the text cannot be read.
    """
    if request is not None:
        compared = Compared.of(run)
        begun_with_dense = report.kind == "prune" and (report.lineage is None or len(report.lineage.stages) < 2)
        if not begun_with_dense and (compared.dense is None or not compared.dense.exists()):
            if not any(found.reference for found in report.evaluations):
                where = "is not known" if compared.dense is None else f"is not at {compared.dense}"
                add = f"'{shell_line('evaluate', run.folder, '--against', 'DENSE')}' adds them"
                listener.say(f"no figures of the dense model, which {where}: {add}")
            compared = replace(compared, dense=None)  # the run itself did not need it
        measurement = _Measurement(run, report, compared, execution, permissions, listener)
        with measurement.timed("evaluation"):
            measurement.evaluate(request)
        with measurement.timed("samples"):
            measurement.generate()
    publish(run, report, listener)
    return report


@dataclass(frozen=True)
class _Measurement:
    """Measure the result of a finished run beside the models that it is compared with.

    Args:
        run, execution, permissions, listener: as for :func:`measure`.
        report: of the run; receives the figures.
        compared: the models that the result is compared with.
    """

    run: RunDirectory
    report: Report
    compared: Compared
    execution: Execution
    permissions: Permissions
    listener: Listener

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to the report's phases, unless its work was done before."""
        split, begin = self.report.totals.time_split, time.perf_counter()
        done = bool(self.report.generations if phase == "samples" else self.report.evaluations)
        yield
        if not done:
            split[phase] = split.get(phase, 0.0) + time.perf_counter() - begin

    def evaluate(self, request: EvaluationRequest) -> None:
        """Measure perplexity and divergence, and keep them with the report at once."""
        run, report, compared, permissions = self.run, self.report, self.compared, self.permissions
        assert report.calibration is not None
        compare_texts(report, request.data, self.listener, trained=False)
        seqlen = request.seqlen or report.calibration.seqlen
        cut = load_windows(request.data, permissions.at(run.model).tokenizer(), seqlen, request.windows)
        settings = {
            "device": self.execution.device,
            "dtype": report.recipe.get("dtype", "auto"),
            "batch_size": self._batch_size(seqlen),
            "memory_limit": self.execution.memory_limit,
            # What the run has made is not lost for a warning.
            "warn": lambda sentence: add_warning(report, sentence, self.listener),
            "tick": self.listener.tick,
            **permissions.keywords(),
        }
        measured = (
            found for found in report.evaluations if found.perplexity and found.perplexity.text_sha256 == cut.sha256
        )
        found = next(measured, None)
        if found is None:
            both = "dense and the " if compared.dense else ""
            self.listener.say(f"evaluating the {both}{DONE[report.kind]} model on {request.data}")
            found = run_evaluation(run.model, cut, against=compared.dense, **settings)
            report.evaluations.append(found)
            run.write_report(report)
        if evaluate_input(report, compared, found, self.listener, data=cut, **settings):
            run.write_report(report)

    def generate(self) -> None:
        """Continue a few prompts with the dense model, the run's result, and the model before recovery."""
        if self.report.generations:
            return
        compared = self.compared
        models = {"dense": compared.dense, "pruned": compared.before, "recovered": self.run.model}
        if compared.before is None:
            models = {"dense": compared.dense, "pruned": self.run.model}
        faults = FistaPrunerError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError
        try:
            self.report.generations = generate_side_by_side(
                {name: folder for name, folder in models.items() if folder is not None and folder.exists()},
                choose_device(self.execution.device),
                memory_limit=self.execution.memory_limit,
                tick=self.listener.tick,
                **self.permissions.keywords(),
            )
        except faults as error:  # of the models' own code: an example is no figure
            self.listener.say(f"no examples: {type(error).__name__}: {one_line(error)}")

    def _batch_size(self, seqlen: int) -> int:
        """Choose the windows in one pass: the default, or fewer that were asked for or come down to.

        What the plan of a training run came down to says nothing of a forward pass alone.
        """
        run, report, execution = self.run, self.report, self.execution
        device = choose_device(execution.device)
        sizes = [windows_at_once(seqlen, device), *filter(None, [execution.batch_size])]
        if isinstance(run, PruneDirectory) and (record := run.record()) is not None and report.calibration is not None:
            numerics = record.decision.numerics
            if numerics.batch_size < windows_at_once(report.calibration.seqlen, torch.device(numerics.device)):
                sizes.append(numerics.batch_size)
            if device.type == "cuda" and (reduced := run.journal.reduced(record.fingerprint or "")) is not None:
                sizes.append(reduced)
        return min(sizes)


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


def compare_texts(report: Report, data: str, listener: Listener, *, trained: bool = True) -> tuple[str, ...]:
    """Warn of evaluation text that is also calibration or training text of a run or of those before it.

    Args:
        report: of the run; receives the warnings.
        data: the evaluation text.
        listener: receives them, too.
        trained: compare the run's own training text; the documents that it took of it are compared where it is cut.

    Returns:
        The warnings, those that the report had before among them.
    """
    before = [] if report.lineage is None else report.lineage.stages
    stages = [(stage.kind, stage.settings) for stage in before if stage.fingerprint != report.fingerprint]
    if trained or report.kind == "prune":
        stages.append((report.kind, report.recipe))
    calibration, training = dict[str, None](), dict[str, None]()
    for kind, settings in stages:
        with suppress(FistaPrunerError):  # settings of another release
            if kind == "prune":
                calibration |= dict.fromkeys(Recipe.build(settings).calibration.sources.values())
            elif kind == "recover":
                training |= dict.fromkeys(RecoverRecipe.build(settings).data.texts)
    found = []
    for sources, trains in ((calibration, False), (training, True)):
        with suppress(FistaPrunerError):  # a file that cannot be read any more cannot be compared
            if shared := shared_text(sources, absolute(data), training=trains):
                add_warning(report, shared, listener)
                found.append(shared)
    return tuple(found)


def evaluate_input(
    report: Report,
    compared: Compared,
    found: Evaluation,
    listener: Listener,
    **settings: Any,
) -> bool:
    """Find or measure the figures of the model that training began with, on the windows of its result.

    They are taken from the report of the run that made it, where they were measured there against the same dense model;
    else they are measured. Scores of tasks are taken only.

    Args:
        report: receives them.
        compared: the models.
        found: the figures of the result.
        listener: receives progress.
        **settings: as for :func:`fistapruner.evaluate`.

    Returns:
        Whether the report has changed.
    """
    if report.recovery is None or compared.before is None:
        return False
    others = _of_input(report, compared.before)
    added = add_scores(report.recovery.before, report.evaluations, others)
    if found.perplexity is None:
        return added
    known = next((one for one in report.recovery.before if same_comparison(one, found)), None)
    changed = known is None
    if known is None:
        known = next((one for one in others if same_comparison(one, found)), None)
    if known is None:
        if not compared.before.exists():
            listener.say(f"no figures of the model before {report.training}, which is not at {compared.before}")
            return added
        listener.say(f"evaluating the model before {report.training} on {found.perplexity.data}")
        known = run_evaluation(compared.before, against=found.against, **settings)
    if changed:
        report.recovery.before = [*(one for one in report.recovery.before if not same_text(one, found)), known]
    if gain := gain_text(known, found, report.training):
        listener.say(gain)
    return changed or added


def _of_input(report: Report, before: Path) -> list[Evaluation]:
    """Return what was measured on a recovery run's input, by the run that made it."""
    origin, stages = input_run(str(before)), report.lineage.stages if report.lineage else []
    if origin is None or len(stages) < 2:
        return []
    try:
        made = load_run(origin.folder)
    except FistaPrunerError:
        return []
    return made.evaluations if made.fingerprint == stages[-2].fingerprint else []


def publish(run: RunDirectory, report: Report, listener: Listener) -> None:
    """Write a finished run's ``report.json``, its model card, and the page if it can be drawn."""
    update_stage(report)
    run.write_report(report)
    write_lineage(run.model, report.lineage)
    write_text_atomic(run.model / CARD, model_card(report))
    try:
        listener.say(f"report: {write_page(run.folder)}")
    except MissingExtraError as error:
        listener.say(str(error))

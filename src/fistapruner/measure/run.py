"""Measure a finished run, at its end or when asked, and keep the figures with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import A_MODEL, A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text
from ..models.record import lost_structure, read_pruning_record
from ..models.source import Permissions
from ..reporting.model_card import model_card
from ..reporting.page import write_page
from ..runs.directory import CARD, RunDirectory, finished_run
from ..runs.labels import DONE
from ..runs.lineage import Dense, dense_of, input_run, update_stage, write_lineage
from ..runs.lock import hold
from ..runs.log import Listener
from ..runs.records import Evaluation, Generation, Report, is_run, load_run
from ..runs.settled import EvaluationRequest, absolute, changed_files
from ..runtime.devices import choose_device
from ..runtime.files import write_text_atomic
from ..runtime.machine import describe_machine, now
from ..runtime.numerics import undisturbed
from ..runtime.show import shell_line
from ..settings.base import Execution
from ..settings.prune import Recipe
from ..settings.train import RecoverRecipe
from ..text.sources import document_hash, source_documents
from ..text.training import shared_documents, training_documents
from .data import Windows, evaluation_documents, load_windows
from .evaluate import evaluate as run_evaluation
from .generations import generate_side_by_side
from .speed import Speeds, packed_bytes
from .speed import bench as bench_forms


@dataclass(frozen=True)
class Compared:
    """The models that the result of a run is compared with.

    Args:
        dense: the dense model, whose folder may be gone; None where it is not known.
        before: folder of the pruned model that a run that trains began with; None for a pruning run.
    """

    dense: Dense | None
    before: Path | None

    @classmethod
    def of(cls, run: RunDirectory) -> Compared:
        """Find them in what the run has decided."""
        record = run.record()
        before = None if record is None or record.kind == "prune" else record.decision.folder
        return cls(dense_of(run), before)

    @property
    def folder(self) -> Path | None:
        """Folder of the dense model; None where it is gone."""
        return self.dense.folder if self.dense is not None and self.dense.folder.exists() else None

    def reference(self, run: str | Path, permissions: Permissions, named: str | Path | None = None) -> str | Path:
        """Return the dense model, where a user has named it or where it was.

        Raises:
            FistaPrunerError: it is not there, or has other files than the run began with.
        """
        model = self.folder if named is None else named
        if model is None:
            where = f"not at {self.dense.folder}" if self.dense else "not known"
            raise FistaPrunerError(f"{run}: the model it was made from is {where}: say where it is with --against")
        noted = self.dense.stamps if self.dense is not None else ()
        if noted and (why := changed_files(noted, permissions.find(model))):
            other = shell_line("evaluate", Path(run) / "model", "--against", model)
            raise FistaPrunerError(
                f"{why} since {run} began: name its dense model with --against, or compare with another by '{other}'"
            )
        return model


def measure(
    run: RunDirectory,
    report: Report,
    request: EvaluationRequest | None,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
) -> Report:
    """Evaluate ``RUN/model`` beside the dense model, and write report, model card and page.

    The model that training began with is evaluated on the same windows. What the report already holds of these is not
    measured again.

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
        begin = time.perf_counter()
        if _evaluated(run, report, request, compared, execution, permissions, listener):
            report.totals.time_split["evaluation"] = time.perf_counter() - begin
            run.write_report(report)
        if not report.generations:
            begin = time.perf_counter()
            report.generations = _samples(run, compared, execution, permissions, listener)
            report.totals.time_split["samples"] = time.perf_counter() - begin
    publish(run, report, listener)
    return report


def _evaluated(
    run: RunDirectory,
    report: Report,
    request: EvaluationRequest,
    compared: Compared,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
) -> bool:
    """Measure what the report does not have; arguments as for :func:`measure`.

    Returns:
        Whether the report has changed.
    """
    assert report.calibration is not None
    if compared.folder is None and not any(found.reference for found in report.evaluations):
        where = "is not known" if compared.dense is None else f"is not at {compared.dense.folder}"
        add = shell_line("evaluate", run.folder, "--against", "DENSE")
        listener.say(f"no figures of the dense model, which {where}: '{add}' adds them")
    for warning in seen_texts(report, request.data, own=report.kind == "prune"):
        add_warning(report, warning, listener)
    seqlen = request.seqlen or report.calibration.seqlen
    cut = load_windows(request.data, permissions.at(run.model).tokenizer(), seqlen, request.windows)
    settings = {
        "device": execution.device,
        "dtype": report.recipe.get("dtype", "auto"),
        "batch_size": execution.batch_size,
        "memory_limit": execution.memory_limit,
        "tick": listener.tick,
        **permissions.keywords(),
    }
    found = next(
        (one for one in report.evaluations if one.perplexity and one.perplexity.text_sha256 == cut.sha256), None
    )
    if new := found is None:
        both = "dense and the " if compared.folder else ""
        listener.say(f"evaluating the {both}{DONE[report.kind]} model on {request.data}")
        found = run_evaluation(run.model, cut, against=compared.folder, **settings)
        report.evaluations.append(found)
        run.write_report(report)
    return _add_input(report, compared, found, listener, data=cut, **settings) or new


def _samples(
    run: RunDirectory, compared: Compared, execution: Execution, permissions: Permissions, listener: Listener
) -> list[Generation]:
    """Continue a few prompts with the dense model, the run's result, and the model before training."""
    models = {"dense": compared.folder, "pruned": compared.before or run.model}
    models |= {} if compared.before is None else {"recovered": run.model}
    try:
        return generate_side_by_side(
            {name: folder for name, folder in models.items() if folder is not None and folder.exists()},
            choose_device(execution.device),
            memory_limit=execution.memory_limit,
            tick=listener.tick,
            **permissions.keywords(),
        )
    except Exception as error:  # of the models' own code: an example is no figure
        listener.say(f"no examples: {type(error).__name__}: {one_line(error)}")
        return []


def add_warning(report: Report, sentence: str, listener: Listener) -> None:
    """Add a warning to a report and say it, unless it is there."""
    if sentence not in report.warnings:
        listener.say(sentence)
        report.warnings.append(sentence)


def publish(run: RunDirectory, report: Report, listener: Listener) -> None:
    """Write a finished run's ``report.json``, its model card, and the page if it can be drawn."""
    report.folder = str(run.folder)
    update_stage(report)
    run.write_report(report)
    write_lineage(run.model, report.lineage)
    write_text_atomic(run.model / CARD, model_card(report))
    try:
        listener.say(f"report: {write_page(run.folder)}")
    except MissingExtraError as error:
        listener.say(str(error))


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


def seen_texts(report: Report, data: str, *, own: bool = True) -> list[str]:
    """Warn of evaluation text that is also calibration or training text of a run or of those before it.

    Args:
        report: of the run.
        data: the evaluation text.
        own: compare the run's own text too; a run that trains has compared the documents that it took of it.
    """
    stages = [] if report.lineage is None else report.lineage.stages
    runs = [(stage.kind, stage.settings) for stage in stages if stage.fingerprint != report.fingerprint]
    sources: dict[str, list[str]] = {"prune": [], "recover": []}
    for kind, settings in [*runs, *([(report.kind, report.recipe)] if own else [])]:
        with suppress(FistaPrunerError):  # settings of another release
            if kind == "prune":
                sources[kind] += Recipe.build(settings).calibration.sources.values()
            elif kind == "recover":
                sources[kind] += RecoverRecipe.build(settings).data.texts
    found = []
    for what, files in sources.items():
        with suppress(FistaPrunerError):  # a file that cannot be read any more cannot be compared
            found.append(shared_text(dict.fromkeys(files), absolute(data), training=what == "recover"))
    return [warning for warning in found if warning]


def _add_input(report: Report, compared: Compared, found: Evaluation, listener: Listener, **settings: Any) -> bool:
    """Add the figures of the model that training began with, on the windows and items of its result.

    They are taken from the report of the run that made it, where they were measured there; else perplexity is measured.

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
    before = report.recovery.before
    items = {task.measured_on for task in found.tasks}
    for one in _of_input(report, compared.before):
        alike = replace(one, tasks=tuple(task for task in one.tasks if task.measured_on in items))
        before = put_in_place(before, alike if _same_text(one, found) else _without_text(alike))
    if found.perplexity is not None and not any(_same_text(one, found) for one in before):
        if compared.before.exists():
            listener.say(f"evaluating the model before {report.training} on {found.perplexity.data}")
            before = put_in_place(before, run_evaluation(compared.before, against=found.against, **settings))
        else:
            listener.say(f"no figures of the model before {report.training}, which is not at {compared.before}")
    changed = before != report.recovery.before
    report.recovery.before = before
    return changed


def _of_input(report: Report, before: Path) -> list[Evaluation]:
    """Return what was measured on the input of a run that trains, by the run that made it."""
    origin, stages = input_run(str(before)), report.lineage.stages if report.lineage else []
    if origin is None or len(stages) < 2:
        return []
    try:
        made = load_run(origin.folder)
    except FistaPrunerError:
        return []
    return made.evaluations if made.fingerprint == stages[-2].fingerprint else []


def put_in_place(earlier: Sequence[Evaluation], found: Evaluation) -> list[Evaluation]:
    """Put an evaluation in the place of the earlier one on its text, or last; what it measures again goes."""
    again = {(task.task, task.metric) for task in found.tasks}
    kept: list[Evaluation] = []
    place = None
    for evaluation in earlier:
        rest = replace(evaluation, tasks=tuple(t for t in evaluation.tasks if (t.task, t.metric) not in again))
        if _same_text(evaluation, found):
            rest, place = _without_text(rest), len(kept)
        if rest.perplexity is not None or rest.tasks:
            kept.append(rest)
    if found.perplexity is not None or found.tasks:
        kept.insert(len(kept) if place is None else place, found)
    return kept


def _without_text(found: Evaluation) -> Evaluation:
    """Return an evaluation with its tasks only."""
    return replace(found, perplexity=None, reference=None, divergence=None)


def _same_text(a: Evaluation, b: Evaluation) -> bool:
    """Check that two evaluations are of the same windows in the same precision."""
    if a.perplexity is None or b.perplexity is None:
        return False
    return a.perplexity.measured_on == b.perplexity.measured_on


def evaluate(
    model: str | Path,
    data: str | Path | Windows | None = None,
    *,
    against: str | Path | None = None,
    listener: Listener | None = None,
    keep: Callable[[Evaluation], None] = lambda found: None,
    **settings: Any,
) -> Evaluation:
    """Measure a model, or a finished run against its dense model, whose figures are kept with the run.

    Figures of a run go into ``report.json``, the page and the model card, in the place of earlier ones of the same
    tokens and precision, or of the same task. The model that training began with is evaluated on the same text too,
    unless its own run has done that.

    Args:
        model: run directory, hub id, local folder, packed folder, GGUF file, or ``smollm2``.
        data: text for perplexity, or windows of it; None measures tasks only.
        against: the dense model; of a run by default the one that was pruned.
        listener: receives progress.
        keep: called with what is measured before the tasks begin; figures of a run are kept with it.
        **settings: ``seqlen``, ``windows``, ``tasks``, ``tasks_dir``, ``limit``, ``device``, ``dtype``, ``batch_size``,
            ``memory_limit``, ``bos``, ``allow_pickle``, ``trust_remote_code``, as the options of
            ``fistapruner evaluate``.

    Returns:
        What was measured, printed as ``fistapruner evaluate`` prints it.

    Raises:
        FistaPrunerError: bad input, named; a run that is not finished, or whose dense model is gone or has changed.
        MissingExtraError: a data set needs the extra ``data``, tasks need the extra ``eval``.
    """
    listener = listener or Listener()
    if not isinstance(model, (str, Path)) or not is_run(model):
        return run_evaluation(model, data, **{"against": against, "tick": listener.tick, "keep": keep, **settings})
    data = None if data is None else path_text("data", data, A_TEXT)
    against = None if against is None else path_text("against", against, A_MODEL)
    permissions = Permissions(settings.get("allow_pickle", False), settings.get("trust_remote_code", False))
    with hold(Path(model)):
        run, report = finished_run(Path(model))
        compared = Compared.of(run)
        against = compared.reference(model, permissions, against)
        listener.tick("opening and checking the models", 0, 1)
        shared = [] if data is None else seen_texts(report, data)
        for warning in shared:
            add_warning(report, warning, listener)

        def keep_with_run(found: Evaluation) -> None:
            for warning in found.warnings:
                add_warning(report, warning, listener)
            report.evaluations = put_in_place(report.evaluations, replace(found, warnings=(*shared, *found.warnings)))
            text = {name: value for name, value in settings.items() if name not in ("tasks", "tasks_dir", "limit")}
            _add_input(report, compared, found, listener, data=data, **text)
            publish(run, report, listener)

        found = run_evaluation(run.model, data, against=against, keep=keep_with_run, **settings)
        keep_with_run(found)
    return replace(found, warnings=(*shared, *found.warnings))


@undisturbed()
def bench(model: str | Path, *, listener: Listener | None = None, **settings: Any) -> Speeds:
    """Measure speed, memory and sizes of a pruned model, or of a finished run, which keeps them.

    Figures of a run go into ``report.json``, the page and the model card, in the place of earlier ones.

    Args:
        model: run directory, or checkpoint folder.
        listener: receives progress.
        **settings: ``batch``, ``prompt``, ``tokens``, ``runs``, ``threads``, ``allow_pickle``, as the options of
            ``fistapruner bench``.

    Returns:
        One speed for each form, printed as a table.

    Raises:
        FistaPrunerError: no pruned model, a number that is too small, or a form that cannot be loaded or run.
    """
    listener = listener or Listener()
    if not isinstance(model, (str, Path)) or not is_run(model):
        return Speeds(bench_forms(model, **{"tick": listener.tick, **settings}))
    with hold(Path(model)):
        (run, report), before = finished_run(Path(model)), None
        if lost_structure(read_pruning_record(run.model)):
            try:
                before = Compared.of(run).reference(model, Permissions(settings.get("allow_pickle", False)))
            except FistaPrunerError as error:
                listener.say(f"the dense model is not measured: {error}")
        found = Speeds(bench_forms(run.model, before=before, tick=listener.tick, **settings))
        machine = describe_machine(torch.device("cpu")).model_dump(mode="json")
        report.speed = {**found.to_json(), "machine": machine, "measured": now()}
        report.totals.compressed_bytes = packed_bytes(found)
        publish(run, report, listener)
    return found

"""Measure a finished run, at its end or when asked, and keep the figures with it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import A_MODEL, A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text
from ..models.gguf import convert_gguf
from ..models.record import lost_structure, read_pruning_record
from ..models.source import Permissions
from ..reporting.measured import INT8, gain_text
from ..reporting.model_card import model_card
from ..reporting.page import write_page
from ..runs.directory import CARD, RunDirectory, finished_run
from ..runs.labels import DONE
from ..runs.lineage import Dense, dense_of, input_run, trained_on, update_stage, write_lineage
from ..runs.lock import hold
from ..runs.log import Listener
from ..runs.records import Evaluation, Perplexity, Report, TaskResult, is_run, load_run
from ..runs.settled import EvaluationRequest, absolute, changed_files, stamps
from ..runtime.devices import choose_device
from ..runtime.files import temporary_folder, write_text_atomic
from ..runtime.machine import describe_machine, now
from ..runtime.numerics import undisturbed
from ..runtime.show import shell_line
from ..settings.execution import Execution
from ..settings.prune import Recipe
from ..settings.train import RecoverRecipe
from ..text.sources import document_hash, source_documents
from ..text.training import shared_documents, training_documents
from .data import Windows, evaluation_documents, load_windows
from .evaluate import check_request
from .evaluate import evaluate as run_evaluation
from .generations import generate_side_by_side
from .speed import Speed, Speeds, Variant, packed_bytes
from .speed import bench as bench_forms
from .speed import record as speed_record
from .streaming import KeptStates


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

    def changed(self, permissions: Permissions) -> str | None:
        """Say which file of the dense model has changed since the run; None where none has, or none was noted."""
        if self.dense is None or not self.dense.stamps:
            return None
        return changed_files(self.dense.stamps, permissions.at(self.dense.folder))


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
        if compared.folder is None and not any(found.reference for found in report.evaluations):
            where = "is not known" if compared.dense is None else f"is not at {compared.dense.folder}"
            add = f"'{shell_line('evaluate', run.folder, '--against', 'DENSE')}' adds them"
            listener.say(f"no figures of the dense model, which {where}: {add}")
        _evaluate(run, report, request, compared, execution, permissions, listener)
        if not report.generations:
            begin = time.perf_counter()
            report.generations = _samples(run, compared, execution, permissions, listener)
            report.totals.time_split["samples"] = time.perf_counter() - begin
    publish(run, report, listener)
    return report


def _evaluate(
    run: RunDirectory,
    report: Report,
    request: EvaluationRequest,
    compared: Compared,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
) -> None:
    """Measure perplexity and divergence, and keep them with the report at once.

    Arguments as for :func:`measure`.
    """
    assert report.calibration is not None
    begin = time.perf_counter()
    compare_texts(report, request.data, listener, trained=False)
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
    known = (one for one in report.evaluations if one.perplexity and one.perplexity.text_sha256 == cut.sha256)
    found = next(known, None)
    if found is None:
        both = "dense and the " if compared.folder else ""
        listener.say(f"evaluating the {both}{DONE[report.kind]} model on {request.data}")
        found = run_evaluation(run.model, cut, against=compared.folder, **settings)
        report.evaluations.append(found)
        report.totals.time_split["evaluation"] = time.perf_counter() - begin
        run.write_report(report)
    if _evaluate_input(report, compared, found, listener, data=cut, **settings):
        report.totals.time_split["evaluation"] = time.perf_counter() - begin
        run.write_report(report)


def _samples(
    run: RunDirectory, compared: Compared, execution: Execution, permissions: Permissions, listener: Listener
) -> Any:
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


def _evaluate_input(report: Report, compared: Compared, found: Evaluation, listener: Listener, **settings: Any) -> bool:
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
    before, others = report.recovery.before, _of_input(report, compared.before)
    added = add_scores(before, report.evaluations, others)
    if found.perplexity is None:
        return added
    known = next((one for one in (*before, *others) if same_comparison(one, found)), None)
    if known is None:
        if not compared.before.exists():
            listener.say(f"no figures of the model before {report.training}, which is not at {compared.before}")
            return added
        listener.say(f"evaluating the model before {report.training} on {found.perplexity.data}")
        known = run_evaluation(compared.before, against=found.against, **settings)
    if gain := gain_text(known, found, report.training):
        listener.say(gain)
    if known in before:
        return added
    before[:] = [*(one for one in before if not _same_text(one, found)), known]
    return True


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
    """Put an evaluation in the place of the earlier one on its text, or last.

    What it measures again is left out of the others; a score on fewer items than an earlier one, of the new one.
    """
    scores = {(task.task, task.metric): task for one in earlier for task in one.tasks}
    found = replace(found, tasks=tuple(t for t in found.tasks if not _fuller(scores.get((t.task, t.metric)), t)))
    again = {(task.task, task.metric) for task in found.tasks}
    kept: list[Evaluation] = []
    place = None
    for evaluation in earlier:
        rest = replace(evaluation, tasks=tuple(t for t in evaluation.tasks if (t.task, t.metric) not in again))
        if _same_text(evaluation, found):
            rest = replace(rest, perplexity=None, reference=None, divergence=None)
            place = len(kept)
        if rest.perplexity is not None or rest.tasks:
            kept.append(rest)
    if found.perplexity is not None or found.tasks:
        kept.insert(len(kept) if place is None else place, found)
    return kept


def _fuller(old: TaskResult | None, new: TaskResult) -> bool:
    """Check that an earlier score is of more items than a new one, which is not of all items."""
    short = new.items != new.available
    return old is not None and new.items < old.items and (short or new.source != old.source)


def add_scores(before: list[Evaluation], evaluations: Iterable[Evaluation], others: Iterable[Evaluation]) -> bool:
    """Add scores of a run's input on the same items of its result's tasks; tell whether any are new.

    Args:
        before: evaluations of the input that the run has; receives them.
        evaluations: of the result.
        others: evaluations of the input by other runs.
    """
    wanted = {task.measured_on for one in evaluations for task in one.tasks}
    wanted -= {task.measured_on for one in before for task in one.tasks}
    count = len(before)
    for one in others:
        if tasks := tuple(task for task in one.tasks if task.measured_on in wanted):
            before.append(replace(one, perplexity=None, reference=None, divergence=None, tasks=tasks))
            wanted -= {task.measured_on for task in tasks}
    return len(before) > count


def same_comparison(a: Evaluation, b: Evaluation) -> bool:
    """Check that two evaluations are of the same windows, precision and dense model."""
    dense = [None if one.against is None else Path(one.against).resolve() for one in (a, b)]
    return dense[0] == dense[1] and _same_text(a, b)


def _same_text(a: Evaluation, b: Evaluation) -> bool:
    """Check that two evaluations are of the same windows in the same precision."""
    if a.perplexity is None or b.perplexity is None:
        return False
    return a.perplexity.measured_on == b.perplexity.measured_on


def evaluate(
    model: str | Path,
    data: str | Path | Windows | None = None,
    *,
    listener: Listener | None = None,
    keep: Callable[[Evaluation], None] | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a model, or a finished run against its dense model, whose figures are kept with the run.

    Args:
        model: run directory, hub id, local folder, packed folder, GGUF file, or ``smollm2``.
        data: text for perplexity, or windows of it; None measures tasks only.
        listener: receives progress.
        keep: called with what is measured before the tasks begin; figures of a run are kept with it.
        **settings: ``seqlen``, ``windows``, ``against``, ``tasks``, ``tasks_dir``, ``limit``, ``device``, ``dtype``,
            ``batch_size``, ``memory_limit``, ``bos``, ``allow_pickle``, ``trust_remote_code``, as the options of
            ``fistapruner evaluate``.

    Returns:
        What was measured, printed as ``fistapruner evaluate`` prints it.

    Raises:
        FistaPrunerError: bad input, named; a run that is not finished, or whose dense model is gone or has changed.
        MissingExtraError: a data set needs the extra ``data``, tasks need the extra ``eval``.
    """
    if isinstance(model, (str, Path)) and is_run(model):
        return evaluate_run(model, data, listener=listener, **settings)  # type: ignore[arg-type]
    settings = {"tick": (listener or Listener()).tick, "keep": keep or (lambda found: None), **settings}
    return run_evaluation(model, data, **settings)


def bench(model: str | Path, *, listener: Listener | None = None, **settings: Any) -> Speeds:
    """Measure speed, memory and sizes of a pruned model, or of a finished run, which keeps them.

    Args:
        model: run directory, or checkpoint folder.
        listener: receives progress.
        **settings: ``batch``, ``prompt``, ``tokens``, ``runs``, ``threads``, ``gguf``, ``allow_pickle``, as the options
            of ``fistapruner bench``.

    Returns:
        One speed for each form, printed as a table.

    Raises:
        FistaPrunerError: no pruned model, a number that is too small, or a form that cannot be loaded or run.
        MissingExtraError: GGUF files need the extra ``bench``.
    """
    if isinstance(model, (str, Path)) and is_run(model):
        return bench_run(model, listener=listener, **settings)
    return Speeds(bench_forms(model, tick=(listener or Listener()).tick, **settings))


def evaluate_run(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    against: str | Path | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a finished run against its dense model, and keep the result with the run.

    The figures go into ``report.json``, the page and the model card, in the place of earlier ones of the same tokens
    and precision, or of the same task. If tasks fail, the perplexity before them is there. The model that training
    began with is evaluated on the same text too, unless its own run has done that. Figures against another model than
    the run's own dense model are returned only.

    Args:
        folder: the run directory.
        data: text for perplexity, see ``fistapruner.evaluate``; None measures tasks only.
        against: the dense model; default is the one that was pruned.
        listener: receives progress.
        **settings: as for ``fistapruner.evaluate``, less ``keep`` and ``warn``.

    Returns:
        What was measured.

    Raises:
        FistaPrunerError: not a finished run, its dense model is gone or has changed, or bad settings.
    """
    data = None if data is None else path_text("data", data, A_TEXT)
    against = None if against is None else path_text("against", against, A_MODEL)
    check_request(data, **settings)
    permissions = Permissions(settings.get("allow_pickle", False), settings.get("trust_remote_code", False))
    with _finished(folder) as (run, report):
        compared, listener = Compared.of(run), listener or Listener()
        kept = against is None or not _is_another(against, compared.dense, permissions)
        if against is None:
            against = compared.folder
            if against is None:
                where = f"not at {compared.dense.folder}" if compared.dense else "not known"
                raise FistaPrunerError(
                    f"{folder}: the model it was made from is {where}: say where it is with --against"
                )
            if why := compared.changed(permissions):
                raise FistaPrunerError(f"{why} since {folder} began: name the dense model with --against")
        elif not kept:
            own = compared.dense and compared.dense.folder
            listener.say(f"{against} is not the dense model of this run, {own}: the figures are not kept with the run")
        if (settings.get("tasks") or settings.get("tasks_dir")) and (warning := trained_on(report.lineage)) is not None:
            add_warning(report, warning, listener)
        listener.tick("opening and checking the models", 0, 1)  # the sentences above are not what takes time
        shared = () if data is None else compare_texts(report, data, listener)

        def keep(found: Evaluation) -> None:
            if kept:
                found = replace(found, warnings=(*shared, *found.warnings))
                report.evaluations = put_in_place(report.evaluations, found)
                publish(run, report, listener)

        found = run_evaluation(run.model, data, against=against, keep=keep, **settings)
        keep(found)
        text = {name: value for name, value in settings.items() if name not in ("tasks", "tasks_dir", "limit")}
        if kept and _evaluate_input(report, compared, found, listener, data=data, **text):
            publish(run, report, listener)
    return replace(found, warnings=(*shared, *found.warnings))


@undisturbed()
def bench_run(folder: str | Path, *, listener: Listener | None = None, **settings: Any) -> Speeds:
    """Measure speed and sizes of the checkpoint of a finished run, and keep the result with the run.

    The figures go into ``report.json``, the page and the model card, in the place of earlier ones. Every form runs in a
    process of its own.

    Args:
        folder: the run directory.
        listener: receives progress.
        **settings: ``batch``, ``prompt``, ``tokens``, ``runs``, ``threads``, ``gguf``, as the options of
            ``fistapruner bench``.

    Returns:
        One speed for each form, printed as a table. Forms with the run's own weights have the quality that the run was
        found to have; GGUF files and int8 values are evaluated on the same windows.

    Raises:
        FistaPrunerError: not a finished run, a number that is too small, it does not fit disk or memory, or a file is
            no GGUF file.
        MissingExtraError: GGUF files need the extra ``bench``.
    """
    permissions, listener = Permissions(settings.get("allow_pickle", False)), listener or Listener()
    with _finished(folder) as (run, report):
        compared, before = Compared.of(run), None
        if lost_structure(read_pruning_record(run.model)):
            before = compared.folder
        if before is not None and (why := compared.changed(permissions)):
            listener.say(f"{why} since {folder} began: the dense model is not measured")
            before = None
        machine = describe_machine(torch.device("cpu")).model_dump(mode="json")

        def keep(found: list[Speed]) -> None:
            report.speed = {**speed_record(found), "machine": machine, "measured": now()}
            report.totals.compressed_bytes = packed_bytes(found)
            publish(run, report, listener)

        judge = _Judge(run, report, compared, listener, keep, permissions)
        found = bench_forms(run.model, before=before, quality=judge.quality, tick=listener.tick, **settings)
        keep(found)
    return Speeds(found)


@dataclass(frozen=True)
class _Judge:
    """Adds the quality of a run's forms, and of GGUF files beside them, to their speeds.

    Args:
        run, report, compared, listener: of the run.
        keep: called with the speeds before evaluations, which take longer.
        permissions: what the models' files may do.
    """

    run: RunDirectory
    report: Report
    compared: Compared
    listener: Listener
    keep: Callable[[list[Speed]], None]
    permissions: Permissions

    def quality(self, variants: list[Variant], speeds: list[Speed]) -> list[Speed]:
        """Return the speeds with perplexity and divergence, where these are known or can be measured.

        Forms that hold the run's weights, or the dense model's, have the figures of the run's first evaluation against
        the dense model; those that round them in a narrower precision have none. int8 values and GGUF files are
        evaluated.
        """
        own = next((one for one in self.report.evaluations if one.perplexity and one.divergence), None)
        evaluated = [number for number, one in enumerate(variants) if one.is_gguf or one.name == INT8]
        names = ", ".join(variants[number].name for number in evaluated)
        if own is None or own.perplexity is None or own.reference is None or own.divergence is None:
            if evaluated:
                self.listener.say(f"no quality of {names}: the run was not evaluated against its dense model")
            return speeds
        stored = self.permissions.at(self.run.model).checkpoint().dtype
        for number, variant in enumerate(variants):
            passes = stored if variant.dtype is None else getattr(torch, variant.dtype)
            if number not in evaluated and torch.promote_types(stored, passes) == passes:
                whole = variant.name.startswith("dense ")
                known = (own.reference.perplexity, 0.0) if whole else (own.perplexity.perplexity, own.divergence.kl)
                speeds[number] = speeds[number].judged(*known)
        if not evaluated:
            return speeds
        self.keep(speeds)
        try:
            dense, cut = self._reference(own.perplexity)
        except FistaPrunerError as error:
            self.listener.say(f"no quality of {names}: {error}")
            return speeds
        with temporary_folder() as scratch, closing(KeptStates(dense, Path(scratch) / "states")) as kept:
            for number in evaluated:
                variant = variants[number]
                folder = Path(scratch) / variant.folder.stem if variant.is_gguf else variant.folder
                self.listener.say(f"evaluating {variant.name} on {cut.data}")
                try:
                    if variant.is_gguf:
                        convert_gguf(variant.folder, folder)
                    settings: dict[str, Any] = {"dtype": own.perplexity.dtype, "tick": self.listener.tick}
                    found = run_evaluation(
                        folder, cut, against=dense, kept=kept, **settings, **self.permissions.keywords()
                    )
                except FistaPrunerError as error:
                    self.listener.say(f"no quality of {variant.name}: {error}")
                    continue
                finally:
                    if variant.is_gguf:
                        shutil.rmtree(folder, ignore_errors=True)
                assert found.perplexity is not None
                assert found.divergence is not None
                speeds[number] = speeds[number].judged(found.perplexity.perplexity, found.divergence.kl)
        return speeds

    def _reference(self, measured: Perplexity) -> tuple[Path, Windows]:
        """Find the dense model that an evaluation of the run is against, and cut its windows again.

        Raises:
            FistaPrunerError: the model or the text is gone, or has changed.
        """
        if (dense := self.compared.folder) is None:
            raise FistaPrunerError("the dense model is not at hand")
        if changed := self.compared.changed(self.permissions):
            raise FistaPrunerError(f"{changed} since {self.run.folder} began")
        record = self.run.record()
        request = None if record is None else record.decision.evaluation
        tokenizer = self.permissions.at(self.run.model).tokenizer()
        for data in dict.fromkeys([measured.data if request is None else request.data, measured.data]):
            with suppress(FistaPrunerError):
                cut = load_windows(data, tokenizer, measured.seqlen, measured.windows, measured.bos)
                if cut.sha256 == measured.text_sha256:
                    return dense, cut
        raise FistaPrunerError(f"the text {measured.data} is not at hand as it was")


@contextmanager
def _finished(folder: str | Path) -> Iterator[tuple[RunDirectory, Report]]:
    """Hold a finished run, so that no other process writes it meanwhile; yields it and its report."""
    if not is_run(folder):
        raise FistaPrunerError(f"{folder} is not a run: it has neither run.json nor report.json")
    with hold(Path(folder)):
        yield finished_run(Path(folder))


def _is_another(model: str | Path, dense: Dense | None, permissions: Permissions) -> bool:
    """Tell whether a model has other files than the dense model of a run; False where that is not known.

    Args:
        model: as the user named it.
        dense: of the run; where no checksums of its files were noted, they are taken from its folder.
        permissions: what the models' files may do.

    Raises:
        FistaPrunerError: the model cannot be opened.
    """
    if dense is None:
        return False
    noted = dense.stamps
    if not noted and dense.folder.exists():
        noted = tuple(stamps(permissions.at(dense.folder).checkpoint()))
    return bool(noted) and changed_files(noted, permissions.find(model)) is not None

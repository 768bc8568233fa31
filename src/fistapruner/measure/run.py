"""Measure a finished run, at its end or when asked, and keep the figures with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import A_MODEL, A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text
from ..models.record import lost_structure, read_pruning_record
from ..models.source import Permissions
from ..reporting.measured import speeds_text
from ..reporting.model_card import model_card
from ..reporting.page import write_page
from ..runs.directory import CARD, RunDirectory, finished_run
from ..runs.lineage import Dense, dense_of, input_run, update_stage, write_lineage
from ..runs.log import Listener, hold
from ..runs.records import DONE, Evaluation, Generation, Report, is_run, load_run
from ..runs.settled import EvaluationRequest, absolute, changed_files
from ..runtime.devices import choose_device
from ..runtime.files import write_text_atomic
from ..runtime.machine import describe_machine, now
from ..runtime.numerics import undisturbed
from ..runtime.show import shell_line
from ..settings.base import Execution
from ..text.sources import document_hash, source_documents
from ..text.training import training_documents
from .data import Windows, evaluation_documents, load_windows
from .evaluate import evaluate as run_evaluation
from .generations import generate_side_by_side
from .speed import Speed, kernel_name
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

    @property
    def gone(self) -> str:
        """Say why there is no dense model."""
        return f"is not at {self.dense.folder}" if self.dense is not None else "is not known"

    def reference(self, run: Path, permissions: Permissions, named: str | None = None) -> str | Path:
        """Return the dense model, where a user has named it or where it was.

        Raises:
            FistaPrunerError: it is not there, or has other files than the run began with.
        """
        model = named or self.folder
        if model is None:
            raise FistaPrunerError(f"{run}: the model it was made from {self.gone}: say where it is with --against")
        noted = self.dense.stamps if self.dense is not None else ()
        if noted and (why := changed_files(noted, permissions.find(model))):
            other = shell_line("evaluate", run / "model", "--against", model)
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
        compared, begin = Compared.of(run), time.perf_counter()
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
    """Measure what the report does not have, for :func:`measure`; return whether there was anything."""
    assert report.calibration is not None
    if compared.folder is None and not any(found.reference for found in report.evaluations):
        add = shell_line("evaluate", run.folder, "--against", "DENSE")
        listener.say(f"no figures of the dense model, which {compared.gone}: '{add}' adds them")
    settled = run.begun_record().decision.evaluation
    own = settled is None or settled.data != request.data  # else it was compared before the long work
    for warning in seen_texts(report, request.data, own=own):
        add_warning(report, warning, listener)
    seqlen = request.seqlen or report.calibration.seqlen
    cut = load_windows(request.data, permissions.at(run.model).tokenizer(), seqlen, request.windows)
    again: Callable[..., Evaluation] = partial(
        run_evaluation,
        data=cut,
        device=execution.device,
        dtype=report.recipe.get("dtype", "auto"),
        batch_size=execution.batch_size,
        memory_limit=execution.memory_limit,
        tick=listener.tick,
        **permissions.keywords(),
    )
    texts = [one for one in report.evaluations if one.perplexity and one.perplexity.text_sha256 == cut.sha256]
    if not texts:
        both = "dense and the " if compared.folder else ""
        listener.say(f"evaluating the {both}{DONE[report.kind]} model on {request.data}")
        report.evaluations = put_in_place(report.evaluations, again(run.model, against=compared.folder))
        run.write_report(report)
    found = texts[0] if texts else report.evaluations[-1]
    return _add_input(report, compared, found, listener, again) or not texts


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
    """Warn that evaluation text has documents of calibration or training text; None where it has none.

    Known data sets, and Python's language reference, have parts of their own for both, so only files are compared.
    """
    files = [source for source in sources if Path(source).is_file()]
    if not files or not Path(data).is_file():
        return None
    read = training_documents if training else source_documents
    known = {document_hash(document) for file in files for document in read(file)}
    documents = evaluation_documents(data)
    shared = [document for document in documents if document_hash(document) in known]
    if not shared:
        return None
    return (
        f"{len(shared)} of the {len(documents)} documents of the evaluation text {data!r} are also in the "
        f"{'training' if training else 'calibration'} text (such as {' '.join(shared[0][:200].split())[:40]!r}): "
        "figures on it are too good"
    )


def seen_texts(report: Report, data: str, *, own: bool = True) -> list[str]:
    """Warn of evaluation text that is also text of the runs before one, or its own."""
    stages = report.lineage.stages if report.lineage else []
    runs = [(stage.kind, stage.settings) for stage in stages if stage.fingerprint != report.fingerprint]
    runs += [(report.kind, report.recipe)] if own else []
    found = []
    for kind, section in (("prune", "calibration"), ("recover", "data")):
        texts = [(settings.get(section) or {}).get("source") for verb, settings in runs if verb == kind]
        named = [name for text in texts for name in (text.values() if isinstance(text, dict) else [text])]
        with suppress(FistaPrunerError):  # a file that cannot be read any more cannot be compared
            files = dict.fromkeys(str(name) for name in named)
            found.append(shared_text(files, absolute(data), training=kind == "recover"))
    return [warning for warning in found if warning]


def _add_input(
    report: Report, compared: Compared, found: Evaluation, listener: Listener, again: Callable[..., Evaluation]
) -> bool:
    """Add the figures of the model that training began with, on the windows and items of its result.

    They are taken from the report of the run that made it, where they were measured there; else perplexity is measured.

    Args:
        report: receives them.
        compared: the models.
        found: the figures of the result.
        listener: receives progress.
        again: evaluates a model on the same text.

    Returns:
        Whether the report has changed.
    """
    if report.recovery is None or compared.before is None:
        return False
    wanted, before = _measured_on(found), report.recovery.before
    for each in _of_input(report, compared.before):
        for part in _parts(each).values():
            before = put_in_place(before, part) if _measured_on(part) <= wanted else before
    if found.perplexity is not None and not any(found.perplexity.measured_on in _measured_on(one) for one in before):
        if compared.before.exists():
            listener.say(f"evaluating the model before {report.training} on {found.perplexity.data}")
            before = put_in_place(before, again(compared.before, against=found.against))
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
    with suppress(FistaPrunerError):
        made = load_run(origin.folder)
        return made.evaluations if made.fingerprint == stages[-2].fingerprint else []
    return []


def put_in_place(earlier: Sequence[Evaluation], found: Evaluation) -> list[Evaluation]:
    """Put each part of an evaluation in the place of the earlier one of its text or task, or last."""
    kept: dict[tuple[str, str], Evaluation] = {}
    for each in (*earlier, found):
        kept |= _parts(each)
    return list(kept.values())


def _parts(found: Evaluation) -> dict[tuple[str, str], Evaluation]:
    """Split an evaluation into those of its text and of each score, by what a new one replaces."""
    bare = replace(found, perplexity=None, reference=None, divergence=None, tasks=())
    text = {} if found.perplexity is None else {found.perplexity.measured_on: replace(found, tasks=())}
    return text | {(task.task, task.metric): replace(bare, tasks=(task,)) for task in found.tasks}


def _measured_on(found: Evaluation) -> set[Any]:
    """Return the windows and the items of an evaluation."""
    text = set() if found.perplexity is None else {found.perplexity.measured_on}
    return text | {task.measured_on for task in found.tasks}


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
        **settings: the other options of ``fistapruner evaluate``, by name: ``seqlen=1024, tasks=["piqa"]``.

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
    named = None if against is None else path_text("against", against, A_MODEL)
    permissions = Permissions(settings.get("allow_pickle", False), settings.get("trust_remote_code", False))
    with hold(Path(model)):
        run, report = finished_run(Path(model))
        compared = Compared.of(run)
        against = compared.reference(Path(model), permissions, named)
        listener.tick("opening and checking the models", 0, 1)
        shared = [] if data is None else seen_texts(report, data)
        text = {name: value for name, value in settings.items() if name not in ("tasks", "tasks_dir", "limit")}

        def keep_with_run(found: Evaluation) -> None:
            for warning in (*shared, *found.warnings):
                add_warning(report, warning, listener)
            report.evaluations = put_in_place(report.evaluations, replace(found, warnings=(*shared, *found.warnings)))
            _add_input(report, compared, found, listener, partial(run_evaluation, data=data, **text))
            publish(run, report, listener)

        found = run_evaluation(run.model, data, against=against, keep=keep_with_run, **settings)
        keep_with_run(found)
    return replace(found, warnings=(*shared, *found.warnings))


class Speeds(list[Speed]):
    """Speeds of the forms of one model, printed as facts."""

    def to_json(self) -> dict[str, Any]:
        """Return the measurements as JSON values, for ``bench --json`` and ``report.json``."""
        return {"speeds": [asdict(speed) for speed in self], "kernel": kernel_name()}

    def __str__(self) -> str:
        return speeds_text(self.to_json())


@undisturbed()
def bench(model: str | Path, *, listener: Listener | None = None, **settings: Any) -> Speeds:
    """Measure speed, memory and sizes of a pruned model, or of a finished run, which keeps them.

    Figures of a run go into ``report.json``, the page and the model card, in the place of earlier ones.

    Args:
        model: run directory, or checkpoint folder.
        listener: receives progress.
        **settings: the options of ``fistapruner bench``.

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
                before = Compared.of(run).reference(run.folder, Permissions(settings.get("allow_pickle", False)))
            except FistaPrunerError as error:
                listener.say(f"the dense model is not measured: {error}")
        found = Speeds(bench_forms(run.model, before=before, tick=listener.tick, **settings))
        machine = describe_machine(torch.device("cpu")).model_dump(mode="json")
        report.speed = {**found.to_json(), "machine": machine, "measured": now()}
        report.totals.compressed_bytes = next((form.file_size for form in found if form.variant == "packed"), None)
        publish(run, report, listener)
    return found

"""Measure a finished run, at its end or when asked, and keep the figures with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import A_MODEL, A_TEXT, FistaPrunerError, MissingExtraError, one_line, path_text
from ..models.build import load_whole, whole_fits
from ..models.record import lost_structure, read_pruning_record
from ..models.source import UNTRUSTED, Permissions
from ..reporting.measured import speeds_text
from ..reporting.model_card import model_card
from ..reporting.page import write_page
from ..runs.directory import CARD, RunDirectory, finished_run
from ..runs.lineage import Dense, dense_of, input_run, update_stage, write_lineage
from ..runs.log import Listener, hold
from ..runs.records import DONE, Evaluation, Generation, Report, is_run, load_run
from ..runs.settled import EvaluationRequest, absolute, changed_files
from ..runtime.devices import choose_device, cpu_threads
from ..runtime.files import write_text_atomic
from ..runtime.machine import describe_machine, now
from ..runtime.numerics import undisturbed
from ..runtime.show import Tick, shell_line, silent
from ..settings.base import Execution
from ..text.sources import document_hash, source_documents
from ..text.training import training_documents
from .data import Windows, evaluation_documents, load_windows
from .evaluate import evaluate as run_evaluation
from .speed import Speed, kernel_name
from .speed import bench as bench_forms

PROMPTS = (
    "The capital of France is",
    "To make a good cup of tea, first",
    "def fibonacci(n):",
)

NEW_TOKENS = 32
"""Tokens that continue a prompt."""


def _folder_of(dense: Dense | None) -> Path | None:
    """Return the folder of the dense model; None where it is not known, or gone."""
    return dense.folder if dense is not None and dense.folder.exists() else None


def _before(run: RunDirectory) -> Path | None:
    """Return the folder of the pruned model that a run that trains began with; None for a pruning run."""
    record = run.record()
    return None if record is None or record.kind == "prune" else record.decision.folder


def _missing(dense: Dense | None) -> str:
    """Say why there is no dense model."""
    return "is not known" if dense is None else f"is not at {dense.folder}"


def _reference(run: RunDirectory, permissions: Permissions, named: str | None = None) -> str | Path:
    """Return the dense model, where a user has named it or where it was; one with other files is refused."""
    dense = dense_of(run)
    model = named or _folder_of(dense)
    if model is None:
        raise FistaPrunerError(
            f"{run.folder}: the model it was made from {_missing(dense)}: say where it is with --against"
        )
    if dense is not None and dense.stamps and (why := changed_files(dense.stamps, permissions.find(model))):
        other = shell_line("evaluate", run.model, "--against", model)
        raise FistaPrunerError(
            f"{why} since {run.folder} began: name its dense model with --against, or compare with another by '{other}'"
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
        request: the text to evaluate on; None evaluates nothing.
        execution: names the device and the most memory; a run may end on another machine than it began on.
    """
    if request is not None:
        begin = time.perf_counter()
        if _evaluated(run, report, request, execution, permissions, listener):
            report.totals.time_split["evaluation"] = time.perf_counter() - begin
            run.write_report(report)
        if not report.generations:
            begin = time.perf_counter()
            report.generations = _samples(run, execution, permissions, listener)
            report.totals.time_split["samples"] = time.perf_counter() - begin
    publish(run, report, listener)
    return report


def _evaluated(
    run: RunDirectory,
    report: Report,
    request: EvaluationRequest,
    execution: Execution,
    permissions: Permissions,
    listener: Listener,
) -> bool:
    """Measure what the report does not have, for :func:`measure`; return whether there was anything."""
    assert report.calibration is not None
    noted = dense_of(run)
    dense = _folder_of(noted)
    if dense is None and not any(found.reference for found in report.evaluations):
        add = shell_line("evaluate", run.folder, "--against", "DENSE")
        listener.say(f"no figures of the dense model, which {_missing(noted)}: '{add}' adds them")
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
        both = "dense and the " if dense else ""
        listener.say(f"evaluating the {both}{DONE[report.kind]} model on {request.data}")
        report.evaluations = put_in_place(report.evaluations, again(run.model, against=dense))
        run.write_report(report)
    found = texts[0] if texts else report.evaluations[-1]
    return _add_input(run, report, found, listener, again) or not texts


def _samples(run: RunDirectory, execution: Execution, permissions: Permissions, listener: Listener) -> list[Generation]:
    """Continue a few prompts with the dense model, the run's result, and the model before training."""
    before = _before(run)
    models = {"dense": _folder_of(dense_of(run)), "pruned": before or run.model}
    models |= {} if before is None else {"recovered": run.model}
    there = {name: folder for name, folder in models.items() if folder is not None and folder.exists()}
    try:
        device = choose_device(execution.device)
        return generate_side_by_side(there, device, execution.memory_limit, permissions, listener.tick)
    except Exception as error:  # of the models' own code: an example is no figure
        listener.say(f"no examples: {type(error).__name__}: {one_line(error)}")
        return []


@cpu_threads()
def generate_side_by_side(
    models: Mapping[str, Path],
    device: torch.device,
    memory_limit: int | None = None,
    permissions: Permissions = UNTRUSTED,
    tick: Tick = silent,
) -> list[Generation]:
    """Continue :data:`PROMPTS` greedily with every model, each loaded whole, one after the other.

    Nothing is generated where one of them would not fit into three quarters of the free memory.

    Args:
        models: Hugging Face folders, by the field of :class:`Generation` that they fill.
        memory_limit: bytes of main memory that the process may use; None is the free memory.
    """
    sources = {name: permissions.at(folder) for name, folder in models.items()}
    if not all(whole_fits(source.checkpoint(), device, memory_limit) for source in sources.values()):
        return []
    found = [Generation(prompt=prompt) for prompt in PROMPTS]
    for number, (name, source) in enumerate(sources.items()):
        tick("models that have continued the sample prompts", number, len(models))
        tokenizer = source.tokenizer()
        model = load_whole(source.folder, device, trust_remote_code=source.trust_remote_code)
        for each in found:
            ids = tokenizer(each.prompt, return_tensors="pt", return_attention_mask=True).to(device)
            # A tokenizer may return more, such as token_type_ids, which generate() refuses.
            given = {key: ids[key] for key in ("input_ids", "attention_mask")}
            end = tokenizer.eos_token_id
            with torch.no_grad():
                out = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            setattr(each, name, str(text))
    return found


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
    run: RunDirectory, report: Report, found: Evaluation, listener: Listener, again: Callable[..., Evaluation]
) -> bool:
    """Add to a report the figures of the model that training began with, on what measures its result.

    They are taken from the report of the run that made it, where they were measured there; else perplexity is measured
    by ``again``, which evaluates a model on the same text.

    Returns:
        Whether the report has changed.
    """
    if report.recovery is None or (folder := _before(run)) is None:
        return False
    wanted, before = _measured_on(found), report.recovery.before
    for each in _of_input(report, folder):
        for part in _parts(each).values():
            before = put_in_place(before, part) if _measured_on(part) <= wanted else before
    if found.perplexity is not None and not any(found.perplexity.measured_on in _measured_on(one) for one in before):
        if folder.exists():
            listener.say(f"evaluating the model before {report.training} on {found.perplexity.data}")
            before = put_in_place(before, again(folder, against=found.against))
        else:
            listener.say(f"no figures of the model before {report.training}, which is not at {folder}")
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
        against = _reference(run, permissions, named)
        listener.tick("opening and checking the models", 0, 1)
        shared = [] if data is None else seen_texts(report, data)
        text = {name: value for name, value in settings.items() if name not in ("tasks", "tasks_dir", "limit")}

        def keep_with_run(found: Evaluation) -> None:
            for warning in (*shared, *found.warnings):
                add_warning(report, warning, listener)
            report.evaluations = put_in_place(report.evaluations, replace(found, warnings=(*shared, *found.warnings)))
            _add_input(run, report, found, listener, partial(run_evaluation, data=data, **text))
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
                before = _reference(run, Permissions(settings.get("allow_pickle", False)))
            except FistaPrunerError as error:
                listener.say(f"the dense model is not measured: {error}")
        found = Speeds(bench_forms(run.model, before=before, tick=listener.tick, **settings))
        machine = describe_machine(torch.device("cpu")).model_dump(mode="json")
        report.speed = {**found.to_json(), "machine": machine, "measured": now()}
        report.totals.compressed_bytes = next((form.file_size for form in found if form.variant == "packed"), None)
        publish(run, report, listener)
    return found

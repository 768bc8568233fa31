"""Measure a finished run when it is asked for: quality and speed of its checkpoint, kept with the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import A_MODEL, A_TEXT, FistaPrunerError, path_text
from ..measure.bench import Speeds, bench, packed_bytes
from ..measure.bench import record as speed_record
from ..measure.data import Windows, load_windows
from ..measure.evaluate import check_request
from ..measure.evaluate import evaluate as run_evaluation
from ..measure.speed import Speed, Variant
from ..measure.streaming import KeptStates
from ..models.gguf import convert_gguf
from ..models.record import lost_structure, read_pruning_record
from ..models.source import Permissions
from ..reporting.quality import item_count
from ..reporting.size_and_speed import INT8
from ..runs.arguments import checked_arguments
from ..runs.directory import RunDirectory, finished_run
from ..runs.identity import changed_files, stamps
from ..runs.lineage import trained_on
from ..runs.listener import Listener
from ..runs.lock import hold
from ..runs.records import Report, is_run
from ..runs.results import Evaluation, Perplexity
from ..runs.training_runs import Dense, dense_of
from ..runtime.files import temporary_folder
from ..runtime.machine import describe_machine, now
from ..runtime.numerics import undisturbed
from .kept_evaluations import fuller_scores, put_in_place
from .measure import Compared, compare_texts, evaluate_input, publish


@checked_arguments
def evaluate_run(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    against: str | Path | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a finished run against its dense model, and keep the result with the run.

    The figures go into ``report.json``, the page and the model card. They take the place of earlier ones of the same
    tokens and precision, or of the same task and not more items. If tasks fail, the perplexity before them is there.
    The model that a recovery run began with is evaluated on the same text too, unless its own run has done that.
    Figures against another model than the run's own dense model are returned only: the run's are of that one.

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
        compared = Compared.of(run)
        dense, listener = dense_of(run), listener or Listener()
        kept = True
        if against is None:
            against = compared.dense
            if against is None:
                raise FistaPrunerError(f"{folder} names no dense model: say where it is with --against")
            if not Path(against).exists():
                raise FistaPrunerError(
                    f"{folder}: the model it was made from is not at {against}: say where it is with --against"
                )
            if why := _changed(dense, permissions):
                raise FistaPrunerError(f"{why} since {folder} began: name the dense model with --against")
        elif _is_another(against, dense, permissions):
            kept = False
            listener.say(
                f"{against} is not the dense model of this run, {compared.dense}: the figures are not kept with the run"
            )
        if (settings.get("tasks") or settings.get("tasks_dir")) and (warning := trained_on(report.lineage)) is not None:
            listener.say(warning)
            if warning not in report.warnings:
                report.warnings.append(warning)
        listener.tick("opening and checking the models", 0, 1)  # the sentences above are not what takes time

        shared = () if data is None else compare_texts(report, data, listener)

        def warned(found: Evaluation) -> Evaluation:
            return replace(found, warnings=(*shared, *found.warnings))

        def keep(found: Evaluation) -> None:
            if kept:
                for task in fuller_scores(report.evaluations, found):
                    listener.say(
                        f"{task.task} {task.metric}: the run keeps its score on {item_count(task)}: they are more"
                    )
                report.evaluations = put_in_place(report.evaluations, warned(found))
                publish(run, report, listener)

        found = run_evaluation(run.model, data, against=against, keep=keep, **settings)
        keep(found)
        text = {name: value for name, value in settings.items() if name not in ("tasks", "tasks_dir", "limit")}
        if kept and evaluate_input(report, compared, found, listener, data=data, **text):
            publish(run, report, listener)
    return warned(found)


@checked_arguments
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
    with _finished(folder) as (run, report):
        listener = listener or Listener()
        dense = dense_of(run) if lost_structure(read_pruning_record(run.model)) else None
        before = dense.folder if dense is not None and dense.folder.is_dir() else None
        if before is not None and (why := _changed(dense, Permissions(settings.get("allow_pickle", False)))):
            listener.say(f"{why} since {folder} began: the dense model is not measured")
            before = None
        machine = describe_machine(torch.device("cpu")).model_dump(mode="json")

        def keep(found: list[Speed]) -> None:
            report.speed = {**speed_record(found), "machine": machine, "measured": now()}
            report.totals.compressed_bytes = packed_bytes(found)
            publish(run, report, listener)

        judge = _Judge(run, report, listener, keep, Permissions(settings.get("allow_pickle", False)))
        found = bench(run.model, before=before, quality=judge.quality, tick=listener.tick, **settings)
        keep(found)
    return Speeds(found)


@dataclass(frozen=True)
class _Judge:
    """Adds the quality of a run's forms, and of GGUF files beside them, to their speeds.

    Args:
        run, report, listener: of the run.
        keep: called with the speeds before evaluations, which take longer.
        permissions: what the models' files may do.
    """

    run: RunDirectory
    report: Report
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

        def rounds(variant: Variant) -> bool:
            passes = None if variant.dtype is None else getattr(torch, variant.dtype)
            narrower = passes is not None and torch.promote_types(stored, passes) != passes
            return narrower or variant.name == INT8

        figures = {
            variant.name: (own.reference.perplexity, 0.0)
            if variant.name.startswith("dense ")
            else (own.perplexity.perplexity, own.divergence.kl)
            for variant in variants
            if not (variant.is_gguf or rounds(variant))
        }
        speeds = [speed.judged(*figures[speed.variant]) if speed.variant in figures else speed for speed in speeds]
        if not evaluated:
            return speeds
        self.keep(speeds)
        try:
            dense, cut = self._reference(own.perplexity)
        except FistaPrunerError as error:
            self.listener.say(f"no quality of {names}: {error}")
            return speeds
        settings: dict[str, Any] = {"against": dense, "dtype": own.perplexity.dtype, "tick": self.listener.tick}
        with temporary_folder() as scratch, closing(KeptStates(dense, Path(scratch) / "states")) as kept:
            for number in evaluated:
                variant = variants[number]
                self.listener.say(f"evaluating {variant.name} on {cut.data}")
                folder = variant.folder
                try:
                    if variant.is_gguf:
                        folder = Path(scratch) / variant.folder.stem
                        convert_gguf(variant.folder, folder)
                    found = run_evaluation(folder, cut, kept=kept, **settings, **self.permissions.keywords())
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
        dense, record = dense_of(self.run), self.run.record()
        if dense is None or not dense.folder.exists():
            raise FistaPrunerError("the dense model is not at hand")
        if changed := _changed(dense, self.permissions):
            raise FistaPrunerError(f"{changed} since {self.run.folder} began")
        request = None if record is None else record.decision.evaluation
        tokenizer = self.permissions.at(self.run.model).tokenizer()
        for data in dict.fromkeys([measured.data if request is None else request.data, measured.data]):
            with suppress(FistaPrunerError):
                cut = load_windows(data, tokenizer, measured.seqlen, measured.windows, measured.bos)
                if cut.sha256 == measured.text_sha256:
                    return dense.folder, cut
        raise FistaPrunerError(f"the text {measured.data} is not at hand as it was")


@contextmanager
def _finished(folder: str | Path) -> Iterator[tuple[RunDirectory, Report]]:
    """Hold a finished run, so that no other process writes it meanwhile; yields it and its report."""
    if not is_run(folder):
        raise FistaPrunerError(f"{folder} is not a run: it has neither run.json nor report.json")
    with hold(Path(folder)):
        yield finished_run(Path(folder))


def _changed(dense: Dense | None, permissions: Permissions) -> str | None:
    """Say which file of a dense model is not what it was; None where all are, or no run has noted them."""
    return changed_files(dense.stamps, permissions.at(dense.folder)) if dense is not None and dense.stamps else None


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

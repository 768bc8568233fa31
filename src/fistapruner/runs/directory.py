"""The run directories: the files of a run, and what a later process finds in them.

    RUN/
        recipe.yaml                every setting
        run.json                   model, machine, the decisions before the long work, and a checksum
        lock  log.txt  times.json  who works here, what happened, seconds of every process (:mod:`.log`)
        report.json  report.html   the report
        model/                     the finished checkpoint
        adapter/                   low-rank parts of the operators, where the recipe asks for them

Of a pruning run:

        calibration.safetensors    the token ids
        metrics.safetensors        what was measured on the dense model: weights of errors, order of channels
        layers/                    the finished decoder layers (:class:`LayerJournal`)
        bypass.safetensors         the state of learning which channels stay, where the recipe asks for it
        hidden/                    hidden states that are still needed, where memory does not hold them

Of a run that trains:

        windows.safetensors        training text or pairs: token ids, which carry loss, which are held out or tested
        teacher/                   the dense model's predictions of them (:mod:`fistapruner.training.loss`)
        references.safetensors     log-probabilities of answers (:mod:`fistapruner.training.alignment`)
        steps.jsonl  states/       one line a step (:mod:`.log`); the newest training states (:mod:`.store`)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, cast

import torch
from torch import Tensor
from typing_extensions import TypeVar

from ..errors import FistaPrunerError
from ..models.checkpoint import Orders
from ..models.record import FOLDER, read_pruning_record
from ..models.safetensors import SafetensorsFile, write_tensors
from ..runtime.files import (
    PARTIAL,
    disk_errors,
    entries,
    read_json,
    read_sealed_json,
    sha256_file,
    write_json_atomic,
    write_sealed_json,
    write_text_atomic,
)
from ..runtime.show import shell_line
from ..text import tokens_sha256
from ..text.training import Pairs, TrainingText
from .log import hold, log_file
from .records import Report, is_run, load_run, parse
from .settled import PruneRecord, RunRecord, TrainingRecord, interrupted_with
from .store import LayerJournal, Snapshots

CARD = "README.md"
"""The model card in ``model/``. It is written anew with every measurement."""

FORMAT = 4
"""Format of ``run.json`` and the files beside it. A release that cannot continue older runs raises it."""

DRAWING = "drawing"
"""Metadata key of a run's text: the settings and the model that decide it. No file of others has it."""

EARLY = rf"(log\.txt|times\.json)({re.escape(PARTIAL)})?"
"""Names of files that an attempt has left that was stopped before its first result."""

DRAWN = rf"lock|(metrics|bypass)\.safetensors|hidden|(recipe\.yaml|run\.json)({re.escape(PARTIAL)})?"
"""Names of what is written between a run's text and ``run.json``."""

UNREADABLE = (FistaPrunerError, OSError, KeyError, ValueError, TypeError)
"""What reading a damaged file raises."""

R_co = TypeVar("R_co", bound=RunRecord, default=RunRecord, covariant=True)


def refuse_out(out: Path) -> None:
    """Refuse an output folder that is a file."""
    if out.exists() and not out.is_dir():
        raise FistaPrunerError(f"--out {out} is a file; name a folder")


class RunDirectory(Generic[R_co]):
    """Paths and records of one run, whichever verb made it.

    Attributes:
        verb: whose runs they are; None takes those of all.
        schema: of ``run.json``.
        text_name: stem of the file with the run's text, which is the first that is written.
        working: names of what only an unfinished run needs.
    """

    verb: str | None = None
    schema: ClassVar[type[RunRecord]] = RunRecord
    text_name: ClassVar[str] = "windows"
    working: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.run_file = folder / "run.json"
        self.report_file = folder / "report.json"
        self.page_file = folder / "report.html"
        self.log_file = folder / "log.txt"
        self.text_file = folder / f"{self.text_name}.safetensors"
        self.model = folder / "model"
        self.adapter = folder / FOLDER

    # --- the place

    def check_place(self) -> None:
        """Refuse a place that is neither new, nor empty, nor a run, or that has others' files in it."""
        refuse_out(self.folder)
        if self.run_file.exists():
            return
        ours = rf"{EARLY}|lock|{self.text_name}\.safetensors{re.escape(PARTIAL)}"
        with suppress(*UNREADABLE):
            if DRAWING in SafetensorsFile(self.text_file).metadata:
                ours += rf"|{self.text_name}\.safetensors|{DRAWN}"
        others = [path.name for path in entries(self.folder) if not re.fullmatch(ours, path.name)]
        if others:
            shown = ", ".join(others[:3]) + (" and more" if len(others) > 3 else "")
            said = f"is a folder with other things in it ({shown}); name a new folder"
            raise FistaPrunerError(f"--out {self.folder} {said}")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make, hold and log to the folder; an interruption says how to go on.

        Folder, log and times go again where the block is refused and has made nothing else.
        """
        existed = self.folder.is_dir()
        before = set(self.folder.iterdir()) if existed else set()
        try:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with interrupted_with(self._interrupted), hold(self.folder), log_file(self.log_file):
                yield
        except FistaPrunerError:
            with suppress(OSError):
                made = set(self.folder.iterdir()) - before
                if all(re.fullmatch(EARLY, path.name) for path in made):  # a lock is that of another process
                    for path in made:
                        path.unlink()
                    if not existed:
                        self.folder.rmdir()
            raise

    def _interrupted(self) -> str:
        how = "go on with: " + shell_line("resume", self.folder) if self.run_file.exists() else "give the command again"
        return f"interrupted; {how}"

    # --- what was decided, and the report

    def record(self) -> R_co | None:
        """Read ``run.json``; None where there is none yet."""
        if not self.run_file.exists():
            return None
        content, fault = {}, ""
        try:
            with disk_errors(self.run_file, "read"):
                content = read_sealed_json(self.run_file)
        except ValueError as error:
            fault = f"{self.run_file} is damaged ({error})"
        if not fault and content.pop("format", 0) != FORMAT:
            by = (content.get("versions") or {}).get("fistapruner", "unknown")
            fault = f"{self.run_file} was written by another release of fistapruner ({by}), in another format"
        elif not fault and self.verb not in (None, found := content.get("kind", "prune")):
            fault = f"{self.folder} holds a run of 'fistapruner {found}', not of {self.verb}"
        if fault:
            raise FistaPrunerError(f"{fault}: name another folder")
        return cast("R_co", parse(self.schema, content, str(self.run_file)))

    def begun_record(self) -> R_co:
        """Read ``run.json`` of a run that was begun; a FistaPrunerError says that there is none."""
        if (record := self.record()) is None:
            again = "give its command again, and if that is refused with a new --out"
            raise FistaPrunerError(f"{self.folder} is not a run that was begun (it has no run.json): {again}")
        return record

    def write_record(self, record: RunRecord, recipe: str | None = None) -> None:
        """Replace ``run.json``, with its format and a checksum; before it ``recipe.yaml``, unless that stays."""
        if recipe is not None:
            write_text_atomic(self.recipe_file, recipe)
        results = {"layers", "totals", "evaluations", "speed", "generations"}
        write_sealed_json(self.run_file, {**record.model_dump(mode="json", exclude=results), "format": FORMAT})

    def read_report(self) -> Report:
        """Read ``report.json``; a FistaPrunerError says that it is missing, damaged or of a newer release."""
        return parse(Report, read_json(self.report_file), str(self.report_file))

    def write_report(self, report: Report) -> None:
        """Replace ``report.json``."""
        write_json_atomic(self.report_file, report.model_dump(mode="json"))

    def finished_report(self, fingerprint: str | None) -> Report | None:
        """Read the report of a finished run; None where something is left to do."""
        report = self.read_report() if self.report_file.exists() else None
        finished = report is not None and report.status == "finished" and report.fingerprint == fingerprint
        return report if finished else None

    # --- the finished checkpoint, and what is no longer needed then

    def has_model(self, fingerprint: str | None) -> bool:
        """Say whether the finished checkpoint of this run is there."""
        return self.model.is_dir() and read_pruning_record(self.model).get("fingerprint") == fingerprint

    def remove_working_files(self) -> None:
        """Remove the files from which only an unfinished run goes on; they are as large as the model."""
        for name in self.working:
            if (path := self.folder / name).is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class PruneDirectory(RunDirectory[PruneRecord]):
    """Paths and records of one pruning run."""

    verb = "prune"
    schema = PruneRecord
    text_name = "calibration"
    working = ("layers", "hidden", "bypass.safetensors")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metrics_file = folder / "metrics.safetensors"
        self.bypass_file = folder / "bypass.safetensors"
        self.hidden = folder / "hidden"
        self.journal = LayerJournal(folder / "layers")

    def write_tokens(self, tokens: Tensor, drawing: str, how: Mapping[str, Any]) -> None:
        """Store the (samples, seqlen) token ids, how they were drawn, and the settings that decide them."""
        ids = tokens.to(torch.int64)
        about = {DRAWING: drawing, "how": json.dumps(how), "sha256": tokens_sha256(ids)}
        write_tensors(self.text_file, {"tokens": ids}, about)

    def drawn(self, drawing: str | None = None) -> tuple[Tensor, dict[str, Any]] | None:
        """Read the token ids and how they were drawn; None where gone, damaged or of another ``drawing``."""
        with suppress(*UNREADABLE):
            file = SafetensorsFile(self.text_file)
            tokens, how = file.read("tokens"), json.loads(file.metadata["how"])
            if drawing in (None, file.metadata[DRAWING]) and file.metadata["sha256"] == tokens_sha256(tokens):
                return tokens, how
        return None

    def tokens(self) -> Tensor:
        """Read the (samples, seqlen) calibration token ids."""
        return SafetensorsFile(self.text_file).read("tokens")

    def fault(self, settled: PruneRecord) -> str | None:
        """Say which of the files that the run began with is gone or damaged; None where all are whole."""
        if self.drawn() is None:
            return f"{self.text_file} is gone or damaged"
        digest = settled.decision.metrics_sha256
        if digest and not (self.metrics_file.is_file() and sha256_file(self.metrics_file) == digest):
            return f"{self.metrics_file} is gone or damaged"
        return None

    def write_metrics(
        self, metrics: Sequence[Tensor], importance: Mapping[str, Tensor], orders: Orders, scores: Mapping[str, Tensor]
    ) -> None:
        """Store what was measured on the dense model, as :meth:`measured` and :meth:`orders` read it."""
        tensors = {f"output.{index:04d}": metric for index, metric in enumerate(metrics)}
        tensors |= {f"rows.{name}": rows for name, rows in importance.items()}
        tensors |= {f"order.{dim}.{name}": order for name, (dim, order) in orders.items()}
        tensors |= {f"scores.{name}": values for name, values in scores.items()}
        write_tensors(self.metrics_file, tensors)

    def measured(self, kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Read what was measured, by name; what has no measurement is left out.

        Args:
            kind: ``rows``: weights of an operator's rows; ``scores``: of the channels that it reads; both by its full
                name; ``output``: weights of the errors of a decoder layer's output, by its number in four digits.
        """
        file = SafetensorsFile(self.metrics_file)
        return {name: file.read(f"{kind}.{name}") for name in names if f"{kind}.{name}" in file.entries}

    def orders(self) -> Orders:
        """Read the new order of channels by tensor: the dimension, and the old places."""
        file = SafetensorsFile(self.metrics_file)
        named = [name.split(".", 2) for name in file.entries if name.startswith("order.")]
        return {tensor: (int(dim), file.read(f"order.{dim}.{tensor}")) for _, dim, tensor in named}


class TrainingDirectory(RunDirectory[TrainingRecord]):
    """Paths and records of one run that trains, ``recover`` or ``align``."""

    schema = TrainingRecord
    working = ("teacher", "states")

    def __init__(self, folder: Path, verb: str) -> None:
        super().__init__(folder)
        self.verb = verb
        self.references_file = folder / "references.safetensors"
        self.steps_file = folder / "steps.jsonl"
        self.teacher = folder / "teacher"
        self.states = Snapshots(folder / "states")

    def write_text(self, text: TrainingText) -> None:
        """Store the training text, or the pairs."""
        tensors = {"tokens": text.tokens, "marks": text.marks, "held_out": text.held_out, "task": text.task}
        if isinstance(text, Pairs):
            tensors["test"] = text.test
        about = json.dumps({"tasks": text.tasks, "facts": text.facts})
        write_tensors(self.text_file, tensors, {DRAWING: "", "about": about})

    def text(self) -> TrainingText | None:
        """Read the training text, or the pairs; None where they are gone or damaged."""
        with suppress(*UNREADABLE):
            file = SafetensorsFile(self.text_file)
            about: dict[str, Any] = json.loads(file.metadata["about"])
            flags = ("marks", "held_out", "test")
            tensors = {name: file.read(name) for name in file.entries}
            fields: dict[str, Any] = {name: t.bool() if name in flags else t for name, t in tensors.items()}
            kind = Pairs if "test" in tensors else TrainingText
            return kind(**fields, tasks=tuple(about["tasks"]), facts=about["facts"])
        return None


def finished_run(folder: Path) -> tuple[RunDirectory, Report]:
    """Open a finished run and its report; refuse an unfinished run, and one whose checkpoint is gone."""
    run, report = RunDirectory(folder), load_run(folder)
    if report.status != "finished":
        raise FistaPrunerError(f"{folder} has no finished checkpoint: go on with '{shell_line('resume', folder)}'")
    if not run.has_model(report.fingerprint):
        raise FistaPrunerError(f"{run.model} is gone, or not of the run in {folder}: run it again in another folder")
    return run, report


def checkpoint_of(path: str | Path) -> Path:
    """Return the checkpoint of a run directory, as :func:`finished_run` does; any other path as it is."""
    return finished_run(Path(path))[0].model if is_run(path) else Path(path)

"""The run directory of every verb: the files of a run, and what a second process finds in them.

    RUN/
        recipe.yaml                every setting
        run.json                   model, machine, the decisions before the long work, and a checksum
        lock                       host and process that works here (:mod:`fistapruner.runs.lock`)
        times.json                 seconds of every process that worked here (:mod:`fistapruner.runs.times`)
        log.txt                    what happened, with times
        report.json  report.html   the report
        model/                     the finished checkpoint
        model.json                 sizes and checksums of its weight files, names of its other files

A verb adds files of its own: see :mod:`fistapruner.runs.prune_directory`. Every file is whole or absent
(:mod:`fistapruner.runtime.files`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import ValidationError

from ..errors import FistaPrunerError, explain, unreadable
from ..models.checkpoint import INDEX, PRUNING_RECORD, READ_BY_TRANSFORMERS, SINGLE, Checkpoint
from ..models.low_rank import FOLDER, LowRankAdapter, remove_adapter
from ..models.write import remove_unfinished, safetensors_name
from ..runtime.files import (
    BYSTANDERS,
    PARTIAL,
    disk_errors,
    entries,
    read_json,
    read_sealed_json,
    remove_folder,
    require_utf8,
    sampled_sha256,
    write_json_atomic,
    write_sealed_json,
    write_text_atomic,
)
from ..runtime.formatting import shell_line
from .base import VERSION, Record, parse
from .decision import RunRecord
from .lock import NAME as LOCK
from .lock import holder
from .records import Report, is_run, load_run
from .times import TIMES

CARD = "README.md"
"""The model card in ``model/``. It is written anew with every measurement."""

FORMAT = 3
"""Format of ``run.json`` and the files beside it. A release that cannot continue older runs raises it."""

EARLY = rf"log\.txt|{LOCK}|{re.escape(TIMES)}({re.escape(PARTIAL)})?"
"""Names of files that an attempt has left that was stopped before its first result."""

R = TypeVar("R", bound=RunRecord)


class FileClaim(Record):
    """Hold what ``model.json`` says of a weight file; ``sampled`` is a checksum of samples of its bytes."""

    bytes: int
    sha256: str
    sampled: str


class ModelRecord(Record):
    """Hold ``model.json``: the run's fingerprint, weight files by name, names of the other files."""

    fingerprint: str
    files: dict[str, FileClaim]
    others: list[str]


def refuse_out(out: Path) -> None:
    """Refuse an output folder that is a file or below a link to nothing, or whose path is not UTF-8.

    Raises:
        FistaPrunerError: names it.
    """
    require_utf8(out)
    for path in (out, *out.parents):
        if path.is_symlink() and not path.exists():
            target = path.parent / path.readlink()
            raise FistaPrunerError(
                f"--out {out}: {path} is a link to {target}, which does not exist: make it, or name another folder"
            )
    if out.exists() and not out.is_dir():
        raise FistaPrunerError(f"--out {out} is a file; name a folder")


class RunDirectory:
    """Paths and records of one run, whichever verb made it.

    Args:
        folder: the run directory.

    Attributes:
        early: pattern of the names that an attempt has left that was stopped before ``run.json`` was written.
    """

    early: ClassVar[str] = EARLY

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.run_file = folder / "run.json"
        self.report_file = folder / "report.json"
        self.page_file = folder / "report.html"
        self.log_file = folder / "log.txt"
        self.model = folder / "model"
        self.model_file = folder / "model.json"
        self.adapter = folder / FOLDER

    def create(self) -> None:
        """Make the folders."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def own_folders(self) -> tuple[Path, ...]:
        """Folders that the run keeps."""
        return (self.model,)

    def own_files(self) -> tuple[Path, ...]:
        """Files that the run keeps."""
        return (self.recipe_file, self.run_file, self.report_file, self.log_file, self.model_file)

    def foreign(self) -> list[str]:
        """Names in a folder without ``run.json`` that no stopped attempt at a run has left there."""
        return [path.name for path in entries(self.folder) if not re.fullmatch(self.early, path.name)]

    def check_place(self) -> None:
        """Refuse a folder that is neither new, nor empty, nor a run, or that has others' files in it.

        Raises:
            FistaPrunerError: names what is in the way.
        """
        refuse_out(self.folder)
        if not self.folder.is_dir():
            return
        if not self.run_file.exists() and (others := self.foreign()):
            shown = ", ".join(others[:3]) + (" and more" if len(others) > 3 else "")
            raise FistaPrunerError(
                f"--out {self.folder} is a folder with other things in it ({shown}); name a new folder"
            )
        for path in self.own_folders():
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                what = "a link" if path.is_symlink() else "a file"
                raise FistaPrunerError(
                    f"{path} is {what} where the run keeps a folder: move it away, or choose another --out"
                )
        for path in self.own_files():
            if path.is_symlink() or path.is_dir():
                what = "a link" if path.is_symlink() else "a folder"
                raise FistaPrunerError(
                    f"{path} is {what} where the run keeps a file: move it away, or choose another --out"
                )

    @contextmanager
    def created(self) -> Iterator[None]:
        """Make the folders; they, log and times go again where the block is refused and has made nothing else."""
        existed = self.folder.is_dir()
        before = set(self.folder.iterdir()) if existed else set()
        try:
            with disk_errors(self.folder):
                self.create()
            yield
        except FistaPrunerError:
            with suppress(OSError):
                made = set(self.folder.iterdir()) - before
                files = [path for path in made if re.fullmatch(EARLY, path.name)]
                empty = [path for path in made if path in self.own_folders() and not any(path.iterdir())]
                only_these = len(files) + len(empty) == len(made) and not self.run_file.exists()
                if only_these and holder(self.folder) is None:  # else others work here
                    for path in files:
                        path.unlink()
                    for path in empty:
                        path.rmdir()
                    if not existed:
                        self.folder.rmdir()
            raise

    def record(self) -> RunRecord | None:
        """Read ``run.json``, as far as all verbs have it; None where there is none yet.

        Raises:
            FistaPrunerError: the file is not what a run writes, or what a run of another release wrote.
        """
        return self.read_record(RunRecord)

    def read_record(self, schema: type[R], verb: str | None = None) -> R | None:
        """Read ``run.json`` as the record of one verb; None where there is none yet.

        Args:
            schema: of the record.
            verb: whose runs have it; None takes those of all.

        Raises:
            FistaPrunerError: it is a run of another verb, the file is damaged or cannot be read, or a run of another
                release wrote it.
        """
        if not self.run_file.exists():
            return None
        hint = f"remove {self.folder} or choose another --out"
        try:
            content = read_sealed_json(self.run_file)
        except OSError as error:
            raise unreadable(self.run_file, error) from None
        except ValueError as error:
            raise FistaPrunerError(f"{self.run_file} is damaged ({error}): {hint}") from None
        if content.pop("format", 0) != FORMAT or content.get("version", VERSION) not in range(VERSION + 1):
            versions = content.get("versions")
            by = versions.get("fistapruner", "unknown") if isinstance(versions, Mapping) else "unknown"
            raise FistaPrunerError(
                f"{self.run_file} was written by another release of fistapruner ({by}) in a format that this one does "
                "not read: go on with that release, or choose another --out"
            )
        if verb not in (None, found := content.get("kind", "prune")):
            raise FistaPrunerError(
                f"{self.folder} holds a run of 'fistapruner {found}', not of {verb}: name another folder"
            )
        try:
            return schema.model_validate(content)
        except ValidationError as error:
            raise FistaPrunerError(f"{self.run_file} is damaged ({explain(error)}): {hint}") from None

    def write_record(self, record: RunRecord) -> None:
        """Replace ``run.json``; its format and a checksum of its content go with it."""
        results = {"layers", "totals", "evaluations", "speed", "generations"}
        content = {**record.model_dump(mode="json", exclude=results), "format": FORMAT}
        write_sealed_json(self.run_file, content)

    def write_recipe(self, text: str) -> None:
        """Replace ``recipe.yaml``."""
        write_text_atomic(self.recipe_file, text)

    def read_report(self) -> Report:
        """Read ``report.json``.

        Raises:
            FistaPrunerError: it is missing or damaged, or a newer release wrote it.
        """
        return parse(Report, read_json(self.report_file), str(self.report_file))

    def finished_report(self, fingerprint: str | None) -> tuple[Report | None, str | None]:
        """Read the report of a finished run, and say what of its files must be made again.

        Args:
            fingerprint: of the run.

        Returns:
            The report, None where something is left to do; and a sentence where a file is damaged or gone.
        """
        if not self.report_file.exists():
            return None, None
        try:
            report = self.read_report()
        except FistaPrunerError as error:
            return None, f"the report is made again: {error}"
        if report.status != "finished" or report.fingerprint != fingerprint:
            return None, None
        fault = self.model_fault(fingerprint or "")
        if fault is None and self.model_record() is None and (self.model / PARTIAL).exists():
            fault = f"writing {self.model} was interrupted"
        return report, None if fault is None else f"the checkpoint is made again: {fault}"

    def write_report(self, report: Report) -> None:
        """Replace ``report.json``."""
        write_json_atomic(self.report_file, report.model_dump(mode="json"))

    def write_model_record(self, fingerprint: str, digests: Mapping[str, str]) -> None:
        """Record the files of the finished checkpoint, so that damage is found later.

        Args:
            fingerprint: of the run.
            digests: SHA-256 of every weight file, by name.
        """
        shards = {
            name: {
                "bytes": (self.model / name).stat().st_size,
                "sha256": digest,
                "sampled": sampled_sha256(self.model / name),
            }
            for name, digest in digests.items()
        }
        others = sorted(name for name in self._model_names() if name not in shards)
        write_sealed_json(self.model_file, {"fingerprint": fingerprint, "files": shards, "others": others})

    def model_record(self) -> ModelRecord | None:
        """Read ``model.json``; None where it is missing or damaged."""
        try:
            return ModelRecord.model_validate(read_sealed_json(self.model_file))
        except (OSError, ValueError):
            return None

    def model_fault(self, fingerprint: str) -> str | None:
        """Find what is wrong with the finished checkpoint; None where nothing is.

        Weight files are compared by their size and by samples of their bytes
        (:func:`~fistapruner.runtime.files.sampled_sha256`); configurations, index, tokenizer and the files of a
        low-rank part must be readable. The checkpoint must name this run in its own record. Where ``model.json`` is
        missing, its shards must be whole.

        Args:
            fingerprint: of the run.
        """
        if not self.model.is_dir():
            return f"{self.model} is gone"
        record = self.model_record()
        if record is not None and record.fingerprint != fingerprint:
            return f"{self.model} is of another model or calibration text"
        for name in record.others if record else ():
            if name != CARD and not (self.model / name).is_file():
                return f"{self.model / name} is gone"
        for name, claim in record.files.items() if record else ():
            path = self.model / name
            if not path.is_file():
                return f"{path} is gone"
            if path.stat().st_size != claim.bytes:
                return f"{path} has {path.stat().st_size} bytes instead of {claim.bytes}"
            if sampled_sha256(path) != claim.sampled:
                return f"{path} is damaged: its checksum is not the one it was written with"
        try:
            if read_json(self.model / PRUNING_RECORD).get("fingerprint") != fingerprint:
                return f"{self.model} is not of this run, or is damaged"
            Checkpoint.open(self.model)
            for path in (self.model / name for name in READ_BY_TRANSFORMERS):
                if path.is_file():
                    read_json(path)
            LowRankAdapter.beside(self.model)
        except FistaPrunerError as error:
            return str(error)
        return None

    def model_fingerprint(self) -> str | None:
        """Read the fingerprint of the run that wrote the checkpoint; None where its record has none."""
        try:
            fingerprint = read_json(self.model / PRUNING_RECORD).get("fingerprint")
        except FistaPrunerError:
            return None
        return fingerprint if isinstance(fingerprint, str) else None

    def remove_model(self, source: Checkpoint | None = None) -> None:
        """Remove the checkpoint, or what a killed attempt has left of it: the files that the run wrote.

        What shows that the run wrote them goes last, so that a removal that was killed can be done again.
        ``model.json`` stays: it tells whether a checkpoint that is made again is the one that was measured.

        Args:
            source: the model that the run changes; where ``model.json`` is gone, it tells the names of the files that
                the run writes. None knows those of every checkpoint only.

        Raises:
            FistaPrunerError: the folder holds other files, or has no record of a run. Nothing is removed then.
        """
        self.check_model(source)
        remove_unfinished(self.model)
        if self.model.is_dir():
            remove_folder(self.model, self.model / PRUNING_RECORD)

    def check_model(self, source: Checkpoint | None = None) -> None:
        """Refuse a checkpoint that is to be removed and holds others' files; see :meth:`remove_model`.

        Raises:
            FistaPrunerError: names the first of them.
        """
        record, names = self.model_record(), self._model_names()
        if names and record is None and self.model_fingerprint() is None:
            raise FistaPrunerError(
                f"{self.model} was not written by this run (it has no {PRUNING_RECORD}): move it away"
            )
        own = set() if record is None else {*record.files, *record.others}
        if record is None or self.model_fingerprint() not in (None, record.fingerprint):  # it is of an earlier one
            own |= {SINGLE, INDEX, "config.json", PRUNING_RECORD, CARD, PARTIAL}
            own |= {*map(safetensors_name, source.files), *source.companions} if source is not None else set()
        if others := sorted(names - own):
            raise FistaPrunerError(
                f"{self.model / others[0]} was not written by this run: move it away, and run the same command again"
            )

    def remove_weights(self) -> None:
        """Remove what is as large as the model, and the times that were spent on it; the records stay.

        Raises:
            FistaPrunerError: a folder holds files that the run did not write.
        """
        self.remove_model()
        remove_adapter(self.adapter)
        (self.folder / TIMES).unlink(missing_ok=True)

    def _model_names(self) -> set[str]:
        files = (path for path in self.model.rglob("*") if not path.is_dir())
        return {str(path.relative_to(self.model)) for path in files if not BYSTANDERS.fullmatch(path.name)}


def finished_run(folder: Path) -> tuple[RunDirectory, Report]:
    """Open a run and its report.

    Raises:
        FistaPrunerError: it is not finished, or its checkpoint is damaged.
    """
    run, report = RunDirectory(folder), load_run(folder)
    if report.status != "finished" or not run.model.is_dir():
        raise FistaPrunerError(f"{folder} has no finished checkpoint: go on with '{shell_line('resume', folder)}'")
    if (fault := run.model_fault(report.fingerprint or "")) is not None:
        raise FistaPrunerError(f"{fault}: make the checkpoint again with '{shell_line('resume', folder)}'")
    return run, report


def checkpoint_of(path: str | Path) -> Path:
    """Return the checkpoint of a run directory; any other path as it is.

    Raises:
        FistaPrunerError: the run is not finished, or its checkpoint is damaged.
    """
    return finished_run(Path(path))[0].model if is_run(path) else Path(path)

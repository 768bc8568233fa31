"""The run directory serves every verb: a record has a kind, and nothing that only pruning has is needed."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from fistapruner.errors import FistaPrunerError
from fistapruner.runs.directory import LayerJournal, PruneDirectory, RunDirectory, TrainingDirectory, refuse_out
from fistapruner.runs.log import Listener, Logged, StepJournal, hold, log_file, spent
from fistapruner.runs.records import LayerEntry, ModelFacts, load_run
from fistapruner.runs.settled import EvaluationRequest, Numerics, TrainingDecision, TrainingRecord
from fistapruner.runs.store import Snapshots
from fistapruner.runtime.files import remove_folder, write_sealed_json, write_text_atomic

NUMERICS = Numerics(batch_size=2, threads=1, device="cpu", dtype="float32")


def begin(folder: Path) -> TrainingDirectory:
    """A run that has begun."""
    run = TrainingDirectory(folder, "recover")
    run.check_place()
    run.folder.mkdir(exist_ok=True)
    evaluation = EvaluationRequest(data="python", windows=2)
    decision = TrainingDecision(model="m", folder=folder / "dense", numerics=NUMERICS, evaluation=evaluation, steps=7)
    run.write_record(TrainingRecord(kind="recover", model=ModelFacts(source="m"), decision=decision), "steps: 7\n")
    return run


def test_a_place_that_no_run_can_have_is_refused(tmp_path: Path) -> None:
    """A path below a link to nothing; for files see the tests of the command line."""
    (tmp_path / "link").symlink_to("gone")
    for place in ("link", "link/a/b"):
        with (
            pytest.raises(FistaPrunerError, match=rf"cannot write .*/{place}: "),
            RunDirectory(tmp_path / place).entered(),
        ):
            pass
    refuse_out(tmp_path / "new" / "run")


def test_only_what_another_process_reads_stays_of_a_finished_run(tmp_path: Path) -> None:
    for number, run in enumerate((PruneDirectory(tmp_path / "0"), TrainingDirectory(tmp_path / "1", "recover"))):
        working = ["layers/0000.json", "hidden/states", "bypass.safetensors"]
        working = ["teacher/0.safetensors", "states/1.json"] if number else working
        for name in ("report.json", run.text_file.name, *working):
            (run.folder / name).parent.mkdir(exist_ok=True, parents=True)
            (run.folder / name).touch()
        run.remove_working_files()
        assert sorted(path.name for path in run.folder.rglob("*")) == sorted(["report.json", run.text_file.name])


def test_a_verb_keeps_its_own_decision_and_readers_see_what_all_verbs_have(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    record = run.record()
    assert (record.kind, record.decision.steps, record.decision.numerics) == ("recover", 7, NUMERICS)
    common = RunDirectory(run.folder).record()
    assert common.decision.evaluation == EvaluationRequest(data="python", windows=2)
    assert common.decision.folder == tmp_path / "run" / "dense"
    with pytest.raises(FistaPrunerError, match=r"holds a run of 'fistapruner recover', not of prune"):
        PruneDirectory(run.folder).record()
    report = load_run(run.folder)
    assert (report.kind, report.status) == ("recover", "running")
    assert report.model_extra == {}
    assert record.report() == report


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_log_on_a_full_disk_hides_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        Logged(Listener()).say("a line that is lost")
        raise FistaPrunerError("the reason")

    with pytest.raises(FistaPrunerError, match="the reason"), log_file(Path("/dev/full")):
        fail()
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()  # as a file of another user, which root could open
    with pytest.raises(FistaPrunerError, match=r"cannot write .*log\.txt: "), log_file(tmp_path / "log.txt"):
        pass


def test_what_a_stopped_attempt_has_left_is_taken_over(tmp_path: Path) -> None:
    for name in ("lock", "log.txt", "times.json", "times.json.partial"):
        (tmp_path / name).touch()
    TrainingDirectory(tmp_path, "recover").check_place()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("lock", lambda run: hold(run).__enter__()),
        ("log.txt", lambda run: log_file(run / "log.txt").__enter__()),
        ("steps.jsonl", lambda run: StepJournal(run / "steps.jsonl", 0)),
        ("model", lambda run: remove_folder(run / "model")),
        ("model.fistapruner.partial", lambda run: remove_folder(run / "model")),
    ],
)
def test_links_of_a_run_folder_are_refused_and_lead_to_no_other_file(
    tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    victim.write_text("years of work")
    (run / name).symlink_to(victim)
    with pytest.raises(FistaPrunerError, match=rf"{name}\b.* a link .*move (it|the link) away"):
        write(run)
    assert victim.read_text() == "years of work"


def test_files_that_are_only_called_like_those_of_a_run_are_kept(tmp_path: Path) -> None:
    names = ["lock-picking.md", "locksmith.txt", "lock.0-9.txt", "times-table.json", "timesheet.json", "times.a-b.json"]
    for name in names:
        (tmp_path / name).write_text("[1e6]")
    with hold(tmp_path), spent(tmp_path) as times:
        assert times.total() < 1e6
        times.forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_linked_temporary_file_is_replaced(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    (victim := tmp_path / "victim").write_text("years of work")
    link(tmp_path / "report.html.partial", victim)
    write_text_atomic(tmp_path / "report.html", "a report")
    assert (tmp_path / "report.html").read_text() == "a report"
    assert not (tmp_path / "report.html").is_symlink()
    assert victim.read_text() == "years of work"


def test_a_record_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice for a damaged one is to remove the run."""
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    with pytest.raises(FistaPrunerError, match=r"cannot read .*run\.json: Permission denied$"):
        RunDirectory(tmp_path).record()


@pytest.mark.parametrize("name", ["report.html", "report.html.partial"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "mine").mkdir(parents=True)
    with pytest.raises(FistaPrunerError, match=r"cannot write .*/report\.html: Is a directory$"):
        write_text_atomic(tmp_path / "report.html", "a report")
    assert (tmp_path / name / "mine").is_dir()


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EIO])
def test_folders_that_cannot_be_flushed_take_files_and_a_file_that_cannot_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", fsync)
    folders = True
    with nullcontext() if fault != errno.EIO else pytest.raises(FistaPrunerError, match="cannot write"):
        write_text_atomic(tmp_path / "report.html", "a report")
    assert (tmp_path / "report.html").read_text() == "a report"
    folders = False
    with pytest.raises(FistaPrunerError, match=r"cannot write .*report\.html"):
        write_text_atomic(tmp_path / "report.html", "another")
    assert (tmp_path / "report.html").read_text() == "a report"


def test_a_folder_that_may_not_be_listed_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    write_text_atomic(tmp_path / "report.html", "a report")
    assert (tmp_path / "report.html").read_text() == "a report"


@pytest.mark.parametrize("name", [".DS_Store", "._notes", ".nfs000000000001"])
def test_what_systems_leave_in_every_folder_is_nobodys_file(tmp_path: Path, name: str) -> None:
    places = tmp_path / "any", tmp_path / "prune", tmp_path / "recover"
    for run in (RunDirectory(places[0]), PruneDirectory(places[1]), TrainingDirectory(places[2], "recover")):
        run.folder.mkdir()
        (run.folder / name).touch()
        run.check_place()
    (run.folder / name).unlink()
    (run.folder / name).mkdir()  # no file of a system
    with pytest.raises(FistaPrunerError, match=rf"other things in it \({re.escape(name)}\)"):
        run.check_place()


def test_a_run_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    content = json.loads(run.run_file.read_text())
    content["decision"]["steps"] = 8
    run.run_file.write_text(json.dumps(content))
    with pytest.raises(FistaPrunerError, match="its checksum is wrong"):
        run.record()


@pytest.mark.parametrize(("versions", "by"), [(None, "unknown"), ({"fistapruner": "0.0.1"}, r"0\.0\.1")])
def test_a_run_file_of_another_format_is_refused(tmp_path: Path, versions: object, by: str) -> None:
    run = RunDirectory(tmp_path)
    write_sealed_json(run.run_file, {"format": 0, "versions": versions})
    with pytest.raises(FistaPrunerError, match=rf"was written by another release of fistapruner \({by}\)"):
        run.record()


def test_a_journaled_layer_counts_only_as_it_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = LayerJournal(tmp_path)
    journal.write("run", {"a": torch.arange(4.0)}, LayerEntry(index=0))
    assert journal.finished(0, "run")
    assert torch.equal(journal.weights(0).read("a"), torch.arange(4.0))
    assert journal.finished(1, "run") is None
    assert not caplog.messages  # a layer that was never written is not one that is done again
    assert journal.finished(0, "another run") is None
    assert len(caplog.messages) == 1  # damaged ones: ``tests/fuzz``; swapped ones: ``tests/faults``


@pytest.mark.parametrize("content", ["null", "7", '"text"', "[]", "{}", "[" * 100_000, "\xff"])
def test_a_record_that_is_no_sealed_object_counts_as_damaged(tmp_path: Path, content: str) -> None:
    journal, snapshots = LayerJournal(tmp_path / "layers"), Snapshots(tmp_path / "states")
    journal.write("run", {}, LayerEntry(index=0))
    snapshots.write("run", 1, {}, {"weight": torch.ones(1)})
    assert journal.finished(0, "run")
    assert snapshots.newest("run")
    for record in (journal.files(0)[1], snapshots.files(1)[1]):
        record.write_text(content, "latin-1")
    assert journal.finished(0, "run") is None
    assert snapshots.newest("run") is None


def test_a_fault_of_the_program_is_in_the_log_with_its_traceback(tmp_path: Path) -> None:
    """An error of the user's and an interruption are lines without one."""
    for fault in (OSError(2, "gone", "file"), FistaPrunerError("no such model"), KeyboardInterrupt()):
        with pytest.raises(type(fault)), log_file(tmp_path / "log.txt"):
            raise fault
        said = (tmp_path / "log.txt").read_text()
        assert f"stopped: {str(fault) or 'KeyboardInterrupt'}\n" in said
        assert ("Traceback" in said) == isinstance(fault, OSError)
        (tmp_path / "log.txt").unlink()

"""Two processes on one run directory: the second is refused while the first lives, and takes over when it is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import select
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from faults.conftest import Runs
from fistapruner.errors import FistaPrunerError
from fistapruner.runs.directory import RunDirectory
from fistapruner.runs.lock import PREPARING, hold, holders, preparing


def write_lock(folder: Path, **record: object) -> None:
    (folder / "lock").write_text(json.dumps(record))


def test_second_run_is_refused_with_host_and_process(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    out.mkdir()
    (out / "layers").mkdir()
    with hold(out):
        outcome = runs.run(out)
    assert outcome.status == 2
    assert f"process {os.getpid()} on this machine ({platform.node()})" in outcome.stderr
    runs.check_resumed(out)


def test_holder_on_another_host_is_believed(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    (out / "layers").mkdir(parents=True)
    write_lock(out, host="elsewhere", pid=77, started=1.0)
    outcome = runs.run(out)
    assert outcome.status == 2
    assert "process 77 on host elsewhere" in outcome.stderr
    assert f"remove {out / 'lock'}" in outcome.stderr
    (out / "lock").unlink()
    runs.check_resumed(out)


WRONG = [{"host": 1}, {"pid": "1"}, {"started": None}]
"""What is wrong in a record that another process would hold the lock with."""


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"[1]", b"\xff\x00", b"x" * 500]
    + [json.dumps({"host": "elsewhere", "pid": 1, "started": 1.0} | wrong).encode() for wrong in WRONG],
)
def test_unreadable_lock_is_stale(disk: Path, content: bytes) -> None:
    (disk / "lock").write_bytes(content)
    assert holders(disk) == []
    with hold(disk):
        assert json.loads((disk / "lock").read_text())["pid"] == os.getpid()
    assert not (disk / "lock").exists()


def test_dead_and_reborn_processes_are_stale(disk: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    write_lock(disk, host=platform.node(), pid=gone.pid, started=1.0)
    with hold(disk):
        pass
    # The id lives, but it is another process than the one that wrote the file.
    write_lock(disk, host=platform.node(), pid=os.getppid(), started=1.0)
    with hold(disk):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="elsewhere start times do not move with the clock")
def test_a_holder_lives_whatever_the_clock_was_set_to(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = psutil.Process(os.getppid())
    monkeypatch.setattr(os, "getpid", lambda: parent.pid)
    with hold(disk):
        theirs = json.loads((disk / "lock").read_text())
    monkeypatch.undo()
    write_lock(disk, **theirs | {"started": parent.create_time() - 3600})
    assert [holder["pid"] for holder in holders(disk)] == [parent.pid]
    with pytest.raises(FistaPrunerError, match=f"process {parent.pid}"), hold(disk):
        pass
    later = f"{theirs['born']}0"  # not this process's, which may have begun in the same tick of the clock
    write_lock(disk, **theirs | {"born": later, "started": parent.create_time()})  # an id that was used again
    assert holders(disk) == []


def test_living_process_is_believed_where_the_file_system_has_no_locks(disk: Path) -> None:
    parent = psutil.Process(os.getppid())
    write_lock(disk, host=platform.node(), pid=parent.pid, started=parent.create_time())
    with pytest.raises(FistaPrunerError, match=f"process {parent.pid} on this machine") as caught, hold(disk):
        pass
    assert "remove" not in str(caught.value)  # the lock of a process that lives is not for removal


@pytest.mark.parametrize("fault", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EIO])
def test_file_systems_without_locks_serve_and_other_faults_are_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(fault, os.strerror(fault))))
    for lock in (hold, preparing):
        named = pytest.raises(FistaPrunerError, match=rf"cannot lock {disk / 'lock'}.*: Input/output error$")
        with nullcontext() if fault != errno.EIO else named, lock(disk):
            pass


def test_a_holder_that_has_not_written_its_record_yet_is_waited_for(disk: Path) -> None:
    with open(disk / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FistaPrunerError, match="by another process that is just starting: wait"), hold(disk):
            pass
    with hold(disk):
        pass


def test_ranges_of_layers(disk: Path) -> None:
    """Ranges that do not overlap work at once; a whole run excludes them all."""
    with hold(disk, (4, 7)), hold(disk, (0, 3)):
        pass
    with hold(disk, (0, 3)), hold(disk, (4, 7)):
        for layers in ((3, 3), (4, 4), (1, 2), (5, 9), None):
            with pytest.raises(FistaPrunerError, match="in use"), hold(disk, layers):
                pass
    with hold(disk), pytest.raises(FistaPrunerError, match="in use"), hold(disk, (0, 1)):
        pass
    assert list(disk.iterdir()) == []


def test_a_file_that_its_holder_removes_before_it_is_locked_is_made_again(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append((disk / "lock").unlink())
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(disk):
        assert removed
        assert json.loads((disk / "lock").read_text())["pid"] == os.getpid()


def test_the_file_of_another_holder_stays(disk: Path) -> None:
    """Somebody has removed ours, and another process has taken the directory."""
    with hold(disk):
        (disk / "lock").unlink()
        write_lock(disk, host="elsewhere", pid=77, started=1.0)
    assert [holder["host"] for holder in holders(disk)] == ["elsewhere"]


def test_parts_may_find_the_same_lock_stale_at_once(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each locks it for a moment to find that nobody else does."""
    write_lock(disk, host=platform.node(), pid=2**22 + 1, started=1.0)
    other = os.open(disk / "lock", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr("fistapruner.runs.lock.time.sleep", lambda _: os.close(other))
    with hold(disk, (0, 3)):
        assert [path.name for path in disk.iterdir()] == ["lock.0-3"]


def test_parts_take_turns_to_prepare(disk: Path) -> None:
    """With a lock on a file, which holds between hosts on NFS; it goes when the whole directory is held."""
    script = f"""
from pathlib import Path
from fistapruner.runs.lock import hold, preparing
with hold(Path({str(disk)!r}), (4, 7)):
    with preparing(Path({str(disk)!r}), lambda: print("waits", flush=True)):
        print("prepares", flush=True)
"""
    with hold(disk, (0, 3)), preparing(disk):
        assert (disk / PREPARING).is_file()
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        assert not select.select([process.stdout], [], [], 0.3)[0]
    assert process.communicate() == (b"prepares\n", None)
    RunDirectory(disk).check_place()  # nobody has written run.json
    with hold(disk):
        assert [path.name for path in disk.iterdir()] == ["lock"]


def test_killed_holder_is_taken_over(disk: Path) -> None:
    script = f"""
import time
from pathlib import Path
from fistapruner.runs.lock import hold
with hold(Path({str(disk)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FistaPrunerError, match=f"process {process.pid}"), hold(disk):
            pass
        process.kill()
        process.wait()
    with hold(disk):
        pass

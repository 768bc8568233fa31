"""Two processes on one run directory: the second is refused while the first lives, and takes over when it is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from faults.conftest import Runs
from fistapruner.errors import FistaPrunerError
from fistapruner.runs.lock import hold, holder


def write_lock(folder: Path, **record: object) -> None:
    (folder / "lock").write_text(json.dumps(record))


def test_second_run_is_refused_with_host_and_process(runs: Runs, disk: Path) -> None:
    out = disk / "run"
    out.mkdir()
    with hold(out):
        outcome = runs.run(out)
    assert outcome.status == 2
    assert f"process {os.getpid()} on the host {platform.node()}" in outcome.stderr
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
    assert holder(disk) is None
    with hold(disk):
        assert json.loads((disk / "lock").read_text())["pid"] == os.getpid()
    assert not (disk / "lock").exists()


@pytest.mark.parametrize("fault", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EIO])
def test_file_systems_without_locks_serve_and_other_faults_are_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(fault, os.strerror(fault))))
    named = pytest.raises(FistaPrunerError, match=rf"cannot write {disk / 'lock'}.*: Input/output error$")
    with nullcontext() if fault != errno.EIO else named, hold(disk):
        pass


def test_a_lock_that_nobody_keeps_is_taken_over_whatever_host_it_names(runs: Runs, disk: Path) -> None:
    """As of a pod that starts again under another name; its process id may be anybody's."""
    out = disk / "run"
    out.mkdir()
    write_lock(out, host="elsewhere", pid=os.getppid())
    assert holder(out) is None
    runs.check_resumed(out)


def test_a_holder_is_seen_without_a_lock_of_ones_own(disk: Path) -> None:
    with hold(disk):
        assert holder(disk) == holder(disk) == {"host": platform.node(), "pid": os.getpid()}
    assert holder(disk) is None


def test_a_holder_that_has_not_written_its_record_yet_is_waited_for(disk: Path) -> None:
    with open(disk / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FistaPrunerError, match="by another process that is just starting: wait"), hold(disk):
            pass
    with hold(disk):
        pass


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

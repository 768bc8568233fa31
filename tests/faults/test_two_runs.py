"""Two processes on one run directory: the second is refused while the first lives, and takes over when it is dead."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from faults.conftest import Runs
from fistapruner.errors import FistaPrunerError
from fistapruner.runs.log import hold, holder


def test_second_run_is_refused_with_host_and_process(runs: Runs, disk: Path) -> None:
    """Others see the holder without a lock of their own."""
    out = disk / "run"
    out.mkdir()
    assert holder(out) is None
    with hold(out):
        assert holder(out) == holder(out) == {"host": platform.node(), "pid": os.getpid()}
        outcome = runs.run(out)
    assert holder(out) is None
    assert outcome.status == 2
    assert f"process {os.getpid()} on the host {platform.node()}" in outcome.stderr
    runs.check_resumed(out)


@pytest.mark.parametrize(
    "content", ["", "nonsense", "[1]", "x" * 500, f'{{"host": "elsewhere", "pid": {os.getppid()}, "started": 1.0}}']
)
def test_a_lock_that_nobody_keeps_is_taken_over_whatever_it_says(disk: Path, content: str) -> None:
    """As of a pod that starts again under another name; its process id may be anybody's."""
    (disk / "lock").write_text(content)
    assert holder(disk) is None
    with hold(disk):
        assert holder(disk) == {"host": platform.node(), "pid": os.getpid()}
    assert holder(disk) is None


def test_killed_holder_is_taken_over(disk: Path) -> None:
    script = f"""
import time
from pathlib import Path
from fistapruner.runs.log import hold
with hold(Path({str(disk)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FistaPrunerError, match=f"process {process.pid}"), hold(disk):
            pass
        process.kill()
        process.wait()
    with hold(disk):
        pass

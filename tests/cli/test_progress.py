"""Long passes before and after the walk through the decoder layers say how far they are, now and then."""

from __future__ import annotations

import gc
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest

import tiny
from fistapruner.cli import progress
from fistapruner.pruning.run import prune
from fistapruner.runs.log import Listener
from fistapruner.runs.records import LayerEntry, OperatorEntry


def test_every_long_pass_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    class Told(Listener):
        def tick(self, what: str, done: int, total: int) -> None:
            told.append((what, done, total))

    dense = tiny.save("llama", tmp_path / "dense")
    report = prune(
        str(dense),
        tmp_path / "run",
        listener=Told(),
        evaluate="python",
        evaluate_windows=2,
        calibration={"source": "python", "samples": 4, "seqlen": 32},
    )
    layers = len(report.layers)
    for what in (
        "decoder layers, forwards",
        "decoder layers, backwards",
        "decoder layers of dense",
        "decoder layers of run",  # RUN/model has the run's name
    ):
        assert [(done, total) for name, done, total in told if name == what] == [
            (done, layers) for done in range(1, layers + 1)
        ], what


def test_a_long_pass_is_one_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    listener = progress.PlainListener(lambda: now)
    for done in range(1, 31):
        listener.tick("decoder layers of model", done, 30)
        now += progress.EVERY / 8
    assert capsys.readouterr().err.splitlines() == ["decoder layers of model: 9 of 30"]
    listener.tick("decoder layers of dense", 1, 2)
    assert capsys.readouterr().err == "decoder layers of dense: 1 of 2\n"


def test_what_is_being_done_is_said_after_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    """With how much of it is done, or for how long it has gone on where that is not known or has not changed."""
    now = 100.0
    listener = progress.PlainListener(lambda: now)

    def later(share: float) -> list[str]:
        nonlocal now
        now += share * progress.EVERY
        listener.remind()
        return capsys.readouterr().err.splitlines()

    assert later(1) == ["starting, for 7.0 s"]
    listener.say("model smollm2")
    capsys.readouterr()
    assert later(0.9) == []
    now += progress.EVERY
    listener.tick("planning", 0, 1)
    assert capsys.readouterr().err == "planning\n"  # not "planning, for 0 ms"
    listener.say("model smollm2")
    capsys.readouterr()
    listener.tick("planning", 0, 1)
    assert later(1.5) == []  # said before
    listener.tick("windows", 3, 9)
    assert capsys.readouterr().err == "windows: 3 of 9\n"
    listener.operators(5, "down_proj", None)
    assert later(1) == ["layer 5: down_proj, for 7.0 s"]
    listener.say("writing the checkpoint")
    capsys.readouterr()
    assert later(1) == ["writing the checkpoint, for 7.0 s"]


def test_a_listener_says_it_by_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the main thread is busy; not once it is gone, nor where it is to be quiet."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    gc.collect()  # listeners of earlier tests, whose threads then end
    for thread in [thread for thread in threading.enumerate() if thread.name == progress.REMINDER]:
        thread.join(60)
    before = threading.active_count()
    listener = progress.choose_listener(Namespace(quiet=False, json=False))
    said = ""
    until = time.monotonic() + 60
    while "starting, for" not in said and time.monotonic() < until:
        said += capsys.readouterr().err
    assert "starting, for" in said
    thread = next(thread for thread in threading.enumerate() if thread.name == progress.REMINDER)
    del listener
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    for flags in ({"quiet": True, "json": False}, {"quiet": False, "json": True}):
        assert type(progress.choose_listener(Namespace(**flags))) is Listener
    assert threading.active_count() == before


def test_a_layer_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    listener = progress.PlainListener(lambda: now)
    listener.begin(33, 30)
    for index in range(30, 33):
        now += 4000.0
        listener.layer(LayerEntry(index=index, name=f"layers.{index}", seconds={}, operators=[]))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "33 decoder layers, 30 of them already done"
    assert [line.partition("; ")[2] for line in lines[1:]] == [
        "2 layers and about 2 h 13 min left",
        "1 layer and about 1 h 07 min left",
        "",
    ]


def test_layers_that_a_resumed_run_passes_do_not_count_into_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    listener = progress.PlainListener(lambda: now)
    listener.begin(33, 30)
    now += 50000.0  # hidden states go through thirty layers
    for index in range(30, 32):
        now += 4000.0
        listener.layer(LayerEntry(index=index, name=f"layers.{index}", seconds={"solve": 4000.0}, operators=[]))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("; ")[2] for line in lines[1:]] == [
        "2 layers and about 2 h 13 min left",
        "1 layer and about 1 h 07 min left",
    ]


def test_each_run_has_a_bar_and_errors_of_its_own() -> None:
    """A comparison's runs share the listener."""
    listener = progress.LiveListener()
    for error in (0.5, 0.25):
        listener.begin(1, 0)
        assert [task.description for task in listener._bar.tasks] == [""]
        operator = OperatorEntry(name="q", shape=(1, 1), sparsity="50%", zeros=0, relative_error=error)
        listener.layer(LayerEntry(index=0, name="layers.0", seconds={}, operators=[operator]))
        listener.operators(0, "q", None)
        assert listener._bar.tasks[0].description == f"0.q, error so far {100 * error:.2f} %"
        listener.end()
        assert listener._bar.tasks == []

"""Long passes before and after the walk through the decoder layers say how far they are, now and then."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

import tiny
from fistapruner.cli import progress
from fistapruner.cli.arguments import show
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


def test_who_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody where it is to be quiet; lines in a file, live lines in a terminal, until the result is printed."""
    for flags in ({"quiet": True, "json": False}, {"quiet": False, "json": True}):
        assert type(progress.choose_listener(Namespace(**flags))) is Listener
    assert isinstance(progress.choose_listener(Namespace()), progress.PlainListener)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    live = progress.choose_listener(arguments := Namespace())
    assert isinstance(live, progress.LiveListener)
    assert live.bar.live.is_started
    show("the result", arguments)
    assert not live.bar.live.is_started


def test_a_layer_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Layers that a resumed run passes do not count into the time."""
    now = 100.0
    listener = progress.PlainListener(lambda: now)
    listener.begin(33, 30)
    now += 50000.0  # hidden states go through thirty layers
    for index in range(30, 33):
        now += 4000.0
        listener.layer(LayerEntry(index=index, name=f"layers.{index}", seconds={"solve": 4000.0}, operators=[]))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "33 decoder layers, 30 of them already done"
    left = [line.partition("; ")[2] for line in lines[1:]]
    assert left == ["2 layers and about 2 h 13 min left", "1 layer and about 1 h 07 min left", ""]


def test_each_run_has_a_bar_and_errors_of_its_own() -> None:
    """A comparison's runs share the listener; beside the bar is what is being done, and how much of it."""
    listener = progress.LiveListener()
    for error in (0.5, 0.25):
        listener.begin(1, 0)
        operator = OperatorEntry(name="q", shape=(1, 1), sparsity="50%", zeros=0, relative_error=error)
        listener.layer(LayerEntry(index=0, name="layers.0", seconds={}, operators=[operator]))
        listener.operators(0, "q", None)
        work, layers = listener.bar.tasks
        assert (work.description, layers.completed) == ("layer 0: q", 1)
        assert layers.fields["done"] == f"error so far {100 * error:.2f} %"
        listener.end()
        listener.tick("evaluating", 3, 9)
        assert [(task.description, task.fields["done"]) for task in listener.bar.tasks] == [("evaluating", "3 of 9")]
    listener.close()

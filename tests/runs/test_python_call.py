"""Arguments that public functions share are checked first, and errors that name flags name the keywords too."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.errors import MissingExtraError
from fistapruner.execution.pool import NoRoom
from fistapruner.runs.python_call import python_call
from fistapruner.runtime.formatting import shell_line


@pytest.mark.parametrize(
    "call",
    [
        lambda **given: fp.prune("m", "out", **given),
        lambda **given: fp.finish_run("out", **given),
        lambda **given: fp.recover("m", "out", **given),
        lambda **given: fp.align("m", "out", **given),
        lambda **given: fp.align_compare("m", "out", **given),
        lambda **given: fp.resume("out", **given),
        lambda **given: fp.evaluate_run("out", "python", **given),
        lambda **given: fp.bench_run("out", **given),
    ],
)
@pytest.mark.parametrize("listener", [print, 3, fp.FistaPrunerError])
def test_a_listener_that_is_none(call: Callable[..., Any], listener: Any) -> None:
    with pytest.raises(FistaPrunerError, match=r"^listener is of the class \w+, and an object of a subclass of .*List"):
        call(listener=listener)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp.prune("m", "out", inspect=3), "inspect is of the class int, and a function is expected"),
        (lambda: fp.prune("m", "out", command=["a"]), "command is of the class list, and the text of a shell line is"),
        (lambda: fp.recover("m", "out", command=3), "command is of the class int"),
        (lambda: fp.prune("m", "out", source="m"), "source is of the class str, and a ModelSource is expected"),
        (lambda: fp.prune("m", "out", allow_pickle="no"), "allow_pickle is of the class str, and True or False is"),
        (lambda: fp.evaluate("m", "python", trust_remote_code=1), "trust_remote_code is of the class int"),
        (lambda: fp.evaluate("m", "python", tick=3), "tick is of the class int"),
        (lambda: fp.evaluate("m", tasks="a", tasks_dir=3), "tasks_dir is of the class int, and the path of a folder"),
        (lambda: fp.evaluate("m", tasks=3), r"tasks 3: a name, or a list of names, is expected"),
        (lambda: fp.evaluate("m", tasks=["a", 3]), r"tasks \['a', 3\]: a name, or a list of names"),
        (lambda: fp.load("m", int8="yes"), "int8 is of the class str, and True or False is expected"),
        (lambda: fp.pack("m", "out", progress=3), "progress is of the class int"),
    ],
)
def test_arguments_of_a_wrong_type(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=f"^{message}"):
        call()


def test_keywords_of_flags(tmp_path: Path) -> None:
    """The note names every keyword of the function that was called, and the message stays that of the command."""

    def notes(call: Callable[[], Any], message: str) -> list[str]:
        with pytest.raises(FistaPrunerError, match=message) as caught:
            call()
        return getattr(caught.value, "__notes__", [])

    data_of = {"source": "python"}
    model = str(tiny.save("llama", tmp_path / "model"))
    out, data = tmp_path / "out", {"source": "python", "samples": 4, "seqlen": 16}
    none = notes(lambda: fp.prune(model, out, sparsity="0%", recover={}, calibration=data), "another --sparsity, or")
    assert none == ["In Python: --sparsity is sparsity=..., --recover is recover=..."]
    nothing = notes(lambda: fp.align(model, out), "say what to train on with --data: a .jsonl")
    assert nothing == ["In Python: --data is data={'pairs': ...}"]
    dense = notes(
        lambda: fp.recover(model, out, dense=str(tmp_path / "no"), data=data_of), "^--dense: model .* does not exist"
    )
    assert dense == ["In Python: --dense is dense=..."]
    few = tmp_path / "few.txt"
    few.write_text("some words " * 40)
    short = notes(lambda: fp.prune(model, out, calibration={**data, "source": few, "seqlen": 900}), "--seqlen")
    assert "--seqlen is calibration={'seqlen': ...}" in short[0]
    assert notes(lambda: fp.prune(str(tmp_path / "no"), out), "does not exist") == []


def test_keywords_of_the_recovery_that_follows(tmp_path: Path) -> None:
    """Pruning has a flag of the same name."""
    model, text = str(tiny.save("llama", tmp_path / "model")), str(tiny.write_text(tmp_path / "text.jsonl"))
    calibration = {"source": text, "samples": 4, "seqlen": 16}
    with pytest.raises(FistaPrunerError, match=r"^recover: .* a smaller --seqlen \(these are flags") as caught:
        fp.prune(model, tmp_path / "out", calibration=calibration, recover={"data": {"source": text, "seqlen": 2048}})
    assert caught.value.__notes__ == [
        "In Python: --seqlen is recover={'data': {'seqlen': ...}}, --recipe is recipe=..."
    ]


def test_flags_in_commands_stay_flags_and_notes_of_others_stay() -> None:
    def fails(message: str) -> Callable[..., None]:
        def call(*, dense: str = "", dtype: str = "") -> None:
            error = FistaPrunerError(message)
            error.add_note("of somebody else")
            raise error

        return python_call()(call)

    command = shell_line("recover", "/a folder/run", "--out", "it", "--dense", "MODEL")
    for message, note in (
        (f"give '{command}', or the model's --dtype", ["In Python: --dtype is dtype=..."]),
        ("give 'fistapruner recover /run --dense MODEL'", []),
        ("'--dense' or --dtype", ["In Python: --dense is dense=..., --dtype is dtype=..."]),
    ):
        with pytest.raises(FistaPrunerError) as caught:
            python_call()(fails(message))()
        assert caught.value.__notes__ == ["of somebody else", *note]


@pytest.mark.parametrize("error", [MissingExtraError("ray", "ray", "a pool"), NoRoom("layer 3"), FistaPrunerError("a")])
def test_errors_are_pickled_with_their_notes(error: FistaPrunerError) -> None:
    """As a pool of processes that calls this library does."""
    error.add_note("In Python: ...")
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.__notes__) == (type(error), str(error), error.__notes__)

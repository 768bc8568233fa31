"""The comparison: how methods are named, one protocol for all rows, going on where it stopped."""

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.errors import FistaPrunerError
from fistapruner.reporting.comparison import comparison_table
from fistapruner.runs.log import Listener, hold
from fistapruner.runs.records import Comparison, load_comparison, load_run

SETTINGS: dict[str, Any] = {"calibration": {"source": "python", "samples": 3, "seqlen": 32}}


class Counts(Listener):
    """Count the rows that are measured and the passes of the dense model; a message that begins so interrupts."""

    def __init__(self, stop: str | None = None) -> None:
        self.stop, self.measured, self.dense, self.generated = stop, 0, 0, 0

    def say(self, message: str) -> None:
        self.measured += message.startswith("evaluating on")
        self.generated += message.startswith("generating text: 0.0 of")
        if self.stop and message.startswith(self.stop):
            raise KeyboardInterrupt

    def tick(self, what: str, done: int, total: int) -> None:
        self.dense += done == total and what == "decoder layers of dense model"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny.save("llama", tmp_path / "dense model", num_hidden_layers=1))


def compared(model: str, methods: str | Sequence[str], out: Path, sparsities: str = "50%", **named: Any) -> Comparison:
    return fp.compare(model, methods, sparsities, out, **{"settings": SETTINGS, "windows": 2, **named})


def folders(out: Path) -> dict[str, Path]:
    """Run directories of a comparison's rows by the first letters of their names."""
    return {path.name.partition("-")[0]: path for path in (out / "runs").iterdir()}


def test_methods_chains_recipes_and_their_settings(model: str, tmp_path: Path) -> None:
    """A list is read as the text; sparsity, calibration, seed and execution of a recipe are those of the comparison."""
    file = tmp_path / "mine.yaml"
    file.write_text("{method: magnitude, dense_target: 0.5, sparsity: 70%, seed: 5, calibration: {samples: 9}}")
    methods = [
        "wanda",
        "alps@propagate=dense,calibration={samples: 2, seqlen: 8}",
        "wanda+refit@targets=[q_proj, v_proj],allocation=owl",
        str(file),
    ]
    found = compared(model, methods, tmp_path / "out")
    assert [row.label for row in found.rows] == methods
    assert [row.error for row in found.rows] == [None] * 4
    assert [row.method for row in found.rows] == ["wanda", "alps", "wanda+refit", "magnitude"]
    one, two, three, four = (row.settings for row in found.rows)
    assert (two["method"], two["propagate"]) == ([{"alps": {}}], "dense")
    assert (two["calibration"]["samples"], two["calibration"]["seqlen"]) == (2, 8)
    assert (three["targets"], three["allocation"]) == (["q_proj", "v_proj"], "owl")
    assert (four["dense_target"], four["sparsity"], four["seed"]) == (0.5, "50%", 0)
    assert four["calibration"] == one["calibration"]
    assert found.calibration.samples == 3  # not that of a row with settings of its own
    counts = Counts()
    assert compared(model, ",".join(methods), tmp_path / "out", listener=counts).rows == found.rows
    assert not counts.measured


@pytest.mark.parametrize(
    ("methods", "named", "message"),
    [
        ("dense_target=0.5,alps", {}, "'dense_target=0.5' is not known"),
        ("wanda,wanda", {}, "name a row twice"),
        ("wanda@dense_target", {}, "'dense_target' is not a setting such as"),
        ("wanda@sparsity=70%", {}, "sparsity is no setting of one method: use"),
        ("alps@iteration=3", {}, "unknown setting 'iteration'"),
        ("alps@propagat=dense", {}, r"unknown setting 'propagat': did you mean 'propagate'\?"),
        ("nowhere.yaml", {}, r"recipe 'nowhere.yaml' is neither a file nor"),
        ("wanda", {"seeds": (0, 1, 0)}, "name a row twice"),
        ("wanda", {"sparsities": "50%,2:4,0.5"}, "name a row twice"),
        ("wanda", {"seeds": ()}, "nothing to compare"),
        ("wanda", {"data": "nowhere.txt"}, r"nowhere\.txt"),
        ("wanda", {"settings": {"calibration": {"source": "python", "seqlen": 10**6}}}, "seqlen 1000000 is more than"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_made(
    model: str, tmp_path: Path, methods: str, named: dict[str, Any], message: str
) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        compared(model if named else "nowhere", methods, tmp_path / "out", **named)
    assert not (tmp_path / "out").exists()


def test_one_protocol_and_going_on(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = "magnitude,wanda+refit@propagate=pruned,dense_target=pruned,sparsegpt@allocation=owl"
    stopped, resumed = Counts(stop="6/12"), Counts()
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; nothing is lost: give the same command again$"):
        compared(model, methods, out, "50%,2:4", seeds=(0, 1), listener=stopped)
    assert json.loads((out / "compare.json").read_text())["status"] == "running"
    comparison = compared(model, methods, out, "50%,2:4", seeds=(0, 1), listener=resumed)
    # Five rows were done when the sixth was interrupted. Of the other seven two fail: owl cannot do 2:4.
    assert (stopped.measured, resumed.measured) == (5, 5)
    assert (stopped.dense, resumed.dense) == (1, 1)  # and not once a row
    assert not (out / "dense-states").exists()
    assert (comparison.status, len(comparison.rows)) == ("finished", 12)
    failed = [row for row in comparison.rows if row.error]
    assert [(row.sparsity, row.method) for row in failed] == [("2:4", "sparsegpt")] * 2
    for row in comparison.rows:
        if row.error:
            continue
        assert row.perplexity.text_sha256 == comparison.dense.text_sha256
        assert row.gap == pytest.approx(row.perplexity.nll - comparison.dense.nll)
        assert row.divergence.nll_difference == pytest.approx(row.gap, abs=1e-6)
        assert row.operator_zeros >= row.operator_weights // 2
    tokens: dict[int, set[str]] = {}
    for file in (out / "runs").glob("*/run.json"):
        facts = json.loads(file.read_text())
        tokens.setdefault(facts["recipe"]["seed"], set()).add(facts["calibration"]["sha256"])
        assert not (file.parent / "model").exists()
        assert not list((file.parent / "layers").glob("*.safetensors"))
    assert {seed: len(hashes) for seed, hashes in tokens.items()} == {0: 1, 1: 1}
    assert tokens[0] != tokens[1]
    table = (out / "compare.md").read_text()
    assert table.count("\n| ") == 2 + 12
    assert "cannot be used with 2:4" in table
    same = f"{Path(model).parent}/../{Path(model).parent.name}/{Path(model).name}/"
    assert compared(same, methods, out, "50%,2:4", seeds=(0, 1)).rows == comparison.rows
    assert load_comparison(out).rows == comparison.rows


def test_a_comparison_is_the_rows_that_are_asked_for_now(model: str, tmp_path: Path) -> None:
    counts = Counts()
    first = compared(model, "magnitude,wanda", tmp_path / "out")
    assert [row.label for row in compared(model, "sparsegpt", tmp_path / "out").rows] == ["sparsegpt"]
    both = compared(model, "wanda,magnitude", tmp_path / "out", listener=counts)
    assert (both.rows, counts.measured) == (first.rows[::-1], 0)


def test_another_model_text_or_setting_is_refused_and_changes_nothing(model: str, tmp_path: Path) -> None:
    out, text, data = tmp_path / "out", tmp_path / "text.txt", tmp_path / "data.txt"
    text.write_text("it was the best of times, it was the worst of times. " * 20)
    data.write_text("a brown fox jumps over it. " * 40)
    settings = {"calibration": {**SETTINGS["calibration"], "source": str(text)}}
    named: dict[str, Any] = {"settings": settings, "data": str(data)}
    compared(model, "wanda@allocation=owl", out, "2:4", **named)  # whose only row fails
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    other = str(tiny.save("llama", tmp_path / "other", num_hidden_layers=1, seed=1))
    samples = {"calibration": {**settings["calibration"], "samples": 4}}

    def refused(name: str, model: str, **changes: Any) -> None:
        with pytest.raises(FistaPrunerError, match=f"holds a comparison with another {name}: name another folder"):
            compared(model, "magnitude", out, **{**named, **changes})
        assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    refused("model", other)
    refused("evaluation text", model, windows=1)
    refused("calibration.samples", model, settings=samples)
    refused("ignore", model, settings={**settings, "ignore": ["down_proj"]})
    text.write_text("it was the age of wisdom, it was the age of foolishness. " * 20)
    refused("calibration text", model)


def test_a_row_that_was_begun_with_other_settings_says_so(model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: wanda")
    compared(model, str(recipe), tmp_path / "out")
    recipe.write_text("method: magnitude")
    [row] = compared(model, str(recipe), tmp_path / "out").rows
    assert row.perplexity is None
    assert "holds a run with method" in (row.error or "")


def test_one_comparison_at_a_time_works_in_a_folder(model: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out"), pytest.raises(FistaPrunerError, match="in use by process"):
        compared(model, "wanda", tmp_path / "out")


def test_a_folder_that_is_no_comparison_is_refused_and_kept(model: str, tmp_path: Path) -> None:
    file = tmp_path / "out" / "runs" / "experiment" / "notes.txt"
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    with pytest.raises(FistaPrunerError, match="other things in it"):
        compared(model, "magnitude", tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]


def test_checkpoints_that_a_command_kept_stay(model: str, tmp_path: Path) -> None:
    """Also after commands without it; a row whose checkpoint is gone is made again where it is asked to be kept."""
    out, counts = tmp_path / "out", [Counts(), Counts(), Counts()]
    [first], [again], [once_more] = (
        compared(model, "wanda", out, keep=keep, listener=count).rows
        for keep, count in zip((False, True, True), counts, strict=True)
    )
    assert (again.error, again.perplexity, again.operator_zeros) == (None, first.perplexity, first.operator_zeros)
    assert (once_more, counts[2].measured) == (again, 0)
    compared(model, "magnitude", out)
    compared(model, "wanda,magnitude", out)
    runs = folders(out)
    assert not (runs["magnitude"] / "model").exists()
    assert "| Perplexity, python |" in (runs["wanda"] / "model" / "README.md").read_text()


def test_calibration_text_is_generated_once_and_its_time_is_in_no_row(model: str, tmp_path: Path) -> None:
    """Also by a comparison that goes on."""
    named: dict[str, Any] = {"settings": {"calibration": {"samples": 2, "seqlen": 32}}}
    generated = []
    for stop in ("2/2", None):
        said = Counts(stop)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            found = compared(model, "magnitude,wanda", tmp_path / "out", listener=said, **named)
        generated.append(said.generated)
    assert generated == [1, 0]
    assert [row.error for row in found.rows] == [None, None]
    runs = [load_run(run) for run in (tmp_path / "out" / "runs").iterdir()]
    assert len({run.calibration.sha256 for run in runs if run.calibration is not None}) == 1
    seconds = sum((run.totals.seconds or 0.0) - run.totals.time_split["calibration"] for run in runs)
    assert sum(row.seconds or 0.0 for row in found.rows) == pytest.approx(seconds)


def test_rows_say_what_structure_was_removed(model: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "structure": {"remove": "mlp=25%", "multiple": 4}}
    comparison = compared(model, "wanda", tmp_path / "out", settings=settings)
    (row,), run = comparison.rows, load_run(folders(tmp_path / "out")["wanda"])
    assert (row.model_weights, row.checkpoint_bytes) == (run.totals.model_weights, run.totals.checkpoint_bytes)
    assert "structure mlp=25% removed: " in comparison_table(comparison)


def test_a_row_with_a_low_rank_part(model: str, tmp_path: Path) -> None:
    """Its weights are counted, its adapter is deleted with the checkpoint, and it is not measured again."""
    out, counts = tmp_path / "out", Counts()
    found = compared(model, "magnitude@low_rank=2,magnitude", out, "2:4")
    assert [bool(row.low_rank_weights) for row in found.rows] == [True, False]
    assert not [*out.glob("runs/*/adapter"), *out.glob("runs/*/model")]
    again = compared(model, "magnitude@low_rank=2,magnitude", out, "2:4", listener=counts)
    assert (again.rows, counts.measured) == (found.rows, 0)


def test_legacy_weights_are_compared_where_they_are_trusted(model: str, tmp_path: Path) -> None:
    """By every step of a row: pruning, and the comparison with the dense model. Each has the command."""
    source = Path(model)
    torch.save(tiny.tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(FistaPrunerError, match="--allow-pickle"):
        compared(model, "wanda", tmp_path / "out")
    [row] = compared(model, "wanda", tmp_path / "out", allow_pickle=True, command="the command").rows
    assert (row.error, row.divergence is not None) == (None, True)
    lineage = load_run(folders(tmp_path / "out")["wanda"]).lineage
    assert [stage.command for stage in lineage.stages] == ["the command"]


def test_command_line(model: str, tmp_path: Path, cli: tiny.Cli) -> None:
    common = ["compare", model, "--calibration", "python", "--samples", "2", "--seqlen", "32"]
    common += ["--evaluate-windows", "2", "--out", str(tmp_path / "out"), "--methods"]
    printed = cli(*common, "magnitude,wanda", "--keep", "--seeds", "5").out
    assert printed.count("50.0000 %") == 2
    assert "dense: perplexity" in printed
    for run in (tmp_path / "out" / "runs").iterdir():
        assert re.fullmatch(r"[A-Za-z0-9.+_-]+-seed5-[0-9a-f]{6}", run.name)
        assert "| Perplexity, python |" in (run / "model" / "README.md").read_text()
        assert "Perplexity, python" in (run / "report.html").read_text()
    for wrong in (["nothing"], ["wanda", "--seeds", "a"]):
        cli(*common, *wrong, status=2)
    fails = "sparsegpt@allocation=owl"  # owl cannot do 2:4
    cli(*common, fails, "--sparsity", "2:4", status=1)
    rows = json.loads(cli(*common, f"{fails},magnitude", "--sparsity", "2:4", "--json").out)["rows"]
    assert [bool(row["error"]) for row in rows] == [True, False]


def test_the_sparsity_is_that_of_the_recipe_unless_it_is_given(model: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("sparsity: 70%")
    words = ["compare", model, "--methods", "magnitude", "--calibration", "python", "--samples", "2", "--seqlen", "32"]
    for given, sparsity in (
        ([], "50%"),
        (["--recipe", str(tmp_path / "own.yaml")], "70%"),
        (["--structure", "25%"], "0%"),
        (["--recipe", str(tmp_path / "own.yaml"), "--sparsity", "2:4"], "2:4"),
    ):
        out = tmp_path / "out"
        assert main([*words, *given, "--evaluate-windows", "2", "--out", str(out), "--quiet"]) in (0, 1)
        assert [row.sparsity for row in load_comparison(out).rows] == [sparsity]
        shutil.rmtree(out)

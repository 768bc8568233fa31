"""Settings are described once, on their fields; command line and reference page follow."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from fistapruner import FistaPrunerError
from fistapruner.cli import VERBS, build_parser
from fistapruner.cli.arguments import SAME_FLAG, add_recipe_arguments, recipe_settings, settings
from fistapruner.cli.reference import reference
from fistapruner.settings.align import AlignRecipe
from fistapruner.settings.base import Settings
from fistapruner.settings.prune import Recipe
from fistapruner.settings.train import RecoverRecipe
from fistapruner.solvers import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def read(*words: str) -> Recipe:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return Recipe.build(recipe_settings(parser.parse_args(words)))


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == reference(), "make reference"


def test_every_setting_is_described() -> None:
    said = {path: field.description for path, field in settings()}
    for name, method in METHODS.items():
        said |= {f"{name}.{key}": description for key, (_, description) in method.descriptions().items()}
    assert [path for path, description in said.items() if not description] == []


@pytest.mark.parametrize(
    ("flag", "value", "path", "expected"),
    [
        ("--dense-target", "0.5", "dense_target", 0.5),
        ("--dense-target", "dense", "dense_target", 1.0),
        ("--samples", "7", "calibration.samples", 7),
        ("--calibration", "python", "calibration.source", "python"),
        ("--calibration", "a=c4", "calibration.tasks", {"a": "c4"}),
        ("--seed", "3", "seed", 3),
        ("--seed", "3", "calibration.seed", 3),
        ("--memory-limit", "8GiB", "execution.memory_limit", 8 << 30),
        ("--targets", "q_proj", "targets", ("q_proj",)),
        ("--allocation", "owl", "allocation", "owl"),
        ("--reconstruct", "4", "reconstruct", 4),
    ],
)
def test_a_flag_sets_its_setting(flag: str, value: str, path: str, expected: object) -> None:
    found: object = read(flag, value)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == expected


def test_every_setting_can_be_set_by_its_name() -> None:
    """Over the recipe and the flags; a wrong name is answered with the nearest."""
    words = ["--recipe", "best", "--samples", "9", "--set", "calibration.samples=7", "--set", "targets=[q_proj]"]
    found = read(*words, "--set", "structure={remove: 25%, multiple: 16}", "--set", "method={alps: {iterations: 3}}")
    assert (found.reconstruct, found.calibration.samples, found.targets) == (512, 7, ("q_proj",))
    assert (found.structure.multiple, found.steps[0].iterations) == (16, 3)  # type: ignore[attr-defined]
    for text, message in (
        ("low_rnk=2", "unknown setting 'low_rnk': did you mean 'low_rank'"),
        ("samples=2", "did you mean 'calibration.samples'"),
        ("low_rank", "'low_rank' is not a setting such as"),
        ("low_rank=[", "not valid YAML"),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            read("--set", text)


def test_the_help_of_prune_fits_on_two_screens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["prune", "--help"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^  --", said, re.MULTILINE)) <= 20
    assert said.count("\n") <= 70


@pytest.mark.parametrize("recipe", [Recipe, RecoverRecipe, AlignRecipe])
def test_the_help_of_seed_names_both_seeds_that_it_sets(recipe: type[Settings]) -> None:
    served = [path for path, flag in SAME_FLAG.items() if flag == "seed"]
    assert any(path in served for path, _ in settings(recipe))
    assert "; as a flag also that of the " in str(recipe.model_fields["seed"].description)


def test_a_default_that_the_help_shows_is_one_that_its_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["recover", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    shown = re.search(r"Rank of lora[^()]*\(default: ([^)]*)\)", said)
    assert shown is not None
    words = ["recover", "x", "--out", "y", "--rank", shown[1]]
    assert RecoverRecipe.build(recipe_settings(build_parser().parse_args(words), RecoverRecipe)) == RecoverRecipe()
    assert "(default: (" not in said


def test_no_flags_leave_the_recipe_as_it_is() -> None:
    assert read() == Recipe()
    assert read("--recipe", "fast", "--samples", "9") == read("--quality", "fast", "--samples", "9")
    assert read("--no-error-correction").error_correction is False
    assert {str(s) for s in read("--allocation", "{re:mlp: 60%, re:attn: 2:4}").allocation.values()} == {"60%", "2:4"}  # type: ignore[union-attr]


def test_several_calibration_texts_have_names() -> None:
    calibration = read("--calibration", "sql=a.jsonl", "--calibration", "chat=c4").calibration
    assert calibration.sources == {"sql": "a.jsonl", "chat": "c4"}
    assert read("--calibration", "/data/key=value.txt").calibration.source == "/data/key=value.txt"
    for words, message in (
        (("a.jsonl", "b.jsonl"), "--calibration a.jsonl --calibration b.jsonl: several texts need a name each"),
        (("sql=a.jsonl", "c4"), "several texts need a name each"),
        (("sql=a.jsonl", "sql=c4"), "one name stands twice"),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            read(*(word for text in words for word in ("--calibration", text)))


@pytest.mark.parametrize("verb", ["prune", "recover", "align"])
def test_every_example_of_the_help_has_a_run_of_its_own(verb: str) -> None:
    """A second example with the same run and other settings would be refused."""
    text = importlib.import_module(f"fistapruner.cli.{verb}").__doc__ or ""
    runs = re.findall(rf"^  fistapruner {verb} .*--out (\S+)", text, re.MULTILINE)
    assert runs
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("columns", [30, 80, 160])
def test_the_help_of_a_verb_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its examples, which can be copied as they are, and words that are longer."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb in VERBS:
        with pytest.raises(SystemExit):
            build_parser().parse_args([verb, "--help"])
        said = capsys.readouterr().out.partition("positional arguments:")[0]
        description = said[said.index("\n\n") :].splitlines()
        prose = [line for line in description if not line.startswith("  ") and " " in line.strip()]
        assert prose
        assert max(map(len, prose)) <= columns
        source = str(importlib.import_module(f"fistapruner.cli.{verb}").__doc__).splitlines()
        examples = [[line for line in lines if line.startswith("  ")] for lines in (source, description)]
        assert examples[0] == examples[1]


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("prune", "compare", "evaluate", "methods"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([verb, "--help"])
    assert "(default: 50%)" in capsys.readouterr().out

"""Settings are described once, on their fields; command line and reference page follow."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fistapruner import FistaPrunerError
from fistapruner.cli import VERBS, build_parser
from fistapruner.cli.arguments import FLAGS, recipe_settings, settings
from fistapruner.cli.reference import reference
from fistapruner.settings.align import AlignRecipe
from fistapruner.settings.prune import Recipe
from fistapruner.settings.train import RecoverRecipe
from fistapruner.solvers import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
RECIPES: dict[str, Any] = {"prune": Recipe, "recover": RecoverRecipe, "align": AlignRecipe}


def read(*words: str, verb: str = "prune") -> Any:
    return RECIPES[verb].build(recipe_settings(build_parser().parse_args([verb, "model", "--out", "run", *words])))


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        build_parser().parse_args([verb, "--help"])
    return capsys.readouterr().out


def text_of(verb: str) -> str:
    return inspect.getdoc(getattr(import_module(f"fistapruner.cli.{VERBS[verb]}"), verb)) or ""


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == reference(), "make reference"


def test_every_setting_is_described_and_there_are_few() -> None:
    said = {(path, field.description) for recipe in RECIPES.values() for path, field in settings(recipe)}
    for name, method in METHODS.items():
        said |= {(f"{name}.{key}", description) for key, (_, description) in method.descriptions().items()}
    assert [path for path, description in said if not description] == []
    assert len({path for path, _ in said}) <= 60


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        ("--samples 7", "calibration.samples", 7),
        ("--calibration python", "calibration.source", "python"),
        ("--calibration a=c4", "calibration.source", {"a": "c4"}),
        ("--seed 3", "seed", 3),
        ("--seed 3", "calibration.seed", 3),
        ("--sparsity 2:4", "sparsity.m", 4),
        ("--structure 25%", "structure.remove.share", 0.25),
        ("--set sparsity=2:4", "sparsity.m", 4),
        ("--set dense_target=0.5", "dense_target", 0.5),
        ("--set dense_target=dense", "dense_target", 1.0),
        ("--set execution.memory_limit=8GiB", "execution.memory_limit", 8 << 30),
        ("--set targets=[q_proj]", "targets", ("q_proj",)),
        ("--set allocation=owl", "allocation", "owl"),
        ("--set error_correction=no", "error_correction", False),
        ("--set structure.remove.mlp=20% --set structure.remove.heads=1", "structure.remove.heads", 1),
        ("--structure 25% --set structure.multiple=16", "structure.multiple", 16),
        ("--recipe best --samples 9 --set calibration.samples=7", "calibration.samples", 7),
        ("--recipe best", "reconstruct", 512),
        ("--recipe fista --set method=[fista]", "calibration.source", "c4"),
    ],
)
def test_flags_and_set_stand_over_the_recipe(words: str, path: str, expected: object) -> None:
    found: object = read(*words.split())
    for name in path.split("."):
        found = getattr(found, name)
    assert found == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set low_rnk=2", "unknown setting 'low_rnk': did you mean 'low_rank'"),
        ("--set samples=2", "did you mean 'calibration.samples'"),
        ("--set low_rank", "'low_rank' is not a setting such as"),
        ("--set low_rank=[", "not valid YAML"),
        ("--calibration a.jsonl --calibration b.jsonl", "--calibration a.jsonl --calibration b.jsonl: several texts "),
        ("--calibration sql=a.jsonl --calibration c4", "several texts need a name each"),
        ("--calibration sql=a.jsonl --calibration sql=c4", "several texts need a name each"),
    ],
)
def test_what_is_no_setting_is_named(words: str, message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        read(*words.split())


def test_no_flags_leave_the_recipe_as_it_is() -> None:
    for verb, kind in RECIPES.items():
        assert read(verb=verb) == kind()
    assert read("--calibration", "/data/key=value.txt").calibration.source == "/data/key=value.txt"
    named = read("--set", "allocation={re:mlp: 60%, re:attn: 2:4}").allocation
    assert {name: str(sparsity) for name, sparsity in named.items()} == {"re:mlp": "60%", "re:attn": "2:4"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_shows_all_its_flags_and_prune_at_most_twenty_with_a_line_each(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flag is hidden: what the help does not show is for ``--set``."""
    monkeypatch.setenv("COLUMNS", "100")
    shown = re.findall(r"^  (--[a-z-]+).*(\n {20,}\S.*)?$", help_of(verb, capsys), re.MULTILINE)
    if verb in RECIPES:
        assert len(shown) <= 20 + (verb != "prune")
        assert [flag for flag, more in shown if more] == []
    verbs = next(action for action in build_parser()._actions if action.choices)
    known = set(verbs.choices[verb]._option_string_actions)  # type: ignore[index,call-overload]
    assert known == {"-h", "--help", *(flag for flag, _ in shown)}


def test_flags_are_of_settings_that_are_there() -> None:
    assert set(FLAGS) <= {path for recipe in RECIPES.values() for path, _ in settings(recipe)}


@pytest.mark.parametrize("verb", ["prune", "recover", "align"])
def test_every_example_of_the_help_has_a_run_of_its_own(verb: str) -> None:
    """A second example with the same run and other settings would be refused."""
    runs = re.findall(rf"^  fistapruner {verb} .*--out (\S+)", text_of(verb), re.MULTILINE)
    assert runs
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("columns", [30, 80, 160])
def test_the_help_of_a_verb_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its examples, which can be copied as they are and are understood, and words that are longer."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb in VERBS:
        said = help_of(verb, capsys).partition("positional arguments:")[0]
        description = said[said.index("\n\n") :].splitlines()
        prose = [line for line in description if not line.startswith("  ") and " " in line.strip()]
        assert prose
        assert max(map(len, prose)) <= columns
        examples = [
            [line for line in lines if line.startswith("  ")] for lines in (text_of(verb).splitlines(), description)
        ]
        assert examples[0] == examples[1]
        for line in examples[0]:
            build_parser().parse_args(line.split()[1:])

"""How recipes are read, and what they settle before a run begins."""

import re
from pathlib import Path
from shutil import rmtree
from typing import Any
from unittest.mock import Mock

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import tiny
from fistapruner import AlignRecipe, FistaPrunerError, Recipe, align, prune, recover
from fistapruner.core import NM
from fistapruner.settings.parse import load_recipe_settings, merge_settings, parse_bytes, parse_count, parse_value
from fistapruner.settings.prune import Calibration
from fistapruner.settings.structure import Remove
from fistapruner.settings.train import RecoverRecipe
from fistapruner.solvers.alps import ALPS
from fistapruner.solvers.fista import Fista
from fistapruner.solvers.scores import Magnitude

PARALLEL = {"execution": {"executor": "process"}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("pruned", 0.5, "correct")),
        ({"method": "proximal+swap"}, ("pruned", 0.5, "correct")),
        ({"method": "sparsegpt"}, ("pruned", 0.0, "none")),
        ({"method": "wanda+refit"}, ("pruned", 0.0, "none")),
        ({"method": "alps"}, ("pruned", 0.0, "none")),
        ({"method": "sparsegpt+fista+refit"}, ("dense", 1.0, "none")),
        ({"method": "fista", "propagate": "pruned"}, ("pruned", 1.0, "none")),
        ({"propagate": "dense"}, ("dense", 1.0, "correct")),
        ({"propagate": "dense", "dense_target": "pruned"}, ("dense", 0.0, "none")),
        ({"residual": "none", "dense_target": "dense"}, ("pruned", 1.0, "none")),
        (PARALLEL, ("dense", 1.0, "correct")),
        ({"method": "alps", **PARALLEL}, ("dense", 1.0, "none")),
        ({"propagate": "pruned", **PARALLEL}, ("pruned", 0.5, "correct")),
    ],
)
def test_auto_is_what_the_method_was_published_with_or_ours_measured_best(
    settings: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    recipe = Recipe.build(settings).resolved()
    assert (recipe.propagate, recipe.dense_share, recipe.residual) == expected
    assert recipe.resolved() == recipe  # what is resolved stays
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_residual_correction_without_effect_is_refused() -> None:
    alps = Recipe.build({"method": "alps", "residual": "correct"})
    with pytest.raises(FistaPrunerError, match=r"residual correct needs a dense_target above 0 .*, and it is 0"):
        alps.resolved()
    assert Recipe.build({"method": "alps", "residual": "correct", "dense_target": 0.5}).resolved().corrects_drift
    assert Recipe.build({"error_correction": False}).resolved().residual == "none"


class Mine(Magnitude):
    name = "mine"
    takes_start = True


class Other(Magnitude):
    pass


REFUSED: dict[Any, list[tuple[dict[str, Any], str]]] = {
    Recipe: [
        ({"method": ALPS(iterations=3)}, r"ALPS\(.*iterations=3.* is more than a recipe keeps"),
        ({"method": Mine()}, r"Mine\(.*\) is more than a recipe keeps"),
        ({"method": Other()}, r"Other\(.*\) is more than a recipe keeps"),
        ({"method": ["wanda", Mine()]}, r"Mine\(.*\) is more than a recipe keeps"),
        ({"residual": "correct", "error_correction": False}, "needs error_correction True, and that is False"),
        ({"execution": {"workers": 4}}, "execution.workers 4 needs execution.executor process or ray, and that is ser"),
        ({"execution": {"executor": "process", "address": "auto"}}, "address auto needs execution.executor ray"),
        ({"low_rank": 4, "structure": "25%"}, "low_rank 4 needs structure.remove none, and that is 25%"),
        ({"structure": {"method": "goa"}}, "structure.method goa needs structure.remove, and that is none"),
        ({"structure": {"remove": "25%", "steps": 60}}, "steps 60 needs structure.method bypass, and that is auto"),
        ({"calibration": {"seed": 1}}, "calibration.seed is no setting of its own: seed is that of the text"),
        ({"calibration": "c4"}, "calibration: a mapping of settings is expected .got 'c4'"),
        (merge_settings({"execution": "a"}, {"execution": {"device": None}}), "execution: a mapping of settings is ex"),
        ({"calibration": {"source": ["a", "b"]}}, r"calibration\.source.*: .* \(got an object of the class list\)"),
        (
            {"calibration": {"samples": 1, "source": {"a": "x", "b": "y"}}},
            "samples is 1, and each of the 2 texts needs",
        ),
        ({"low_rank": True}, "low_rank: a number is expected .got True"),
        ({"reconstruct": False}, "reconstruct: a number is expected .got False"),
        ({"seed": True}, "seed: a number is expected"),
        ({"calibration": {"samples": True}}, "calibration.samples: a number is expected"),
        ({"calibration": {"seqlen": True}}, "calibration.seqlen: a number is expected"),
        ({"method": {"fista": {"penalty": True}}}, "penalty True: relative or published is expected"),
        ({"allocation": {"down_proj": "150%"}}, "^recipe: allocation: down_proj: sparsity '?1.5'? is out of range: a"),
        ({"allocation": "{down_proj: 150%}"}, "^recipe: allocation: down_proj: sparsity '?1.5'? is out of range: a"),
        ({"allocation": {0: "30%"}}, r"0: names of operators are expected, such as down_proj or 're:layers\\.0\\.'"),
        ({"allocation": "{down_proj: }"}, "^recipe: allocation: down_proj: sparsity None is not understood: write "),
        ({"allocation": {"re:(": "30%"}}, r"^recipe: allocation: 're:\(' is not a regular expression: "),
        ({"targets": "down_proj"}, r"targets: a list of names is expected, .*\[down_proj\] \(got 'down_proj'\)$"),
        ({"ignore": None}, r"ignore: a list of names is expected, such as \[down_proj\] \(got None\)$"),
        ({"targets": [0]}, r"^recipe: targets\.0: Input should be a valid string \(got 0\)$"),
        ({"methods": "wanda"}, r"unknown setting 'methods': did you mean 'method'\?$"),
        ({"seqlen": 64}, r"unknown setting 'seqlen': did you mean 'calibration\.seqlen'\?$"),
        ({"calibration": {"sample": 4}}, r"unknown setting 'calibration\.sample': did you mean 'samples'\?$"),
        ({"calibration": {"xyz": 4}}, r"unknown setting 'calibration\.xyz': one of .*samples, .* is expected$"),
        ({"method": {"fista": {"penalti": 4}}}, r"unknown setting 'penalti': did you mean 'penalty'\?"),
        ({"dtype": torch.float16}, r"dtype: .*'float16' \(got an object of the class dtype\)$"),
        *(
            ({"execution": {"memory_limit": limit}}, "is not a size: write 8GiB, 500MB or a number of bytes")
            for limit in (0, "0", "0.5", -1, "-1GiB", "much", "", "8 apples", "1e400", "9" * 400, ".", "-1", "1.2.3")
        ),
    ],
    RecoverRecipe: [
        ({"execution": {"executor": "process"}}, r"execution\.executor: Input should be 'serial' .got 'process'"),
        *(({"data": {"tokens": most}}, "^recipe: data.tokens: ") for most in ("9" * 400, "9" * 400 + "M", 10**400)),
    ],
    AlignRecipe: [
        ({"optimizer": "mezo", "parameters": "lora"}, "optimizer mezo needs parameters full, and that is lora"),
        ({"as_published": True}, "as_published True needs parameters spp, and that is lora"),
        ({"loss": "accuracy"}, "loss accuracy needs optimizer mezo or subzero, and that is adamw"),
        ({"loss": "sft", "references": ["dense"]}, "loss dpo or multi-dpo or harmonic or geometric, and that is sft"),
        ({"weights": "held-out"}, "weights held-out needs loss multi-dpo or harmonic or geometric, and that is dpo"),
        ({"loss": "geometric", "clip": 0.5}, "clip 0.5 needs loss harmonic, and that is geometric"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "settings", "message"), [(kind, *case) for kind in REFUSED for case in REFUSED[kind]], ids=str
)
def test_wrong_settings_are_named_in_one_line(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FistaPrunerError, match=message) as error:
        kind.build(settings)
    assert "\n" not in str(error.value)
    assert str(error.value).count("allocation") <= 1


def test_settings_that_have_what_they_need_are_taken() -> None:
    for settings in ({"executor": "process", "workers": 4}, {"executor": "ray", "address": "auto"}):
        Recipe.build({"execution": settings})
    assert RecoverRecipe(optimizer="mezo").parameters == "full"
    assert Recipe.build({"method": Magnitude()}).method == (Magnitude(),)
    assert Recipe.from_yaml("error_correction: no").error_correction is False


def test_the_seed_of_a_recipe_is_that_of_its_texts() -> None:
    assert Recipe(seed=3).calibration.seed == RecoverRecipe(seed=3).data.seed == AlignRecipe(seed=3).data.seed == 3
    assert Recipe(seed=3).changed({"seed": 4}).calibration.seed == 4
    assert Recipe.from_yaml(Recipe(seed=3).to_yaml()) == Recipe(seed=3)
    assert "seed" not in Recipe(seed=3).model_dump()["calibration"]


def test_who_goes_on_with_a_run_may_say_what_auto_settled() -> None:
    earlier = Recipe().resolved().model_dump(mode="json")
    assert Recipe.build({"dense_target": "dense", **PARALLEL}).resolved(earlier=earlier).dense_share == 1.0


SETTINGS: dict[str, list[Any]] = {
    "sparsity": ["0%", "50%", "2:4"],
    "method": ["wanda+refit", "fista", {"fista": {"warm_start": "auto"}}, "magnitude+swap"],
    "propagate": ["dense", "pruned"],
    "dense_target": ["dense", "pruned", 0.3],
    "residual": ["none", "correct"],
    "error_correction": [False],
    "targets": [["re:mlp", "o_proj"]],
    "allocation": ["owl", "error", {"down_proj": "2:4", "re:mlp": "60%"}],
    "weighting": ["none", "fisher"],
    "structure": [
        "25%",
        "mlp=20%,heads=1",
        {"remove": "mlp=10%", "method": "flap"},
        {"remove": "30%", "compensate": "none"},
    ],
    "low_rank": [2],
    "reconstruct": [3],
    "calibration": [{"source": "text.jsonl"}, {"source": {"chat": "python", "code": "self"}}],
    "dtype": ["bfloat16"],
    "seed": [3],
    "execution": [PARALLEL["execution"], {"memory_limit": "8GiB", "threads": 2}],
}


@hypothesis.settings(deadline=None)
@given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in SETTINGS.items()}))
def test_a_run_goes_on_with_the_recipe_that_it_began_with_whatever_settings_meet(settings: dict[str, Any]) -> None:
    def family() -> str:
        return "opt"

    try:
        recipe = Recipe.build(settings).resolved(family=family)
    except FistaPrunerError:
        return
    written = recipe.model_dump(mode="json")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    for read in (Recipe.build(written), Recipe.build(settings), Recipe.build({**settings, **PARALLEL})):
        assert read.resolved(earlier=written, family=family).identity() == recipe.identity()


def test_a_set_of_targets_is_the_same_run_in_every_process() -> None:
    names = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    for kind in (set, frozenset):
        recipe = Recipe(targets=kind(names), ignore=kind(names))
        assert recipe.targets == recipe.ignore == RecoverRecipe(targets=kind(names)).targets == names


def test_names_of_an_allocation_in_another_order_are_another_run() -> None:
    names = {"down_proj": "40%", r"re:layers\.0\.": "30%"}
    recipe, other = Recipe(allocation=names), Recipe(allocation=dict(reversed(names.items())))
    assert recipe.fingerprint() != other.fingerprint()
    assert recipe.identity()["allocation"] == other.identity()["allocation"][::-1]
    for one in (recipe, other):
        assert Recipe.build(one.model_dump(mode="json")).fingerprint() == one.fingerprint()


FISTA_PRESETS = {
    "paper": {"llama": ("published", "wanda"), "opt": ("published", "sparsegpt")},
    "paper-sparsegpt": {"llama": ("published", "sparsegpt"), "opt": ("published", "sparsegpt")},
    "fista": {"llama": ("relative", "sparsegpt"), "opt": ("relative", "sparsegpt")},
}


@pytest.mark.parametrize("preset", FISTA_PRESETS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_run_writes_out_the_penalty_and_warm_start_of_its_preset(tmp_path: Path, preset: str, family: str) -> None:
    model, run = tiny.save(family, tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    settings = load_recipe_settings(preset) | {"calibration": {"source": "python", "samples": 2, "seqlen": 16}}
    report = prune(str(model), run, recipe=Recipe.build(settings))
    written = Recipe.from_yaml((run / "recipe.yaml").read_text())
    (step,) = written.method
    assert isinstance(step, Fista)
    assert (step.penalty, step.warm_start) == FISTA_PRESETS[preset][family]
    assert (written.propagate, written.dense_share, written.residual, written.error_correction) == (
        "dense",
        1.0,
        "none",
        True,
    )
    assert Recipe.build(report.recipe) == written
    started = {record["warm_start"] for operator in report.operators for record in operator.steps}
    assert started == {FISTA_PRESETS[preset][family][1]}
    rmtree(model)  # what was chosen stands in the run
    assert prune(str(model), run, recipe=Recipe.build(settings)).recipe == report.recipe


def test_patterns_and_dates_are_words_in_yaml() -> None:
    assert Recipe.from_yaml("sparsity: 2:4").sparsity == NM(2, 4)
    values = {
        "2:4": "2:4",
        "1e-3": 0.001,
        "-5": -5,
        "010": 10,
        "-08": -8,
        "3.5": 3.5,
        "1.": 1.0,
        "2024-13-45": "2024-13-45",
        "1_000": "1_000",
        "true": True,
    }
    assert {text: parse_value(text, "x") for text in values} == values
    misfits = ("!!bool maybe", '!!int ""', "!!timestamp x", "!!float [1]", "!!set {[1]: 2}")
    for text in ("'", "[1", "*a", "!!python/name:os.system x", *misfits):
        with pytest.raises(FistaPrunerError, match="x is not valid YAML"):
            parse_value(text, "x")


def test_recipes_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("beta: 0.2")
    assert load_recipe_settings(str(file), "align") == {"beta": 0.2}  # a verb without shipped recipes
    with pytest.raises(FistaPrunerError, match=r"^recipe 'spp' is not a file$"):
        load_recipe_settings("spp", "align")
    monkeypatch.setattr("fistapruner.settings.parse.shipped_recipes", Mock(return_value={}))
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(FistaPrunerError, match=r"^cannot read .*own\.yaml: Permission denied$"):
        load_recipe_settings(str(file))


@pytest.mark.parametrize("setting", ["scale", "anchor", "beta", "lr", "clip"])
@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
def test_infinity_is_no_number(setting: str, number: str) -> None:
    with pytest.raises(FistaPrunerError, match=rf"^recipe: {setting}.*number"):
        AlignRecipe.from_yaml(f"{setting}: {number}")


@given(count=st.integers(0, 2**63 - 1), zeros=st.integers(0, 3))
def test_a_count_is_read_exactly_as_it_is_written(count: int, zeros: int) -> None:
    whole, part = divmod(count, 1000**zeros)
    written = f"{whole}.{part:0{3 * zeros}d}{'kMG'[zeros - 1]}" if zeros else str(whole)
    assert parse_count(written) == count
    with pytest.raises(ValueError, match="is not a whole number"):
        parse_count(f"{whole}.{part:0{3 * zeros}d}1{' kMG'[zeros]}")


def test_shipped_recoveries_are_as_long_as_published() -> None:
    """SPP: 3 epochs of Alpaca's 50,002 training examples in steps of 128, about four in a window of 512 tokens."""
    spp, *forward_only = (
        RecoverRecipe.build(load_recipe_settings(name, "recover")) for name in ("spp", "mezo", "subzero")
    )
    assert (spp.steps, spp.as_published, spp.data.seqlen) == (None, True, 512)
    assert spp.data.tokens == 3 * (50_002 // 128) * spp.windows_per_step * 512
    assert spp.windows_per_step * 4 == 128
    for recipe in forward_only:
        assert (recipe.steps, recipe.windows_per_step, recipe.parameters) == (20_000, 16, "full")


def test_functions_take_a_recipe_its_settings_or_its_name(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("sparsity: 70%")
    own = Recipe.build({"sparsity": "70%"})
    assert [Recipe.of(recipe) for recipe in (own, {"sparsity": "70%"}, file, str(file), None)] == [own] * 4 + [Recipe()]
    assert RecoverRecipe.of("spp") == RecoverRecipe.build(load_recipe_settings("spp", "recover"))
    other = (
        "recipe is of the class RecoverRecipe, and Recipe, a mapping of settings or the name of a recipe is expected"
    )
    for recipe, message in (
        (RecoverRecipe(), other),
        ("nothing", "recipe 'nothing' is neither"),
        (3, "the class int"),
        ({"sparsity": "5:4"}, "recipe: sparsity: "),
    ):
        with pytest.raises(FistaPrunerError, match=message):
            Recipe.of(recipe)
    with pytest.raises(FistaPrunerError, match=other):
        prune("model", tmp_path / "out", recipe=RecoverRecipe())
    for function, name in ((recover, "RecoverRecipe"), (align, "AlignRecipe")):
        with pytest.raises(FistaPrunerError, match=f"of the class Recipe, and {name}, a mapping of settings"):
            function("model", tmp_path / "out", recipe=Recipe())


def test_texts_may_be_paths() -> None:
    file = Path("text.txt")
    for kind, name in ((Recipe, "calibration"), (RecoverRecipe, "data")):
        assert getattr(kind.build({name: {"source": file}}), name).source == "text.txt"
        assert getattr(kind.build({name: {"source": {"one": file}}}), name).tasks == {"one": "text.txt"}
    assert AlignRecipe.build({"data": {"pairs": file}}).data.pairs == "text.txt"


def test_wrong_settings_of_a_recipe_are_one_line() -> None:
    for kind, settings, message in (
        (Recipe, {"sparsity": "5:4"}, "Recipe: sparsity: "),
        (RecoverRecipe, {"parameters": "foo", "rank": 0}, "RecoverRecipe: parameters: .*; rank: "),
        (AlignRecipe, {"nothing": 1}, "AlignRecipe: unknown setting 'nothing'"),
    ):
        with pytest.raises(FistaPrunerError, match=message) as error:
            kind(**settings)
        assert "\n" not in str(error.value)
        with pytest.raises(ValidationError):
            kind.model_validate(settings)
    assert Recipe(sparsity="2:4") == Recipe.model_validate({"sparsity": "2:4"})


@pytest.mark.parametrize(
    ("kind", "other"), [(Recipe, RecoverRecipe), (RecoverRecipe, Recipe), (Recipe, AlignRecipe), (AlignRecipe, Recipe)]
)
def test_a_recipe_of_another_verb_is_answered_briefly(kind: type[Any], other: type[Any]) -> None:
    settings = other().model_dump(mode="json")
    with pytest.raises(FistaPrunerError) as error:
        kind.build(settings, "recipe other.yaml")
    assert re.match(r"recipe other\.yaml: unknown settings .* more: a recipe of another verb, or ", str(error.value))
    assert len(str(error.value)) < 800


def test_settings_are_merged() -> None:
    """With an amount of structure alone; None and other texts replace what a recipe says, as null does in a file."""
    flap = {"structure": {"method": "flap"}}
    for base, changes in (({"structure": "25%"}, flap), (flap, {"structure": 0.25})):
        structure = Recipe.build(merge_settings(base, changes)).structure
        assert (structure.remove, structure.method) == (Remove(share=0.25), "flap")
    merged = merge_settings({"structure": "25%"}, {"structure": {"remove": "50%", **flap["structure"]}})
    assert merged == {"structure": {"remove": "50%", "method": "flap"}}
    recipe = {"calibration": {"source": {"a": "c4"}, "seqlen": 64}}
    for changed in ({"seqlen": None}, {"source": "python"}, {"source": {"b": "c4"}}):
        assert merge_settings(recipe, {"calibration": changed})["calibration"] == recipe["calibration"] | changed


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1e9", 10**9), ("1.5k", 1500)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_structure_that_is_taken_back_leaves_the_default_sparsity() -> None:
    changed = Recipe(structure="25%").changed({"structure": "none"})
    assert str(changed.sparsity) == str(Recipe().sparsity)
    said = Recipe(structure="25%", sparsity="0%").changed({"structure": "none"})
    assert str(said.sparsity) == "0%"


def test_one_calibration_text_or_several_by_name() -> None:
    def built(**settings_: Any) -> Calibration:
        return Recipe.build({"calibration": settings_}).calibration

    assert built().sources == {"self": "self"}
    assert built(source={"a": "c4"}).sources == built(source={"a": "c4"}).tasks == {"a": "c4"}
    mixed = built(source={"a": "python", "b": "x.txt"})
    assert mixed.name == "a, b"
    assert mixed.with_absolute_files().tasks == {"a": "python", "b": str(Path("x.txt").absolute())}
    assert Recipe.from_yaml(Recipe.build({"calibration": mixed.model_dump()}).to_yaml()).calibration == mixed

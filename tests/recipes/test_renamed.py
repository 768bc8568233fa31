"""Old names are refused in one line that names the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

import fistapruner as fp
from fistapruner.cli import main
from fistapruner.errors import FistaPrunerError
from fistapruner.recipes.settings import Recipe

SETTINGS = [("target", "dense_target"), ("match", "reconstruct")]


@pytest.mark.parametrize(("old", "new"), SETTINGS)
@pytest.mark.parametrize("verb", ["prune", "plan", "compare"])
def test_an_old_flag(verb: str, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "nowhere", f"--{old}", "1"]) == 2
    assert capsys.readouterr().err == f"fistapruner: --{old} is called --{new.replace('_', '-')}\n"


@pytest.mark.parametrize(("old", "new"), SETTINGS)
def test_an_old_setting(tmp_path: Path, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{old}: 1\n")
    assert main(["prune", "nowhere", "--out", str(tmp_path / "run"), "--recipe", str(recipe)]) == 2
    assert f"the setting '{old}' is called '{new}'" in capsys.readouterr().err
    for call in (lambda: Recipe.build({old: 1}), lambda: fp.prune("nowhere", tmp_path / "run", **{old: 1})):
        with pytest.raises(FistaPrunerError, match=f"'{old}' is called '{new}'"):
            call()


def test_an_old_function() -> None:
    with pytest.raises(FistaPrunerError, match=r"accelerate is called fistapruner\.to_semi_structured"):
        _ = fp.accelerate
    with pytest.raises(AttributeError, match="nothing"):
        _ = fp.nothing

"""Read the methods of a comparison: chains or recipes, each with settings of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FistaPrunerError, instead_of
from ..settings.loading import load_recipe_settings, merge_settings, parse_value, shipped_recipes
from ..settings.settings import Recipe
from ..solvers import METHODS, parse_method

SHARED = {"sparsity": "--sparsity", "seed": "--seeds", "calibration.seed": "--seeds"}
"""Settings that all methods of a comparison share, and the flag that gives them."""


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Args:
        label: as the user wrote it.
        settings: recipe settings over those of the comparison.
    """

    label: str
    settings: dict[str, Any]

    def recipe(self, shared: Mapping[str, Any], sparsity: str, seed: int) -> Recipe:
        """Build the recipe of its run, from the settings that all methods share.

        Raises:
            FistaPrunerError: they are no recipe.
        """
        said = merge_settings(dict(shared), {"seed": seed, "calibration": {"seed": seed}})
        return Recipe.build(merge_settings(merge_settings(said, self.settings), {"sparsity": sparsity}), self.label)


def parse_contenders(text: str | Sequence[str]) -> list[Contender]:
    """Read ``--methods``: method chains or recipes separated by commas, each with settings after an ``@``.

    ``wanda,alps@propagate=pruned,dense_target=pruned,best`` are three: a part with ``=`` belongs to the method before
    it. A value in brackets may have commas. Dots name settings of a section: ``alps@calibration.samples=64``. Each item
    of a list is read as such a text. Where the method is a single one, its own settings may follow, too:
    ``alps@iterations=30``. The name of a shipped recipe, or a ``.yaml`` file, is a recipe; its sparsity, calibration,
    seed and execution are left out: all methods use those of the comparison.

    Raises:
        FistaPrunerError: nothing named, an empty part, a setting before any method, twice, or one that all share; an
            unknown setting of a single method, or one of a step of a chain or recipe.
    """
    parts = [part for item in ([text] if isinstance(text, str) else text) for part in _split(item)]
    grouped: list[list[str]] = []
    for part in (part.strip() for part in parts):
        name, at, first = part.partition("@")
        if at or "=" not in part:
            grouped.append([name, *([first] if first else [])])
        elif grouped:
            grouped[-1].append(part)
        else:
            raise FistaPrunerError(
                f"--methods begins with the setting {part!r}: name a method before it, such as alps@{part}"
            )
    contenders = []
    for name, *settings in grouped:
        if not name:
            raise FistaPrunerError(
                f"--methods {','.join(parts)!r} has an empty name in it: write names separated by commas, such as "
                "wanda,alps"
            )
        label = name + ("@" + ",".join(settings) if settings else "")
        is_recipe = name in shipped_recipes() or name.endswith((".yaml", ".yml"))
        base: dict[str, Any] = load_recipe_settings(name) if is_recipe else {"method": name}
        for shared in ("sparsity", "calibration", "seed", "execution"):
            base.pop(shared, None)
        given = _nested(settings, label)
        own = [key for key in given if key not in Recipe.model_fields]
        if own and not is_recipe and name in METHODS:
            known = [*METHODS[name].descriptions(), *Recipe.model_fields]
            if wrong := next((key for key in own if key not in known), None):
                raise FistaPrunerError(f"--methods {label}: unknown setting {wrong!r}{instead_of(wrong, known)}")
            base["method"] = {name: {key: given.pop(key) for key in own}}
        elif own and "method" in base:
            of_steps = {key for step in parse_method(base["method"]) for key in step.descriptions()}
            if inner := next((key for key in own if key in of_steps), None):
                raise FistaPrunerError(
                    f"--methods {label}: {inner} is one of the own settings of {name}'s steps: write them in a recipe "
                    "file"
                )
        contenders.append(Contender(label, merge_settings(base, given)))
    if len({contender.label for contender in contenders}) < len(contenders):
        raise FistaPrunerError(f"--methods {','.join(parts)!r} names the same method twice")
    return contenders


def has_own_calibration(label: str) -> bool:
    """Check whether a method as the user wrote it has calibration settings of its own."""
    _, at, settings = label.partition("@")
    return bool(at) and "calibration" in _nested(_split(settings), label)


def _split(text: str) -> list[str]:
    """Split text at its commas, but for those inside a value in brackets."""
    parts: list[str] = []
    for piece in text.split(","):
        value = parts[-1].partition("=")[2].lstrip() if parts else ""
        if value.startswith(("[", "{")) and sum(map(value.count, "[{")) > sum(map(value.count, "]}")):
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts


def _nested(settings: Sequence[str], label: str) -> dict[str, Any]:
    """``["dense_target=0.5", "calibration.samples=64"]`` as a mapping."""
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or not value:
            raise FistaPrunerError(f"--methods {label}: {setting!r} is not a setting such as dense_target=0.5")
        parsed = parse_value(value, f"--methods {label}: the value of {setting!r}")
        inside = [f"{key}.{name}" for name in parsed] if isinstance(parsed, dict) else []
        if shared := next((name for name in (key, *inside) if name in SHARED), None):
            raise FistaPrunerError(
                f"--methods {label}: {setting!r} is for one method, and {shared} is that of {SHARED[shared]} for all: "
                "leave it out"
            )
        if key == "method":
            raise FistaPrunerError(f"--methods {label}: {setting!r} is a second method: write it before the @")
        section, dot, inner = key.partition(".")
        place, last = (result.setdefault(section, {}), inner) if dot else (result, section)
        if not isinstance(place, dict):
            raise FistaPrunerError(
                f"--methods {label}: {section} is given whole and {setting!r} beside it: write one of the two"
            )
        if last in place:
            raise FistaPrunerError(
                f"--methods {label}: {key} is given before {setting!r} already, whole or in part: write one of the two"
            )
        place[last] = parsed
    return result

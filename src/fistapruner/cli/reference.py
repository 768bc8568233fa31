"""Write the reference page: verbs with their arguments, recipe settings, methods with their settings.

``python -m fistapruner.cli.reference`` prints it; ``make reference`` writes ``docs/reference.md``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from ..packed.kernel import ENVIRONMENT, LEVELS
from ..settings.align import AlignRecipe
from ..settings.base import TOGETHER, Settings
from ..settings.prune import Recipe
from ..settings.train import RecoverRecipe
from ..solvers import CATALOGUE, METHODS
from . import VERBS, build_parser
from .arguments import FLAGS, settings

HEAD = """# Reference

Made from the program by `make reference`; do not edit. The guides show how they are used.
"""

STATUSES = (
    ("0", "done"),
    (
        "1",
        "a check failed: `inspect` found a violated claim, NaN or infinity; training stopped at a loss that is not "
        "finite; every row that `compare` was asked for failed",
    ),
    ("2", "bad input, or what cannot fit; one line says why"),
    ("130", "interrupted by Ctrl-C"),
    ("143", "ended by SIGTERM"),
)
VARIABLES = (
    ("`FISTAPRUNER_FIGURES`", "`0` leaves out the figures of a page"),
    (
        f"`{ENVIRONMENT}`",
        f"level of the compiled CPU kernel: {', '.join(f'`{level}`' for level in LEVELS)}, or `torch` for no kernel; "
        "without it the fastest that the processor has",
    ),
)

RECIPES: tuple[tuple[str, str, type[Settings]], ...] = (
    ("Recipe", "A recipe is a YAML mapping of these; `structure`, `calibration` and `execution`", Recipe),
    ("Recovery", "The recipe of `recover`; `data` and `execution`", RecoverRecipe),
    ("Alignment", "The recipe of `align`; `data` and `execution`", AlignRecipe),
)


def reference() -> str:
    """Return the page as Markdown."""
    return "\n".join([HEAD, *_verbs(), *_shell(), *_recipes(), *_methods()])


def _verbs() -> Iterable[str]:
    yield "## Verbs\n"
    (verbs,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb in VERBS:
        parser = verbs.choices[verb]
        yield f"### fistapruner {verb}\n"
        yield f"{(parser.description or '').strip().splitlines()[0]}\n"
        rows = []
        for action in parser._actions:
            if action.dest == "help":
                continue
            flags = " / ".join(action.option_strings)
            values = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
            name = " ".join(filter(None, (flags, "" if action.nargs == 0 else str(values))))
            rows.append((f"`{name}`", str(action.help) % {"default": action.default}))
        yield from _table(("argument", "meaning"), rows)


def _shell() -> Iterable[str]:
    yield "## Exit status and environment\n"
    yield from _table(("exit status", "meaning"), STATUSES)
    yield from _table(("environment variable", "meaning"), VARIABLES)


def _recipes() -> Iterable[str]:
    yield "## Settings\n"
    yield (
        "Each is set in a recipe file, by `--set KEY=VALUE`, as an argument of the function, and some by a flag of "
        "their own.\n"
    )
    for title, what, recipe in RECIPES:
        yield f"### {title} settings\n"
        yield f"{what} are sections.\n"
        rows = []
        for path, field in settings(recipe):
            flag = FLAGS[path][0] if path in FLAGS else ""
            rows.append((f"`{path}`" + (f" (`{flag}`)" if flag else ""), *_describe(field)))
        yield from _table(("setting", "default", "meaning"), rows)
    yield "### Which settings go together\n"
    yield from _table(("setting", "where it is", "needs", "at"), map(_together, TOGETHER))


def _together(row: tuple[str, tuple[Any, ...], str, tuple[Any, ...]]) -> tuple[str, ...]:
    """Write a row of the settings that go together."""
    name, values, other, needed = row
    found, right = (
        " or ".join("none" if each is None else f"`{each}`" for each in part) or "given" for part in (values, needed)
    )
    return f"`{name}`", found, f"`{other}`", right


def _methods() -> Iterable[str]:
    yield "## Methods\n"
    for entry in CATALOGUE:
        kind = "Refinement" if entry.refines else "Solver"
        yield f"### {entry.name}\n"
        yield f"{kind}: {entry.summary}. Source: {entry.reference}.\n"
        if known := METHODS[entry.name].descriptions():
            rows = [(f"`{name}`", f"`{json.dumps(default)}`", said) for name, (default, said) in known.items()]
            yield from _table(("setting", "default", "meaning"), rows)


def _describe(field: FieldInfo) -> tuple[str, str]:
    """Return a setting's default and its meaning."""
    default = field.default if isinstance(field.default, str) else json.dumps(field.default)
    values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    said = str(field.description)
    if values and not any(said.startswith(f"{word},") for word in values):
        said = ", ".join(f"`{value}`" for value in values) + f". {said}"
    return f"`{default}`", said


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    lines = [
        head,
        ("---",) * len(head),
        *(tuple(" ".join(_without_bars(cell).split()) for cell in row) for row in rows),
    ]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _without_bars(cell: str) -> str:
    """Write bars so that they end no cell; the site would show a backslash before one in backticks."""
    return re.sub(r"`([^`]*\|[^`]*)`", r"<code>\1</code>", cell).replace("|", "&#124;")


if __name__ == "__main__":
    print(reference(), end="")

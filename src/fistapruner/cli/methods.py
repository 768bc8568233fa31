"""List the solvers and refinements, or describe one of them with its settings.

Chain them with '+': --method wanda+refit, --method alps+swap. Settings of a method are given in a recipe file.

  fistapruner methods
  fistapruner methods fista
"""

from __future__ import annotations

import argparse
import json

from ..errors import FistaPrunerError, instead_of
from ..solvers.catalogue import CATALOGUE
from .arguments import add_json_argument

SUMMARY = "list the pruning methods"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe this method and its settings")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.name:
        _print_method(arguments.name, as_json=arguments.json)
    else:
        _print_list(as_json=arguments.json)
    return 0


def _print_list(*, as_json: bool) -> None:
    if as_json:
        rows = {
            entry.name: {"summary": entry.summary, "reference": entry.reference, "refines": entry.refines}
            for entry in CATALOGUE
        }
        print(json.dumps(rows, indent=2))
        return
    for refines, title in ((False, "Solvers"), (True, "Refinements (after a solver: wanda+refit)")):
        print(title)
        for entry in CATALOGUE:
            if entry.refines is refines:
                print(f"  {entry.name:<12} {entry.summary}")
                print(f"  {'':<12} {entry.reference}")
    print("Settings of one method: fistapruner methods NAME")


def _print_method(name: str, *, as_json: bool) -> None:
    from ..solvers import METHODS

    found = [entry for entry in CATALOGUE if entry.name == name]
    if not found:
        raise FistaPrunerError(f"method {name!r} is not known{instead_of(name, [entry.name for entry in CATALOGUE])}")
    (entry,) = found
    if as_json:
        facts = {"name": name, "summary": entry.summary, "reference": entry.reference, "refines": entry.refines}
        known = {
            key: {"default": default, "description": description}
            for key, (default, description) in METHODS[name].descriptions().items()
        }
        print(json.dumps({**facts, "settings": known}, indent=2))
        return
    print(f"{name}: {entry.summary}\n{entry.reference}")
    for key, (default, description) in METHODS[name].descriptions().items():
        print(f"  {key} = {json.dumps(default)}\n      {description}")

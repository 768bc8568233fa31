"""List the solvers and refinements, their settings and where they come from.

Chain them with '+': --method wanda+refit, --method alps+swap.
"""

from __future__ import annotations

import argparse
import json

SUMMARY = "list the pruning methods"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..solvers import METHODS

    if arguments.json:
        table = {
            name: {
                "summary": method.summary,
                "reference": method.reference,
                "refines": method.refines,
                "settings": method.model_json_schema().get("properties", {}),
            }
            for name, method in METHODS.items()
        }
        print(json.dumps(table, indent=2))
        return 0
    for refines, title in ((False, "Solvers"), (True, "Refinements (after a solver: wanda+refit)")):
        print(title)
        for name, method in METHODS.items():
            if method.refines is refines:
                print(f"  {name:<12} {method.summary}")
                defaults = ", ".join(f"{key}={field.default}" for key, field in method.model_fields.items())
                if defaults:
                    print(f"  {'':<12} settings: {defaults}")
                if method.reference:
                    print(f"  {'':<12} {method.reference}")
    return 0

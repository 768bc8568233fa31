"""The command line: a dictionary from verb to module, and nothing else that decides anything.

A verb's module has ``SUMMARY`` (one line), ``configure(parser)`` (its arguments) and ``run(arguments)`` (calls the
public API, prints, returns the exit status). It imports heavy packages inside ``run``, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS: dict[str, str] = {
    "prune": "prune",
    "plan": "plan",
    "resume": "resume",
    "finish": "finish",
    "compare": "compare",
    "evaluate": "evaluate",
    "inspect": "inspect",
    "report": "report",
    "status": "status",
    "pack": "pack",
    "unpack": "unpack",
    "bench": "bench",
    "methods": "methods",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="fistapruner",
        description="Make a trained language model sparse after training, and see what that did to it.",
        epilog="'fistapruner VERB --help' explains each verb. Exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"fistapruner {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, name in VERBS.items():
        module = import_module(f".{name}", __package__)
        sub = verbs.add_parser(verb, help=module.SUMMARY, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.configure(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``fistapruner`` command."""
    from ..errors import FistaPrunerError

    parsed = build_parser().parse_args(arguments)
    _quieten()
    try:
        return int(parsed.run(parsed))
    except FistaPrunerError as error:
        print(f"fistapruner: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt as interruption:
        print(f"fistapruner: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130


def _quieten() -> None:
    """Keep other libraries' bars and advice out of our output; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

"""The command line: fourteen verbs, each the public function of the same name.

A verb is a function of one of the modules here. It calls the public function, prints its result and returns the exit
status if that may not be 0; its docstring is what ``--help`` says. ``configure_VERB`` beside it adds its arguments. A
verb imports torch and what needs it inside, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import atexit
import inspect
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

VERBS = dict.fromkeys(("prune", "recover", "align", "resume", "compare"), "runs") | dict.fromkeys(
    ("evaluate", "inspect", "report", "status", "pack", "unpack", "export", "bench", "methods"), "look"
)
"""The verbs in the order of ``--help``, and the module of each."""

READ_ONLY = ("inspect", "methods", "status")
"""Verbs that write nothing: several processes of a launcher may do the same."""

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment variables that hide other libraries' output; importing transformers for it would take seconds."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Fill the paragraphs of a description; indented lines, such as commands, stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(part, width, break_on_hyphens=False, break_long_words=False)
            for part in text.strip().split("\n\n")
        )


class _Parser(argparse.ArgumentParser):
    """Refuse wrong arguments in one line, and a misspelt verb or value with the nearest one."""

    def error(self, message: str) -> NoReturn:
        wrong = re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message)
        if wrong and (near := get_close_matches(wrong[2], re.findall(r"[\w-]+", wrong[3]), n=1)):
            message = f"{wrong[1]}: did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message} ('{self.prog} --help' lists all)\n")


class _Verb(_Parser):
    """Refuse unknown arguments, before required ones are missed: the nearest flag may be one of these."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags = (word.partition("=")[0] for word in args or () if word.startswith("--") and word != "--")
        for flag in flags:
            if flag not in self._option_string_actions:
                near = get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.75)
                hint = ": settings without a flag are given by --set KEY=VALUE" * (
                    "--set" in self._option_string_actions
                )
                self.error(f"unrecognized arguments: {flag}" + (f": did you mean {near[0]}?" if near else hint))
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; the arguments are those of ``only`` one verb, or of all."""
    from .. import __version__

    parser = _Parser(
        prog="fistapruner",
        description="Prune trained language models, and measure what that costs and gains.",
        epilog="'fistapruner VERB --help' explains each verb. Exit status: "
        "0 done, 1 a check failed, 2 bad input, 130 interrupted, 143 ended by SIGTERM.",
    )
    parser.add_argument("--version", action="version", version=f"fistapruner {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Verb)
    for verb, place in VERBS.items():
        module = import_module(f".{place}", __package__)
        said = inspect.getdoc(getattr(module, verb)) or ""
        summary = said.splitlines()[0].rstrip(".")
        sub = verbs.add_parser(
            verb,
            help=summary[0].lower() + summary[1:],
            description=said,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        if only in (None, verb):
            getattr(module, f"configure_{verb}")(sub)
            sub.add_argument("--debug", action="store_true", help="print the traceback of an error")
            sub.set_defaults(run=getattr(module, verb))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``fistapruner`` command and return its exit status."""
    from ..errors import FistaPrunerError, at_home, out_path
    from ..runtime.machine import leads
    from .arguments import hide_progress, write

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding does not have
    with _signals() as terminated:
        try:
            words = list(sys.argv[1:] if arguments is None else arguments)
            verb = next((word for word in words if not word.startswith("-")), "")
            parsed = build_parser(verb).parse_args(words)  # which may colour its help
            for name, called in (("out", "out"), ("run_directory", "RUN")):
                if (given := getattr(parsed, name, None)) is not None:
                    setattr(parsed, name, str(out_path(given, name=called)))
            for name, value in vars(parsed).items():
                setattr(parsed, name, at_home(value))
            _quieten()
            if (os.cpu_count() or 1) <= 8 and "OMP_WAIT_POLICY" not in os.environ:
                # OpenMP's threads spin 300 times as long, and take the time in which other programs could run.
                os.environ.setdefault("GOMP_SPINCOUNT", "1000")
            _refuse_processes(parsed)
            try:
                return int(parsed.run(parsed) or 0)
            except Exception:
                if parsed.debug:
                    traceback.print_exc()
                raise
            finally:
                hide_progress(parsed)
        except FistaPrunerError as error:
            write(f"fistapruner: {' '.join(str(error).split())}", sys.stderr)
            return 2
        except (RuntimeError, MemoryError) as error:
            if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which --help does not import
                said = (
                    "the GPU's memory ran out: free some, lower execution.batch_size or --seqlen, or take --device cpu"
                )
            elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # PyTorch's, on the host
                said = (
                    "main memory ran out: free some of it, and the same command goes on; a new run needs less with a "
                    "lower execution.batch_size or execution.memory_limit"
                )
            else:
                raise
            write(f"fistapruner: {said}", sys.stderr)
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            write(f"fistapruner: {os.fsdecode(error.filename)}: {error.strerror}", sys.stderr)
            return 2
        except KeyboardInterrupt as interruption:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would print a traceback
            if leads():  # it says how to go on
                write(f"fistapruner: {str(interruption) or 'interrupted'}", sys.stderr)
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            return 143 if terminated else 130
        finally:
            for stream in (sys.stdout, sys.stderr):
                write("", stream, end="")


def _refuse_processes(arguments: argparse.Namespace) -> None:
    """Refuse several processes of a launcher for what one process does."""
    from ..errors import FistaPrunerError
    from ..runtime.machine import launched

    if arguments.verb in READ_ONLY:
        return
    count = launched()
    alone = " --merge" if getattr(arguments, "merge", None) else ""
    if count > 1 and (alone or arguments.verb not in ("recover", "align", "resume")):
        what = arguments.verb + alone
        raise FistaPrunerError(
            f"WORLD_SIZE is {count}, so torchrun or another launcher has started {count} processes, and {what} is done "
            "by one: leave the launcher out; without one, unset RANK and WORLD_SIZE"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ignore that the terminal is closed, and let SIGTERM interrupt as Ctrl-C does.

    A second SIGTERM ends the process at once. ``torchrun`` ends its processes with both signals, and at last kills
    them: there SIGHUP is left alone, and a second SIGTERM, which may come from what has sent the first one to all, does
    not cut short that the run is left in order. Only the main thread can set signals. The list that is yielded is empty
    until SIGTERM comes.
    """
    came: list[int] = []
    elastic = "TORCHELASTIC_RUN_ID" in os.environ

    def interrupt(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN if elastic else signal.SIG_DFL)
        came.append(number)
        raise KeyboardInterrupt

    actions: dict[int, Any] = {signal.SIGTERM: interrupt} | ({} if elastic else {signal.SIGHUP: signal.SIG_IGN})
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        before |= {number: signal.signal(number, action) for number, action in actions.items()}
    try:
        yield came
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def _quieten() -> None:
    """Hide progress bars and warnings of other libraries; their errors are shown."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # too late for environment variables
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

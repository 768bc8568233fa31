"""The command line: a dictionary from verb to module, and nothing else that decides anything.

A verb's module has ``SUMMARY`` (one line), ``configure(parser)`` (its arguments) and ``run(arguments)`` (calls the
public API, prints, returns the exit status). It imports heavy packages inside ``run``, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TextIO, cast

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

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment variables that keep other libraries quiet. Importing transformers to say so would take seconds."""


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

    with _readers_may_leave():
        try:
            parsed = build_parser().parse_args(arguments)
            _quieten()
            return int(parsed.run(parsed))
        except FistaPrunerError as error:
            print(f"fistapruner: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interruption:
            print(f"fistapruner: {str(interruption) or 'interrupted'}", file=sys.stderr)
            return 130


class _Output:
    """A standard stream whose reader may leave: what nobody reads is dropped, and the work goes on.

    Args:
        stream: the stream; everything but writing is its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it where the reader has left."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send what is still buffered, and all that follows, nowhere."""
        if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that was closed
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Let output that nobody reads (``2>&1 | head -1``) neither stop the work nor change the exit status."""
    before = sys.stdout, sys.stderr
    # A stream that was closed before the program began is None.
    sys.stdout, sys.stderr = (stream and cast(TextIO, _Output(stream)) for stream in before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


def _quieten() -> None:
    """Keep other libraries' bars and advice out of our output; their errors still show."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # too late for environment variables
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

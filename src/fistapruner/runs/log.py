"""The log of a run, ``RUN/log.txt``: its progress, with times."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FistaPrunerError
from ..runtime.files import disk_errors, refuse_link
from .listener import Listener
from .records import LayerEntry

log = logging.getLogger("fistapruner")


class Logged(Listener):
    """Write progress to the log, and pass it on.

    Args:
        listener: receives everything.
        after_layer: called when a decoder layer is done.
    """

    def __init__(self, listener: Listener, after_layer: Callable[[], None] = lambda: None) -> None:
        self._listener = listener
        self._after_layer = after_layer

    def say(self, message: str) -> None:
        log.info(message)
        self._listener.say(message)

    def tick(self, what: str, done: int, total: int) -> None:
        self._listener.tick(what, done, total)

    def begin(self, layers: int, done: int) -> None:
        log.info("%d decoder layers, %d already done", layers, done)
        self._listener.begin(layers, done)

    def operators(self, index: int, names: str, error: float | None) -> None:
        if error is not None:
            log.info("layer %d %s: worst relative error %.5f", index, names, error)
        self._listener.operators(index, names, error)

    def layer(self, entry: LayerEntry) -> None:
        log.info("layer %d done in %s", entry.index, {phase: round(value, 3) for phase, value in entry.seconds.items()})
        for warning in entry.warnings:
            log.warning(warning)
        self._after_layer()
        self._listener.layer(entry)

    def end(self) -> None:
        self._listener.end()


class _LogFile(logging.FileHandler):
    """A log whose lines are lost where the disk takes none: what stops the run tells why."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: a traceback for every line would hide it."""


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Write the log to a file inside the block.

    Raises:
        FistaPrunerError: the file is a link, or cannot be opened.
    """
    refuse_link(path)
    with disk_errors(path):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        fault = not isinstance(error, (FistaPrunerError, KeyboardInterrupt))
        log.error("stopped: %s", str(error) or type(error).__name__, exc_info=fault)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        with suppress(OSError):  # a full disk: what ended the block is reported
            handler.close()

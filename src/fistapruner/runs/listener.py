"""The listener of a run receives its progress."""

from __future__ import annotations

from .records import LayerEntry


class Listener:
    """Receive the progress of a run. A subclass overrides the methods that it needs; these do nothing."""

    def say(self, message: str) -> None:
        """Receive a sentence for the user."""

    def tick(self, what: str, done: int, total: int) -> None:
        """Receive progress of a pass through the whole model, such as an evaluation: ``done`` of ``total``."""

    def begin(self, layers: int, done: int) -> None:
        """Receive the beginning of pruning: ``layers`` to prune, ``done`` of them already journaled."""

    def operators(self, index: int, names: str, error: float | None) -> None:
        """Receive a group of operators: begun (``error`` is None), or done with its worst relative error."""

    def layer(self, entry: LayerEntry) -> None:
        """Receive a finished decoder layer."""

    def end(self) -> None:
        """Receive the end of pruning."""

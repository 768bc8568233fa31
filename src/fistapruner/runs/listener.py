"""The listener of a run: receives its progress."""

from __future__ import annotations

from .records import LayerEntry


class Listener:
    """Told what happens during a run; the command line shows it, tests count it. Every method may be left as it is."""

    def say(self, message: str) -> None:
        """A sentence for the user."""

    def tick(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of a pass through a whole model, before or after the walk: measuring, evaluating."""

    def begin(self, layers: int, done: int) -> None:
        """The walk begins: ``layers`` in all, ``done`` of them already journaled."""

    def operators(self, index: int, names: str, error: float | None) -> None:
        """Operators of a decoder layer are worked on (``error`` None) or done, with their worst relative error."""

    def layer(self, entry: LayerEntry) -> None:
        """A decoder layer is done."""

    def end(self) -> None:
        """The walk is over."""

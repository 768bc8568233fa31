"""Records of runs that train: steps, losses, and what a model prefers."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from .base import Number, Record
from .results import Evaluation, Loss, StandardError, Written
from .steps import read_steps

CURVE_POINTS = 500
"""Most points of a training curve in a report."""


class TextSide(Record):
    """The part of a training text that is trained on, or the part that is held out.

    Args:
        documents: that were cut (None for generated text); ``windows``; ``tokens``: without padding; ``loss_tokens``:
            tokens that carry loss.
    """

    documents: int | None = None
    windows: int = 0
    tokens: int = 0
    loss_tokens: int = 0


class Check(Record):
    """One check on the held-out windows of a run that trains.

    Args:
        step: after which it was made; ``held_out``: loss per token; ``by_task``: of each of several tasks.
        kept: its weights are the best so far.
    """

    step: int
    held_out: Loss
    kept: bool = False
    by_task: dict[str, Loss] = {}


class Recovery(Record):
    """What a run trained, on what, and what that changed.

    Args:
        parameters, optimizer, loss: as resolved; ``lr``: the lowest and the highest first learning rate.
        trained: numbers that were trained; ``operators``: operators among them.
        steps: optimizer steps taken; ``asked_steps``; ``kept_step``: the step whose weights were written; 0 is the
            input's own.
        tokens: tokens with loss that were passed in training.
        windows, held_out_windows, documents, held_out_documents: of either side.
        checks: on the held-out windows, in order, that of step 0 first; ``curve``: (step, training loss), at most 500.
        seconds: of steps and checks, all processes; ``last_step``: ISO time of the last step.
        changed: share of the operators' surviving weights that changed; ``change``: largest norm of an operator's
            change over its norm.
        before: the input on the texts that the result was evaluated on, against the same dense model.
    """

    parameters: str = ""
    optimizer: str = ""
    loss: str = ""
    lr: dict[str, Number] = {}
    trained: int = 0
    operators: int = 0
    steps: int = 0
    asked_steps: int = 0
    kept_step: int = 0
    tokens: int = 0
    windows: int = 0
    held_out_windows: int = 0
    documents: int | None = None
    held_out_documents: int | None = None
    checks: list[Check] = []
    curve: list[tuple[int, Number]] = []
    changed: float | None = None
    change: float | None = None
    seconds: float = 0.0
    last_step: str | None = None
    before: list[Evaluation] = []

    @property
    def start(self) -> Check | None:
        """The check before the first step."""
        return next((check for check in self.checks if check.step == 0), None)

    @property
    def best(self) -> Check | None:
        """The check of the step that is kept."""
        return next((check for check in self.checks if check.step == self.kept_step), None)

    def read_journal(self, path: Path) -> None:
        """Take steps, losses and times from a journal (:mod:`fistapruner.runs.steps`).

        Raises:
            FistaPrunerError: the file cannot be read.
        """
        if not (lines := read_steps(path)):
            return
        losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        self.steps = lines[-1]["step"]
        self.tokens = sum(line.get("tokens", 0) for line in lines)
        self.seconds = sum(line.get("seconds", 0.0) for line in lines)
        self.last_step = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
        self.curve = losses[:: -(-len(losses) // CURVE_POINTS) or 1]
        checks = [line for line in lines if line.get("held_out") is not None]
        self.checks = [Check.model_validate({key: line.get(key) for key in Check.model_fields}) for line in checks]
        self.kept_step = next((check.step for check in reversed(self.checks) if check.kept), 0)


class PreferenceFigures(Record):
    """What a model prefers on the test pairs of an alignment run.

    Args:
        accuracy: share of pairs whose chosen answer is more likely; ties count one half. ``accuracy_error``: its
            standard error.
        normalised, normalised_error: the same with log-probabilities divided by tokens.
        p_value: exact McNemar test of ``accuracy`` against that of the run's result; ``lost``, ``won``: pairs that only
            this model, or only the result, gets right.
    """

    accuracy: Number
    accuracy_error: StandardError
    normalised: Number
    normalised_error: Annotated[float | None, Written] = None
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None


class Alignment(Record):
    """What an alignment run trained on, and what its result prefers.

    Rewards are relative to the references of the loss, combined as the loss does (the mean of them for multi-dpo), or
    to the model that went in where the loss has none.

    Args:
        pairs, held_out_pairs, test_pairs: of the three sides; ``left_out``: pairs that did not fit.
        references: their weights by name, the mean over the pairs of the steps where they differ; empty without any.
        test: of ``dense``, ``pruned`` (the model that went in) and ``aligned``, on the test pairs.
        reward_accuracy: share of test pairs whose margin is above the references'; ties count one half.
        margin: ``beta (h - m)``, the mean over test pairs.
        chosen_reward, rejected_reward: ``beta (p - r)`` of either answer, means.
        reward_accuracy_error, margin_error, chosen_reward_error, rejected_reward_error: standard errors.
    """

    pairs: int = 0
    held_out_pairs: int = 0
    test_pairs: int = 0
    left_out: int = 0
    references: dict[str, Number] = {}
    test: dict[str, PreferenceFigures] = {}
    reward_accuracy: float | None = None
    reward_accuracy_error: Annotated[float | None, Written] = None
    margin: float | None = None
    margin_error: Annotated[float | None, Written] = None
    chosen_reward: float | None = None
    chosen_reward_error: Annotated[float | None, Written] = None
    rejected_reward: float | None = None
    rejected_reward_error: Annotated[float | None, Written] = None

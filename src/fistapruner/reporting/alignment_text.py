"""Say in words and numbers what an alignment run changed in what its model prefers."""

from __future__ import annotations

from ..runs.records import Report
from ..runs.training_records import PreferenceFigures
from ..runtime.formatting import count, counted, p_value, percent, percent_with_error, significant, with_error

PAIR_LOSS_TEXTS = {
    "dpo": "dpo, nats a pair",
    "multi-dpo": "dpo, mean over references, nats a pair",
    "harmonic": "dpo with the harmonic mean of the references, nats a pair",
    "geometric": "dpo with the geometric mean of the references, nats a pair",
    "sft": "cross-entropy of the chosen answers, nats a token",
    "none": "KL from the dense model on the chosen answers, nats a token",
}
"""What the losses of alignment are, for axes."""

Row = tuple[str, str, str, str, str]


FEW = 20
"""Test pairs below which a preference accuracy says little."""


def preference_rows(report: Report) -> list[Row]:
    """List measure, its value of the dense model, before alignment and after it, and how it was measured."""
    found = report.alignment
    if found is None:
        return []
    after = found.test["aligned"]
    models = [found.test.get(name) for name in ("dense", "pruned")] + [after]
    pairs = f"{counted(found.test_pairs, 'test pair')}"
    dense, before, result = (accuracy_text(each) for each in models)
    rows = [("Preference accuracy, %", dense, before, result, "; ".join([pairs, *_tests(report)]))]
    dense, before, result = (by_token_text(each) for each in models)
    rows.append(("Preference accuracy by token, %", dense, before, result, f"{pairs}; log-probabilities a token"))
    against = references_text(report)
    if found.margin is not None and found.reward_accuracy is not None:
        margin = with_error(found.margin, found.margin_error, 3)
        rows.append(("Reward margin", "–", "–", margin, f"beta (h - m) against {against}"))
        share = percent_with_error(found.reward_accuracy, found.reward_accuracy_error)
        rows.append(("Reward accuracy, %", "–", "–", share, f"pairs whose margin is above that of {against}"))
    if found.chosen_reward is not None and found.rejected_reward is not None:
        chosen = with_error(found.chosen_reward, found.chosen_reward_error, 3)
        rejected = with_error(found.rejected_reward, found.rejected_reward_error, 3)
        rewards = f"{chosen} / {rejected}".replace("-", "−")
        rows.append(("Rewards, chosen / rejected", "–", "–", rewards, f"against {against}"))
    return rows


def accuracy_text(found: PreferenceFigures | None) -> str:
    """Write a preference accuracy in percent with its standard error."""
    return "–" if found is None else percent_with_error(found.accuracy, found.accuracy_error)


def by_token_text(found: PreferenceFigures | None) -> str:
    """Write a preference accuracy by token in percent with its standard error."""
    return "–" if found is None else percent_with_error(found.normalised, found.normalised_error)


def references_text(report: Report) -> str:
    """Name the references of the loss with their weights; without any, the model that went in."""
    found = report.alignment
    if found is None or not found.references:
        return "the model that went in"
    if len(found.references) == 1:
        return f"the {next(iter(found.references))} model"
    return " and ".join(f"{significant(weight, 2)} {name}" for name, weight in found.references.items())


def pairs_text(report: Report) -> str:
    """Say how many pairs were on each side, and how many were left out."""
    found = report.alignment
    if found is None:
        return ""
    text = f"{count(found.pairs)} pairs to train on, {count(found.held_out_pairs)} held out, {count(found.test_pairs)}"
    return f"{text} to test" + (f", {count(found.left_out)} left out" if found.left_out else "")


def preference_sentence(report: Report) -> str:
    """Say how the preference accuracy changed; empty for another run."""
    found = report.alignment
    if found is None:
        return ""
    before, after = found.test["pruned"], found.test["aligned"]
    text = f"The chosen answer is more likely in {percent(after.accuracy)} of {counted(found.test_pairs, 'test pair')}"
    text += f", before alignment in {percent(before.accuracy)}"
    if before.p_value is not None:
        text += f" (McNemar {p_value(before.p_value)})"
    if found.test_pairs < FEW:
        text += f"; fewer than {FEW} pairs say little"
    return f"{text}."


def _tests(report: Report) -> list[str]:
    found = report.alignment
    assert found is not None
    names = {"pruned": "before", "dense": "dense"}
    return [
        f"against {names[name]} {each.lost} lost, {each.won} won, McNemar {p_value(each.p_value)}"
        for name, each in found.test.items()
        if each.p_value is not None
    ]

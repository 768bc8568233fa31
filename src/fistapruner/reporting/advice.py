"""Advise what to try next, from the figures of a run.

An operator's error counts without the part that its dense weights would have too: only what pruning added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from ..allocate.curves import REACH
from ..core import parse_sparsity
from ..errors import FistaPrunerError
from ..runs.labels import method_label
from ..runs.layer_records import LayerEntry, OperatorEntry
from ..runs.records import Report
from ..runs.training_records import Recovery
from ..runtime.formatting import percent, significant
from .layer_errors import short_names
from .traces import TRACES


def advice(report: Report) -> list[str]:
    """Write advice as sentences, most useful first; options stand between backticks.

    Empty when nothing stands out.
    """
    if report.recovery is not None:
        return _recovery(report, report.recovery)
    if report.only_structure:
        return [*_training(report), *_calibration(report)]
    why = _why_not_uneven(report)
    found = [*_training(report), *_layers(report, why), *_operators(report.layers, why)]
    return [*found, *_chain(report), *_search(report.layers), *_calibration(report)]


def length_setting(report: Report) -> str:
    """Name the setting that makes a training longer: steps, where they are given, override the others."""
    if report.recipe.get("steps") is not None:
        return "--steps"
    return "--epochs" if report.kind == "align" else "--tokens"


def _recovery(report: Report, found: Recovery) -> list[str]:
    checks = len(found.checks)
    lines: list[str] = []
    if checks > 1 and found.kept_step == 0:
        lines.append(
            "No check was better than the start: try a smaller `--lr`, or a text closer to the model's own use."
        )
    elif checks > 1 and found.kept_step == found.asked_steps:
        lines.append(f"The held-out loss was lowest at the last step: more `{length_setting(report)}` may win more.")
    if found.optimizer in ("mezo", "subzero"):
        lines.append(
            f"The gradients of {found.optimizer} are estimates, which need thousands of steps: where its memory is "
            "there, `--parameters lora --optimizer adamw` for the same time is better."
        )
    return lines


def _training(report: Report) -> list[str]:
    """Advise recovery where a loss is beyond two standard errors."""
    damage = [evaluation.divergence for evaluation in report.evaluations if evaluation.divergence is not None]
    lost = any(each.nll_difference > 2 * (each.nll_difference_standard_error or 0.0) for each in damage)
    if not lost:
        return []
    kept = "" if report.only_structure else " with every zero kept"
    return [f"Training{kept} wins back a part of what pruning lost: `fistapruner recover RUN --out NEW`."]


def _layers(report: Report, why_not: str) -> list[str]:
    layers = report.layers
    means = {layer.index: mean for layer in layers if (mean := _mean(layer.operators)) is not None}
    if len(means) < 4:
        return []
    middle = median(means.values())
    if not middle:  # nothing was lost: a model that has the pattern already
        return []
    outliers = sorted((index for index, mean in means.items() if mean > 2 * middle), key=lambda index: -means[index])
    if not outliers:
        ratio = significant(max(means.values()) / middle, 2)
        return [f"No decoder layer stands out: the largest mean error is {ratio} times the median."]
    shown = ", ".join(f"{index} ({percent(means[index], 2)})" for index in outliers[:4])
    name = next(layer.name for layer in layers if layer.index == outliers[0]) or f"layers.{outliers[0]}"
    one = len(outliers) == 1
    subject, them = (f"Decoder layer {shown} stands", "it") if one else (f"Decoder layers {shown} stand", "them")
    stands = f"{subject} out against a median error of {percent(middle, 2)}."
    pattern = f"re:{re.escape(name)}\\."
    if why_not:
        return [f"{stands} {why_not}; `--ignore '{pattern}'` leaves {'the layer' if one else name} dense."]
    spread = f"{stands} Give {them} less sparsity: `--allocation error` spreads the same budget by measured error"
    try:
        sparsity = parse_sparsity(report.recipe.get("sparsity", ""))
    except FistaPrunerError:
        return [f"{spread}."]
    if not sparsity.supports_allocation:
        return [f"{spread}."]
    less = f"{80 * sparsity.fraction:.3g}%"
    return [f"{spread}, or name the layer: `--allocation \"{{'{pattern}': {less}}}\"`."]


def _operators(layers: Sequence[LayerEntry], why_not: str) -> list[str]:
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        for operator in layer.operators:
            if operator.loss is not None:
                kinds.setdefault(operator.name, []).append(operator.loss)
    if len(kinds) < 3:
        return []
    means = {name: sum(errors) / len(errors) for name, errors in kinds.items()}
    middle = median(means.values())
    worst = max(means, key=lambda name: means[name])
    if not middle or means[worst] < 1.8 * middle:
        return []
    spread = "" if why_not else "`--allocation error` moves sparsity away from it; "
    return [
        f"Pruning adds the largest error to {worst}: {percent(means[worst], 2)} on average, against a median of "
        f"{percent(middle, 2)} over all operators. "
        f"{spread}`--ignore {short_names(layers)[worst]}` leaves it dense."
    ]


def _chain(report: Report) -> list[str]:
    method = method_label(report.recipe.get("method", ""))
    if method.split("+")[-1] in ("magnitude", "wanda", "sparsegpt", "fista"):  # their weights are not least squares
        refit = f"`--method {method}+refit`"
        return [f"A least-squares refit on the kept weights can only lower the error and costs little: {refit}."]
    return []


def _search(layers: Sequence[LayerEntry]) -> list[str]:
    tried = kept = 0
    symbol = ""
    for layer in layers:
        for operator in layer.operators:
            for position, step in enumerate(operator.steps):
                trace = TRACES.get(str(step.get("method")))
                rounds = [] if trace is None or not trace.search else trace.rounds(step)
                if trace is None or not rounds:
                    continue
                symbol = trace.penalty_label
                best = step.get(trace.value)
                beaten = best is not None and all(best < record[trace.value] * (1 - 1e-9) for record in rounds)
                tried, kept = tried + 1, kept + (beaten and position == 0)
    if tried and kept > tried / 4:
        return [
            f"In {kept} of {tried} operators no round of the {symbol} search beat its warm start, which was kept. "
            "A longer search (more rounds without improvement before stopping) or another solver may gain there."
        ]
    return []


def _calibration(report: Report) -> list[str]:
    used, taken = report.calibration, _taken(report)
    if used is None or not used.tokens or taken == {"nothing"}:
        return []
    found = []
    # Norms of inputs are known from few windows, Grams are not.
    widest = max((operator.shape[1] for operator in report.operators), default=0)
    if used.tokens < 4 * widest and "Gram" in taken:
        found.append(
            f"{used.tokens} calibration tokens are few for operators of {widest} inputs: "
            "their Grams are poorly determined. Use more `--samples` or a longer `--seqlen`."
        )
    elif used.samples < 128 and "Gram" in taken:
        found.append(
            f"Calibration used {used.samples} windows; the papers use 128, and quality drops quickly with fewer."
        )
    if used.source in ("python", "self") and report.evaluations:
        found.append(
            f"Calibration text was {used.source!r}. Text like what the model will be used for usually gives "
            "a better model: `--calibration FILE` or `--calibration c4`."
        )
    return found


def _taken(report: Report) -> set[str]:
    """Return what a run took from its text: nothing, the inputs' norms, or all of their Gram."""
    recipe = report.recipe
    allocation = recipe.get("allocation", "auto")
    measured = isinstance(allocation, str) and allocation not in ("auto", "uniform")
    others = (recipe.get("low_rank"), recipe.get("reconstruct"), recipe.get("permutation") == "channels")
    if report.structured or measured or any(others):
        return {"Gram"}
    takes = {"magnitude": "nothing", "wanda": "norms"}
    return {takes.get(name, "Gram") for name in method_label(recipe.get("method", "")).split("+")}


def _why_not_uneven(report: Report) -> str:
    """Say why another allocation is not worth trying; empty where it is."""
    if len({operator.sparsity for operator in report.operators}) > 1:
        return "Sparsity differs between operators already"
    try:
        pattern = parse_sparsity(report.recipe.get("sparsity", ""))
        if not pattern.supports_allocation and not pattern.neighbours(REACH):
            return f"The pattern {report.recipe['sparsity']} has the same sparsity in every operator"
    except FistaPrunerError:
        pass
    return ""


def _mean(operators: Sequence[OperatorEntry]) -> float | None:
    losses = [operator.loss for operator in operators if operator.loss is not None]
    return sum(losses) / len(losses) if losses else None

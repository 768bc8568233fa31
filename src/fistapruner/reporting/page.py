"""``report.html`` of a run: one file that needs nothing else, made from the report alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import yaml

from ..runs.records import Report
from ..runs.results import Evaluation, TaskResult
from ..runtime.formatting import count, duration, p_value, pattern, percent, short_count, significant, size, with_error
from .advice import advice
from .drawing import Drawing
from .evaluation_text import item_count, protocol
from .figures import layer_figures
from .figures_quality import quality_figures
from .html import facts, moment, page, section, table, tiles
from .layer_errors import hardest
from .lineage_text import lineage_lines
from .model_card import base_model
from .size_and_speed import dense_speed, packed_speeds, size_rows, speed_protocol, speed_rows, speed_table, speeds


def run_page(report: Report) -> str:
    """The page of a run, finished or not, as HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = layer_figures(report) | quality_figures(report.evaluations)
    sections = [
        _summary(report),
        _warnings(report),
        section("Quality", _figures(figures, "perplexity", "divergence", "zero-shot")),
        _generations(report),
        section("Where the error is", _figures(figures, "error-map", "layer-errors", "layer-sparsity")),
        _next(report),
        section("How the solver got there", _figures(figures, "chain-errors", "solver-path", "spectra") + _hardest(report)),
        section("Cost", _cost(report, figures)),
        _reproduce(report),
    ]
    title = f"{base_model(report) or 'Model'} at {report.sparsity or 'unknown'} sparsity"
    return page(title, _header(report, title), "".join(sections), f"fistapruner {report.versions.get('fistapruner', '')}")


def _figures(figures: Mapping[str, Drawing], *keys: str) -> str:
    shown = [figures[key] for key in keys if key in figures]
    kind = "figures"
    if not any(figure.full for figure in shown):
        kind += {1: " one", 3: " three"}.get(len(shown), "")
    return f'<div class="{kind}">{"".join(figure.html() for figure in shown)}</div>' if shown else ""


def _header(report: Report, title: str) -> str:
    done = f"{len(report.layers)} of {report.model.layers} decoder layers" if report.status != "finished" else ""
    parts = [report.method, report.model.architecture, done, moment(report.finished or report.started)]
    meta = " · ".join(escape(part) for part in parts if part)
    return (
        f'<h1>{escape(title)}</h1><p class="meta"><span class="status {report.status}">{report.status}</span> {meta}</p>'
        f'<p class="lead">{escape(verdict(report))}</p>'
    )


def verdict(report: Report) -> str:
    """What happened to the model, in two or three sentences."""
    totals = report.totals
    sentences = []
    if totals.operator_weights and totals.operator_zeros is not None:
        sentences.append(
            f"{percent(totals.operator_zeros / totals.operator_weights, 4)} of the pruned operators' weights are exactly zero."
        )
    for evaluation in report.evaluations[:1]:
        text, dense = evaluation.perplexity, evaluation.reference
        if text is not None and dense is not None:
            ratio = text.perplexity / dense.perplexity
            sentences.append(
                f"Perplexity on {text.data} went from {dense.perplexity:.2f} to {text.perplexity:.2f} (×{significant(ratio)})."
            )
        if evaluation.divergence is not None:
            sentences.append(
                f"The most likely next token stayed the same for {percent(evaluation.divergence.top1_agreement)} of the tokens."
            )
    if report.permuted:
        sentences.append(
            f"The hidden channels that {len(report.permuted)} operators read were reordered for the pattern: adapters made for the "
            "dense model do not fit this one."
        )
    if report.status == "failed":
        sentences.append(f"The run stopped: {report.error or 'reason unknown'}.")
    if report.status == "running":
        sentences.append("The run is not finished; this page shows the layers that are done.")
    return " ".join(sentences)


def _summary(report: Report) -> str:
    totals = report.totals
    items = []
    evaluation = next((e for e in report.evaluations if e.perplexity is not None), None)
    if evaluation is not None and evaluation.perplexity is not None:
        text, dense = evaluation.perplexity, evaluation.reference
        before = f"dense {with_error(dense.perplexity, dense.standard_error)}; " if dense is not None else ""
        items.append(("Perplexity", f"{text.perplexity:.2f}", f"{before}{text.data}, windows of {text.seqlen}"))
        if evaluation.divergence is not None:
            agreement = evaluation.divergence
            items.append(
                (
                    "Top-1 agreement",
                    percent(agreement.top1_agreement),
                    f"KL {with_error(agreement.kl, agreement.kl_standard_error, 3)} nats",
                )
            )
    if totals.operator_weights and totals.operator_zeros is not None:
        whole = f"{percent(totals.model_zeros / totals.model_weights)} of the model" if totals.model_weights and totals.model_zeros else ""
        items.append(
            ("Zeros", percent(totals.operator_zeros / totals.operator_weights), f"{count(totals.operator_zeros)}; {whole}".rstrip("; "))
        )
    errors = [op.relative_error for layer in report.layers for op in layer.operators if op.relative_error is not None]
    if errors:
        items.append(
            ("Mean relative error", percent(sum(errors) / len(errors)), f"worst of {len(errors)} operators {percent(max(errors))}")
        )
    tasks = _one_metric([task for evaluation in report.evaluations for task in evaluation.tasks])
    if len(tasks) > 1:
        mean, _, dense_mean, _ = _mean_score(tasks)
        note = f"mean of {len(tasks)} tasks" + (f"; dense {100 * dense_mean:.1f} %" if dense_mean is not None else "")
        items.insert(2 if items else 0, ("Zero-shot", f"{100 * mean:.1f} %", note))
    if totals.checkpoint_bytes:
        packed = f"compressed {size(totals.compressed_bytes)}" if totals.compressed_bytes else "zeros are stored as they are"
        items.append(("Size on disk", size(totals.checkpoint_bytes), packed))
    baseline, fast = dense_speed(report), packed_speeds(report)
    if baseline is not None and fast:
        ratio = float(fast[0]["tokens_per_second"]) / float(baseline["tokens_per_second"])
        note = f"{significant(fast[0]['tokens_per_second'])} tokens/s, {fast[0]['variant']}, against {baseline['variant']}"
        items.append(("Decoding speed", f"×{significant(ratio)}", note))
    if totals.seconds:
        peak = f"peak memory {size(totals.peak_memory)}" if totals.peak_memory else ""
        items.append(("Time to prune", duration(totals.seconds), peak))
    rows = [*_measurements(report.evaluations), *size_rows(report), *speed_rows(report)]
    measured = ""
    if rows:
        head = ("measure", "dense", "pruned", "change", "how it was measured")
        measured = f'<div class="card">{table(head, rows, "Measured results", numeric=(1, 2, 3), stack=True)}</div>'
    return f'<section><h2 class="hidden">Summary</h2>{tiles(items)}{measured}{_speed(report)}</section>'


def _measurements(evaluations: Sequence[Evaluation]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for evaluation in evaluations:
        text, dense, damage = evaluation.perplexity, evaluation.reference, evaluation.divergence
        if text is not None:
            change = f"×{significant(text.perplexity / dense.perplexity)}" if dense is not None else "–"
            before = with_error(dense.perplexity, dense.standard_error) if dense is not None else "–"
            rows.append((f"Perplexity, {text.data}", before, with_error(text.perplexity, text.standard_error), change, protocol(text)))
        if damage is not None:
            gap = with_error(damage.nll_difference, damage.nll_difference_standard_error, 3)
            rows.append(("NLL gap, nats a token", "0", gap, "", "ln of the ratio of the perplexities, paired over windows"))
            kl = with_error(damage.kl, damage.kl_standard_error, 3)
            rows.append(("KL from dense, nats a token", "0", kl, "", "mean over the same tokens of KL(dense || pruned)"))
            agreement = with_error(100 * damage.top1_agreement, 100 * damage.top1_standard_error, 1)
            rows.append(("Top-1 agreement, %", "100", agreement, "", "tokens whose most likely successor is the same in both models"))
    tasks = [task for evaluation in evaluations for task in evaluation.tasks]
    for task in tasks:
        before, change, how = "–", "–", f"{task.shots}-shot, {item_count(task)}, {task.source}"
        if task.reference is not None and task.reference_standard_error is not None:
            before = with_error(100 * task.reference, 100 * task.reference_standard_error, 1)
            change = points(task.value - task.reference)
            verdict = "a real difference" if task.significant else "within noise"
            how += f"; {task.lost} lost, {task.won} won, McNemar {p_value(task.p_value)}: {verdict}"
        rows.append((f"{task.task}, {task.metric}, %", before, with_error(100 * task.value, 100 * task.standard_error, 1), change, how))
    together = _one_metric(tasks)
    if len(together) > 1:
        mean, error, dense_mean, dense_error = _mean_score(together)
        before = with_error(100 * dense_mean, 100 * (dense_error or 0), 1) if dense_mean is not None else "–"
        change = points(mean - dense_mean) if dense_mean is not None else "–"
        how = "unweighted mean over " + ", ".join(f"{task.task} {task.metric}" for task in together)
        rows.append((f"Mean of {len(together)} tasks, %", before, with_error(100 * mean, 100 * error, 1), change, how))
    return rows


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _one_metric(tasks: Sequence[TaskResult]) -> list[TaskResult]:
    """One result a task, for a mean: plain accuracy where there is one."""
    chosen: dict[str, TaskResult] = {}
    for task in tasks:
        if task.task not in chosen or task.metric == "acc":
            chosen[task.task] = task
    return list(chosen.values())


def _mean_score(tasks: Sequence[TaskResult]) -> tuple[float, float, float | None, float | None]:
    """Mean score and its standard error (tasks are independent), and the dense model's if every task has them."""
    count = len(tasks)
    mean = sum(task.value for task in tasks) / count
    error = math.hypot(*(task.standard_error for task in tasks)) / count
    dense = [task.reference for task in tasks if task.reference is not None]
    errors = [task.reference_standard_error for task in tasks if task.reference_standard_error is not None]
    if len(dense) < count or len(errors) < count:
        return mean, error, None, None
    return mean, error, sum(dense) / count, math.hypot(*errors) / count


ZEROS = (
    "Zeros in a checkpoint are stored and multiplied like any other number: in engines that read dense weights this model is as large and "
    "as fast as the dense one. Only packed, in this program's own format and kernels, can it be smaller or faster."
)


def _speed(report: Report) -> str:
    if report.status != "finished":
        return ""
    if not speeds(report):
        how = "<p>No speed was measured: <code>fistapruner bench RUN</code> does that and adds it here.</p>"
        return f'<div class="card"><h3>What sparsity gives here</h3><p>{escape(ZEROS)}</p>{how}</div>'
    head = ("form of the model", "tokens/s", "slowest to fastest", "first token", "peak memory", "file size")
    made = table(head, speed_table(report), "Speed and size of every form", numeric=(1, 2, 3, 4, 5), stack=True)
    kernel = (report.speed or {}).get("kernel")
    how = speed_protocol(report, speeds(report)[0]) + (f", kernel {kernel}" if kernel else "")
    words = f"<p>{escape(str((report.speed or {}).get('sentence') or ''))}</p><p>{escape(ZEROS)}</p>"
    note = f'<p class="meta">Measured: {escape(how)}. Rows named dense hold the same weights with their zeros filled in.</p>'
    return f'<div class="card"><h3>What sparsity gives here</h3>{words}{made}{note}</div>'


def _warnings(report: Report) -> str:
    if not report.warnings and not report.error:
        return ""
    lines = ([f"Stopped: {report.error}"] if report.error else []) + list(dict.fromkeys(report.warnings))
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines[:20])
    more = f"<li>and {len(lines) - 20} more in report.json</li>" if len(lines) > 20 else ""
    return section("Warnings", f'<div class="card warning"><ul>{shown}{more}</ul></div>')


def _next(report: Report) -> str:
    lines = advice(report)
    if not lines:
        return ""
    return section("What to try next", f'<div class="card next"><ul>{"".join(f"<li>{_options(line)}</li>" for line in lines)}</ul></div>')


def _options(line: str) -> str:
    """A sentence with what stands between backticks set as code."""
    return re.sub(r"`([^`]+)`", r'<code class="option">\1</code>', escape(line))


def _hardest(report: Report) -> str:
    rows = [
        (
            f"layer {layer.index}, {operator.name}",
            percent(operator.relative_error),
            percent(operator.dense_error or 0.0),
            f"{operator.shape[0]} × {operator.shape[1]}, {pattern(operator.sparsity)}",
            " → ".join(f"{step.get('method', '?')} {percent(step.get('relative_error'), 2)}" for step in operator.steps),
        )
        for layer, operator in hardest(report.layers, 8)
    ]
    if not rows:
        return ""
    head = ("operator", "relative error", "of dense weights", "shape, pattern", "error after each step")
    made = table(head, rows, "The hardest operators", numeric=(1, 2), stack=True)
    return f'<div class="card below"><h3>The hardest operators</h3>{made}</div>'


def _generations(report: Report) -> str:
    cards = []
    for sample in report.generations:
        prompt = f'<span class="prompt">{escape(sample.prompt)}</span>'
        texts = [
            f'<div><p class="who">{name}</p><p class="text">{prompt}{escape(text or "–")}</p></div>'
            for name, text in (("Dense", sample.dense), ("Pruned", sample.pruned))
        ]
        cards.append(f'<div class="card split">{"".join(texts)}</div>')
    if cards:
        cards.insert(0, '<p class="meta">Prompts (grey) continued greedily by both models.</p>')
    return section("Side by side", "".join(cards))


PHASES = {
    "capture": "forward passes that collect inputs",
    "gram": "sums of outer products",
    "solve": "the method itself",
    "reconstruct": "block reconstruction",
    "sensitivity": "what the dense model's predictions feel",
    "io": "reading weights, writing results",
    "report": "spectra and errors for this page",
    "plain": "one unwatched forward pass, to compare",
    "write": "writing the checkpoint",
}


def _cost(report: Report, figures: Mapping[str, Drawing]) -> str:
    totals = report.totals
    blocks = [figures["time-by-layer"].html()] if "time-by-layer" in figures else []
    if totals.time_split:
        whole = sum(totals.time_split.values()) or 1.0
        split = [
            (name, duration(value), f"{100 * value / whole:.1f} %", PHASES.get(name, ""))
            for name, value in sorted(totals.time_split.items(), key=lambda pair: -pair[1])
        ]
        made = table(("phase", "time", "share", "what it is"), split, "Time split", numeric=(1, 2), stack=True)
        blocks.append(f'<div class="card"><h3>Time split</h3>{made}</div>')
    if report.plan:
        shown = {"bytes": size, "seconds": duration}
        rows = [
            (
                row.quantity,
                *(shown.get(row.unit, significant)(value) for value in (row.planned, row.actual)),
                _ratio(row.planned, row.actual),
            )
            for row in report.plan
        ]
        head = ("quantity", "planned", "measured", "measured / planned")
        blocks.append(
            f'<div class="card"><h3>Plan and reality</h3>{table(head, rows, "Plan and reality", numeric=(1, 2, 3), stack=True)}</div>'
        )
    pairs = [
        ("peak memory", size(totals.peak_memory) if totals.peak_memory else None),
        ("peak GPU memory", size(totals.peak_device_memory) if totals.peak_device_memory else None),
        ("capture", f"{significant(totals.capture_tokens_per_second)} tokens/s" if totals.capture_tokens_per_second else None),
        (
            "one plain forward pass",
            f"{significant(totals.forward_tokens_per_second)} tokens/s" if totals.forward_tokens_per_second else None,
        ),
    ]
    rates = facts(pairs)
    if rates:
        blocks.append(f'<div class="card"><h3>Rates and memory</h3>{rates}</div>')
    return f'<div class="figures">{"".join(blocks)}</div>' if blocks else ""


def _ratio(planned: float | None, actual: float | None) -> str:
    return significant(actual / planned) if planned and actual is not None else "–"


def _reproduce(report: Report) -> str:
    blocks = []
    if report.command:
        blocks.append(f'<div class="card"><h3>Command</h3><pre>{escape(report.command)}</pre></div>')
    used, machine, model = report.calibration, report.machine, report.model
    pairs: list[tuple[str, str | None]] = [
        ("model", model.source),
        ("architecture", model.architecture),
        ("parameters", f"{count(model.parameters)} ({short_count(model.parameters)})" if model.parameters else None),
        ("decoder layers", count(model.layers) if model.layers else None),
        ("precision", model.dtype),
        ("fingerprint", report.fingerprint),
        ("lineage", " → ".join(lineage_lines(report.lineage)) if report.lineage and report.lineage.stages else None),
    ]
    if used is not None:
        pairs += [
            ("calibration", f"{used.source}: {used.samples} windows of {used.seqlen} tokens" + (f", {used.how}" if used.how else "")),
            ("calibration tokens", f"{count(used.tokens)}, sha256 {used.sha256[:16]}" if used.sha256 else count(used.tokens)),
            ("calibration seed", None if used.seed is None else str(used.seed)),
        ]
    pairs += [
        ("seed", str(report.recipe["seed"]) if "seed" in report.recipe else None),
        ("machine", ", ".join(part for part in (machine.cpu, machine.device_name or "", machine.system) if part)),
        ("instructions", " ".join(machine.instructions)),
        ("threads", f"{machine.threads} of {machine.cores} cores" if machine.threads and machine.cores else None),
        ("memory", size(machine.memory) if machine.memory else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("started", moment(report.started)),
        ("finished", moment(report.finished)),
    ]
    blocks.append(f'<div class="card"><h3>What was used</h3>{facts(pairs)}</div>')
    if report.recipe:
        recipe = yaml.safe_dump(report.recipe, sort_keys=False).strip()
        blocks.append(f'<div class="card"><h3>Recipe</h3><pre>{escape(recipe)}</pre></div>')
    return section("Make it again", "".join(blocks))

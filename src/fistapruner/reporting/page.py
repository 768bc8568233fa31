"""Draw ``report.html`` of a run: one file that loads nothing, made from the report alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import yaml

from ..runs.labels import PHASES
from ..runs.records import Report
from ..runs.results import Evaluation
from ..runs.training_records import TextSide
from ..runtime.formatting import count, counted, duration, pattern, percent, short_count, significant, size
from .advice import advice
from .alignment_text import pairs_text, references_text
from .figures import layer_figures
from .figures_quality import quality_figures
from .figures_recovery import training_figures
from .layer_errors import hardest
from .lineage_text import DONE, lineage_lines
from .model_card import base_model_name
from .quality_rows import quality_rows, recovery_rows
from .recovery_text import change_text, held_out_text, task_losses, trained_text
from .rendering import Table, moment, present, render, versions_text
from .size_and_speed import (
    QUANTISE_FIRST,
    becomes_smaller_packed,
    gguf_speeds,
    has_quality,
    size_rows,
    smaller_speeds,
    speed_protocol,
    speed_rows,
    speed_table,
    speeds,
)
from .structure_text import structure_rows, structure_table
from .tiles import tiles
from .verdict import verdict
from .workload_text import workload_sentence, workload_tables

MOST_WARNINGS = 20
"""Warnings that a page shows."""


def run_page(report: Report) -> str:
    """Draw the page of a run, finished or not, as HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    report = report.model_copy(update={"evaluations": _last_of_each_text(report.evaluations)})
    done = f"{len(report.layers)} of {report.model.layers} decoder layers"
    if report.recovery is not None:
        done = f"{report.recovery.steps} of {report.recovery.asked_steps} steps"
    if report.status == "finished":
        done = ""
    about = (report.method, report.model.architecture, done, moment(report.finished or report.started))
    return render(
        "run.html.j2",
        title=_title(report),
        status=report.status,
        about=" · ".join(part for part in about if part),
        verdict=verdict(report),
        program=f"fistapruner {report.versions.get('fistapruner', '')}".strip(),
        report=report,
        becomes_smaller_packed=becomes_smaller_packed(report),
        figures=layer_figures(report) | quality_figures(report) | training_figures(report),
        tiles=tiles(report),
        measured=_measured(report),
        below_sizes=QUANTISE_FIRST if size_rows(report) else "",
        speed=_speed(report),
        speed_sentence=str((report.speed or {}).get("sentence") or ""),
        speed_measured=_speed_measured(report),
        dense_rows_are_larger=bool(smaller_speeds(report)),
        quality_beside_speed=has_quality(report),
        warnings=_warnings(report),
        training=_training(report),
        tasks=_tasks(report),
        texts=_texts(report),
        samples=_samples(report),
        advice=advice(report),
        hardest=_hardest(report),
        removed=structure_table(report),
        smaller=structure_rows(report),
        workload=workload_tables(report),
        workload_sentence="" if report.workload is None else workload_sentence(report.workload),
        time_split=_time_split(report),
        plan=_plan(report),
        rates=_rates(report),
        used=_used(report),
        lineage=lineage_lines(report.lineage) if report.lineage and report.lineage.stages else [],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False).strip() if report.recipe else "",
    )


def _last_of_each_text(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Leave figures of a text out that was evaluated again later; scores of tasks stay."""
    last = {(one.perplexity.data, one.perplexity.split): one for one in evaluations if one.perplexity is not None}
    return [
        one
        if one.perplexity is None or last[one.perplexity.data, one.perplexity.split] is one
        else replace(one, perplexity=None, reference=None, divergence=None)
        for one in evaluations
    ]


def _title(report: Report) -> str:
    """Name the model and what was removed from it."""
    name = base_model_name(report.origin) or "Model"
    amount = f", {report.sparsity}" if report.structured else f" at {report.sparsity or 'unknown'} sparsity"
    return name + amount + ("" if report.recovery is None else f", {report.trained}")


def _measured(report: Report) -> Table:
    """Tabulate what was measured on the dense model and on the result, and before recovery."""
    costs = [*size_rows(report), *speed_rows(report)]
    name, how = DONE[report.kind], "how it was measured"
    if report.recovery is None:
        rows = [*quality_rows(report.evaluations), *costs]
        return Table("Measured results", ("measure", "dense", name, "change", how), rows, numeric=(1, 2, 3), stack=True)
    beside = [(measure, dense, "–", *others) for measure, dense, *others in costs]
    head = ("measure", "dense", "before", name, "against dense", how)
    return Table("Measured results", head, [*recovery_rows(report), *beside], numeric=(1, 2, 3, 4), stack=True)


def _training(report: Report) -> list[tuple[str, str]]:
    """List what a run trained, how, and how far the weights moved."""
    found = report.recovery
    if found is None:
        return []
    windows = found.steps * (report.recipe.get("windows_per_step") or 2 * report.recipe.get("pairs_per_step", 0))
    over = "pairs" if report.kind == "align" else "text"
    passes = f", {significant(windows / found.windows, 2)} passes over the {over}" if windows and found.windows else ""
    pairs = [
        ("trained", f"{found.parameters}: {trained_text(found)}" if found.trained else found.parameters),
        ("optimizer", found.optimizer),
        ("loss", found.loss),
        ("steps", f"{count(found.steps)} of {count(found.asked_steps)}{passes}"),
        ("tokens with loss", count(found.tokens)),
        ("pairs", pairs_text(report)),
        ("references", references_text(report) if report.alignment and report.alignment.references else ""),
        ("kept", held_out_text(found)),
        ("changed", change_text(report)),
    ]
    return present(pairs)


def _tasks(report: Report) -> Table:
    """Tabulate the held-out loss of every task of a mixture."""
    rows = [
        (name, f"{start:.4f}", f"{best:.4f}", f"{best - start:+z.4f}".replace("-", "−"))
        for name, start, best in (task_losses(report.recovery) if report.recovery is not None else [])
    ]
    return Table("Held-out loss by task", ("task", "before", "recovered", "change"), rows, numeric=(1, 2, 3))


def _texts(report: Report) -> Table:
    """Tabulate the texts of a run that trains."""
    rows = []
    texts = report.calibration.tasks if report.calibration is not None and report.recovery is not None else {}
    for name, facts in texts.items():
        sides = [_side(side) for side in (facts.trained, facts.held_out)]
        windows = f"{sides[0]} to train on, {sides[1]} held out" if all(sides) else f"{facts.samples} windows"
        rows.append((name if facts.source == name else f"{name}: {facts.source}", windows, facts.how))
    return Table("Training text", ("text", "windows", "how they were made"), rows, stack=True)


def _side(side: TextSide | None) -> str:
    """Write the windows and documents of one side of a text; empty where there is none."""
    if side is None:
        return ""
    return counted(side.windows, "window") + (f" of {counted(side.documents, 'document')}" if side.documents else "")


def _samples(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """List prompts, each with the continuations of the models by name."""
    recovered = report.recovery is not None
    return [
        (
            sample.prompt,
            [
                (name, _without_gaps(text or "–"))
                for name, text in (
                    ("Dense", sample.dense),
                    (f"Before {report.training}" if recovered else "Pruned", sample.pruned),
                    (report.trained.capitalize(), sample.recovered),
                )
                if text is not None or (name == "Pruned")
            ],
        )
        for sample in report.generations
    ]


def _without_gaps(text: str) -> str:
    """Replace many line breaks in a row by their number: a model that writes nothing else fills no page."""
    return re.sub(r"\n{4,}", lambda breaks: f"\n[{len(breaks[0])} line breaks]\n", text)


def _speed(report: Report) -> Table:
    quality = ("perplexity", "KL, nats a token") if has_quality(report) else ()
    head = ("form of the model", "tokens/s", "slowest to fastest", "first token", "peak memory", "file size", *quality)
    numeric = tuple(range(1, len(head)))
    return Table("Speed and size of every form", head, speed_table(report), numeric=numeric, stack=True)


def _speed_measured(report: Report) -> str:
    """Say how the speeds were measured."""
    kernel = (report.speed or {}).get("kernel")
    parts = [speed_protocol(report, row) for row in speeds(report)[:1]] + ([f"kernel {kernel}"] if kernel else [])
    if gguf_speeds(report):
        parts.append("GGUF files in llama.cpp, and evaluated with their weights expanded to bf16")
    return ", ".join(parts)


def _warnings(report: Report) -> list[str]:
    """List the error that stopped the run, then its warnings, each once."""
    lines = ([f"Stopped: {report.error}"] if report.error else []) + list(dict.fromkeys(report.warnings))
    more = len(lines) - MOST_WARNINGS
    return lines[:MOST_WARNINGS] + ([f"and {more} more in report.json"] if more > 0 else [])


def _hardest(report: Report) -> Table:
    rows = [
        (
            f"layer {layer.index}, {operator.name}",
            percent(operator.relative_error),
            percent(operator.dense_error or 0.0),
            f"{operator.shape[0]} × {operator.shape[1]}, {pattern(operator.sparsity)}",
            " → ".join(
                f"{step.get('method', '?')} {percent(step.get('relative_error'), 2)}" for step in operator.steps
            ),
        )
        for layer, operator in hardest(report.layers, 8)
    ]
    head = ("operator", "relative error", "with dense weights", "shape, pattern", "error after each step")
    return Table("The hardest operators", head, rows, numeric=(1, 2), stack=True)


def _time_split(report: Report) -> Table:
    times = report.totals.time_split
    whole = sum(times.values()) or 1.0
    rows = [
        (PHASES.get(name, name), duration(value), f"{100 * value / whole:.1f} %")
        for name, value in sorted(times.items(), key=lambda pair: -pair[1])
    ]
    return Table("Time by phase", ("phase", "time", "share"), rows, numeric=(1, 2))


def _plan(report: Report) -> Table:
    units = {"bytes": size, "seconds": duration}
    rows = []
    for row in report.plan:
        shown = units.get(row.unit, significant)
        name = "disk (planned: at its peak; measured: at the end)" if row.quantity == "disk" else row.quantity
        rows.append((name, shown(row.planned), shown(row.actual), _ratio(row.planned, row.actual)))
    head = ("quantity", "planned", "measured", "measured / planned")
    return Table("Plan and reality", head, rows, numeric=(1, 2, 3), stack=True)


def _rates(report: Report) -> list[tuple[str, str]]:
    totals = report.totals
    capture, forward = totals.capture_tokens_per_second, totals.forward_tokens_per_second
    pairs = [
        ("peak memory", size(totals.peak_memory) if totals.peak_memory else None),
        ("peak GPU memory", size(totals.peak_device_memory) if totals.peak_device_memory else None),
        ("capture", f"{significant(capture)} tokens/s" if capture else None),
        ("one plain forward pass", f"{significant(forward)} tokens/s" if forward else None),
    ]
    return present(pairs)


def _ratio(planned: float | None, actual: float | None) -> str:
    return significant(actual / planned) if planned and actual is not None else "–"


def _used(report: Report) -> list[tuple[str, str]]:
    """List model, data, machine and versions: what another run needs to give the same result."""
    used, machine, model = report.calibration, report.machine, report.model
    pairs: list[tuple[str, str | None]] = [
        ("model", model.source),
        ("architecture", model.architecture),
        ("parameters", f"{count(model.parameters)} ({short_count(model.parameters)})" if model.parameters else None),
        ("decoder layers", count(model.layers) if model.layers else None),
        ("precision", model.dtype),
        ("fingerprint", report.fingerprint),
    ]
    if used is not None:
        text = report.text_kind
        pairs += [
            (text, used.description),
            (
                f"{text} tokens",
                f"{count(used.tokens)}, sha256 {used.sha256[:16]}" if used.sha256 else count(used.tokens),
            ),
            (f"{text} seed", None if used.seed is None else str(used.seed)),
        ]
    pairs += [
        ("seed", str(report.recipe["seed"]) if "seed" in report.recipe else None),
        ("machine", ", ".join(part for part in (machine.cpu, machine.device_name or "", machine.system) if part)),
        ("instructions", " ".join(machine.instructions)),
        ("threads", f"{machine.threads} of {machine.cores} cores" if machine.threads and machine.cores else None),
        ("memory", size(machine.memory) if machine.memory else None),
        ("versions", versions_text(report.versions)),
        ("started", moment(report.started)),
        ("finished", moment(report.finished)),
    ]
    return present(pairs)

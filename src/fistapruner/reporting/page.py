"""Draw ``report.html`` of a run: one file that loads nothing, made from the report alone."""

from __future__ import annotations

import re

import yaml

from ..runs.records import Report
from ..runs.results import Evaluation
from ..runs.training_records import Alignment, Recovery, TextSide
from ..runtime.formatting import count, counted, duration, pattern, percent, short_count, significant, size
from .advice import advice
from .alignment_text import pairs_text, preference_sentence, references_text
from .evaluation_text import kl_text, on_text, perplexity_text
from .figures import layer_figures
from .figures_quality import quality_figures
from .figures_recovery import training_figures
from .layer_errors import hardest
from .lineage_text import DONE, lineage_lines
from .model_card import base_model_name
from .quality_rows import mean_score, one_metric, quality_rows, recovery_rows
from .recovery_text import (
    Gain,
    change_text,
    closed_text,
    gain_of,
    held_out_text,
    task_losses,
    trained_text,
)
from .rendering import Table, moment, present, render, versions_text
from .size_and_speed import (
    QUANTISE_FIRST,
    becomes_smaller_packed,
    dense_speed,
    fastest,
    low_rank_sentence,
    low_rank_share,
    packed_speeds,
    size_rows,
    smaller_speeds,
    speed_protocol,
    speed_rows,
    speed_table,
    speeds,
)
from .structure_text import ONLY_HERE, has_free_widths, kept_units, structure_rows, structure_sentence, structure_table
from .workload_text import workload_how, workload_sentence, workload_tables

MOST_WARNINGS = 20
"""Warnings that a page shows."""


def run_page(report: Report) -> str:
    """Draw the page of a run, finished or not, as HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
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
        tiles=_tiles(report),
        measured=_measured(report),
        below_sizes=QUANTISE_FIRST if size_rows(report) else "",
        speed=_speed(report),
        speed_sentence=str((report.speed or {}).get("sentence") or ""),
        speed_measured=_speed_measured(report),
        dense_rows_are_larger=bool(smaller_speeds(report)),
        warnings=_warnings(report),
        training=_training(report),
        tasks=_tasks(report),
        texts=_texts(report),
        samples=_samples(report),
        advice=advice(report),
        hardest=_hardest(report),
        removed=structure_table(report),
        smaller=structure_rows(report),
        only_here=ONLY_HERE if has_free_widths(report) else "",
        workload=workload_tables(report),
        workload_sentence="" if report.workload is None else workload_sentence(report.workload),
        workload_how=workload_how(report),
        time_split=_time_split(report),
        plan=_plan(report),
        rates=_rates(report),
        used=_used(report),
        lineage=lineage_lines(report.lineage) if report.lineage and report.lineage.stages else [],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False).strip() if report.recipe else "",
    )


def _title(report: Report) -> str:
    """Name the model and what was removed from it."""
    name = base_model_name(report.origin) or "Model"
    amount = f", {report.sparsity}" if report.structured else f" at {report.sparsity or 'unknown'} sparsity"
    return name + amount + ("" if report.recovery is None else f", {report.trained}")


def verdict(report: Report) -> str:
    """Say what happened to the model, in two or three sentences."""
    totals = report.totals
    sentences = [sentence] if (sentence := structure_sentence(report)) else []
    if totals.zeros_share is not None and not report.only_structure:
        share = percent(totals.zeros_share, 4)
        kept = f", the same as before {report.training}" if report.recovery is not None else ""
        sentences.append(f"{share} of the {report.counted}' weights are exactly zero{kept}.")
    if sentence := low_rank_sentence(report):
        sentences.append(sentence)
    if report.recovery is not None and (losses := held_out_text(report.recovery)):
        sentences.append(f"Held-out loss: {losses}.")
    if report.alignment is not None:
        sentences.append(preference_sentence(report))
    if (evaluation := on_text(report.evaluations)) is not None:
        text, dense = evaluation.perplexity, evaluation.reference
        if (earlier := gain_of(report, evaluation)) is not None and text is not None:
            sentences.append(_won(*earlier, evaluation))
        elif text is not None and dense is not None:
            ratio = significant(text.perplexity / dense.perplexity)
            change = f"from {dense.perplexity:.2f} to {text.perplexity:.2f} (×{ratio})"
            sentences.append(f"Perplexity on {text.data} went {change}.")
        if evaluation.divergence is not None:
            same = percent(evaluation.divergence.top1_agreement)
            stayed = "stayed the same" if report.recovery is None else "is that of the dense model"
            sentences.append(f"The most likely next token {stayed} for {same} of the tokens.")
    if report.permuted:
        sentences.append(
            f"The hidden channels that {len(report.permuted)} operators read were reordered or rotated for the "
            "pattern: adapters made for the dense model do not fit this one."
        )
    if report.status == "failed":
        sentences.append(f"The run stopped: {report.error or 'reason unknown'}.")
    if report.status == "running":
        what = "layers" if report.recovery is None else "steps"
        sentences.append(f"The run is not finished; this page shows the {what} that are done.")
    return " ".join(sentences)


def _won(before: Evaluation, won: Gain, after: Evaluation) -> str:
    """Say how perplexity changed by recovery, beside that of the dense model."""
    old, new, dense = before.perplexity, after.perplexity, after.reference
    assert old is not None  # there is no gain without them
    assert new is not None
    text = f"Perplexity on {new.data} went from {old.perplexity:.2f} to {new.perplexity:.2f}"
    if dense is None or won.closed is None:
        return f"{text}."
    return f"{text}, against {dense.perplexity:.2f} of the dense model: {closed_text(won)} of the gap is closed."


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """List name, value and note of the figures that matter most."""
    totals = report.totals
    items = []
    evaluation = on_text(report.evaluations)
    if evaluation is not None and evaluation.perplexity is not None:
        text, dense, earlier = evaluation.perplexity, evaluation.reference, gain_of(report, evaluation)
        note = f"dense {perplexity_text(dense)}; " if dense is not None else ""
        if earlier is not None and earlier[0].perplexity is not None:
            note += f"before {perplexity_text(earlier[0].perplexity)}; "
        items.append(("Perplexity", f"{text.perplexity:.2f}", f"{note}{text.data}, windows of {text.seqlen}"))
        if earlier is not None and earlier[1].closed is not None:
            items.append(
                ("Gap closed", closed_text(earlier[1]), "of ln(perplexity before / dense), paired over windows")
            )
        if evaluation.divergence is not None:
            agreement = evaluation.divergence
            items.append(
                (
                    "Top-1 agreement",
                    percent(agreement.top1_agreement),
                    f"KL {kl_text(agreement, 3)} nats",
                )
            )
    if report.alignment is not None:
        items += _preference_tile(report.alignment)
    if report.recovery is not None:
        items += _held_out_tile(report.recovery)
    if report.widths and totals.model_weights and report.model.parameters:
        share = percent(1 - totals.model_weights / report.model.parameters)
        units = [f"{unit} {before} → {after}" for unit, before, after in kept_units(report)]
        items.append(("Parameters removed", share, "; ".join([f"{short_count(totals.model_weights)} stay", *units])))
    if totals.zeros_share is not None and not report.only_structure:
        whole = (
            f"{percent(totals.model_zeros / totals.model_weights)} of the model"
            if totals.model_weights and totals.model_zeros
            else ""
        )
        items.append(
            (
                "Zeros",
                percent(totals.zeros_share),
                f"{count(totals.operator_zeros)}; {whole}".rstrip("; "),
            )
        )
    if more := totals.low_rank_weights:
        share = low_rank_share(report) or count(more)
        items.append(("Additional weights", share, f"{count(more)} in low-rank parts of rank {totals.low_rank}"))
    if report.mean_error is not None:
        errors = report.relative_errors
        items.append(
            (
                "Mean relative error",
                percent(report.mean_error),
                f"worst of {len(errors)} operators {percent(max(errors))}",
            )
        )
    tasks = one_metric([task for evaluation in report.evaluations for task in evaluation.tasks])
    if len(tasks) > 1:
        mean, _, dense_mean, _ = mean_score(tasks)
        note = f"mean of {len(tasks)} tasks" + (f"; dense {100 * dense_mean:.1f} %" if dense_mean is not None else "")
        items.insert(2 if items else 0, ("Zero-shot", f"{100 * mean:.1f} %", note))
    if totals.checkpoint_bytes:
        packed = (
            f"compressed {size(totals.compressed_bytes)}"
            if totals.compressed_bytes
            else f"dense {size(report.origin.bytes)}"
            if report.only_structure
            else "zeros are stored as they are"
        )
        if totals.low_rank_bytes:
            adapter = f"{size(totals.low_rank_bytes)} of adapter"
            packed += f", {adapter} among them" if totals.compressed_bytes else f"; and {adapter}"
        items.append(("Size on disk", size(totals.checkpoint_bytes), packed))
    baseline, best = dense_speed(report), fastest([*packed_speeds(report), *smaller_speeds(report)])
    if baseline is not None and best is not None:
        ratio = float(best["tokens_per_second"]) / float(baseline["tokens_per_second"])
        note = f"{significant(best['tokens_per_second'])} tokens/s, {best['variant']}, against {baseline['variant']}"
        items.append(("Decoding speed", f"×{significant(ratio)}", note))
    if totals.seconds:
        notes = [f"{totals.parts} parts added up"] if totals.parts else []
        notes += [f"peak memory {size(totals.peak_memory)}"] if totals.peak_memory else []
        items.append((f"Time to {report.kind}", duration(totals.seconds), "; ".join(notes)))
    return items


def _preference_tile(found: Alignment) -> list[tuple[str, str, str]]:
    before, after = found.test["pruned"], found.test["aligned"]
    note = f"{percent(before.accuracy)} before; {counted(found.test_pairs, 'test pair')}"
    return [("Preference accuracy", percent(after.accuracy), note)]


def _held_out_tile(found: Recovery) -> list[tuple[str, str, str]]:
    start, best = found.start, found.best
    if start is None or best is None:
        return []
    note = f"{start.held_out:.4f} before; step {best.step} of {found.asked_steps} is kept"
    return [("Held-out loss", f"{best.held_out:.4f}", note)]


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
    head = ("form of the model", "tokens/s", "slowest to fastest", "first token", "peak memory", "file size")
    return Table("Speed and size of every form", head, speed_table(report), numeric=(1, 2, 3, 4, 5), stack=True)


def _speed_measured(report: Report) -> str:
    """Say how the speeds were measured."""
    kernel = (report.speed or {}).get("kernel")
    return ", ".join(
        [speed_protocol(report, row) for row in speeds(report)[:1]] + ([f"kernel {kernel}"] if kernel else [])
    )


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
    head = ("operator", "relative error", "of dense weights", "shape, pattern", "error after each step")
    return Table("The hardest operators", head, rows, numeric=(1, 2), stack=True)


PHASE_TEXTS = {
    "capture": "forward passes that collect inputs",
    "gram": "sums of outer products",
    "problem": "products of these sums with the weights",
    "structure": "choosing channels to remove, and the weights of those that remain",
    "solve": "the method itself",
    "reconstruct": "block reconstruction",
    "sensitivity": "measurements on the dense model",
    "io": "reading weights, writing results",
    "report": "errors for this page",
    "plain": "one forward pass without hooks, to compare",
    "train": "optimizer steps and checks on held-out windows",
    "write": "writing the checkpoint",
}
"""What the phases of a run's time are."""


def _time_split(report: Report) -> Table:
    times = report.totals.time_split
    whole = sum(times.values()) or 1.0
    rows = [
        (name, duration(value), f"{100 * value / whole:.1f} %", PHASE_TEXTS.get(name, ""))
        for name, value in sorted(times.items(), key=lambda pair: -pair[1])
    ]
    return Table("Time split", ("phase", "time", "share", "what it is"), rows, numeric=(1, 2), stack=True)


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

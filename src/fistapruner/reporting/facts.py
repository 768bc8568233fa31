"""List what there is to say of a run, and the commands to go on with."""

from __future__ import annotations

from pathlib import Path

from ..errors import printable
from ..runs.records import (
    DONE,
    PHASES,
    Lineage,
    ModelFacts,
    Recovery,
    Report,
    Stage,
    TextSide,
    amount_label,
    methods_label,
    sets_zeros,
    training_label,
)
from ..runtime.show import (
    align_columns,
    count,
    counted,
    duration,
    p_value,
    percent,
    percent_with_error,
    shell_line,
    short_count,
    significant,
    size,
    span,
    with_error,
)
from .measured import (
    COST,
    ORIGIN,
    PRUNING,
    QUALITY,
    TRAINING,
    Fact,
    becomes_smaller_packed,
    file_name,
    perplexity_text,
    quality_facts,
    size_facts,
    speed_facts,
    speeds,
)

PLACES = {"experts": "mixture", "expert channels": "expert", "shared expert channels": "shared expert"}
"""Where so many of a unit are; in decoder layers without an entry."""


def facts(report: Report) -> list[Fact]:
    """List all facts of a run, section by section; those that the report does not know are left out."""
    return [
        *quality_facts(report),
        *preference_facts(report),
        *training_facts(report),
        *pruning_facts(report),
        *size_facts(report),
        *speed_facts(report),
        *cost_facts(report),
        *origin_facts(report),
    ]


def preference_facts(report: Report) -> list[Fact]:
    """List what an alignment run changed in what its model prefers."""
    found = report.alignment
    if found is None:
        return []
    against, pairs = references_text(report), counted(found.test_pairs, "test pair")
    sides = [found.test.get(name) for name in ("aligned", "dense", "pruned")]
    tests = [
        f"against {name} {each.lost} lost, {each.won} won, McNemar {p_value(each.p_value)}"
        for name, each in (("before", sides[2]), ("dense", sides[1]))
        if each is not None and each.p_value is not None
    ]
    shares, by_token = (
        [
            "" if each is None else percent_with_error(getattr(each, name), getattr(each, f"{name}_error"))
            for each in sides
        ]
        for name in ("accuracy", "normalised")
    )
    how = f"{pairs}; log-probabilities a token"
    rows = [
        Fact(QUALITY, "Preference accuracy, %", shares[0], shares[1], shares[2], "; ".join([pairs, *tests])),
        Fact(QUALITY, "Preference accuracy by token, %", by_token[0], by_token[1], by_token[2], how),
    ]
    if found.margin is not None:
        margin = with_error(found.margin, found.margin_error, 3)
        rows.append(Fact(QUALITY, "Reward margin", margin, how=f"beta (h - m) against {against}"))
    if found.reward_accuracy is not None:
        accuracy = percent_with_error(found.reward_accuracy, found.reward_accuracy_error)
        rows.append(Fact(QUALITY, "Reward accuracy, %", accuracy, how=f"pairs whose margin is above that of {against}"))
    if found.chosen_reward is not None and found.rejected_reward is not None:
        chosen = with_error(found.chosen_reward, found.chosen_reward_error, 3)
        rejected = with_error(found.rejected_reward, found.rejected_reward_error, 3)
        rewards = f"{chosen} / {rejected}".replace("-", "−")
        rows.append(Fact(QUALITY, "Rewards, chosen / rejected", rewards, how=f"against {against}"))
    return rows


def references_text(report: Report) -> str:
    """Name the references of an alignment's loss with their weights; without any, the model that went in."""
    references = report.alignment.references if report.alignment else {}
    if len(references) == 1:
        return f"the {next(iter(references))} model"
    weighed = [f"{significant(weight, 2)} {name}" for name, weight in references.items()]
    return " and ".join(weighed) or "the model that went in"


def training_facts(report: Report) -> list[Fact]:
    """List what a run trained, on what, and what that changed."""
    found = report.recovery
    if found is None:
        return []
    rates = [significant(rate, 2) for rate in sorted(set(found.lr.values()))]
    operators = f" of {counted(found.operators, 'operator')}" if found.operators else ""
    how = [found.parameters, found.optimizer, f"loss {found.loss}"]
    how += [f"first learning rate {' to '.join(dict.fromkeys((rates[0], rates[-1])))}"] if rates else []
    steps = f"{count(found.steps)} of {count(found.asked_steps)}"
    tokens = f"{short_count(found.tokens)} tokens with loss" if found.tokens else ""
    rows = [
        *_held_out(found),
        Fact(TRAINING, "Trained", f"{count(found.trained)} numbers{operators}", how=", ".join(filter(None, how))),
        Fact(TRAINING, "Steps", steps, how=tokens),
        *_texts(report, found),
    ]
    if found.changed is not None:
        moved = [
            (op.change, f"layer {at.index}, {op.name}") for at in report.layers for op in at.operators if op.change
        ]
        most, where = max(moved, default=(0.0, ""))
        how_far = f"largest ‖ΔW‖ / ‖W‖ {percent(most, 2)} ({where})" if most else ""
        rows.append(Fact(TRAINING, "Changed", f"{percent(found.changed)} of the surviving weights", how=how_far))
    return rows


def _held_out(found: Recovery) -> list[Fact]:
    """List the held-out loss before training and at the step that is kept, and the same of every task."""
    start, best = found.start, found.best
    if start is None or best is None:
        return []
    others = len(found.checks) - 1
    how = f"step {best.step} of {found.asked_steps} is kept"
    if best.step == 0:
        how = f"none of {counted(others, 'check')} is lower: the weights of the input are kept" if others else ""
    losses = [("", start.held_out, best.held_out)]
    losses += [(f", {name}", loss, best.by_task[name]) for name, loss in start.by_task.items() if name in best.by_task]
    return [
        Fact(TRAINING, f"Held-out loss{name}", f"{after:.4f}", before=f"{before:.4f}", how="" if name else how)
        for name, before, after in losses
    ]


def _texts(report: Report, found: Recovery) -> list[Fact]:
    """List the texts or the pairs that a run trained on."""
    used, pairs = report.calibration, report.alignment
    if used is None:
        return []
    if pairs is not None:
        passed = found.steps * report.recipe.get("pairs_per_step", 0)
        some = f"{count(passed)} of " if 0 < passed < pairs.pairs else ""
        sides = [f"{count(pairs.held_out_pairs)} held out", f"{count(pairs.test_pairs)} to test"]
        sides += [f"{count(pairs.left_out)} left out"] if pairs.left_out else []
        how = ", ".join([*sides, f"from {file_name(used.source)}"]) + (f", {used.how}" if used.how else "")
        return [Fact(TRAINING, "Pairs", f"{some}{count(pairs.pairs)} preference pairs", how=how)]
    whole = [_side(TextSide(windows=found.windows, documents=found.documents))]
    whole.append(_side(TextSide(windows=found.held_out_windows, documents=found.held_out_documents)))
    after = f"{whole[0]}, {whole[1]} held out"
    how = f"{used.seqlen} tokens each"
    how += f"; {file_name(used.source)}" + (f", {used.how}" if used.how else "") if len(used.tasks) < 2 else ""
    rows = [Fact(TRAINING, "Training text", after, how=how)]
    for name, text in used.tasks.items() if len(used.tasks) > 1 else ():
        windows = f"{text.samples} windows"
        if text.trained is not None and text.held_out is not None:
            windows = f"{_side(text.trained)}, {_side(text.held_out)} held out"
        of = f"{file_name(text.source)}, {text.how}" if text.how else file_name(text.source)
        rows.append(Fact(TRAINING, f"Training text, {name}", windows, how=of))
    return rows


def _side(side: TextSide) -> str:
    """Write the windows and documents of one side of a text."""
    return counted(side.windows, "window") + (f" of {counted(side.documents, 'document')}" if side.documents else "")


def pruning_facts(report: Report) -> list[Fact]:
    """List how a model was pruned, what that removed, and the errors of its operators."""
    totals, used, rows = report.totals, report.calibration, []

    def add(label: str, after: str, how: str = "", dense: str = "") -> None:
        rows.append(Fact(PRUNING, label, after, dense, how=how))

    if report.pruning:
        starts = [step["start_kept"] for each in report.operators for step in each.steps if "start_kept" in step]
        kept = f"the start was kept in {sum(starts)} of {counted(len(starts), 'operator')}" if starts else ""
        add("Method", f"{methods_label(report.pruning)}, {report.sparsity}", kept)
    if used is not None and report.recovery is None:
        windows = f"{counted(used.samples, 'window')} of {used.seqlen} tokens"
        add("Calibration", windows, file_name(used.source) + (f", {used.how}" if used.how else ""))
    if structure := structure_sentence(report):
        add("Structure", structure)
        if (dense := report.model.parameters) and (after := totals.model_weights):
            add("Parameters", count(after), f"{100 * (after / dense - 1):+.1f} %", count(dense))
    if totals.zeros_share is not None and not report.only_structure:
        whole = "" if any(operator.sparsity == "0%" for operator in report.operators) else "pruned "
        zeros, weights = count(totals.operator_zeros), count(totals.operator_weights)
        how = f"{zeros} of {weights} weights of the {whole}operators are zero"
        if totals.model_weights and totals.model_zeros is not None:
            how += (
                f"; zeros of pruned operators are {percent(totals.model_zeros / totals.model_weights)} of all weights"
            )
        add("Zeros", percent(totals.zeros_share, 6), how)
    if totals.low_rank_weights:
        how = f"low-rank part of rank {totals.low_rank} beside every pruned operator: a LoRA adapter of "
        how += f"{size(totals.low_rank_bytes)} in a folder of its own; quality and errors are of both parts together"
        add("Additional weights", count(totals.low_rank_weights), how)
    if (errors := report.relative_errors) and report.mean_error is not None:
        how = f"of the outputs' energy, over {counted(len(errors), 'operator')}; worst {percent(max(errors))}"
        add("Mean relative error", percent(report.mean_error), how)
    if report.permuted:
        how = "hidden channels were reordered or rotated: adapters made for the dense model do not fit this one"
        add("Reordered inputs", f"of {counted(len(report.permuted), 'operator')}", how)
    if (workload := report.workload) is not None:
        by = f"SO-EBM from {counted(workload.deployments, 'earlier deployment')}" if workload.deployments else "its mix"
        add("Sparsities", f"allocated for a workload by {by}")
    for name, task in report.workload.tasks.items() if report.workload else ():
        uniform, weight = significant(task["uniform"]), percent(task["weight"])
        how = f"nats a token, at uniform sparsity {uniform}; {weight} of the workload"
        add(f"Predicted loss, {name}", significant(task["predicted"]), how)
    return rows


def structure_sentence(report: Report) -> str:
    """Say how much of each unit of structure this run kept; empty where it removed none."""
    kept: dict[str, list[str]] = {}
    for unit, (before, _) in report.widths.items():
        layers = [[removal for removal in at.removals if removal.unit == unit] for at in report.layers]
        place = PLACES.get(unit, "decoder layer" if all(layers) else f"decoder layer with {unit}")
        after = span(removal.after for removals in layers for removal in removals)
        kept.setdefault(place, []).append(f"{after} of {count(before)} {unit}")
    text = "; ".join(f"every {place} keeps {' and '.join(units)}" for place, units in kept.items())
    return text[:1].upper() + text[1:]


def cost_facts(report: Report) -> list[Fact]:
    """List time by phase, and memory."""
    totals, rows = report.totals, []
    if totals.seconds is not None:
        whole = totals.seconds + sum(totals.time_split.get(phase, 0.0) for phase in ("evaluation", "samples"))
        phases = {**totals.time_split, "other": whole - sum(totals.time_split.values())}
        ordered = sorted(((name, seconds) for name, seconds in phases.items() if seconds > 0.5), key=lambda it: -it[1])
        split = ", ".join(f"{PHASES.get(name, name)} {duration(seconds)}" for name, seconds in ordered)
        rows.append(Fact(COST, "Time in all", duration(whole), how=split))
    for label, peak in (("Peak memory", totals.peak_memory), ("Peak GPU memory", totals.peak_device_memory)):
        if peak:
            rows.append(Fact(COST, label, size(peak)))
    return rows


def origin_facts(report: Report) -> list[Fact]:
    """List what another run needs to give the same result: model, text, machine, versions."""
    model, used, machine = report.model, report.calibration, report.machine
    about = [model.architecture, model.dtype, f"{short_count(model.parameters)} parameters" if model.parameters else ""]
    about.append(f"{counted(model.layers, 'decoder layer')}" if model.layers else "")
    hardware = [machine.cpu, machine.device_name or "", machine.system]
    threads = f"{machine.threads} of {machine.cores} cores" if machine.threads and machine.cores else ""
    stages = report.lineage.stages if report.lineage else []
    digest = f"sha256 {used.sha256[:16]}" if used and used.sha256 else ""
    values = [
        ("Model", base_model_name(model), ", ".join(part for part in about if part)),
        ("Tokens of the text", count(used.tokens) if used else "", digest),
        ("Machine", ", ".join(part for part in hardware if part), threads),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items()), ""),
        ("Fingerprint", report.fingerprint or "", ""),
        ("Lineage", " → ".join(lineage_lines(report.lineage)) if report.lineage and stages else "", ""),
    ]
    return [Fact(ORIGIN, label, after, how=how) for label, after, how in values if after]


def lineage_lines(lineage: Lineage) -> list[str]:
    """Write one line for the dense model and one for each run that changed it, in order."""
    source = lineage.source
    known = [source.architecture, source.dtype, f"revision {source.revision[:12]}" if source.revision else ""]
    about = ", ".join(part for part in known if part)
    first = base_model_name(source) + (f" ({about})" if about else "")
    return [printable(line) for line in (first, *(_stage_line(stage) for stage in lineage.stages))]


def _stage_line(stage: Stage) -> str:
    """Say what a run did, what it measured, and when."""
    figures, settings = stage.figures, stage.settings
    parts = [DONE[stage.kind]]
    if stage.kind in ("recover", "align"):
        parts[0] = training_label(stage.kind, settings, figures.tokens)
        data = settings.get("data") or {}
        if text := data.get("source") or data.get("pairs"):
            parts[0] += f" of {', '.join(text) if isinstance(text, dict) else file_name(str(text))}"
    elif settings.get("sparsity"):
        less = bool((settings.get("structure") or {}).get("remove"))
        parts[0] += f" {'by' if less else 'to'} {amount_label(settings)} with {methods_label(settings)}"
    if figures.parameters:
        parts.append(f"{count(figures.parameters)} parameters")
    if stage.kind == "prune" and figures.zeros_share is not None and sets_zeros(settings):  # no other changes zeros
        parts.append(f"{percent(figures.zeros_share)} zeros in its operators")
    if (text := figures.perplexity) is not None:
        measured = f"{text.windows} windows of {text.seqlen} tokens of {text.data}"
        parts.append(f"perplexity {perplexity_text(text)} on {measured}")
    if stage.finished:
        parts.append(stage.finished[:10])
    return ", ".join(parts)


def base_model_name(model: ModelFacts) -> str:
    """Name a model as a card may: a hub id, which has a revision, stays; a path is cut to its last part."""
    source = model.source
    is_hub_id = model.revision is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return source if is_hub_id else file_name(source.rstrip("/"))


def title_of(report: Report) -> str:
    """Name the dense model and what was done to it: ``owner/name, 50% sparse, recovered``."""
    name = base_model_name(report.origin) or "Model"
    amount = report.sparsity if report.structured else f"{report.sparsity or 'unknown'} sparse"
    return f"{name}, {amount}" + ("" if report.recovery is None else f", {DONE[report.kind]}")


def next_steps(report: Report, folder: str | Path = "RUN") -> list[tuple[str, str]]:
    """List commands that go on from a finished run in ``folder``, and what each does."""
    if report.status != "finished":
        return []
    found = []
    if report.recovery is None:
        kept = "" if report.only_structure else ", every zero kept"
        found.append((shell_line("recover", folder, "--out", "NEW"), f"trains what is left{kept}"))
    if not report.evaluations:
        found.append((shell_line("evaluate", folder), "measures quality and adds it to the report"))
    if not report.stacked_experts and not speeds(report):
        found.append((shell_line("bench", folder), "measures speed and adds it to the report"))
    if becomes_smaller_packed(report):
        found.append((shell_line("pack", folder, "NEW"), "writes the file without its zeros"))
    return found


def summary(report: Report, folder: str | Path = "") -> str:
    """Write the table that is printed at the end of a run, in ``folder`` or in that of its report."""
    folder = Path(folder or report.folder or "RUN")
    rows = [
        fact.row
        for fact in facts(report)
        if fact.after not in ("", "–") and (fact.section != ORIGIN or fact.label in ("Model", "Lineage"))
    ]
    rows += [("warning", printable(warning)) for warning in report.warnings]
    rows.append(("checkpoint", str(folder / "model")))
    if report.totals.low_rank_weights:
        rows.append(("adapter", str(folder / "adapter")))
    rows += [("next", f"{command}  {what}") for command, what in next_steps(report, folder)]
    return align_columns(rows)


def length_setting(report: Report) -> str:
    """Name the setting that makes a training longer: steps, where they are given, override the others."""
    if report.recipe.get("steps") is not None:
        return "--steps"
    return "--epochs" if report.kind == "align" else "--tokens"

"""Write the model card of a run's checkpoint: its source, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runs.labels import OTHERS_BY_NAME, sparsity_label
from ..runs.records import ModelFacts, Report
from ..runs.results import Evaluation, TaskResult
from ..runtime.formatting import count, p_value, percent, short_count, significant, size, with_error
from ..settings.values import WORKLOAD
from .alignment_text import pairs_text, preference_rows, preference_sentence
from .evaluation_text import kl_text, on_text, perplexity_text, task_protocol
from .lineage_text import DONE, file_name, lineage_lines
from .quality_rows import task_before
from .recovery_text import change_text, closed_text, gain_of, held_out_text, text_used
from .rendering import code_block, plain_markdown, render, versions_text, yaml_text
from .size_and_speed import becomes_smaller_packed, low_rank_sentence, size_rows, speed_rows, speeds
from .structure_text import structure_sentence
from .workload_text import workload_sentence, workload_tables


def model_card(report: Report) -> str:
    """Write the model card: Markdown with a Hugging Face metadata block.

    Args:
        report: of the run; figures that are not in it are left out of the card.
    """
    from ..models.architecture import auto_class_name  # imports torch, which pages do without

    return render(
        "model_card.md.j2",
        report=report,
        becomes_smaller_packed=becomes_smaller_packed(report),
        metadata=_metadata(report),
        name=base_model_name(report.origin),
        amount=amount(report),
        smaller=structure_sentence(report),
        auto_class=auto_class_name(report.model.architecture),
        done=DONE[report.kind],
        training=_training(report),
        zeros=_zeros(report),
        low_rank=low_rank_sentence(report),
        measured=_measured(report),
        made=_made(report),
        workload=workload_tables(report),
        recipe=_recipe(report.recipe),
        lineage=_lineage(report),
    )


def plain_card(license_name: str | None, title: str, text: str, recipe: Mapping[str, Any] | None = None) -> str:
    """Write the card of a model that no run has made: its title, how it was made, and the recipe."""
    with_recipe = f"\nRecipe:\n\n{code_block(yaml_text(_recipe(recipe)), 'yaml')}\n" if recipe else ""
    block = {
        **({"license": license_name} if license_name else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "sparsity", "fistapruner"],
    }
    return f"""---
{yaml_text(block)}
---
# {title}

fistapruner {text}. Nothing was measured since; `fistapruner evaluate` does it, and `fistapruner inspect` counts the
zeros and lists how the model was made.
{with_recipe}"""


def amount(report: Report) -> str:
    """Say how much was pruned: ``50% sparse``, or what structure was removed."""
    text = report.sparsity if report.structured else f"{report.sparsity} sparse"
    return text if report.recovery is None else f"{text}, {report.trained}"


def base_model_name(model: ModelFacts) -> str:
    """Name a model as a card may: a hub id, which has a revision, stays; a path is cut to its last part."""
    source = model.source
    is_hub_id = model.revision is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return source if is_hub_id else source.rstrip("/").rsplit("/", 1)[-1]


def _metadata(report: Report) -> dict[str, Any]:
    origin = report.origin
    source, license_name = origin.source, origin.license or report.model.license
    block: dict[str, Any] = {}
    if license_name:
        block["license"] = license_name
    if base_model_name(report.origin) == source and "/" in source:
        block["base_model"] = [source]
        block["base_model_relation"] = "finetune"
    block["library_name"] = "transformers"
    block["pipeline_tag"] = "text-generation"
    block["tags"] = [
        "pruning",
        "sparsity",
        "fistapruner",
        *(["structured-pruning"] if report.structured else []),
        *(
            [report.training]
            if report.recovery
            else (method.strip().replace("+", "-") for method in report.method.split(","))
        ),
        "" if report.only_structure else _pattern_tag(report),
    ]
    block["tags"] = [tag for tag in block["tags"] if tag]
    results = _metadata_results(report)
    if results:
        block["model-index"] = [{"name": f"{base_model_name(report.origin)}, {amount(report)}", "results": results}]
    return block


def _pattern_tag(report: Report) -> str:
    """Write the sparsity as a tag: ``2:4``, ``50-percent``, ``mixed-n:4``, or ``mixed`` if names set it."""
    label = sparsity_label(report.pruning) or report.sparsity
    if label.endswith(OTHERS_BY_NAME):
        return "mixed"
    return label.partition(" (")[0].replace("%", "-percent").replace(" ", "-")


def _metadata_results(report: Report) -> list[dict[str, Any]]:
    results = []
    for evaluation in report.evaluations:
        if evaluation.perplexity is not None:
            text = evaluation.perplexity
            results.append(
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": text.data, "type": text.data, "split": text.split},
                    "metrics": [
                        {
                            "type": "perplexity",
                            "value": round(text.perplexity, 4),
                            "name": f"token perplexity, {text.windows} windows of {text.seqlen}, {text.dtype}",
                        }
                    ],
                }
            )
        results += [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": task.task, "type": task.task},
                "metrics": [
                    {"type": task.metric, "value": round(task.value, 4), "name": f"{task.metric}, {task.shots}-shot"}
                ],
            }
            for task in evaluation.tasks
        ]
    return results


def _zeros(report: Report) -> str:
    """Say how many weights are zero; empty where that is not known."""
    totals = report.totals
    if totals.zeros_share is None or report.only_structure:
        return ""
    share = (
        f"{count(totals.operator_zeros)} of {count(totals.operator_weights)} weights of the {report.counted} are zero"
    )
    text = f"{share} ({percent(totals.zeros_share, 4)})"
    if totals.model_weights and totals.model_zeros is not None:
        text += f"; zeros of pruned operators are {percent(totals.model_zeros / totals.model_weights)} of all weights"
    return text + "."


def _training(report: Report) -> str:
    """Say what a recovery run trained, on what, and what that won; empty for another run."""
    found, used = report.recovery, report.calibration
    if found is None:
        return ""
    if report.alignment is not None:
        text = f"It was aligned: {count(found.trained)} numbers (`{found.parameters}`) were trained"
        pairs, passed = report.alignment.pairs, found.steps * report.recipe.get("pairs_per_step", 0)
        text += f" on {f'{count(passed)} of ' if 0 < passed < pairs else ''}{count(pairs)} preference pairs"
        text += f" of {plain_markdown(file_name(used.source))}" if used else ""
        text += f" with the loss `{found.loss}`, with every zero kept."
        return f"{text} {preference_sentence(report)}"
    loss = {
        "kl": "the dense model's predictions",
        "ce": "the next token",
        "mix": "the dense model's predictions and the text",
    }
    text = f"It was recovered: {count(found.trained)} numbers (`{found.parameters}`) were trained"
    text += f" on {short_count(found.tokens)} tokens with loss" + (
        f", from {plain_markdown(file_name(used.source))}," if used else ""
    )
    text += f" to match {loss.get(found.loss, found.loss)}, with every zero kept."
    if (evaluation := on_text(report.evaluations)) is not None:
        earlier = gain_of(report, evaluation)
        if earlier is not None and earlier[1].closed is not None and evaluation.perplexity is not None:
            closed, data = closed_text(earlier[1]), plain_markdown(evaluation.perplexity.data)
            text += f" {closed} of the gap to the dense model, ln of the ratio of perplexities on {data}, is closed."
    return text


def _measured(report: Report) -> list[tuple[str, ...]]:
    """List measure, how it was measured, and the values: dense, before recovery, result."""
    rows: list[tuple[str, ...]] = []
    trained = report.recovery is not None
    for evaluation in report.evaluations:
        earlier = gain_of(report, evaluation)
        known = {(name, how): value for name, how, _, value in _text_values(earlier[0])} if earlier else {}
        for name, how, dense, value in _text_values(evaluation):
            rows.append((name, how, dense, *((known.get((name, how), "–"),) if trained else ()), value))
        for task in evaluation.tasks:
            old = task_before(report, task)
            name, how, dense, value = _task_values(task)
            rows.append((name, how, dense, *((_task_values(old)[-1] if old else "–",) if trained else ()), value))
    rows += [(name, how, *values) for name, *values, how in preference_rows(report)]
    if speeds(report):
        before = ("–",) if report.recovery is not None else ()
        costs = size_rows(report) + speed_rows(report)
        for measure, dense, after, change, how in costs:
            beside = "" if change in ("", "–") else f" ({change})"
            rows.append((measure, how + beside, dense, *before, after))
    return rows


def _text_values(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """List measure, how it was measured, the value of the dense model and of the evaluated one, on a text."""
    text, dense, damage = evaluation.perplexity, evaluation.reference, evaluation.divergence
    if text is None:
        return []
    protocol = f"{plain_markdown(text.data)} {text.split}, {text.windows} windows of {text.seqlen}, {text.dtype}"
    rows = [("perplexity", protocol, perplexity_text(dense), perplexity_text(text))]
    if damage is not None:
        rows.append(("KL from dense (nats/token)", protocol, "0", kl_text(damage, 4)))
        rows.append(("top-1 agreement", protocol, "100 %", percent(damage.top1_agreement)))
    return rows


def _task_values(task: TaskResult) -> tuple[str, str, str, str]:
    """Write the same of a task."""
    return (
        f"{plain_markdown(task.task)} ({task.metric})",
        task_protocol(task) + (f", {p_value(task.p_value)}" if task.p_value is not None else ""),
        with_error(task.reference, task.reference_standard_error, 4),
        with_error(task.value, task.standard_error, 4),
    )


def _made(report: Report) -> list[str]:
    lines = []
    if report.calibration:
        used = report.calibration
        how = f" ({plain_markdown(used.how)})" if used.how else ""
        source = plain_markdown(file_name(used.source))
        if report.alignment is not None:
            lines.append(f"pairs of {source}: {pairs_text(report)}{how}")
        elif report.recovery is not None:
            lines.append(f"training text: {text_used(report, source)}{how}")
        else:
            lines.append(f"calibration: {used.samples} windows of {used.seqlen} tokens from {source}{how}")
    if report.recovery is not None and (text := held_out_text(report.recovery)):
        held_out = f"{report.recovery.held_out_windows} windows"
        if report.alignment is not None:
            held_out = f"{report.alignment.held_out_pairs} pairs"
        lines.append(f"loss on {held_out} held out from training: {text}")
    if text := change_text(report):
        lines.append(f"changed: {text}")
    if report.mean_error is not None:
        mean, worst = percent(report.mean_error), percent(max(report.relative_errors))
        lines.append(f"relative error of the operators' outputs: mean {mean}, worst {worst}")
    if report.workload is not None:
        lines.append(plain_markdown(workload_sentence(report.workload)))
    if report.permuted:
        lines.append(
            f"hidden channels read by {len(report.permuted)} operators are reordered or rotated: they are not those "
            "of the dense model"
        )
    if report.totals.seconds:
        machine = report.machine.device_name or report.machine.cpu or report.machine.device
        peak = f", peak memory {size(report.totals.peak_memory)}" if report.totals.peak_memory else ""
        lines.append(f"{significant(report.totals.seconds)} s on {machine}{peak}")
    if report.versions:
        lines.append(versions_text(report.versions))
    return lines


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without what depends on the machine."""
    recipe = {key: value for key, value in settings.items() if key != "execution"}
    for section in ("calibration", "data"):
        text = recipe.get(section)
        for key in ("source", "pairs"):
            if isinstance(text, dict) and text.get(key):
                recipe[section] = text = {**text, key: file_name(str(text[key]))}
        if isinstance(text, dict) and isinstance(tasks := text.get("tasks"), dict):
            recipe[section] = {**text, "tasks": {name: file_name(str(source)) for name, source in tasks.items()}}
    if isinstance(allocation := recipe.get("allocation"), str) and allocation.startswith(WORKLOAD):
        recipe["allocation"] = WORKLOAD + file_name(allocation.removeprefix(WORKLOAD))
    return recipe


def _lineage(report: Report) -> list[str]:
    """List the runs that made the model, where they are known: the dense model first."""
    if report.lineage is None or not report.lineage.stages:
        return []
    source = report.lineage.source
    shown = source.model_copy(update={"source": base_model_name(source)})
    return lineage_lines(report.lineage.model_copy(update={"source": shown}))

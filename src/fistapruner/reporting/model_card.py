"""Write the model card of a pruned checkpoint: its source, how it was made, what was measured."""

from __future__ import annotations

from typing import Any

from ..runs.records import Report
from ..runtime.formatting import count, p_value, percent, significant, size, with_error
from .evaluation_text import item_count
from .lineage_text import lineage_lines
from .rendering import plain_markdown, render
from .size_and_speed import size_rows, speed_rows, speeds
from .structure_text import structure_sentence


def model_card(report: Report) -> str:
    """Write the model card: Markdown with a Hugging Face metadata block.

    Args:
        report: of the run; figures that are not in it are left out of the card.
    """
    return render(
        "model_card.md.j2",
        report=report,
        metadata=_metadata(report),
        name=base_model(report),
        amount=amount(report),
        smaller=structure_sentence(report),
        zeros=_zeros(report),
        measured=_measured(report),
        made=_made(report),
        recipe=_recipe(report),
        lineage=_lineage(report),
    )


def amount(report: Report) -> str:
    """Say how much was pruned: ``50% sparse``, or what structure was removed."""
    return report.sparsity if report.structured else f"{report.sparsity} sparse"


def base_model(report: Report) -> str:
    """Name the base model as a card may: a hub id stays, a path of this machine is cut to its last part."""
    return base_model_name(report.model.source)


def base_model_name(source: str) -> str:
    """Do the same for the name that a user gave."""
    is_hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith(".gguf")
    return source if is_hub_id else source.rstrip("/").rsplit("/", 1)[-1]


def _metadata(report: Report) -> dict[str, Any]:
    source = report.model.source
    block: dict[str, Any] = {}
    if report.model.license:
        block["license"] = report.model.license
    if base_model(report) == source and "/" in source:
        block["base_model"] = [source]
        block["base_model_relation"] = "finetune"
    block["library_name"] = "transformers"
    block["pipeline_tag"] = "text-generation"
    block["tags"] = [
        "pruning",
        "sparsity",
        "fistapruner",
        *(["structured-pruning"] if report.structured else []),
        *(method.strip().replace("+", "-") for method in report.method.split(",")),
        "" if report.only_structure else str(report.recipe.get("sparsity", "")).replace("%", "-percent"),
    ]
    block["tags"] = [tag for tag in block["tags"] if tag]
    results = _metadata_results(report)
    if results:
        block["model-index"] = [{"name": f"{base_model(report)}, {amount(report)}", "results": results}]
    return block


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
    if not totals.operator_weights or totals.operator_zeros is None or report.only_structure:
        return ""
    share = (
        f"{count(totals.operator_zeros)} of {count(totals.operator_weights)} weights of the pruned operators are zero"
    )
    text = f"{share} ({percent(totals.operator_zeros / totals.operator_weights, 4)})"
    if totals.model_weights and totals.model_zeros is not None:
        text += f", {percent(totals.model_zeros / totals.model_weights)} of the whole model"
    return text + "."


def _measured(report: Report) -> list[tuple[str, str, str, str]]:
    """List measure, how it was measured, dense and pruned value."""
    rows = []
    for evaluation in report.evaluations:
        text, dense, damage = evaluation.perplexity, evaluation.reference, evaluation.divergence
        if text is not None:
            protocol = (
                f"{plain_markdown(text.data)} {text.split}, {text.windows} windows of {text.seqlen}, {text.dtype}"
            )
            before = with_error(dense.perplexity, dense.standard_error) if dense else "–"
            rows.append(("perplexity", protocol, before, with_error(text.perplexity, text.standard_error)))
            if damage is not None:
                rows.append(
                    ("KL from dense (nats/token)", protocol, "0", with_error(damage.kl, damage.kl_standard_error, 4))
                )
                rows.append(("top-1 agreement", protocol, "100 %", percent(damage.top1_agreement)))
        for task in evaluation.tasks:
            before = with_error(task.reference, task.reference_standard_error, 4)
            note = f"{task.shots}-shot, {item_count(task)}" + (
                f", {p_value(task.p_value)}" if task.p_value is not None else ""
            )
            rows.append(
                (
                    f"{plain_markdown(task.task)} ({task.metric})",
                    note,
                    before,
                    with_error(task.value, task.standard_error, 4),
                )
            )
    if speeds(report):
        costs = size_rows(report) + speed_rows(report)
        rows += [(measure, f"{how} ({change})", before, after) for measure, before, after, change, how in costs]
    return rows


def _made(report: Report) -> list[str]:
    lines = []
    errors = [
        operator.relative_error
        for layer in report.layers
        for operator in layer.operators
        if operator.relative_error is not None
    ]
    if report.calibration:
        used = report.calibration
        how = f" ({used.how})" if used.how else ""
        source = plain_markdown(_file_name(used.source))
        lines.append(f"calibration: {used.samples} windows of {used.seqlen} tokens from {source}{how}")
    if errors:
        mean, worst = percent(sum(errors) / len(errors)), percent(max(errors))
        lines.append(f"relative error of the operators' outputs: mean {mean}, worst {worst}")
    if report.permuted:
        lines.append(
            f"hidden channels read by {len(report.permuted)} operators are in another order than in the dense model"
        )
    if report.totals.seconds:
        machine = report.machine.device_name or report.machine.cpu or report.machine.device
        peak = f", peak memory {size(report.totals.peak_memory)}" if report.totals.peak_memory else ""
        lines.append(f"{significant(report.totals.seconds)} s on {machine}{peak}")
    if report.versions:
        lines.append(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    return lines


def _recipe(report: Report) -> dict[str, Any]:
    """Return the recipe without what depends on the machine."""
    recipe = {key: value for key, value in report.recipe.items() if key != "execution"}
    calibration = recipe.get("calibration")
    if isinstance(calibration, dict) and "source" in calibration:
        recipe["calibration"] = {**calibration, "source": _file_name(str(calibration["source"]))}
    return recipe


def _lineage(report: Report) -> list[str]:
    """List the runs that made the model, where they are known: the dense model first."""
    if report.lineage is None or not report.lineage.stages:
        return []
    source = report.lineage.source
    shown = source.model_copy(update={"source": base_model_name(source.source)})
    return lineage_lines(report.lineage.model_copy(update={"source": shown}))


def _file_name(source: str) -> str:
    """Cut a calibration source to its last part: cards are published, folders of a machine are not."""
    return source.rsplit("/", 1)[-1]

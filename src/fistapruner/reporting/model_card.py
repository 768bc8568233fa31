"""Write model cards, and render what cards and pages have in common: tables, templates."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from ..runs.records import DONE, OTHERS_BY_NAME, Report, sparsity_label
from ..settings.prune import WORKLOAD
from .facts import base_model_name, facts, title_of
from .figures import Drawing
from .measured import ORIGIN, QUALITY, SIZE, Fact, becomes_smaller_packed, file_name, speeds

TAGS = ["pruning", "sparsity", "fistapruner"]


def model_card(report: Report) -> str:
    """Write the model card: Markdown with a Hugging Face metadata block."""
    from ..models.build import auto_class_name  # imports torch, which pages do without

    listed = [fact for fact in facts(report) if fact.after not in ("", "–")]
    shown = (QUALITY, SIZE) if speeds(report) else (QUALITY,)
    measured = [fact for fact in listed if fact.section in shown]
    recipe = public_recipe(report.recipe)
    body = render(
        "model_card.md.j2",
        title=plain_markdown(title_of(report)),
        origin=plain_markdown(f"{base_model_name(report.origin)} ({report.origin.architecture})"),
        amount=plain_markdown(report.sparsity),
        method=report.method.replace("`", ""),
        report=report,
        becomes_smaller_packed=becomes_smaller_packed(report),
        auto_class=auto_class_name(report.model.architecture),
        measured=markdown_table(*fact_table(measured, DONE[report.kind])) if measured else "",
        made=[
            f"{plain_markdown(fact.label)}: {plain_markdown(fact.line)}"
            for fact in listed
            if fact not in measured and (fact.section != ORIGIN or fact.label in ("Machine", "Versions"))
        ],
        command=code_block(report.command, "bash") if report.command else "",
        recipe=code_block(yaml_text(recipe), "yaml") if recipe else "",
        lineage=next((plain_markdown(fact.after) for fact in listed if fact.label == "Lineage"), ""),
    )
    return _card(_metadata(report), body)


def plain_card(license_name: str | None, title: str, text: str) -> str:
    """Write the card of a model that no run has made: its title, and how it was made."""
    body = f"""# {title}

fistapruner {text}. Nothing was measured since; `fistapruner evaluate` does it, and `fistapruner inspect` counts the
zeros and lists how the model was made.
"""
    return _card({"license": license_name, "tags": TAGS}, body)


def _card(metadata: Mapping[str, Any], body: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **metadata)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _metadata(report: Report) -> dict[str, Any]:
    """Return what the hub reads: license, base model, tags, results."""
    from huggingface_hub import EvalResult

    origin = report.origin
    base = {"base_model": [origin.source], "base_model_relation": "finetune"}
    on_hub = base_model_name(origin) == origin.source and "/" in origin.source
    done = [report.training] if report.recovery else re.split(r",\s*", report.method.replace("+", "-"))
    pattern = sparsity_label(report.pruning) or report.sparsity
    pattern = "mixed" if pattern.endswith(OTHERS_BY_NAME) else pattern.partition(" (")[0].replace("%", "-percent")
    tags = [*TAGS, *(["structured-pruning"] if report.structured else []), *done]
    tags += [] if report.only_structure else [pattern.replace(" ", "-")]
    task, results = "text-generation", []
    for evaluation in report.evaluations:
        if (text := evaluation.perplexity) is not None:
            name = f"token perplexity, {text.windows} windows of {text.seqlen}, {text.dtype}"
            value = round(text.perplexity, 4)
            results.append(
                EvalResult(task, text.data, text.data, "perplexity", value, dataset_split=text.split, metric_name=name)
            )
        for each in evaluation.tasks:
            name = f"{each.metric}, {each.shots}-shot"
            results.append(EvalResult(task, each.task, each.task, each.metric, round(each.value, 4), metric_name=name))
    return {
        "license": origin.license or report.model.license,
        **(base if on_hub else {}),
        "tags": [tag for tag in tags if tag],
        **({"model_name": title_of(report), "eval_results": results} if results else {}),
    }


def fact_table(found: Sequence[Fact], done: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return head and rows of a table of facts; columns in which nothing stands are left out.

    What the run has done to the model, ``done``, is the head of values that stand beside others.
    """
    compared = any(fact.dense or fact.before for fact in found)
    head = ("measure", "dense", "before", done if compared else "value", "how")
    rows = [(fact.label, fact.dense, fact.before, fact.after, fact.how) for fact in found]
    used = [place for place in range(len(head)) if place == 0 or any(row[place] for row in rows)]
    return [head[place] for place in used], [tuple(row[place] for place in used) for row in rows]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, its cells as they are."""
    lines = [list(head), ["---"] * len(head), *([plain_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_markdown(text: str) -> str:
    """Escape a user's text for Markdown: no HTML, no link, no table, one line."""
    return re.sub(r"([\\`*\[\]<>&|~])", r"\\\1", " ".join(text.split()))


def code_block(text: str, language: str) -> str:
    """Make a Markdown code block that its text cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def yaml_text(value: Any) -> str:
    """Write a value as YAML, keys in their order."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text.strip()


def public_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without what depends on the machine."""
    recipe = {key: value for key, value in settings.items() if key != "execution"}
    for section in ("calibration", "data"):
        text = recipe.get(section)
        for key in ("source", "pairs"):
            if not isinstance(text, dict) or not (said := text.get(key)):
                continue
            names = {name: file_name(str(source)) for name, source in said.items()} if isinstance(said, dict) else None
            recipe[section] = text = {**text, key: names or file_name(str(said))}
    if isinstance(allocation := recipe.get("allocation"), str) and allocation.startswith(WORKLOAD):
        recipe["allocation"] = WORKLOAD + file_name(allocation.removeprefix(WORKLOAD))
    return recipe


# --- pages


@dataclass(frozen=True)
class Table:
    """A table of a page, as texts; the columns ``numeric`` are set flush right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Collection[int] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page; parts without content are not shown.

    ``note`` is a sentence below its tables; ``samples`` are prompts, each with the continuations of the models by name;
    ``code`` is shown as it is, under what it is called.
    """

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Drawing] = ()
    note: str = ""
    samples: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    code: Sequence[tuple[str, str]] = ()


def page(title: str, *, status: str, about: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """Render a page, one file that loads nothing; ``about`` is a line below its title."""
    shown = [each for each in sections if any(table.rows for table in each.tables) or each.figures or each.code]
    return render("page.html.j2", title=title, status=status, about=about, warnings=warnings, sections=shown)


def render(template: str, **values: Any) -> str:
    """Render a template of ``templates/``; every text is escaped in HTML."""
    return _environment().get_template(template).render(values)


def moment(time: str | None) -> str:
    """Format an ISO time to the minute, with its zone: ``2026-01-01 10:08 UTC``."""
    try:
        return datetime.fromisoformat(time or "").strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return time or ""


def breakable(text: str) -> Markup:
    """Escape a text for HTML, and let its lines break after signs that join names."""
    return Markup(re.sub(r"(?<=[,@+/._])(?=[^\W\d])", "<wbr>", str(escape(text))))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fistapruner.reporting"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment

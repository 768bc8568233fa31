"""Render the templates of ``templates/``: pages in HTML, cards and tables in Markdown."""

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


@dataclass(frozen=True)
class Table:
    """A table of a page, as texts.

    Args:
        label: names the table for readers who cannot see it.
        head, rows: cells.
        numeric: columns that are set flush right.
        stack: whether rows become blocks on a phone; otherwise the table scrolls sideways.
    """

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Collection[int] = ()
    stack: bool = False


def render(template: str, **values: Any) -> str:
    """Render a template of ``templates/``.

    Every text is escaped in HTML; Markdown templates escape what comes from users by the filter ``plain``.
    """
    return _environment().get_template(template).render(values)


def moment(time: str | None) -> str:
    """Format an ISO time to the minute, with its zone: ``2026-01-01 10:08 UTC``."""
    try:
        return datetime.fromisoformat(time or "").strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return time or ""


def present(pairs: Sequence[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """Drop the pairs without a value."""
    return [(name, value) for name, value in pairs if value]


def versions_text(versions: Mapping[str, str]) -> str:
    """Write the versions of libraries in one line: ``fistapruner 1.0, torch 2.9``."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def plain_markdown(text: str) -> str:
    """Escape a user's text for Markdown: no HTML, no link, no table, one line."""
    return re.sub(r"([\\`*\[\]<>&|~])", r"\\\1", " ".join(text.split()))


def breakable(text: str) -> Markup:
    """Escape a text for HTML, and let its lines break after signs that join names."""
    return Markup(re.sub(r"(?<=[,@+/])(?=\S)", "<wbr>", str(escape(text))))


def code_block(text: str, language: str) -> str:
    """Make a Markdown code block that its text cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def yaml_text(value: Any) -> str:
    """Write a value as YAML, keys in their order."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text.strip()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fistapruner.reporting"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "plain": plain_markdown,
        "code": code_block,
        "yaml": yaml_text,
    }
    return environment

"""Render the templates of ``templates/``: pages in HTML, the body of model cards in Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from .figures import Drawing


@dataclass(frozen=True)
class Table:
    """A table of a page, as texts.

    Args:
        head, rows: cells; ``numeric``: columns that are set flush right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Collection[int] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page; parts without content are not shown.

    Args:
        title: heading.
        tables, figures: what it shows; ``note``: a sentence below them.
        samples: prompts, each with the continuations of the models by name.
        code: what is shown as it is, under what it is called; the long ones behind a click.
    """

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Drawing] = ()
    note: str = ""
    samples: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    code: Sequence[tuple[str, str]] = ()


def page(title: str, *, status: str, about: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """Render a page: one file that loads nothing.

    Args:
        title: of the page; ``status``: of the run or comparison; ``about``: a line below the title.
        warnings: sentences.
        sections: in order.
    """
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

"""Parts of every page: the document, sections, tables, facts, tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape

from .theme import stylesheet


def page(title: str, header: str, body: str, program: str) -> str:
    """A whole document around a header and sections."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{stylesheet()}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#content">To the content</a>\n<header class="top">{header}</header>\n<main id="content">{body}</main>\n'
        f"<footer>Drawn from the JSON beside this file by {escape(program.strip())}. "
        "± is one standard error. Every figure has its numbers under it.</footer>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, numeric: Iterable[int] = (), *, stack: bool = False) -> str:
    """A table that scrolls sideways where it does not fit, or whose rows become blocks on a phone.

    Args:
        head, rows: texts.
        label: names the table for who cannot see it.
        numeric: columns that are set flush right.
        stack: blocks on a phone.
    """
    right = set(numeric)

    def cells(row: Sequence[str], tag: str) -> str:
        made = []
        for index, text in enumerate(row):
            kind = ' class="n"' if index in right else ""
            name, scope = (tag, ' scope="col"') if tag == "th" else (("th", ' scope="row"') if index == 0 else ("td", ""))
            role = ""
            if stack:  # display: grid takes a table's meaning away, roles give it back
                what = "columnheader" if tag == "th" else "rowheader" if index == 0 else "cell"
                role = f' role="{what}" data-label="{escape(head[index])}"'
            made.append(f"<{name}{scope}{kind}{role}>{escape(text)}</{name}>")
        return ('<tr role="row">' if stack else "<tr>") + "".join(made) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    shape = "stack" if stack else "scroll"
    group, kind = (' role="rowgroup"', ' role="table"') if stack else ("", "")
    return (
        f'<div class="{shape}" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table{kind}><thead{group}>{cells(head, 'th')}</thead><tbody{group}>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str | None]]) -> str:
    """A list of names and values; those without a value are left out."""
    made = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{made}</dl>' if made else ""


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers: name, value, note."""
    made = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></dd></div>'
        for name, value, note in items
    )
    columns = made.count('class="tile"')
    columns = {6: 3, 7: 4, 8: 4, 9: 5}.get(columns, columns)  # no row that is nearly empty
    return f'<dl class="tiles" style="--columns:{columns}">{made}</dl>' if made else ""


def section(title: str, content: str) -> str:
    """A section with a heading; nothing without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def moment(time: str | None) -> str:
    """An ISO time to the minute, with its zone: ``2026-01-01 10:08 UTC``."""
    try:
        return datetime.fromisoformat(time or "").strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return time or ""

"""Draw the page of a run or a comparison from the JSON in its folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import FistaPrunerError
from ..runs.comparison_records import PAGE, is_comparison, load_comparison
from ..runs.directory import RunDirectory
from ..runs.records import load_run
from ..runtime.files import write_text_atomic
from .comparison import comparison_page
from .page import run_page


def write_page(folder: str | Path) -> Path:
    """Draw ``report.html`` of a run (finished or not), or ``compare.html`` of a comparison.

    Args:
        folder: the run directory, or the folder of a comparison.

    Returns:
        The file that was written.

    Raises:
        FistaPrunerError: the folder holds neither or a comparison of alignments, or its JSON is broken.
        MissingExtraError: the extra ``report`` is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise FistaPrunerError(f"{folder} {reason}: give a run directory or the folder of a comparison")
    if is_comparison(folder):
        text, out = comparison_page(load_comparison(folder)), folder / PAGE
    else:
        text, out = run_page(load_run(folder)), RunDirectory(folder).page_file
    write_text_atomic(out, text)
    return out


report = write_page
"""The public name: ``fistapruner.report``, as the verb is called."""

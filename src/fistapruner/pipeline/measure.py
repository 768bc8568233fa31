"""What the finished checkpoint is worth: perplexity and divergence, generations, the model card, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..atomic import write_text_atomic
from ..errors import MissingExtraError
from ..evaluation.evaluate import evaluate as run_evaluation
from ..evaluation.generations import generate_side_by_side
from ..reporting.model_card import model_card
from ..reporting.schema import Report
from ..reporting.write import write_page
from .finish import write_report
from .journal import RunDirectory
from .serial import Listener
from .work import choose_device


def measure(run: RunDirectory, report: Report, data: str | None, windows: int | None, listener: Listener) -> Report:
    """Evaluate ``RUN/model`` beside its source and put the figures into the report, the model card and the page.

    What the report already holds is not measured again.

    Args:
        run: the run directory, with a finished checkpoint.
        report: of the finished run.
        data: text to evaluate on; None evaluates nothing.
        windows: only its first so many windows.
        listener: told of progress.

    Raises:
        FistaPrunerError: the text cannot be read.
    """
    decided: dict[str, Any] = run.facts()["decided"]
    source = Path(decided["folder"])
    trust = {"allow_pickle": decided["allow_pickle"], "trust_remote_code": decided["trust_remote_code"]}
    execution = report.recipe.get("execution", {})
    device, limit = execution.get("device", "auto"), execution.get("memory_limit")
    if data is not None and not any(_is_of(evaluation, data, windows) for evaluation in report.evaluations):
        listener.say(f"evaluating the dense and the pruned model on {data}")
        assert report.calibration is not None
        evaluation = run_evaluation(
            run.model,
            data,
            seqlen=report.calibration.seqlen,
            windows=windows,
            against=source,
            device=device,
            dtype=report.recipe.get("dtype", "auto"),
            memory_limit=limit and limit // 2,  # the other half is for a layer of each model and the logits
            **trust,
        )
        report.evaluations.append(evaluation)
        write_report(run, report)
    if data is not None and not report.generations:
        report.generations = generate_side_by_side(source, run.model, choose_device(device), trust_remote_code=decided["trust_remote_code"])
    write_report(run, report)
    write_text_atomic(run.model / "README.md", model_card(report))
    try:
        listener.say(f"report: {write_page(run.folder)}")
    except MissingExtraError as error:
        listener.say(str(error))
    return report


def _is_of(evaluation: Any, data: str, windows: int | None) -> bool:
    perplexity = evaluation.perplexity
    return perplexity is not None and perplexity.data in (data, Path(data).name) and windows in (None, perplexity.windows)

"""Many methods, one protocol: the same model, calibration windows and evaluation text for every one.

    DIR/
        compare.json   compare.md     the figures so far; rewritten after every run
        runs/NAME/                    one run directory for each method, sparsity and seed

Every run is a normal run, so a comparison that was stopped goes on where it was. Once a run is measured, its checkpoint and
tensors are deleted (they are as large as the model) and its records stay.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..atomic import disk_errors, write_json_atomic, write_text_atomic
from ..errors import FistaPrunerError, MissingExtraError
from ..evaluation.evaluate import evaluate as run_evaluation
from ..evaluation.results import Perplexity
from ..recipe import Recipe, load_recipe_settings, merge, shipped_recipes
from ..reporting.comparison import comparison_markdown
from ..reporting.schema import CompareRow, Comparison, Report, parse, read_json
from ..reporting.write import write_page
from .journal import RunDirectory
from .machine import describe_machine, now, versions
from .run import prune
from .serial import Listener
from .work import choose_device


@dataclass(frozen=True)
class Contender:
    """One method with its settings.

    Args:
        label: as the user wrote it.
        settings: recipe settings over those of the comparison.
    """

    label: str
    settings: dict[str, Any]


def parse_contenders(text: str | Sequence[str]) -> list[Contender]:
    """Read ``--methods``: method chains or recipes, separated by commas, each with settings after an ``@``.

    ``wanda,alps@propagate=pruned,target=pruned,best`` are three: a part with ``=`` in it belongs to the method before it.
    Dots reach into sections: ``alps@calibration.samples=64``. A name of a shipped recipe, or a ``.yaml`` file, is a recipe;
    its calibration section is left aside, since all methods see the same windows.

    Raises:
        FistaPrunerError: nothing named, an empty part, or a setting before any method.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    grouped: list[list[str]] = []
    for part in (part.strip() for part in parts):
        name, at, first = part.partition("@")
        if at or "=" not in part:
            grouped.append([name, *([first] if first else [])])
        elif grouped:
            grouped[-1].append(part)
        else:
            raise FistaPrunerError(f"--methods begins with the setting {part!r}: name a method before it, such as alps@{part}")
    contenders = []
    for name, *settings in grouped:
        if not name:
            raise FistaPrunerError(
                f"--methods {','.join(parts)!r} has an empty name in it: write names separated by commas, such as wanda,alps"
            )
        label = name + ("@" + ",".join(settings) if settings else "")
        is_recipe = name in shipped_recipes() or name.endswith((".yaml", ".yml"))
        base = load_recipe_settings(name) if is_recipe else {"method": name}
        base.pop("calibration", None)
        contenders.append(Contender(label, merge(base, _nested(settings, label))))
    if len({contender.label for contender in contenders}) < len(contenders):
        raise FistaPrunerError(f"--methods {','.join(parts)!r} names the same method twice")
    return contenders


def _nested(settings: Sequence[str], label: str) -> dict[str, Any]:
    """``["target=0.5", "calibration.samples=64"]`` as a mapping."""
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or not value:
            raise FistaPrunerError(f"--methods {label}: {setting!r} is not a setting such as target=0.5")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise FistaPrunerError(f"--methods {label}: the value of {setting!r} cannot be read") from None
        section, dot, inner = key.partition(".")
        if dot:
            result.setdefault(section, {})[inner] = parsed
        else:
            result[section] = value if key in ("sparsity", "method") else parsed
    return result


def compare(
    model: str,
    methods: str | Sequence[str],
    sparsities: Sequence[str],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    data: str = "python",
    windows: int | None = None,
    keep: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
) -> Comparison:
    """Prune a model in many ways and measure all of them alike.

    Args:
        model: hub id, local folder, GGUF file, or ``smollm2``.
        methods: see :func:`parse_contenders`.
        sparsities: patterns, such as ``["50%", "2:4"]``.
        out: folder of the comparison; one that was begun is continued, and rows it has beside those asked for now stay.
        seeds: each draws its own calibration windows; every method sees the same ones.
        settings: recipe settings that all share.
        data: text to evaluate on, as :func:`fistapruner.evaluate` takes it.
        windows: only its first so many windows.
        keep: keep the pruned checkpoints.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: told of progress.
        command: shell line that reproduces the comparison.

    Returns:
        What is in ``out/compare.json``. A method that cannot do a sparsity has a row that says why.

    Raises:
        FistaPrunerError: bad input, named, before anything is pruned.
    """
    listener = listener or Listener()
    folder = Path(out)
    contenders = parse_contenders(methods)
    jobs = []
    for seed in seeds:
        for sparsity in sparsities:
            for contender in contenders:
                said = merge(dict(settings or {}), {"seed": seed, "calibration": {"seed": seed}})
                said = merge(merge(said, contender.settings), {"sparsity": sparsity})
                jobs.append((contender, seed, Recipe.build(said, contender.label).settled()))
    if not jobs:
        raise FistaPrunerError("nothing to compare: name methods, sparsities and seeds")
    first = jobs[0][2]
    earlier = _earlier(folder, model, {(contender.label, str(recipe.sparsity), seed) for contender, seed, recipe in jobs})
    with disk_errors(folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    comparison = Comparison(
        command=command or shlex.join(sys.argv),
        started=now(),
        versions=versions(),
        machine=describe_machine(choose_device(first.execution.device)),
        rows=earlier,
    )
    trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    place = {"device": first.execution.device, "dtype": first.dtype}
    evaluation: dict[str, Any] = {"windows": windows, "tick": listener.tick, **place, **trust}
    calibrated: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for number, (contender, seed, recipe) in enumerate(jobs, 1):
        listener.say(f"{number}/{len(jobs)}: {contender.label}, {recipe.sparsity}, seed {seed}")
        run = RunDirectory(folder / "runs" / run_name(contender.label, str(recipe.sparsity), seed))
        row = CompareRow(
            method=recipe.method_name,
            label=contender.label,
            sparsity=str(recipe.sparsity),
            seed=seed,
            settings=recipe.model_dump(mode="json", exclude={"execution"}),
        )
        try:
            report = _measured(run, recipe, data, windows)
            if report is None:
                key = recipe.calibration.model_dump_json()
                report = prune(model, run.folder, recipe=recipe, listener=listener, tokens=calibrated.get(key), **trust)
                assert report.calibration is not None
                calibrated.setdefault(key, (run.tokens(), report.calibration.model_dump()))
                listener.say(f"evaluating on {data}")
                report.evaluations.append(run_evaluation(run.model, data, seqlen=report.calibration.seqlen, **evaluation))
                write_json_atomic(run.report_file, report.model_dump(mode="json"))
            if not keep:
                _delete_weights(run)
            _adopt(comparison, report)
            if comparison.dense is None:
                comparison.dense = _dense(folder, run, report, data, evaluation, listener)
            row = _filled(row, report, comparison.dense)
        except FistaPrunerError as error:
            row.error = str(error)
            listener.say(f"{contender.label}: {error}")
        comparison.rows.append(row)
        _write(folder, comparison)
    comparison.status = "finished"
    comparison.finished = now()
    _write(folder, comparison)
    try:
        listener.say(f"page: {write_page(folder)}")
    except MissingExtraError as error:
        listener.say(str(error))
    return comparison


def run_name(label: str, sparsity: str, seed: int) -> str:
    """Folder name of a run: readable, and different for different labels."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{label}-{sparsity.replace(':', 'of').replace('%', '')}")[:80]
    return f"{plain}-seed{seed}-{hashlib.sha256(f'{label} {sparsity}'.encode()).hexdigest()[:6]}"


def _earlier(folder: Path, model: str, now: set[tuple[str | None, str, int]]) -> list[CompareRow]:
    """Rows of the comparison that ``folder`` already holds, but those that are asked for now."""
    if folder.exists() and not folder.is_dir():
        raise FistaPrunerError(f"--out {folder} is a file; name a folder")
    file = folder / "compare.json"
    if file.is_file():
        before = parse(Comparison, read_json(file), str(file))
        if before.model.source and before.model.source != model:
            raise FistaPrunerError(
                f"--out {folder} holds a comparison of {before.model.source!r}, this one is of {model!r}: name another folder"
            )
        return [row for row in before.rows if (row.label, row.sparsity, row.seed) not in now]
    if folder.is_dir() and any(entry.name not in ("runs", "dense.json") for entry in folder.iterdir()):
        raise FistaPrunerError(f"--out {folder} is a folder with other things in it; name a new folder")
    return []


def _measured(run: RunDirectory, recipe: Recipe, data: str, windows: int | None) -> Report | None:
    """The report of a run that was pruned with these settings and measured on this text."""
    if not run.report_file.is_file():
        return None
    report = parse(Report, read_json(run.report_file), str(run.report_file))
    same = Recipe.build(report.recipe).fingerprint() == recipe.fingerprint()
    return report if same and report.status == "finished" and _perplexity(report, data, windows) is not None else None


def _perplexity(report: Report, data: str, windows: int | None) -> Perplexity | None:
    for evaluation in report.evaluations:
        found = evaluation.perplexity
        if found is not None and found.data in (data, Path(data).name) and windows in (None, found.windows):
            return found
    return None


def _dense(folder: Path, run: RunDirectory, report: Report, data: str, evaluation: dict[str, Any], listener: Listener) -> Perplexity:
    """The dense model's perplexity on the same tokens, measured once for a comparison."""
    pruned = _perplexity(report, data, evaluation["windows"])
    file = folder / "dense.json"
    if file.is_file():
        stored = Perplexity(**read_json(file))
        if pruned is not None and (stored.text_sha256, stored.dtype) == (pruned.text_sha256, pruned.dtype):
            return stored
    listener.say(f"evaluating the dense model on {data}")
    assert report.calibration is not None
    found = run_evaluation(run.facts()["decided"]["folder"], data, seqlen=report.calibration.seqlen, **evaluation).perplexity
    assert found is not None
    write_json_atomic(file, found.__dict__)
    return found


def _filled(row: CompareRow, report: Report, dense: Perplexity | None) -> CompareRow:
    """The row with the figures of its report."""
    totals = report.totals
    errors = [operator.relative_error for layer in report.layers for operator in layer.operators if operator.relative_error is not None]
    row.perplexity = next((evaluation.perplexity for evaluation in reversed(report.evaluations) if evaluation.perplexity), None)
    if row.perplexity is not None and dense is not None and math.isfinite(row.perplexity.nll):
        if row.perplexity.text_sha256 != dense.text_sha256:
            raise FistaPrunerError(f"{row.label}: it was evaluated on other tokens than the dense model; use one seqlen for all methods")
        row.gap = row.perplexity.nll - dense.nll
    row.relative_error = sum(errors) / len(errors) if errors else None
    row.seconds, row.time_split, row.peak_memory = totals.seconds, totals.time_split, totals.peak_memory
    row.operator_weights, row.operator_zeros = totals.operator_weights, totals.operator_zeros
    return row


def _adopt(comparison: Comparison, report: Report) -> None:
    """What all runs share, from the first of them."""
    if not comparison.model.source:
        comparison.model = report.model
    if comparison.calibration is None:
        comparison.calibration = report.calibration


def _delete_weights(run: RunDirectory) -> None:
    if run.model.is_dir():
        shutil.rmtree(run.model)
    for tensors in [*run.layers.glob("*.safetensors"), run.metrics_file]:
        tensors.unlink(missing_ok=True)


def _write(folder: Path, comparison: Comparison) -> None:
    write_json_atomic(folder / "compare.json", comparison.model_dump(mode="json"))
    write_text_atomic(folder / "compare.md", comparison_markdown(comparison))

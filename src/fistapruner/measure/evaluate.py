"""Measure perplexity, divergence from the dense model and zero-shot tasks: ``fistapruner.evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from ..errors import A_FOLDER, A_MODEL, FistaPrunerError, path_text
from ..models.build import require_tasks_fit, whole_bytes
from ..models.checkpoint import Checkpoint
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.source import ModelSource, Permissions
from ..packed.checkpoint import is_packed
from ..packed.pack import unpack
from ..runs.arguments import checked_arguments
from ..runs.lineage import lineage_of, trained_on
from ..runs.results import Evaluation
from ..runtime.devices import choose_device, threads_within_quota
from ..runtime.files import temporary_folder
from ..runtime.numerics import DTYPES, dtype_name, pass_dtype, undisturbed
from ..runtime.progress import Tick, silent
from ..settings.loading import parse_bytes
from .data import Windows, check_count, check_data, load_windows
from .logits import divergence_of, perplexity_of
from .streaming import KeptStates, Passes, score_windows
from .zero_shot import TaskSettings, evaluate_tasks, find_tasks

LONGEST_DEFAULT = 2048
"""Default length of a window: the model's maximum, at most this."""


@checked_arguments
@undisturbed()
@threads_within_quota()
def evaluate(
    model: str | Path,
    data: str | Path | Windows | None = None,
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    against: str | Path | None = None,
    tasks: str | Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    memory_limit: int | str | None = None,
    bos: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    tick: Tick | None = None,
    keep: Callable[[Evaluation], None] = lambda found: None,
    warn: Callable[[str], None] | None = None,
    kept: KeptStates | None = None,
) -> Evaluation:
    """Measure a model, alone or against the dense one on the same tokens.

    Perplexity streams: it reads one decoder layer at a time, so the model may be larger than memory. Zero-shot tasks
    load the whole model.

    Args:
        model: hub id, local folder, GGUF file, or ``smollm2``; a packed one is unpacked into a temporary folder.
        data: text for perplexity: ``wikitext2``, ``ptb``, ``c4``, ``python`` or a local ``.txt``, ``.raw``,
            ``.md``, ``.jsonl`` or ``.parquet`` file; or windows that were cut before, by the models' tokenizer. None
            measures tasks only.
        seqlen: tokens in a window; default is the model's maximum, at most 2048. A perplexity depends on it.
        windows: take only this many, from the start.
        against: the dense model; adds its perplexity, KL divergence, top-1 agreement and paired tests.
        tasks: zero-shot tasks, by ``lm-eval`` name, or by file name where ``tasks_dir`` is given.
        tasks_dir: folder of local ``.jsonl`` tasks; without ``tasks`` all of them are taken.
        limit: take only this many items of each task, from the start.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: precision of the forward passes; ``auto`` is the checkpoint's own, or fp32 on CPUs without matrix units
            for it; of two models the wider one, for both.
        batch_size: windows in one forward pass.
        memory_limit: main memory that the process may use, in bytes or as ``8GiB``; hidden states take what the models
            leave of it, by default half of what is free. Tasks are refused on a model that it does not hold.
        bos: where BOS tokens stand: ``window`` is in front of every window, ``text`` once in front of the whole text,
            where the tokenizer puts it, ``none`` nowhere; ``auto`` is ``window`` if the tokenizer adds BOS to a text by
            its own setting, and else ``none``.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with a checkpoint.
        tick: called with progress: (what, steps done, steps in all).
        keep: called with what is measured before the tasks begin, so that it is not lost if they fail.
        warn: called with a sentence where ``memory_limit`` does not hold one batch of windows, and it is exceeded; None
            refuses such a limit.
        kept: hidden states of one of the models on this text, from earlier evaluations.

    Raises:
        FistaPrunerError: bad input, named; settings, tasks and weights that may not be read before any long work.
        MissingExtraError: a data set needs the extra ``data``, tasks need the extra ``eval``.
    """
    tick = tick or silent
    data = str(data) if isinstance(data, Path) else data
    against = None if against is None else path_text("against", against, A_MODEL)
    names, memory = check_request(
        data,
        seqlen=seqlen,
        windows=windows,
        tasks=tasks,
        tasks_dir=tasks_dir,
        limit=limit,
        dtype=dtype,
        batch_size=batch_size,
        memory_limit=memory_limit,
        bos=bos,
    )
    begin = time.perf_counter()
    place = choose_device(device)
    known = find_tasks(names, None if tasks_dir is None else Path(tasks_dir)) if names else None
    permissions = Permissions(allow_pickle, trust_remote_code)
    sources = [permissions.find(each) for each in (model, against) if each is not None]
    with ExitStack() as scratch:
        sources = [_unpacked(each, scratch, tick) for each in sources]
        checkpoints = [each.checkpoint() for each in sources]  # transformers would read the weights, whatever they are
        passes = DTYPES.get(dtype) or reduce(
            torch.promote_types, (pass_dtype(each.dtype, place) for each in checkpoints)
        )
        found = Evaluation(model=str(model), against=None if against is None else str(against), device=str(place))
        if (added := LowRankAdapter.beside(sources[0].folder)) is not None:
            found = replace(found, low_rank=added.weights)
        if known is not None:
            for source, checkpoint in zip(sources, checkpoints, strict=True):
                if memory is not None:
                    require_tasks_fit(source.folder, whole_bytes(checkpoint, passes), memory)
            lineage, fault = lineage_of(sources[0].folder)
            found = replace(found, warnings=tuple(filter(None, (fault, trained_on(lineage)))))
        if data is not None:
            # Before the tokenizer, which a folder that is no model lacks too.
            opened = [_open(*each, place, passes) for each in zip(sources, checkpoints, strict=True)]
            tokenizers = [each.tokenizer() for each in sources]
            if len(opened) == 2:
                _check_same_tokens(*opened, *tokenizers)
            length = _window_length(data, seqlen, opened[0].max_length, model)
            cut = data if isinstance(data, Windows) else load_windows(data, tokenizers[0], length, windows, bos)
            found = _with_text(found, cut, opened, Passes(batch_size, memory, warn, tick), kept)
        found = replace(found, seconds=time.perf_counter() - begin)
        if known is not None:
            if found.perplexity is not None:
                keep(found)
            settings = TaskSettings(limit, place, passes, batch_size, trust_remote_code)
            dense = sources[1].folder if against is not None else None
            results = evaluate_tasks(sources[0].folder, known, settings, against=dense, tick=tick)
            found = replace(found, tasks=results, seconds=time.perf_counter() - begin)
        return found


def check_request(
    data: str | Windows | None,
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    tasks: str | Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    batch_size: int | None = None,
    memory_limit: int | str | None = None,
    bos: str = "auto",
    **others: Any,
) -> tuple[Sequence[str], int | None]:
    """Check settings of :func:`evaluate` before anything is opened; ``others`` need no check here.

    Returns:
        The tasks, and the memory limit in bytes.

    Raises:
        FistaPrunerError: nothing to measure, no such text, a setting without effect, or one out of range.
        MissingExtraError: the text needs the extra ``data``.
    """
    for name, given, what in (
        ("data", data, "a text, such as wikitext2 or a .txt file"),
        ("tasks_dir", tasks_dir, "a folder of .jsonl tasks"),
    ):
        if given == "":
            raise FistaPrunerError(f"{name} '' is empty: name {what}, or leave it out")
    if tasks_dir is not None:
        tasks_dir = path_text("tasks_dir", tasks_dir, A_FOLDER)
    tasks = [tasks] if isinstance(tasks, str) else tasks or ([] if tasks_dir is None else ["all"])
    if not (isinstance(tasks, Sequence) and all(isinstance(task, str) for task in tasks)):
        raise FistaPrunerError(f"tasks {tasks!r}: a name, or a list of names, is expected")
    if data is None and not tasks:
        raise FistaPrunerError(
            "nothing to evaluate: give data for perplexity (wikitext2, ptb, c4, python or a file) or tasks"
        )
    if data is not None and not isinstance(data, Windows):
        check_data(data)
    for name, value in (("seqlen", seqlen), ("windows", windows), ("bos", None if bos == "auto" else bos)):
        if data is None and value is not None:
            raise FistaPrunerError(f"{name} {value!r}: for windows of text, and no text is measured: give data")
        if isinstance(data, Windows) and value is not None:
            raise FistaPrunerError(f"{name} {value!r}: data are windows that are cut already: leave it out")
    if limit is not None and not tasks:
        raise FistaPrunerError(f"limit {limit!r}: items of zero-shot tasks, and no tasks are given")
    if dtype != "auto" and not (isinstance(dtype, str) and dtype in DTYPES):
        raise FistaPrunerError(f"dtype {dtype!r} is not known: auto, {', '.join(DTYPES)}")
    check_count("seqlen", seqlen, 2)
    for name, count in (("windows", windows), ("limit", limit), ("batch_size", batch_size)):
        check_count(name, count)
    try:
        return tasks, None if memory_limit is None else parse_bytes(str(memory_limit))
    except ValueError as error:
        raise FistaPrunerError(f"memory_limit: {error}") from None


def _unpacked(source: ModelSource, scratch: ExitStack, tick: Tick) -> ModelSource:
    """Unpack a packed model into a temporary folder that ``scratch`` removes; return others as they are."""
    if not is_packed(source.folder):
        return source
    folder = Path(scratch.enter_context(temporary_folder())) / source.folder.name
    return source.permissions.at(unpack(source.folder, folder, progress=tick))


def _with_text(
    found: Evaluation, cut: Windows, models: list[LayerwiseModel], passes: Passes, kept: KeptStates | None
) -> Evaluation:
    """Add perplexity on windows to an evaluation; with a second model its own, and the divergence from it."""
    start = time.perf_counter()
    sums = score_windows(models[0], cut.tokens, passes, models[1] if models[1:] else None, kept)
    about = partial(
        perplexity_of,
        length=sums.length,
        data=cut.data,
        split=cut.split,
        seqlen=cut.seqlen,
        bos=cut.bos,
        sha256=cut.sha256,
        dtype=dtype_name(models[0].dtype),
    )
    found = replace(found, perplexity=about(sums.nll), forward_seconds=time.perf_counter() - start)
    if sums.reference_nll is None:
        return found
    return replace(found, reference=about(sums.reference_nll), divergence=divergence_of(sums))


def _window_length(data: str | Windows, seqlen: int | None, longest: int | None, model: str | Path) -> int:
    """Choose the tokens of a window.

    Args:
        data: the text, or windows that have their length.
        seqlen: as the user asks; None is the default.
        longest: text of the model, in tokens; None where its config states none.
        model: as the user named it, for the message.

    Raises:
        FistaPrunerError: more tokens than the model was made for.
    """
    default = min(longest or LONGEST_DEFAULT, LONGEST_DEFAULT)
    length = data.seqlen if isinstance(data, Windows) else seqlen or default
    if longest is not None and length > longest:
        raise FistaPrunerError(f"seqlen {length} is more than the {longest} tokens {model} was made for")
    return length


def _open(source: ModelSource, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> LayerwiseModel:
    """Open a model for layer-by-layer passes, with the low-rank part that belongs to it."""
    model = LayerwiseModel(checkpoint, device, dtype, trust_remote_code=source.trust_remote_code)
    model.low_rank = LowRankAdapter.beside(source.folder)
    return model


def _check_same_tokens(
    model: LayerwiseModel, reference: LayerwiseModel, tokenizer: Any, reference_tokenizer: Any
) -> None:
    """Refuse two models that do not predict the same tokens."""
    ours, theirs = model.vocabulary, reference.vocabulary
    if ours != theirs or tokenizer.get_vocab() != reference_tokenizer.get_vocab():
        raise FistaPrunerError(
            f"{model.checkpoint.folder} and {reference.checkpoint.folder} do not share a vocabulary "
            f"({ours} and {theirs} tokens): only a model and what was made of it can be compared"
        )

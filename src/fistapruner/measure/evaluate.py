"""Measure perplexity, divergence from the dense model and zero-shot tasks: ``fistapruner.evaluate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from ..errors import A_FOLDER, A_MODEL, FistaPrunerError, explain, path_text
from ..models.build import ROOM, require_whole, whole_bytes
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.source import Permissions
from ..packed.pack import unpacked
from ..runs.lineage import lineage_of, trained_on
from ..runs.records import Evaluation
from ..runtime.devices import choose_device, cpu_threads, usable_threads
from ..runtime.numerics import DTYPES, dtype_name, pass_dtype, undisturbed
from ..runtime.show import Tick, silent
from ..settings.parse import parse_bytes
from .data import Windows, check_data, load_windows
from .logits import divergence_of, perplexity_of
from .streaming import KeptStates, Passes, score_windows
from .tasks import TaskSettings, evaluate_tasks, find_tasks

LONGEST_DEFAULT = 2048
"""Default length of a window: the model's maximum, at most this."""


@undisturbed()
@cpu_threads(usable_threads())
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
    kept: KeptStates | None = None,
) -> Evaluation:
    """Measure a model, alone or against the dense one on the same tokens.

    Perplexity streams: it reads one decoder layer at a time, so the model may be larger than memory. Zero-shot tasks
    load the whole model.

    Args:
        model: hub id, local folder, GGUF file, or ``smollm2``; a packed one is unpacked into a temporary folder.
        data: text for perplexity, as for :func:`~.data.load_windows`, or windows that were cut before, by the models'
            tokenizer; None measures tasks only.
        seqlen: tokens in a window; default is the model's maximum, at most 2048. A perplexity depends on it.
        windows: take only this many, from the start.
        against: the dense model; adds its perplexity, KL divergence, top-1 agreement and paired tests.
        tasks: names of zero-shot tasks of ``lm-eval``, or of those in ``tasks_dir``.
        tasks_dir: folder of ``.yaml`` files that define tasks for ``lm-eval``; without ``tasks`` all are taken.
        limit: take only this many items of each task, from the start.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        dtype: precision of the forward passes; ``auto`` is the checkpoint's own, or fp32 on CPUs without matrix units
            for it; of two models the wider one, for both.
        batch_size: windows in one forward pass.
        memory_limit: main memory to use, in bytes or as ``8GiB``, by default what is free: hidden states that take more
            than half of it are stored in a temporary file. Tasks are refused on a model that it does not hold.
        bos: where BOS tokens stand, as for :func:`~.data.load_windows`: ``auto``, ``none``, ``text`` or ``window``.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with a checkpoint.
        tick: called with progress: (what, steps done, steps in all).
        keep: called with what is measured before the tasks begin, so that it is not lost if they fail.
        kept: hidden states of one of the models on this text, from earlier evaluations.

    Raises:
        FistaPrunerError: bad input, named before any long work.
        MissingExtraError: a data set needs the extra ``data``, tasks need the extra ``eval``.
    """
    tick = tick or silent
    against = None if against is None else path_text("against", against, A_MODEL)
    given = {"seqlen": seqlen, "windows": windows, "bos": bos, "limit": limit, "dtype": dtype, "batch_size": batch_size}
    folder = None if tasks_dir is None else Path(path_text("tasks_dir", tasks_dir, A_FOLDER))
    names = [tasks] if isinstance(tasks, str) else tasks
    data = str(data) if isinstance(data, Path) else data
    if data is not None and not isinstance(data, Windows):
        check_data(data)
    asked = _checked(isinstance(data, str), folder is not None, tasks=names, memory_limit=memory_limit, **given)
    if data is None and folder is None and not asked.tasks:
        raise FistaPrunerError(
            "nothing to evaluate: give data for perplexity (wikitext2, ptb, c4, python or a file) or tasks"
        )
    begin = time.perf_counter()
    place = choose_device(device)
    known = find_tasks(asked.tasks, folder) if asked.tasks or folder is not None else None
    permissions = Permissions(allow_pickle, trust_remote_code)
    with ExitStack() as scratch:
        folders = [permissions.find(each).folder for each in (model, against) if each is not None]
        sources = [permissions.at(scratch.enter_context(unpacked(folder, tick))) for folder in folders]
        checkpoints = [each.checkpoint() for each in sources]  # transformers would read the weights, whatever they are
        passes = DTYPES.get(dtype) or reduce(
            torch.promote_types, (pass_dtype(each.dtype, place) for each in checkpoints)
        )
        found = Evaluation(model=str(model), against=None if against is None else str(against), device=str(place))
        low_rank = [LowRankAdapter.beside(each.folder) for each in sources]
        if low_rank[0] is not None:
            found = replace(found, low_rank=low_rank[0].weights)
        if known is not None:
            for checkpoint in checkpoints if asked.memory_limit is not None else ():
                nbytes = int(whole_bytes(checkpoint, passes) / ROOM)
                require_whole(
                    nbytes, torch.device("cpu"), asked.memory_limit, f"--tasks on {checkpoint.folder}", "leave it out"
                )
            if (warning := trained_on(lineage_of(sources[0].folder))) is not None:
                found = replace(found, warnings=(warning,))
        if data is not None:
            # Before the tokenizer, which a folder that is no model lacks too.
            opened = [LayerwiseModel(each, place, passes, trust_remote_code=trust_remote_code) for each in checkpoints]
            for layerwise, part in zip(opened, low_rank, strict=True):
                layerwise.low_rank = part
            tokenizers = [each.tokenizer() for each in sources]
            _check_same_tokens(opened, tokenizers)
            longest = opened[0].max_length
            default = min(longest or LONGEST_DEFAULT, LONGEST_DEFAULT)
            length = data.seqlen if isinstance(data, Windows) else seqlen or default
            if longest is not None and length > longest:
                raise FistaPrunerError(f"seqlen {length} is more than the {longest} tokens {model} was made for")
            cut = data if isinstance(data, Windows) else load_windows(data, tokenizers[0], length, windows, bos)
            found = _with_text(found, cut, opened, Passes(batch_size, asked.memory_limit, tick), kept)
        found = replace(found, seconds=time.perf_counter() - begin)
        if known is not None:
            if found.perplexity is not None:
                keep(found)
            settings = TaskSettings(limit, place, passes, batch_size, trust_remote_code)
            dense = sources[1].folder if against is not None else None
            results = evaluate_tasks(sources[0].folder, known, settings, against=dense, tick=tick)
            found = replace(found, tasks=results, seconds=time.perf_counter() - begin)
        return found


class _Request(BaseModel):
    """Settings of :func:`evaluate` that users write."""

    model_config = ConfigDict(strict=True)
    tasks: list[str] = Field(strict=False)
    seqlen: int | None = Field(None, ge=2)
    windows: PositiveInt | None = None
    bos: Literal["auto", "none", "text", "window"] = "auto"
    limit: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: PositiveInt | None = None
    memory_limit: Annotated[
        int | None, BeforeValidator(lambda size: None if size is None else parse_bytes(str(size)))
    ] = None


def _checked(text: bool, folder: bool, **settings: Any) -> _Request:
    """Check settings before anything is opened.

    Args:
        text: there is a text to cut; ``folder``: there is a folder of tasks.
        **settings: fields of the request.

    Raises:
        FistaPrunerError: names a setting that is out of range or has no effect.
    """
    try:
        asked = _Request(**settings)
    except ValidationError as error:
        raise FistaPrunerError(explain(error)) from None
    tasks = folder or bool(asked.tasks)
    needed = {"seqlen": ("text to cut", text), "windows": ("text to cut", text), "limit": ("task", tasks)}
    for name, (what, there) in needed.items():
        if (value := getattr(asked, name)) is not None and not there:
            raise FistaPrunerError(f"{name} {value} has no effect, because no {what} is given: leave it out")
    return asked


def _with_text(
    found: Evaluation, cut: Windows, models: list[LayerwiseModel], passes: Passes, kept: KeptStates | None
) -> Evaluation:
    """Add perplexity on windows to an evaluation; with a second model its own, and the divergence from it."""
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
    found = replace(found, perplexity=about(sums.nll))
    if sums.reference_nll is None:
        return found
    return replace(found, reference=about(sums.reference_nll), divergence=divergence_of(sums))


def _check_same_tokens(models: Sequence[LayerwiseModel], tokenizers: Sequence[Any]) -> None:
    """Refuse two models that do not predict the same tokens."""
    sizes, words = [each.vocabulary for each in models], [each.get_vocab() for each in tokenizers]
    if sizes[0] != sizes[-1] or words[0] != words[-1]:
        raise FistaPrunerError(
            f"{' and '.join(str(each.checkpoint.folder) for each in models)} do not share a vocabulary "
            f"({sizes[0]} and {sizes[-1]} tokens): only a model and what was made of it can be compared"
        )

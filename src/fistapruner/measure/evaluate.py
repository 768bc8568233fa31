"""Measure a model: perplexity, divergence from the dense model and zero-shot tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..errors import A_MODEL, FistaPrunerError, explain, path_text
from ..models.build import ROOM, require_whole, whole_bytes
from ..models.layers import LayerwiseModel
from ..models.low_rank import LowRankAdapter
from ..models.source import Permissions
from ..packed.pack import unpacked
from ..runs.lineage import lineage_of, trained_on
from ..runs.records import Evaluation
from ..runtime.devices import choose_device, cpu_threads
from ..runtime.numerics import DTYPES, pass_dtype, undisturbed
from ..runtime.show import Tick, silent
from ..settings.parse import Size
from ..text.windows import window_length
from .data import Windows, check_data, load_windows
from .logits import KeptStates, divergence_of, perplexity_of, score_windows
from .tasks import evaluate_tasks, find_tasks

Names = Annotated[list[str], BeforeValidator(lambda names: [names] if isinstance(names, str) else names)]


class Asked(BaseModel):
    """Settings of :func:`evaluate`, as ``fistapruner evaluate --help`` describes them.

    ``data`` may also be windows that were cut before, by the models' tokenizer.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    data: str | InstanceOf[Windows] | None
    seqlen: int | None = Field(None, ge=2)
    windows: PositiveInt | None = None
    bos: Literal["auto", "none", "text", "window"] = "auto"
    tasks: Names = Field([], strict=False)
    tasks_dir: Path | None = Field(None, strict=False)
    limit: PositiveInt | None = None
    device: Any = "auto"  # checked where it is chosen
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: PositiveInt | None = None
    memory_limit: Size = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @property
    def scores_tasks(self) -> bool:
        """Whether any tasks are asked for."""
        return bool(self.tasks) or self.tasks_dir is not None

    @model_validator(mode="after")
    def _have_effect(self) -> Self:
        """Refuse a setting that changes nothing, and a call that measures nothing."""
        if self.data is None and not self.scores_tasks:
            raise ValueError(
                "nothing to evaluate: give data for perplexity (wikitext2, ptb, c4, python or a file) or tasks"
            )
        unused = [] if isinstance(self.data, str) else [("seqlen", "text to cut"), ("windows", "text to cut")]
        unused += [] if self.scores_tasks else [("limit", "task")]
        for name, what in unused:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} {value} has no effect, because no {what} is given: leave it out")
        return self


@undisturbed()
@cpu_threads()
def evaluate(
    model: str | Path,
    data: str | Path | Windows | None = None,
    *,
    against: str | Path | None = None,
    tick: Tick = silent,
    keep: Callable[[Evaluation], None] = lambda found: None,
    kept: KeptStates | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a model, alone or against the dense one on the same tokens.

    Perplexity reads one decoder layer at a time; tasks load the whole model.

    Args:
        model: hub id, local folder, GGUF file, or ``smollm2``; a packed one is unpacked into a temporary folder.
        data: text for perplexity; see :class:`Asked`.
        against: the dense model; adds its perplexity, KL divergence, top-1 agreement and paired tests.
        tick: called with progress: (what, steps done, steps in all).
        keep: called with what is measured before the tasks begin, so that it is not lost if they fail.
        kept: hidden states of one of the models on this text, from earlier evaluations.
        **settings: the other fields of :class:`Asked`.
    """
    against = None if against is None else path_text("against", against, A_MODEL)
    data = str(data) if isinstance(data, Path) else data
    if data is not None and not isinstance(data, Windows):
        check_data(data)
    try:
        asked = Asked(data=data, **settings)
    except ValidationError as error:
        raise FistaPrunerError(explain(error, Asked)) from None
    begin = time.perf_counter()
    place = choose_device(asked.device)
    known = find_tasks(asked.tasks, asked.tasks_dir) if asked.scores_tasks else None
    permissions = Permissions(asked.allow_pickle, asked.trust_remote_code)
    with ExitStack() as scratch:
        folders = [permissions.find(each).folder for each in (model, against) if each is not None]
        sources = [permissions.at(scratch.enter_context(unpacked(folder, tick))) for folder in folders]
        checkpoints = [each.checkpoint() for each in sources]  # transformers would read the weights, whatever they are
        stored = (pass_dtype(each.dtype, place) for each in checkpoints)
        dtype = DTYPES.get(asked.dtype) or reduce(torch.promote_types, stored)
        low_rank = [LowRankAdapter.beside(each.folder) for each in sources]
        found = Evaluation(str(model), against, device=str(place))
        if low_rank[0] is not None:
            found = replace(found, low_rank=low_rank[0].weights)
        if known is not None:
            for checkpoint in checkpoints if asked.memory_limit is not None else ():
                nbytes, option = int(whole_bytes(checkpoint, dtype) / ROOM), f"--tasks on {checkpoint.folder}"
                require_whole(nbytes, torch.device("cpu"), asked.memory_limit, option, "leave it out")
            if (warning := trained_on(lineage_of(sources[0].folder))) is not None:
                found = replace(found, warnings=(warning,))
        if asked.data is not None:
            # Before the tokenizer, which a folder that is no model lacks too.
            opened = [
                LayerwiseModel(each, place, dtype, trust_remote_code=asked.trust_remote_code) for each in checkpoints
            ]
            tokenizers = [each.tokenizer() for each in sources]
            words = [each.get_vocab() for each in tokenizers]
            if opened[0].vocabulary != opened[-1].vocabulary or words[0] != words[-1]:
                raise FistaPrunerError(
                    f"{' and '.join(str(each.checkpoint.folder) for each in opened)} do not share a vocabulary "
                    f"({opened[0].vocabulary} and {opened[-1].vocabulary} tokens): only a model and what was made of "
                    "it can be compared"
                )
            cut = asked.data
            if isinstance(cut, str):
                length = window_length(asked.seqlen, opened[0])
                cut = load_windows(cut, tokenizers[0], length, asked.windows, asked.bos)
            for layerwise, part in zip(opened, low_rank, strict=True):
                layerwise.low_rank = part
            limits = asked.model_dump(include={"batch_size", "memory_limit"})
            sums = score_windows(opened[0], cut.tokens, *opened[1:], **limits, kept=kept, tick=tick)
            found = replace(found, perplexity=perplexity_of(sums[0], cut, dtype))
            if opened[1:]:
                divergence = divergence_of(sums, cut.seqlen - 1)
                found = replace(found, reference=perplexity_of(sums[1], cut, dtype), divergence=divergence)
        found = replace(found, seconds=time.perf_counter() - begin)
        if known is not None:
            if found.perplexity is not None:
                keep(found)
            how = asked.model_dump(include={"limit", "batch_size", "trust_remote_code"})
            results = evaluate_tasks([each.folder for each in sources], known, place, dtype, tick=tick, **how)
            found = replace(found, tasks=results, seconds=time.perf_counter() - begin)
    return found

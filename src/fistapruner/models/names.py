"""Find the stored names of a model's tensors.

transformers loads checkpoints whose names it has changed since, and joins the matrices of experts, and some others, to
one tensor. Beside that a prefix may be missing or added, if it is the same one for all tensors. Every tensor that a
model has must be in its checkpoint with the same shape.

transformers' table of changes is semi-private and used in this file only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FistaPrunerError
from ..runtime.numerics import dtype_name
from .checkpoint import WEIGHT_DTYPES, Checkpoint

STACKED, JOINED = ["MergeModulelist"], ["MergeModulelist", "Concatenate"]
"""Operations by which transformers makes one tensor of the matrices of all experts, from one list or from several."""

CONCATENATED = ["Concatenate"]
"""Operation by which it makes one tensor of several, such as one convolution of three."""


@dataclass(frozen=True)
class StoredNames:
    """What a checkpoint calls the tensors of a model, by the model's names.

    Attributes:
        whole: parameters and buffers that are stored as they are, in the model's order.
        experts: of a tensor of all experts, for each matrix of an expert (gate and up, or down) its stored names, by
            number of the expert.
        joined: of other tensors the stored ones that make one, joined along their first dimension.
    """

    whole: dict[str, str]
    experts: dict[str, list[list[str]]]
    joined: dict[str, list[str]]


def stored_names(model: Any, stored: Collection[str]) -> StoredNames:
    """Find what a checkpoint calls the parameters and persistent buffers of a model.

    Base models are saved without the head model's prefix ("h.0.…" for "transformer.h.0.…"), and multi-part models with
    one more. Tensors that are not found are left out. The model may be on the meta device.
    """
    known: dict[str, str] = {name: name for name in stored}
    experts: defaultdict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    joined: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for name, today, kind, number in _as_loaded(model, stored):
        if kind is None:
            known[today] = name
        elif kind == CONCATENATED:
            joined[today][number] = name
        elif numbers := re.findall(r"\.(\d+)(?=\.)", name):
            experts[today][number, int(numbers[-1])] = name
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    wanted = list(model.state_dict(keep_vars=True))
    place = _common_prefix(
        [name for name in wanted if name not in tied], {*known, *experts, *joined}, model.base_model_prefix + "."
    )
    return StoredNames(
        {name: known[place(name)] for name in wanted if place(name) in known},
        {name: lists for name in wanted if (lists := _numbered(experts.get(place(name), {})))},
        {name: [part for _, part in sorted(joined[place(name)].items())] for name in wanted if place(name) in joined},
    )


def _as_loaded(model: Any, stored: Collection[str]) -> Iterator[tuple[str, str, list[str] | None, int]]:
    """Yield of every stored tensor its name, that of the model's tensor, and how it is a part of that.

    A part has the operations that join the parts, and its place among them. If transformers has no such table, nothing
    is yielded, and an error names the tensors that are not found.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters, places = [], dict[str, tuple[list[str], int]]()
        for change in (change for change in changes if isinstance(change, WeightConverter)):
            kind = [type(operation).__name__ for operation in change.operations]
            if kind in (STACKED, JOINED) or (kind == CONCATENATED and not change.operations[0].dim):
                converters.append(change)
                places |= {pattern: (kind, number) for number, pattern in enumerate(change.source_patterns)}
        for name in stored:
            today, pattern = rename_source_key(name, renamings, converters)
            yield name, today, *places.get(pattern, (None, 0))
    except (ImportError, AttributeError, TypeError):
        return


def _common_prefix(wanted: Collection[str], known: Collection[str], base: str) -> Callable[[str], str]:
    """Find the change of prefixes by which most of the model's names are known: no other one, if all are.

    Any other prefix than ``base``, that of the base model, is one by which all are known, and the only such one.
    """

    def lost(way: tuple[str, str]) -> int:
        return sum(way[1] + name.removeprefix(way[0]) not in known for name in wanted)

    best = min((("", ""), (base, ""), ("", base)), key=lost)
    for cut in ("", base) if lost(best) else ():
        end = "." + next(iter(wanted)).removeprefix(cut)
        ways = {(cut, each.removesuffix(end) + ".") for each in known if each.endswith(end)}
        if len(fitting := [way for way in ways if not lost(way)]) == 1:
            (best,) = fitting
            break
    return lambda name: best[1] + name.removeprefix(best[0])


def _numbered(parts: Mapping[tuple[int, int], str]) -> list[list[str]]:
    """Return the names of experts' matrices by place and number; empty where one is missing."""
    places, numbers = ({key[side] for key in parts} for side in (0, 1))
    if len(places) * len(numbers) != len(parts) or numbers != set(range(len(numbers))):
        return []
    return [[parts[place, number] for number in sorted(numbers)] for place in sorted(places)]


def checkpoint_names(
    model: Any, checkpoint: Checkpoint, names: Mapping[str, str], joined: Mapping[str, list[str]]
) -> dict[str, str]:
    """Map every parameter and persistent buffer of a model to its name in the checkpoint.

    A tied output head has no entry: it is the embedding's. One that is stored with values of its own is not tied, as
    in transformers, whatever the config says. Stored ``names`` and ``joined`` are those of :class:`StoredNames`.
    """
    tensors = model.state_dict(keep_vars=True)
    twins: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}  # of tied tensors one is stored

    def source(name: str) -> str | None:
        first = twins.get(name, name)
        others = (other for other, twin in twins.items() if twin == first)
        return next((names[each] for each in (name, first, *others) if each in names), None)

    sources = {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = bool(getattr(model.config, "tie_word_embeddings", False)) and head is not None and embedding is not None
    for name, tensor in tensors.items():
        found = source(name)
        if shared and tensor is head.weight and tensor is not embedding.weight:
            embedded = next((source(each) for each, other in tensors.items() if other is embedding.weight), None)
            if found is None or embedded is None or checkpoint.same(found, embedded):
                continue
        if found is None and name in joined and tensor.ndim > 2:  # no operator, so it is only read
            found = checkpoint.join(joined[name])
        fault = None
        if found is None:
            fault = f"of {type(model).__name__} is not in it"
        elif (entry := checkpoint.entry(found)).shape != tuple(tensor.shape):
            fault = f"is {entry.shape}, the config asks for {tuple(tensor.shape)}"
        elif tensor.is_floating_point() and entry.dtype not in WEIGHT_DTYPES:
            fault = (
                f"is stored as {dtype_name(entry.dtype)}, no dtype of dense weights (float32, bfloat16, float16, "
                "float64): the checkpoint is quantised or damaged; prune the unquantised one"
            )
        if found is None or fault:
            raise FistaPrunerError(f"{checkpoint.folder}: tensor {found or name!r} {fault}")
        sources[name] = found
    return sources

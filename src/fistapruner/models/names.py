"""Find the stored names of a model's tensors: other prefixes, and names that transformers changed.

Every tensor that a model has must be in its checkpoint with the same shape (:func:`checkpoint_names`).

transformers' table of changed names is semi-private and used in this file only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..errors import FistaPrunerError
from ..runtime.numerics import dtype_name
from .files.checkpoint import WEIGHT_DTYPES, Checkpoint

STACKED, JOINED = ["MergeModulelist"], ["MergeModulelist", "Concatenate"]
"""Operations by which transformers makes one tensor of the matrices of all experts, from one list or from several."""

CONCATENATED = ["Concatenate"]
"""Operation by which it makes one tensor of several, such as one convolution of three."""

NO_NAMES: Mapping[str, str] = MappingProxyType({})


def checkpoint_names(model: Any, checkpoint: Checkpoint, known: Mapping[str, str] = NO_NAMES) -> dict[str, str]:
    """Map every parameter and persistent buffer of a model to its name in the checkpoint.

    A tied output head has no entry: it is the embedding's. One that is stored with values of its own is not tied, as
    in transformers, whatever the config says.

    Args:
        model: the model.
        checkpoint: the checkpoint.
        known: stored names that were found already, by the model's name.

    Raises:
        FistaPrunerError: a tensor is missing, has another shape than the config says, or is quantised.
    """
    names = stored_names(model, checkpoint.names(), known) | dict(known)
    joined = joined_sources(model, checkpoint.names())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    sources: dict[str, str] = {}
    missing: list[str] = []
    twins: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}  # of tied tensors one is stored
    tensors = model.state_dict(keep_vars=True)

    def source(name: str) -> str | None:
        first = twins.get(name, name)
        others = (other for other, twin in twins.items() if twin == first)
        return next((names[each] for each in (name, first, *others) if each in names), None)

    for name, tensor in tensors.items():
        found = source(name)
        is_head = (
            head is not None and tensor is head.weight and embedding is not None and head.weight is not embedding.weight
        )
        if is_head and tied:
            embedded = next((source(each) for each, other in tensors.items() if other is embedding.weight), None)
            if found is None or embedded is None or checkpoint.same(found, embedded):
                continue
        if found is None and name in joined and tensor.ndim > 2:  # no operator, so it is only read
            found = checkpoint.join(joined[name])
        if found is None:
            missing.append(name)
            continue
        entry, expected = checkpoint.entry(found), tuple(tensor.shape)
        if entry.shape != expected:
            raise FistaPrunerError(
                f"{checkpoint.folder}: tensor {found!r} is {entry.shape}, the config asks for {expected}"
            )
        if tensor.is_floating_point() and entry.dtype not in WEIGHT_DTYPES:
            raise FistaPrunerError(
                f"{checkpoint.folder}: tensor {found!r} is stored as {dtype_name(entry.dtype)}, no dtype of dense "
                "weights (float32, bfloat16, float16, float64): the checkpoint is quantised or damaged; prune the "
                "unquantised one"
            )
        sources[name] = found
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FistaPrunerError(
            f"{checkpoint.folder}: tensor {missing[0]!r}{more} of {type(model).__name__} is not in it"
        )
    return sources


def parameter_names(
    model: Any, sources: Mapping[str, str], checkpoint: Checkpoint, same: Callable[[str, str], bool]
) -> set[str]:
    """List the stored tensors that hold parameters of a model: no buffers, and each shared one once.

    Args:
        model: the model.
        sources: stored names of its tensors, by the model's name.
        checkpoint: the checkpoint.
        same: compares two stored tensors: a tied one may be stored twice.
    """
    twins: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found: set[str] = set()
    for name, _ in model.named_parameters():
        source, first = sources.get(name), sources.get(twins.get(name, name))
        if source is not None and (first in (None, source) or not same(source, first)):
            found.update(checkpoint.whole(source))
    return found


def stored_names(model: Any, stored: Collection[str], skipped: Container[str] = ()) -> dict[str, str]:
    """Find the checkpoint's name of every parameter and persistent buffer of a model.

    Base models are saved without the head model's prefix ("h.0.…" for "transformer.h.0.…"), and multi-part models with
    one more: a prefix may be missing or added, if it is the same one for all tensors.

    Args:
        model: transformers model, may be on the meta device.
        stored: tensor names in a checkpoint.
        skipped: names of the model's tensors that are not looked for; a mixture has tens of thousands.

    Returns:
        The stored name by the model's name, for all that were found, in the model's order.
    """
    known = {name: name for name in stored} | _renamed(model, stored)
    base = model.base_model_prefix + "."
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    wanted = [name for name in model.state_dict(keep_vars=True) if name not in skipped]
    names = {}
    for name in wanted:
        candidates = (name, name.removeprefix(base), base + name)
        if (place := next((known[each] for each in candidates if each in known), None)) is not None:
            names[name] = place
    lost = [name for name in wanted if name not in names and name not in tied]
    if not lost or any(name.startswith(base) for name in names):
        return names
    for start in ("", base):
        ends = {name: "." + name.removeprefix(start) for name in wanted}
        prefixes = {each.removesuffix(ends[lost[0]]) for each in known if each.endswith(ends[lost[0]])}
        fitting = [prefix for prefix in prefixes if all(prefix + ends[name] in known for name in lost)]
        if len(fitting) == 1:
            places = {name: known.get(fitting[0] + end) for name, end in ends.items() if name not in names}
            return names | {name: place for name, place in places.items() if place is not None}
    return names


def _renamed(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Map today's name of every stored tensor that transformers renames to its stored name.

    If transformers has no such table, renamed tensors are not found, and the error names them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
        names = {}
        for old in stored:
            new = old
            for change in renamings:
                new, _ = change.rename_source_key(new)
            if new != old:
                names[new] = old
        return names
    except (ImportError, AttributeError, TypeError):
        return {}


def expert_sources(model: Any, stored: Collection[str]) -> dict[str, list[list[str]]]:
    """Find the stored matrices that transformers joins to one tensor of all experts.

    If transformers has no such table, or joins them in another way, they are not found.

    Args:
        model: transformers model, may be on the meta device.
        stored: tensor names in a checkpoint.

    Returns:
        By the model's name of the joined tensor: for each matrix of an expert (gate and up, or down) its stored names,
        by number of the expert.
    """
    found: defaultdict[str, defaultdict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name, joined, place in _parts(model, stored, (STACKED, JOINED)):
        if numbers := re.findall(r"\.(\d+)(?=\.)", name):
            found[joined][place][int(numbers[-1])] = name
    complete = {}
    for joined, lists in found.items():
        numbered = [list(map(experts.get, range(len(experts)))) for _, experts in sorted(lists.items())]
        if all(name is not None for experts in numbered for name in experts):
            complete[joined] = [[str(name) for name in experts] for experts in numbered]
    return complete


def joined_sources(model: Any, stored: Collection[str]) -> dict[str, list[str]]:
    """Find the stored tensors that transformers joins along their first dimension, by the model's name.

    Arguments as for :func:`expert_sources`.
    """
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for name, joined, place in _parts(model, stored, (CONCATENATED,)):
        found[joined][place] = name
    return {joined: [names[place] for place in sorted(names)] for joined, names in found.items()}


def _parts(model: Any, stored: Collection[str], kinds: Collection[Sequence[str]]) -> Iterator[tuple[str, str, int]]:
    """Yield (stored name, name of the model's tensor that it is a part of, place among the parts).

    Args:
        model: transformers model.
        stored: tensor names in a checkpoint.
        kinds: names of the operations that join the parts.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [
            change
            for change in changes
            if isinstance(change, WeightConverter)
            and [type(operation).__name__ for operation in change.operations] in kinds
            and not (kinds == (CONCATENATED,) and change.operations[0].dim)
        ]
        places = {pattern: place for change in converters for place, pattern in enumerate(change.source_patterns)}
        known, prefix = set(model.state_dict(keep_vars=True)), model.base_model_prefix + "."
        for name in stored:
            joined, pattern = rename_source_key(name, renamings, converters)
            joined = next((key for key in (joined, joined.removeprefix(prefix), prefix + joined) if key in known), "")
            if pattern is not None and joined:
                yield name, joined, places[pattern]
    except (ImportError, AttributeError, TypeError):
        return

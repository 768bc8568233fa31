"""Compute the answers' log-probabilities under reference models once, and cache them in a file.

A reference enters a preference loss as two numbers a pair: the log-probabilities of both answers, summed over their
tokens in fp64. The file has, for each reference, tensors ``NAME.chosen`` and ``NAME.rejected`` (pairs,), NaN where a
pair was not asked for, and in its metadata what decides them: the tokens, the weight files, the precision.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..activations.store import Store
from ..activations.stream import Variants
from ..calibration.pairs import Pairs
from ..errors import FistaPrunerError
from ..models.files.safetensors import SafetensorsFile, write_tensors
from ..models.layerwise import LayerwiseModel
from ..runtime.ranks import ALONE, Ranks
from .pair_objective import LIKELIHOOD, AnswerObjective


@dataclass(frozen=True)
class ReferenceModel:
    """A reference model.

    Args:
        open: opens the model, which is not needed where the file has its log-probabilities; None where it is gone.
        windows: of the pairs that are asked for.
        identity: what decides the log-probabilities, each by its name in messages.
    """

    open: Callable[[], LayerwiseModel | None]
    windows: Sequence[int]
    identity: Mapping[str, str]


def answer_log_probabilities(objective: AnswerObjective, windows: Sequence[int], variants: Variants) -> Tensor:
    """Compute the (variants, pairs, 2) summed log-probabilities of chosen and rejected answers, fp64."""
    sums = -objective.losses(windows, variants)
    return sums.view(len(sums), -1, 2)


def log_probabilities_by_parts(
    objective: AnswerObjective, windows: Sequence[int], variants: Variants, at_once: int
) -> Tensor:
    """Compute the (pairs, 2) log-probabilities under one variant, of at most ``at_once`` windows together."""
    places = {chosen: place for place, chosen in enumerate(windows[::2])}
    found = torch.zeros(len(places), 2, dtype=torch.float64)
    for part in _chunks(objective, windows, at_once):
        found[[places[chosen] for chosen in part[::2]]] = answer_log_probabilities(objective, part, variants)[0]
    return found


def reference_log_probabilities(
    path: Path,
    references: Mapping[str, ReferenceModel],
    text: Pairs,
    batch_size: int,
    store: Store,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
    at_once: int = 256,
) -> dict[str, Tensor]:
    """Return the (pairs, 2) log-probabilities under each reference, from the file where it has them.

    A reference that the file does not have, and whose model is gone, is left out.

    Args:
        path: of the file; what is missing in it is computed and added.
        references: by name.
        text: the pairs.
        batch_size: windows in one pass.
        store: makes the stores of hidden states between layers.
        say: receives sentences.
        ranks: the processes that compute together; rank 0 reads and writes.
        at_once: windows whose hidden states are kept at once.

    Raises:
        FistaPrunerError: the disk refuses.
    """
    kept = ranks.share(_read(path, references, say) if ranks.first else None)
    found = dict(kept)
    for name, reference in references.items():
        if name in kept or (model := reference.open()) is None:
            continue
        say(f"log-probabilities of {len(reference.windows) // 2} pairs under the {name} model")
        objective = AnswerObjective(model, text, LIKELIHOOD, None, batch_size, store, ranks=ranks)
        values = torch.full((len(text.tokens) // 2, 2), torch.nan, dtype=torch.float64)
        pairs = [window // 2 for window in reference.windows[::2]]
        values[pairs] = log_probabilities_by_parts(objective, reference.windows, lambda index, layer: [{}], at_once)
        found[name] = values
        if ranks.first:
            _write(path, references, found)
    return {name: found[name] for name in references if name in found}


def _chunks(objective: AnswerObjective, windows: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Yield the windows, pairs of like length together, at most so many at once."""
    pairs = sorted(windows[::2], key=lambda chosen: (objective.seqlen([chosen, chosen + 1]), chosen))
    size = max(1, at_once // 2)
    for start in range(0, len(pairs), size):
        yield [window for chosen in pairs[start : start + size] for window in (chosen, chosen + 1)]


def _read(path: Path, references: Mapping[str, ReferenceModel], say: Callable[[str], None]) -> dict[str, Tensor]:
    """Read the references that the file has and that have not changed; say why others are not used."""
    found: dict[str, Tensor] = {}
    if not path.exists():
        return found
    try:
        file = SafetensorsFile(path)
        for name, reference in references.items():
            if name not in file.metadata:
                continue
            before, now = json.loads(file.metadata[name]), reference.identity
            asked = [window // 2 for window in reference.windows[::2]]
            values = torch.stack([file.read(f"{name}.{answer}").clone() for answer in ("chosen", "rejected")], -1)
            if before.get("checksum") != _checksum(values):
                raise FistaPrunerError(f"the checksum of {name} is wrong")
            changed = [what for what in now if before.get(what) != now[what]]
            if not changed and bool(values[asked].isnan().any()):
                continue  # of fewer pairs
            if changed:
                say(f"log-probabilities of the {name} model are computed again: {' and '.join(changed)} changed")
                continue
            found[name] = values
    except (FistaPrunerError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"{path} is not used: {error}")
    return found


def _write(path: Path, references: Mapping[str, ReferenceModel], found: Mapping[str, Tensor]) -> None:
    tensors = {
        f"{name}.{answer}": values[:, place]
        for name, values in found.items()
        for place, answer in enumerate(("chosen", "rejected"))
    }
    metadata = {
        name: json.dumps({**references[name].identity, "checksum": _checksum(values)}) for name, values in found.items()
    }
    write_tensors(path, tensors, metadata)


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().numpy().data)

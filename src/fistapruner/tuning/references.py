"""Compute the answers' log-probabilities under reference models once, and cache them in a file.

A reference enters a preference loss as two numbers a pair: the log-probabilities of both answers, summed over their
tokens in fp64. The file has, for each reference, tensors ``NAME.chosen`` and ``NAME.rejected`` (pairs,), NaN where a
pair was not asked for or is not computed yet, and in its metadata what decides them: the tokens, the weight files, the
precision. Pairs are computed in the order of their lengths, so many at once, and the file is written now and then: a
run that was killed goes on with the next ones, and with the same bits.
"""

from __future__ import annotations

import json
import time
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
from ..runs.snapshots import LEAST_SECONDS
from ..runtime.progress import Tick, silent
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
) -> Iterator[tuple[list[int], Tensor]]:
    """Compute the log-probabilities under one variant, of at most ``at_once`` windows together.

    Yields:
        Numbers of some pairs, and their (pairs, 2) log-probabilities; pairs of like length come together.
    """
    chosen = sorted(windows[::2], key=lambda window: (objective.seqlen([window, window + 1]), window))
    size = max(1, at_once // 2)
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        both = [window for first in part for window in (first, first + 1)]
        yield [first // 2 for first in part], answer_log_probabilities(objective, both, variants)[0]


def reference_log_probabilities(
    path: Path,
    references: Mapping[str, ReferenceModel],
    text: Pairs,
    batch_size: int,
    store: Store,
    say: Callable[[str], None],
    at_once: int = 256,
    tick: Tick = silent,
) -> dict[str, Tensor]:
    """Return the (pairs, 2) log-probabilities under each reference, from the file where it has them.

    A reference that the file does not have, and whose model is gone, is left out.

    Args:
        path: of the file; the pairs that are missing in it are computed and added.
        references: by name.
        text: the pairs.
        batch_size: windows in one pass.
        store: makes the stores of hidden states between layers.
        say: receives sentences.
        at_once: windows whose hidden states are kept at once.
        tick: receives progress: (what, pairs done, pairs in all).

    Raises:
        FistaPrunerError: the disk refuses.
    """
    found = _read(path, references, say)
    gone: set[str] = set()
    for name, reference in references.items():
        values = _known(found, name, text)
        windows = _missing(values, reference.windows)
        if not windows:
            continue
        if (model := reference.open()) is None:
            gone.add(name)
            continue
        found[name], done, total = values, 0, len(windows) // 2
        say(f"log-probabilities of {total} pairs under the {name} model")
        objective = AnswerObjective(model, text, LIKELIHOOD, None, batch_size, store)
        written = time.monotonic()
        for pairs, sums in log_probabilities_by_parts(objective, windows, lambda index, layer: [{}], at_once):
            values[pairs] = sums
            done += len(pairs)
            if done == total or time.monotonic() - written > LEAST_SECONDS:
                _write(path, references, found)
                written = time.monotonic()
            tick(f"log-probabilities under the {name} model", done, total)
    return {name: found[name] for name in references if name in found and name not in gone}


def _known(found: Mapping[str, Tensor], name: str, text: Pairs) -> Tensor:
    """Return the (pairs, 2) log-probabilities under a reference, NaN where they are not known."""
    pairs = len(text.tokens) // 2
    values = found.get(name)
    return torch.full((pairs, 2), torch.nan, dtype=torch.float64) if values is None or len(values) != pairs else values


def _missing(values: Tensor, windows: Sequence[int]) -> list[int]:
    missing = values.isnan().any(1).tolist()
    return [window for window in windows if missing[window // 2]]


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
            values = torch.stack([file.read(f"{name}.{answer}").clone() for answer in ("chosen", "rejected")], -1)
            if before.get("checksum") != _checksum(values):
                raise FistaPrunerError(f"the checksum of {name} is wrong")
            changed = [what for what in now if before.get(what) != now[what]]
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

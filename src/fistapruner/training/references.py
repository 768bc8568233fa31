"""Compute the answers' log-probabilities under reference models once, and cache them in a file.

A reference enters a preference loss as two numbers a pair: the log-probabilities of both answers, summed over their
tokens in fp64. The file has a tensor (pairs, 2) for each reference, NaN for pairs that were not asked for, and in its
metadata what decides it: the tokens, the weight files, the precision.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.safetensors import SafetensorsFile, write_tensors
from ..text.pairs import Pairs
from .objective import LIKELIHOOD, AnswerObjective


@dataclass(frozen=True)
class ReferenceModel:
    """A reference model.

    Args:
        open: opens the model; None where it is gone.
        windows: of the pairs that are asked for.
        identity: what decides the log-probabilities.
    """

    open: Callable[[], LayerwiseModel | None]
    windows: Sequence[int]
    identity: str


def reference_log_probabilities(
    path: Path, references: Mapping[str, ReferenceModel], text: Pairs, batch_size: int, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Return the (pairs, 2) log-probabilities under each reference, from the file where it has them.

    A reference that the file does not have, and whose model is gone, is left out.

    Args:
        path: of the file, which is written again with what was missing.
        references: by name.
        text: the pairs.
        batch_size: windows in one pass.
        say: receives sentences.
    """
    found = _read(path, references)
    for name, reference in references.items():
        if name in found or (model := reference.open()) is None:
            continue
        say(f"log-probabilities of {len(reference.windows) // 2} pairs under the {name} model")
        values = torch.full((len(text.tokens) // 2, 2), torch.nan, dtype=torch.float64)
        with model.resident():
            objective = AnswerObjective(model, model.run, text, LIKELIHOOD, None, batch_size)
            values[[window // 2 for window in reference.windows[::2]]] = objective.log_probabilities(reference.windows)
        found[name] = values
        write_tensors(path, found, {each: _seal(references[each], values) for each, values in found.items()})
    return found


def _read(path: Path, references: Mapping[str, ReferenceModel]) -> dict[str, Tensor]:
    """Read the references that the file has and that have not changed."""
    try:
        file = SafetensorsFile(path)
        known = {name: file.read(name).clone() for name in references if name in file.entries}
        return {
            name: values for name, values in known.items() if file.metadata.get(name) == _seal(references[name], values)
        }
    except (FistaPrunerError, OSError):
        return {}


def _seal(reference: ReferenceModel, values: Tensor) -> str:
    """Say what decides the log-probabilities, and their checksum."""
    return f"{reference.identity} {zlib.crc32(values.contiguous().numpy().data)}"

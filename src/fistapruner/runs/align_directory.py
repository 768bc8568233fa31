"""The run directory of an alignment run: that of a recovery, with pairs and references.

RUN/
    windows.safetensors       the pairs: two windows each, which tokens carry loss, which pairs are held out or tested
    references.safetensors    log-probabilities of the answers (:mod:`fistapruner.training.references`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..text.pairs import Pairs
from ..text.training import TrainingText
from .training_directory import TrainingDirectory


class AlignDirectory(TrainingDirectory):
    """Paths and records of one alignment run.

    Args:
        folder: the run directory.
    """

    verb: ClassVar[str] = "align"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.references_file = folder / "references.safetensors"

    def own_files(self) -> tuple[Path, ...]:
        return (*super().own_files(), self.references_file)

    def tensors(self, text: TrainingText) -> dict[str, Tensor]:
        assert isinstance(text, Pairs)
        return {**super().tensors(text), "test": text.test}

    def made(self, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Pairs:
        return Pairs(**fields, test=tensors["test"].to(torch.bool))

"""The identity of a run: what decides its results, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import Checkpoint
from ..models.source import ModelSource
from ..runtime.files import json_sha256, sampled_sha256, sha256_file
from ..settings.settings import Recipe
from ..settings.training_settings import TrainingRecipe
from .decision import Numerics


def fingerprint(
    recipe: Recipe | TrainingRecipe, checkpoint: Checkpoint, tokens: Tensor, numerics: Numerics, *more: Any
) -> str:
    """Hash a run's settings, model files and tokens, and what decides the last bits.

    Args:
        recipe: all settings.
        checkpoint: the model that the run changes.
        tokens: (samples, seqlen) token ids of calibration or training.
        numerics: what decides the last bits.
        *more: what else decides the result, as JSON values.
    """
    identity = [recipe.fingerprint(), stamps(checkpoint), numerics.model_dump(), *more]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(tokens.to(torch.int64).contiguous().flatten().numpy().data)
    return digest.hexdigest()[:16]


def stamps(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Identify a checkpoint: a hash of its config, and for every weight file one of samples of its bytes."""
    weights = ((name, sampled_sha256(file.path)) for name, file in checkpoint.files.items())
    return [("config.json", json_sha256(checkpoint.config)), *weights]


def changed_files(before: Iterable[tuple[str, str]], source: ModelSource) -> str | None:
    """Say which file of a model is not what it was; None where all are.

    Args:
        before: its :func:`stamps` then.
        source: the model.

    Raises:
        FistaPrunerError: it cannot be opened.
    """
    old, new = dict(before), dict(stamps(source.checkpoint()))
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            was, now = (str(found.get(name, "missing"))[:12] for found in (old, new))
            return f"{source.folder / name} has changed: its checksum was {was} and is {now}"
    return None


def text_sha256(recipe: Recipe) -> str | None:
    """Hash the calibration files, several as one; None where there is none, or one is gone."""
    files = recipe.calibration.files
    if not files or not all(file.is_file() for file in files):
        return None
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

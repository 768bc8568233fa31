"""The identity of a run: what decides its results, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.files.checkpoint import Checkpoint
from ..recipes.settings import Recipe
from ..runtime.files import sampled_sha256


def fingerprint(recipe: Recipe, checkpoint: Checkpoint, tokens: Tensor, numerics: Mapping[str, Any]) -> str:
    """Identity of a run: its settings, the model's files, the calibration tokens, and what decides the last bits."""
    identity = [recipe.fingerprint(), stamps(checkpoint), checkpoint.config, dict(numerics)]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    digest.update(tokens.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def stamps(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What tells a checkpoint's weights from others: name and hash of samples of every file."""
    return [(name, sampled_sha256(file.path)) for name, file in checkpoint.files.items()]

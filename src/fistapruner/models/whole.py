"""A whole model in memory, for what is not done layer by layer: generating text, zero-shot tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..numerics import pass_dtype


def load_whole(folder: Path, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a ``transformers`` model for forward passes.

    Args:
        folder: a Hugging Face folder, dense or packed.
        device: where it runs.
        dtype: its precision; None is that of :func:`~fistapruner.numerics.pass_dtype`, as for passes layer by layer.
        trust_remote_code: run Python code that comes with the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype or "auto", trust_remote_code=trust_remote_code).to(device)
    if dtype is None and pass_dtype(model.dtype, device) == torch.float32:
        model = model.float()  # only ever wider: ``to`` would round what transformers keeps in fp32, such as rotary frequencies
    return model.eval()

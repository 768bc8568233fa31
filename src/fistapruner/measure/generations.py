"""Continue the same prompts with several models: the dense one and what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..models.build import load_whole, whole_fits
from ..models.checkpoint import Checkpoint
from ..models.source import load_tokenizer
from ..runs.records import Generation
from ..runtime.devices import threads_within_quota
from ..runtime.show import Tick, silent

PROMPTS = (
    "The capital of France is",
    "To make a good cup of tea, first",
    "def fibonacci(n):",
)

NEW_TOKENS = 32
"""Tokens that continue a prompt."""


@threads_within_quota()
def generate_side_by_side(
    models: Mapping[str, Path],
    device: torch.device,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    memory_limit: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    tick: Tick = silent,
) -> list[Generation]:
    """Continue prompts greedily with every model, each loaded whole, one after the other.

    Nothing is generated where one of them would not fit into three quarters of the free memory.

    Args:
        models: Hugging Face folders, by the field of :class:`Generation` that they fill.
        device: where the models run.
        prompts: texts to continue.
        memory_limit: bytes of main memory that the process may use; None is the free memory.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoints.
        tick: receives what is done, and how many models of how many have done it.
    """
    if not all(whole_fits(Checkpoint.open(folder, allow_pickle), device, memory_limit) for folder in models.values()):
        return []
    found = [Generation(prompt=prompt) for prompt in prompts]
    for number, (name, folder) in enumerate(models.items()):
        tick("models that have continued the sample prompts", number, len(models))
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        model = load_whole(folder, device, trust_remote_code=trust_remote_code)
        for each in found:
            ids = tokenizer(each.prompt, return_tensors="pt", return_attention_mask=True).to(device)
            # A tokenizer may return more, such as token_type_ids, which generate() refuses.
            given = {key: ids[key] for key in ("input_ids", "attention_mask")}
            end = tokenizer.eos_token_id
            with torch.no_grad():
                out = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            setattr(each, name, str(text))
    return found

"""The same prompts continued by two models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

import tiny
from fistapruner.measure.generations import generate_side_by_side


def test_what_a_model_does_not_take_of_its_tokenizer_is_left_out(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "model_input_names": ["input_ids", "token_type_ids"]})
    )
    assert set(AutoTokenizer.from_pretrained(folder)("once")) == {"input_ids", "token_type_ids"}
    models = {"dense": folder, "pruned": folder}
    (found,) = generate_side_by_side(models, torch.device("cpu"), prompts=("once upon",))
    assert found.dense == found.pruned
    assert found.recovered is None
    assert found.dense

"""Damaged adapter folders: a clean error, or tensors of the shapes that the file has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from mutations import damaged, damaged_json_text, fuzz

from fistapruner import FistaPrunerError
from fistapruner.training.adapters import Adapter

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/model",
    "bias": "none",
    "init_lora_weights": True,
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"up_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 8},
    "use_dora": False,
    "modules_to_save": None,
    "target_modules": ["q_proj", "up_proj"],
}
WHOLE = safetensors.torch.save(
    {
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4),
        "base_model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(6, 2),
        "base_model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "base_model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(6, 3),
    }
)


def read(folder: Path) -> None:
    try:
        adapter = Adapter(folder)
        changes = [adapter.read(operator) for operator in adapter.operators]
    except FistaPrunerError as error:
        assert str(folder) in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return
    for change in changes:
        assert change.fits(change.tensors["B"].shape[0], change.tensors["A"].shape[1])
        assert torch.isfinite(torch.tensor(change.scale))


@fuzz
@given(damaged_json_text(CONFIG))
@example(json.dumps({**CONFIG, "\n": "some/model"}).encode())
@example(json.dumps({**CONFIG, "rank_pattern": {"(?\n)": 3}}).encode())
def test_damaged_config(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(WHOLE)
    (folder / "adapter_config.json").write_bytes(text)
    read(folder)


@fuzz
@given(damaged(WHOLE))
def test_damaged_tensors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "tensors"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(data)
    read(folder)

"""A config.json that does not describe the checkpoint, or nothing at all: one line that names it, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fistapruner import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel

CHANGES: dict[str, dict[str, Any]] = {
    "unknown architecture": {"model_type": "nonsense"},
    "no heads": {"num_attention_heads": 0},
    "negative width": {"hidden_size": -32},
    "text for a number": {"hidden_size": "x"},
    "other width": {"hidden_size": 64},
    "unknown activation": {"hidden_act": "nonsense"},
    "more layers than stored": {"num_hidden_layers": 5},
    "other vocabulary": {"vocab_size": 64},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_config_is_refused_by_name(tmp_path: Path, change: str) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | CHANGES[change]))
    with pytest.raises(FistaPrunerError) as caught:
        LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantisation_is_named_by_its_method(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    settings = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), "utf-8")
    with pytest.raises(FistaPrunerError, match=r"is quantised \(bitnet\); prune the unquantised one$"):
        LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"))


def test_a_model_of_sound_and_text_is_refused_by_name(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    wrapper = {"model_type": "qwen2_audio", "text_config": config | {"model_type": "qwen2"}}
    (tmp_path / "config.json").write_text(json.dumps(wrapper), "utf-8")
    said = r"qwen2_audio is a model of more than text, .* of it: save its language model \(qwen2\) as a checkpoint"
    with pytest.raises(FistaPrunerError, match=said):
        LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"))


def test_several_text_configs_are_refused_by_name(tmp_path: Path) -> None:
    """MusicGen has a text encoder and a decoder."""
    tiny.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    parts = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}
    for changed, said in (
        (parts | {"model_type": "musicgen"}, "musicgen is an encoder-decoder"),
        (config | {"text_encoder": {}, "decoder": {}}, r"config\.json is not understood: Multiple valid text configs"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed), "utf-8")
        with pytest.raises(FistaPrunerError, match=said):
            LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"))

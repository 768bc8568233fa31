"""Adapters of the PEFT library are read and written without it; what is not understood is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fistapruner.errors import FistaPrunerError
from fistapruner.training.adapters import Adapter, write_hira_adapter

Q = "model.layers.0.self_attn.q_proj"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "lora_dropout": 0.1, "use_dora": False}
HIRA = {"peft_type": "HIRA", "r": 2}
IA3 = {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(operator: str = Q, rank: int = 2, rows: int = 8, columns: int = 6) -> dict[str, Tensor]:
    return {
        f"base_model.model.{operator}.lora_A.weight": draw(rank, columns),
        f"base_model.model.{operator}.lora_B.weight": draw(rows, rank, seed=1),
    }


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"lora_alpha": 0.5}, 0.25),
        ({"r": 9, "rank_pattern": {"q_proj": 2}}, 3.0),
        ({"r": 9, "rank_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 2, "q_proj": 7}}, 3.0),
        ({"r": 9, "rank_pattern": {"proj": 5, "^model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"k_proj": 100, "self_attn.q_proj": 4}}, 2.0),
    ],
)
def test_lora_is_scaled_as_its_config_says(changes: dict[str, Any], scale: float, tmp_path: Path) -> None:
    tensors = lora()
    adapter = Adapter(save(tmp_path, {**LORA, **changes}, tensors))
    a, b = tensors.values()
    weight = draw(8, 6, seed=2)
    change = adapter.read(Q)
    assert adapter.operators == (Q,)
    assert torch.allclose(change.weight(weight), weight + scale * (b @ a))
    assert change.bias(torch.ones(8)) is None
    assert change.fits(8, 6)
    assert not change.fits(6, 8)


@pytest.mark.parametrize("name", ["base_model.model.{}.lora_{}.weight", "{}.lora_{}.default.weight"])
def test_names_of_older_adapters(name: str, tmp_path: Path) -> None:
    tensors = {name.format(Q, part): tensor for part, tensor in zip("AB", lora().values(), strict=True)}
    assert Adapter(save(tmp_path, LORA, tensors)).operators == (Q,)


def test_hira_multiplies(tmp_path: Path) -> None:
    tensors = {f"base_model.model.{Q}.hira_A": draw(2, 6), f"base_model.model.{Q}.hira_B": draw(8, 2, seed=1)}
    change = Adapter(save(tmp_path, HIRA, tensors)).read(Q)
    a, b = tensors.values()
    weight = draw(8, 6, seed=2)
    assert torch.allclose(change.weight(weight), weight * (1 + b @ a))


def test_ia3_scales_inputs_or_outputs_with_their_bias(tmp_path: Path) -> None:
    down = "model.layers.0.mlp.down_proj"
    tensors = {f"base_model.model.{Q}.ia3_l": draw(8, 1), f"base_model.model.{down}.ia3_l": draw(1, 8, seed=1)}
    adapter = Adapter(save(tmp_path, IA3, tensors))
    outputs, inputs = tensors.values()
    weight, bias = draw(8, 8, seed=2), draw(8, seed=3)
    scaled = adapter.read(Q).bias(bias)
    assert scaled is not None
    assert torch.equal(scaled, bias * outputs[:, 0])
    assert torch.equal(adapter.read(Q).weight(weight), weight * outputs)
    assert torch.equal(adapter.read(down).weight(weight), weight * inputs)
    assert adapter.read(down).bias(bias) is None
    assert adapter.read(Q).fits(8, 6)
    assert not adapter.read(Q).fits(6, 8)
    assert adapter.read(down).fits(6, 8)
    assert not adapter.read(down).fits(8, 6)
    with pytest.raises(FistaPrunerError, match=r"q_proj has l \[2, 3\], a column or a row is expected"):
        Adapter(save(tmp_path, IA3, {f"base_model.model.{Q}.ia3_l": draw(2, 3)}))


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "KaSA"])
def test_initial_values_that_change_the_base_are_refused(init: str, tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=f"init_lora_weights '{init}' changed the base model's weights"):
        Adapter(save(tmp_path, LORA | {"init_lora_weights": init}, lora()))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "adapters of type LOHA are not read"),
        ({"peft_type": None}, "adapters of type None are not read"),
        ({**LORA, "use_dora": True}, "the setting use_dora is 'True'"),
        ({**LORA, "bias": "lora_only"}, "the setting bias is 'lora_only'"),
        ({**LORA, "modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: .* --also none"),
        ({**LORA, "modules_to_save": [f"norm_{n}" for n in range(20)]}, r"is \['norm_0', [^:]{40,60}…: whole modules"),
        ({**LORA, "layer_replication": [[0, 2]]}, "layer_replication"),
        ({**LORA, "trainable_token_indices": [1]}, "trainable_token_indices"),
        ({**LORA, "a_new_setting": 3}, "a_new_setting"),
        ({**LORA, "init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base model's weights"),
        ({**LORA, "r": 3}, r"q_proj has rank 2, but adapter_config\.json says 3"),
        ({**LORA, "r": 0}, "r is '0', a whole number from 1 is expected"),
        ({**LORA, "r": 2.0}, "a whole number"),
        ({**LORA, "lora_alpha": float("nan")}, "lora_alpha is 'nan', a number is expected"),
        ({**LORA, "lora_alpha": True}, "lora_alpha is 'True'"),
        ({**LORA, "rank_pattern": ["q_proj"]}, "rank_pattern is not a mapping"),
        ({**LORA, "rank_pattern": {"(": 2}}, "'\\(' is no pattern"),
        ({**LORA, "alpha_pattern": {"q_proj": "8"}}, r"alpha_pattern\['q_proj'\] is '8'"),
        (HIRA, "is no part of a HiRA adapter"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=said):
        Adapter(save(tmp_path, config, lora()))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector is no part of a LoRA adapter"),
        ({"model.embed_tokens.lora_embedding_A": torch.ones(2, 6)}, "lora_embedding_A is no part"),
        ({"model.norm.weight": torch.ones(8)}, r"model\.norm\.weight is no part"),
        ({f"{Q}.lora_A.other.weight": torch.ones(2, 6)}, "two tensors A of"),
        ({"x.lora_A.weight": torch.ones(2, 6)}, r"x has A \[2, 6\], both A and B are expected"),
        ({"x.lora_A.weight": torch.ones(2), "x.lora_B.weight": torch.ones(8, 2)}, r"A \[2\]"),
        ({"x.lora_A.weight": torch.ones(3, 6), "x.lora_B.weight": torch.ones(8, 2)}, r"A \[3, 6\], B \[8, 2\]"),
        ({"x.lora_A.weight": torch.ones(2, 6).int(), "x.lora_B.weight": torch.ones(8, 2)}, "not floating-point"),
    ],
)
def test_tensors_that_would_be_left_out_are_named(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=said):
        Adapter(save(tmp_path, LORA, lora() | tensors))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=r"no adapter_config\.json"):
        Adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FistaPrunerError, match=r"only adapter_model\.bin"):
        Adapter(tmp_path)
    save(tmp_path, LORA, {})
    with pytest.raises(FistaPrunerError, match="no tensors"):
        Adapter(tmp_path)
    save(tmp_path, LORA, {name: tensor.fill_(math.inf) for name, tensor in lora().items()})
    with pytest.raises(FistaPrunerError, match="NaN or infinite"):
        Adapter(tmp_path).read(Q)


def test_a_written_hira_adapter_is_read_back(tmp_path: Path) -> None:
    operators = {Q: (draw(2, 6), draw(8, 2, seed=1)), "model.layers.10.mlp.up_proj": (draw(3, 6), draw(4, 3))}
    write_hira_adapter(tmp_path / "new", "some/model", operators)
    adapter = Adapter(tmp_path / "new")
    assert adapter.base == "some/model"
    assert set(adapter.operators) == set(operators)
    for name, (a, b) in operators.items():
        read = adapter.read(name).tensors
        assert torch.equal(read["B"] @ read["A"], b @ a)
    with pytest.raises(FistaPrunerError, match="exists already"):
        write_hira_adapter(tmp_path / "new", "some/model", operators)


def test_adapters_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no operators"):
        write_hira_adapter(tmp_path / "a", "m", {})
    with pytest.raises(ValueError, match="do not fit"):
        write_hira_adapter(tmp_path / "a", "m", {Q: (draw(2, 6), draw(8, 3))})
    for name in (f"{Q}.bias", f"{Q.rpartition('.')[0]}.scale"):
        with pytest.raises(ValueError, match="is adapted"):
            write_hira_adapter(tmp_path / "a", "m", {Q: (draw(2, 6), draw(8, 2))}, whole={name: draw(8)})
    assert not list(tmp_path.iterdir())

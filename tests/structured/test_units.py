"""MLP channels are found and proved for every architecture, or refused by name before any work."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, NemotronHConfig, NemotronHForCausalLM

import tiny
from fistapruner import FistaPrunerError
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.recipes.settings import Recipe
from fistapruner.recipes.structure_settings import Structure
from fistapruner.structured import proof
from fistapruner.structured.proof import plan_widths
from fistapruner.structured.smaller_model import Widths, removed_weights, resized
from fistapruner.structured.units import layer_weights, unit_weights

ENTRIES = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size"}
"""The entry of the config that holds the width, where it is not ``intermediate_size``."""

REFUSED = {"bloom": "no entry of config.json makes BloomForCausalLM a model whose MLPs have"}


def planned(
    folder: Path, amount: str, multiple: int = 8, **selection: tuple[str, ...]
) -> tuple[LayerwiseModel, Widths]:
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    layout = discover(model).select(Recipe(**selection))
    return model, plan_widths(model, layout, Structure(remove=amount, multiple=multiple))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_channels_are_found_and_proved_or_refused(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16)
    if architecture in REFUSED:
        with pytest.raises(FistaPrunerError, match=REFUSED[architecture]):
            planned(folder, "mlp=25%")
        return
    model, widths = planned(folder, "mlp=25%")
    unit = widths.units[0][0]
    assert unit.after == round(unit.before * 0.75 / 8) * 8
    assert widths.config == {ENTRIES.get(architecture, "intermediate_size"): unit.after}
    assert all(len(units) == 1 for units in widths.units)
    # Nothing of the model was changed by the proof.
    assert planned(folder, "mlp=25%")[1] == widths
    before = dict(discover(model).operators())
    after = dict(resized(discover(model), widths).operators())
    for name, operator in before.items():
        rows = unit.after * unit.copies[0] if name.endswith(unit.producers) else operator.rows
        columns = unit.after if name.endswith(unit.consumer.name) else operator.columns
        assert (after[name].rows, after[name].columns) == (rows, columns)


def test_a_missing_temporary_folder_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with pytest.raises(FistaPrunerError, match=r"no temporary folder can be written \(.*nothing.*\): set TMPDIR$"):
        planned(folder, "mlp=25%")


@pytest.mark.parametrize("amount", ["mlp=25%", "heads=1"])
def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amount: str) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    monkeypatch.setattr(os, "pwrite", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(FistaPrunerError, match=r"the disk is full: cannot write .*config\.json"):
        planned(folder, amount)


def test_a_forward_pass_that_depends_on_the_width_is_refused(tmp_path: Path) -> None:
    """Its channels can be permuted, so only the surgery shows it."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path)), torch.device("cpu"))
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda mlp, _, out: out * mlp.down_proj.weight.shape[1] / 48)
    with pytest.raises(FistaPrunerError, match=r"cutting MLP channels of mlp\.down_proj does not give the outputs"):
        plan_widths(model, discover(model), Structure(remove="25%", multiple=8))


def test_a_share_of_the_parameters_becomes_a_width(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)  # 32 wide, 48 channels: 3 x 32 weights a channel
    model, widths = planned(folder, "25%")
    gone = removed_weights(model, widths)
    channel = sum(unit_weights(model.layers[index], unit) for index, (unit,) in enumerate(widths.units))
    assert abs(gone / layer_weights(model) - 0.25) <= 4 * channel / layer_weights(model)
    assert widths.units[0][0].after % 8 == 0
    assert planned(folder, "mlp=31")[1].units[0][0].after == 31


HEADS = {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi"}
"""Architectures whose key/value groups can be removed, at these sizes."""


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_key_value_groups_are_found_and_proved_or_refused(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16)
    if architecture not in HEADS:
        with pytest.raises(FistaPrunerError, match=r"structure: .*(cannot express|no separate query, key and value)"):
            planned(folder, "heads=1")
        return
    amount = "heads=2" if architecture == "phi" else "heads=1"  # its head count must divide the hidden size
    model, widths = planned(folder, amount)
    unit = widths.units[0][0]
    assert (unit.before, unit.after) == ((4, 2) if architecture == "phi" else (2, 1))
    assert widths.config["num_key_value_heads"] == unit.after
    assert removed_weights(model, widths) >= 3 * 32 * 8 * 4


def test_a_tensor_of_heads_that_is_not_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of another number of heads is built to find one that would do."""
    folder, built = tiny.save("gpt_oss", tmp_path), []
    build = proof.build_changed

    def counted(*arguments: Any, **settings: Any) -> Any:
        built.append(arguments)
        return build(*arguments, **settings)

    monkeypatch.setattr(proof, "build_changed", counted)
    with pytest.raises(FistaPrunerError, match=r"layers\.0\.self_attn\.sinks has values for each head"):
        planned(folder, "heads=1")
    assert len(built) == 1


@pytest.mark.parametrize("amount", ["25%", "heads=1"])
def test_operators_in_different_modules_are_said_not_to_be_found_in_one(tmp_path: Path, amount: str) -> None:
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(FistaPrunerError, match="found beside one another, in one module"):
        planned(tmp_path, amount)


def test_counts_of_heads_that_would_do_are_named(tmp_path: Path) -> None:
    """Llama refuses a number of heads that does not divide the hidden size."""
    folder = tiny.save("llama", tmp_path, hidden_size=32, num_attention_heads=8, num_key_value_heads=8)
    said = "cannot express 5 of 8 key/value groups; heads=4 or heads=6 or heads=7 would do"
    with pytest.raises(FistaPrunerError, match=said):
        planned(folder, "heads=3")
    assert planned(folder, "heads=4")[1].config["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("amount", "multiple", "said"),
    [
        ("90%", 8, r"structure: 90% of the decoder layers' \d+ parameters is more than their MLP channels can give"),
        ("mlp=95%", 8, "structure: mlp=95% leaves fewer than 8 of the 48 channels of every MLP"),
        ("mlp=1%", 8, "structure: mlp=1% removes less than half of 8 of the 48 channels of every MLP, so none"),
        ("mlp=48", 8, "structure: mlp=48 is not less than the 48 channels"),
        ("25%", 64, "structure: widths are multiples of 64 and the model's MLPs have 48 channels"),
    ],
)
def test_amounts_that_leave_or_remove_nothing_are_refused(
    tmp_path: Path, amount: str, multiple: int, said: str
) -> None:
    with pytest.raises(FistaPrunerError, match=said):
        planned(tiny.save("llama", tmp_path), amount, multiple)


def test_a_mixture_with_layers_without_an_mlp_names_what_can_be_removed(tmp_path: Path) -> None:
    """Layers of a hybrid are of one kind each, and only some have experts."""
    config = NemotronHConfig(
        **tiny.SIZES,
        hidden_size=32,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
    )
    NemotronHForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        FistaPrunerError, match=r"layers\.0: no operators .*; experts=25% or the like removes whole exp"
    ):
        planned(tmp_path, "mlp=25%")


@pytest.mark.parametrize(("architecture", "whose"), [("mixtral", "expert"), ("qwen2_moe", "expert")])
def test_amounts_for_the_narrowest_experts_name_experts(tmp_path: Path, architecture: str, whose: str) -> None:
    folder = tiny.save(architecture, tmp_path)
    for amount, said in (("mlp=95%", "leaves fewer than 8"), ("mlp=1%", "removes less than half of 8")):
        with pytest.raises(FistaPrunerError, match=rf"{said} of the \d+ channels of every {whose}[:,]"):
            planned(folder, amount, 8)


@pytest.mark.parametrize(
    ("architecture", "amount", "ignore", "said"),
    [
        (
            "llama",
            "25%",
            ("re:layers.1.mlp.down", "q_proj"),
            r"layers.1: .* no MLP .*\(mlp\.down_proj is left out",
        ),
        ("phi3", "25%", ("gate_up_proj", "qkv_proj"), r"leave no MLP .*\(mlp\.gate_up_proj is left out"),
        ("llama", "heads=1", ("down_proj", "v_proj"), r"leave no key.*\(self_attn\.v_proj is left out"),
        (
            "phi3",
            "heads=1",
            ("down_proj",),
            "no separate query, key and value operators of 4 and 2 heads and one",
        ),
        ("mixtral", "25%", ("re:experts",), r"leave out model\.layers\.0\.mlp\.experts\.0\.gate_proj: of a mixture"),
        ("mixtral", "heads=1", ("re:experts", "q_proj"), r"leave no key.*\(self_attn\.q_proj is left out"),
    ],
)
def test_layers_that_are_left_out_are_refused(
    tmp_path: Path, architecture: str, amount: str, ignore: tuple[str, ...], said: str
) -> None:
    """The operator that is missed is named; where none is, the reason is the architecture."""
    with pytest.raises(FistaPrunerError, match=f"structure: .*{said}"):
        planned(tiny.save(architecture, tmp_path), amount, ignore=ignore)

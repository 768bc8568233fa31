"""What can be removed is found and tried for every architecture, or refused by name before any work."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, HunYuanMoEV1Config

import tiny
from fistapruner import FistaPrunerError
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.settings.prune import Recipe
from fistapruner.settings.structure import Structure
from fistapruner.structure.smaller import Widths, removed_weights, resized
from fistapruner.structure.trial import plan_widths
from fistapruner.structure.units import layer_weights

ENTRIES = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size"}
"""The entry of the config that holds the width, where it is not ``intermediate_size``."""

HEADS = {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi"}
"""Architectures whose key/value groups can be removed, at these sizes."""


def planned(folder: Path, amount: str, multiple: int = 8, **selection: Any) -> tuple[LayerwiseModel, Widths]:
    model = tiny.opened(folder)
    layout = discover(model).select(Recipe(**selection))
    rounds = {} if amount.startswith("experts") else {"multiple": multiple}
    return model, plan_widths(model, layout, Structure.model_validate({"remove": amount, **rounds}))


SOME = {"bloom", "gemma2", "gpt2", "llama", "opt", "phi", "phi3"}
over_architectures = pytest.mark.parametrize("architecture", tiny.quick_first(tiny.ARCHITECTURES, SOME))


@over_architectures
def test_channels_are_found_and_tried_or_refused(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16)
    if architecture == "bloom":
        with pytest.raises(FistaPrunerError, match=r"no entry of config\.json makes Bloom.* with 96 of 128 MLP chan"):
            planned(folder, "mlp=25%")
        return
    model, widths = planned(folder, "mlp=25%")
    (unit,) = widths.units[0]
    assert unit.after == round(unit.before * 0.75 / 8) * 8
    assert widths.config == {ENTRIES.get(architecture, "intermediate_size"): unit.after}
    assert planned(folder, "mlp=25%")[1] == widths == Widths.read(widths.record())
    before, after = (dict(layout.operators()) for layout in (discover(model), resized(discover(model), widths)))
    for name, operator in before.items():
        (rows,) = {cut.copies for producer, cut in unit.producers.items() if name.endswith(producer)} or {0}
        columns = unit.after if name.endswith(unit.name) else operator.columns
        assert (after[name].rows, after[name].columns) == (rows * unit.after or operator.rows, columns)


@over_architectures
def test_key_value_groups_are_found_and_tried_or_refused(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16)
    if architecture not in HEADS:
        with pytest.raises(FistaPrunerError, match=r"structure: .*(no entry of config|no separate query, key and val)"):
            planned(folder, "heads=1")
        return
    amount = "heads=2" if architecture == "phi" else "heads=1"  # its head count must divide the hidden size
    model, widths = planned(folder, amount)
    (unit,) = widths.units[0]
    assert (unit.before, unit.after) == ((4, 2) if architecture == "phi" else (2, 1))
    assert widths.config["num_key_value_heads"] == unit.after
    assert removed_weights(model, widths) >= 3 * 32 * 8 * 4


def test_a_forward_pass_that_depends_on_the_width_is_refused(tmp_path: Path) -> None:
    """Its channels can be permuted, so only the surgery shows it; nothing of the model is changed by that."""
    model = tiny.opened(tiny.save("llama", tmp_path))
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda mlp, _, out: out * mlp.down_proj.weight.shape[1] / 48)
    settings = Structure.model_validate({"remove": "mlp=25%,heads=1", "multiple": 8})
    with pytest.raises(FistaPrunerError, match=r"cutting MLP channels of mlp\.down_proj does not give the outputs"):
        plan_widths(model, discover(model), settings)
    with model.layer(0) as layer:
        assert torch.equal(layer.mlp.down_proj.weight, model.checkpoint.read("model.layers.0.mlp.down_proj.weight"))


@pytest.mark.parametrize(("architecture", "share"), [("llama", 0.25), ("gemma4", 0.15)])
def test_a_share_of_the_parameters_becomes_a_width(tmp_path: Path, architecture: str, share: float) -> None:
    """But for half a channel of every MLP and expert, each of 3 x 32 weights."""
    folder = tiny.save(architecture, tmp_path)
    model, widths = planned(folder, f"{share:.0%}", 1)
    channels = len(model) * (5 if architecture == "gemma4" else 1)
    assert abs(removed_weights(model, widths) - share * layer_weights(model)) <= channels * 3 * 32 / 2
    if architecture == "llama":
        assert planned(folder, "mlp=31")[1].units[0][0].after == 31


def test_counts_of_heads_that_would_do_are_named(tmp_path: Path) -> None:
    """Llama refuses a number of heads that does not divide the hidden size."""
    folder = tiny.save("llama", tmp_path, hidden_size=32, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(FistaPrunerError, match=r"5 of 8 key/value groups.*; heads=4 or heads=6 or heads=7 would do"):
        planned(folder, "heads=3")
    assert planned(folder, "heads=4")[1].config["num_attention_heads"] == 4


def test_a_mixture_loses_channels_and_experts_at_once(tmp_path: Path) -> None:
    """One config entry, or several, for each; what is cut beside the experts is found by the shapes."""
    folder = tiny.save("gemma4", tmp_path)
    model, widths = planned(folder, "mlp=25%,experts=1", 4)
    assert widths.config == {"intermediate_size": 36, "moe_intermediate_size": 12, "num_experts": 3}
    (mixture,) = widths.mixtures(0)
    assert {name: cut.dim for name, cut in mixture.cuts.items()} == {
        "router.proj.weight": 0,
        "router.per_expert_scale": 0,
    }
    assert {unit.name for unit in widths.channels(0)} == {
        "mlp.down_proj",
        *(f"experts.{number}.down_proj" for number in range(3)),
    }
    gone = 33 + 3 * 32 * 16 + 3 * 3 * 32 * 4 + 3 * 32 * 12  # an expert with its row, channels of the others, of the MLP
    assert removed_weights(model, widths) == len(model) * gone


def test_layers_that_choose_different_numbers_of_experts_are_told_apart(tmp_path: Path) -> None:
    sizes = {**tiny.SIZES, **tiny.GQA, "head_dim": 8, "num_experts": 4, "moe_topk": [1, 3, 3]}
    AutoModelForCausalLM.from_config(HunYuanMoEV1Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(FistaPrunerError, match="at most 1 can go, since the router chooses 3"):
        planned(tmp_path, "experts=2")


@pytest.mark.parametrize(("limit", "fits"), [(1, False), (2, True)])
def test_a_token_needs_enough_experts_in_its_groups(tmp_path: Path, limit: int, fits: bool) -> None:
    """The router chooses 4 of the experts of ``limit`` of its 2 groups, which have half of those that stay each."""
    folder = tiny.save("deepseek_v3", tmp_path, topk_group=limit, num_experts_per_tok=4, n_routed_experts=8)
    said = pytest.raises(FistaPrunerError, match=r"at most 0 in multiples of 2, .* chooses 4 for every token")
    with nullcontext() if fits else said:
        assert planned(folder, "experts=4")[1].units[1][0].after == 4


@pytest.mark.parametrize(
    ("architecture", "amount", "more", "said"),
    [
        ("llama", "mlp=95%", {}, "structure: mlp=95% leaves 0 of the 48 MLP channels"),
        ("llama", "mlp=48", {}, "structure: mlp=48 leaves 48 of the 48 MLP channels"),
        ("llama", "heads=2", {}, "heads=2 leaves none of the 2 key/value groups"),
        (
            "llama",
            "25%",
            {"ignore": ["down_proj"]},
            r"model\.layers\.0: no selected operators were found .* leave some",
        ),
        ("llama", "heads=1", {"targets": ["re:mlp"]}, "no separate query, key and value .* leave some out"),
        ("mixtral", "mlp=25%", {"ignore": ["re:experts.3"]}, r"layers\.0\.mlp\.experts\.3\.down_proj: no selected"),
        ("gpt_oss", "heads=1", {}, "no entry of config.json makes GptOssForCausalLM a model with 1 of 2 key/value"),
        ("llama", "experts=25%", {}, "LlamaForCausalLM has no mixture of experts"),
        (
            "qwen3_moe",
            "experts=4",
            {},
            "experts=4 removes 4 of the 4 experts .*, and at most 2 can go, since the router choo",
        ),
        ("deepseek_v3", "experts=1", {}, "at most 0 in multiples of 2, the router's groups, can go"),
        ("qwen3_moe", "experts=1", {"ignore": ["re:experts"]}, "targets and ignore leave out model.layers.0.mlp.exper"),
    ],
)
def test_what_cannot_be_removed_is_refused_by_name(
    tmp_path: Path, architecture: str, amount: str, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(FistaPrunerError, match=said):
        planned(tiny.save(architecture, tmp_path), amount, **more)


def test_operators_in_different_modules_are_not_found(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(FistaPrunerError, match="were found beside one another"):
        planned(tmp_path, "25%")

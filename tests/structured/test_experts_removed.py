"""Experts are removed whole, by REAP's criterion, and the result is an ordinary smaller checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.core import NM
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.models.architecture import build_changed
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.recipes.structure_settings import Structure
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.runs.records import Report
from fistapruner.structured import mixtures

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
QUARTER = {"remove": "mlp=25%", "multiple": 4}
TOKENS = torch.arange(3, 27)[None]
MORE = {"n_routed_experts": 8}
"""DeepSeek-V3 chooses among groups of experts first, and at least two must stay in each."""


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def kept(report: Report, layer: int) -> list[int]:
    (removal,) = report.layers[layer].removals
    assert removal.kept is not None
    return removal.kept


@pytest.mark.parametrize(
    ("architecture", "original"), [*((architecture, True) for architecture in tiny.MIXTURES), ("qwen3_moe", False)]
)
def test_the_smaller_checkpoint_loads_and_is_the_dense_model_without_those_experts(
    tmp_path: Path, architecture: str, original: bool
) -> None:
    changes: dict[str, Any] = MORE if architecture == "deepseek_v3" else {}
    folder = tiny.save(architecture, tmp_path / "model", original=original, **changes)
    report = fp.prune(str(folder), tmp_path / "run", structure="experts=50%", calibration=SMALL)
    small, dense = loaded(tmp_path / "run" / "model"), loaded(folder)
    before = 8 if changes else 4
    layer = len(report.layers) - 1
    stay = kept(report, layer)
    assert len(stay) == before // 2
    assert stay == sorted(stay)
    if changes:
        assert [expert < 4 for expert in stay] == [True, True, False, False]
    assert small.num_parameters() == report.totals.model_weights < dense.num_parameters() == report.model.parameters
    own, whole = small.state_dict(), dense.state_dict()
    assert own.keys() == whole.keys()
    prefix = f"model.layers.{layer}."
    for name, tensor in own.items():
        expected = whole[name]
        if tensor.shape != expected.shape:
            assert len(tensor) == before // 2, name
            expected = expected[stay] if name.startswith(prefix) else expected[kept(report, int(name.split(".")[2]))]
        assert torch.equal(tensor, expected), name
    assert not inspect_checkpoint(tmp_path / "run").violations
    assert small.generate(TOKENS, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_a_router_that_would_keep_its_rows_is_refused(tmp_path: Path) -> None:
    """Gemma 4's computes the same with all rows, but no checkpoint can hold them beside the smaller number."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("gemma4", tmp_path)), torch.device("cpu"))
    units, change = mixtures.find_experts(model, discover(model), Structure(remove="experts=1"), {})
    assert units[0][0].tensors == {"router.proj.weight": 0, "router.per_expert_scale": 0}
    lacking = tuple((unit.model_copy(update={"tensors": {}}),) for (unit,) in units)
    with pytest.raises(fp.FistaPrunerError, match=r"router.* have the shape \(4.* smaller model's has \(3"):
        mixtures._prove(model, lacking, build_changed(model.checkpoint, change).eval(), 3)


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_and_routers_keep_every_bit_where_passes_have_fewer(tmp_path: Path, architecture: str) -> None:
    """Those that get another number too: none of their values is new."""
    changes = MORE if architecture == "deepseek_v3" else {}
    folder = tiny.save(architecture, tmp_path / "model", **changes)
    report = fp.prune(str(folder), tmp_path / "run", structure="experts=50%", dtype="bfloat16", calibration=SMALL)
    before, after = loaded(folder).state_dict(), loaded(tmp_path / "run" / "model").state_dict()
    renumbered = False
    for layer in (layer for layer in report.layers if layer.removals):
        stay = kept(report, layer.index)
        renumbered |= stay != list(range(len(stay)))
        cut = [name for name in after if name.startswith(layer.name) and after[name].shape != before[name].shape]
        assert len(cut) > 2
        for name in cut:
            assert torch.equal(after[name], before[name][stay]), name
            assert name.endswith("bias") or not torch.equal(after[name], after[name].bfloat16().float())
    assert renumbered


def test_scores_are_the_mean_of_weight_times_length_of_the_output(tmp_path: Path) -> None:
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    report = fp.prune(str(folder), tmp_path / "run", structure="experts=1", calibration=SMALL, propagate="dense")
    dense, calls = loaded(folder), []
    experts = dense.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        dense(PruneDirectory(tmp_path / "run").tokens())
        inputs, chosen, weights = calls[0]
        scores = []
        for expert in range(4):
            losses = []
            for token, routed, given in zip(inputs, chosen, weights, strict=True):
                if expert in routed:
                    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                    output = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    losses.append(float(given[routed == expert] * output.norm()))
            scores.append(sum(losses) / len(losses))
    assert report.layers[1].removals[0].scores == pytest.approx(scores, rel=1e-4)
    assert set(range(4)) - set(kept(report, 1)) == {min(range(4), key=scores.__getitem__)}


@pytest.mark.parametrize("structure", ["heads=1", "experts=1", "heads=1,experts=1"])
def test_a_token_costs_the_operations_of_the_experts_that_it_goes_through(tmp_path: Path, structure: str) -> None:
    folder = tiny.save("mixtral", tmp_path / "model")
    totals = fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=SMALL).totals
    attention, router, expert, head = 2 * (32 + 16) * 32, 4 * 32, 3 * 32 * 48, 128 * 32
    dense = 2 * (attention + router + 2 * expert) + head  # 2 layers, 2 experts for a token
    gone = (attention // 2 if "heads" in structure else 0) + (router // 4 if "experts" in structure else 0)
    assert totals.dense_flops_per_token == 2 * dense
    assert totals.flops_per_token == 2 * (dense - 2 * gone)


def test_an_expert_that_no_token_reaches_goes_first_and_removing_it_changes_nothing(tmp_path: Path) -> None:
    folder = tiny.save_unused_expert(tmp_path / "model", 2)
    report = fp.prune(str(folder), tmp_path / "run", structure="experts=1", calibration=SMALL)
    assert kept(report, 0) == kept(report, 1) == [0, 1, 3]
    assert report.method == "reap"
    assert [removal.scores[2] for layer in report.layers for removal in layer.removals if removal.scores] == [0, 0]
    with torch.no_grad():
        expected, found = (loaded(path)(TOKENS).logits for path in (folder, tmp_path / "run" / "model"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_what_remains_gets_zeros_in_the_same_run(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    settings: dict[str, Any] = {"structure": "experts=25%", "sparsity": "2:4", "calibration": SMALL}
    report = fp.prune(str(folder), tmp_path / "run", **settings)
    small = loaded(tmp_path / "run" / "model")
    experts = small.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert len(weight) == 3
        for matrix in weight.detach().transpose(1, 2) if architecture == "gpt_oss" else weight.detach():
            assert NM(2, 4).satisfies(matrix)
    assert report.totals.operator_zeros == report.totals.operator_weights // 2
    permuted = {name for name in report.permuted if ".experts." in name}
    names = {f"{layer.name}.{operator.name}" for layer in report.layers for operator in layer.operators}
    assert permuted <= names
    assert bool(permuted) == (architecture == "mixtral")
    assert not inspect_checkpoint(tmp_path / "run").violations


@pytest.mark.parametrize("sparsity", ["0%", "2:4"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, sparsity: str) -> None:
    folder = tiny.save("deepseek_v3", tmp_path / "model", num_hidden_layers=3, shard="40KB", **MORE)
    settings: dict[str, Any] = {"structure": "experts=25%", "sparsity": sparsity, "calibration": SMALL}
    fp.prune(str(folder), tmp_path / "whole", method="sparsegpt", **settings)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fp.prune(str(folder), tmp_path / "parts", method="sparsegpt", listener=tiny.Stops(), **settings)
    fp.resume(tmp_path / "parts")
    whole, shards = tmp_path / "whole" / "model", tiny.weights(tmp_path / "whole")
    assert len(shards) > 2
    assert tiny.weights(tmp_path / "parts") == shards
    # The index names what is there, under consecutive numbers.
    index = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {name for path in shards for name in load_file(whole / path)}
    assert {name.split(".experts.")[1].split(".")[0] for name in index if ".experts." in name} == set("012345")
    loaded(whole)


def test_several_processes_share_a_run(tmp_path: Path) -> None:
    folder = tiny.save("qwen2_moe", tmp_path / "model")
    settings: dict[str, Any] = {"structure": "experts=2,heads=1", "calibration": SMALL, "propagate": "dense"}
    fp.prune(str(folder), tmp_path / "whole", **settings)
    fp.prune(str(folder), tmp_path / "parts", **settings, execution={"executor": "process", "workers": 2})
    assert tiny.weights(tmp_path / "whole") == tiny.weights(tmp_path / "parts")
    config = loaded(tmp_path / "whole" / "model").config
    assert (config.num_experts, config.num_key_value_heads) == (2, 1)


def test_the_smaller_model_is_recovered(tmp_path: Path) -> None:
    """Nothing is masked in it; every operator is trained, those of the experts among them."""
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    recover: dict[str, Any] = {
        "steps": 1,
        "parameters": "full",
        "data": {"source": "python", "tokens": 300, "seqlen": 16},
    }
    fp.prune(str(folder), tmp_path / "run", structure="experts=50%", calibration=SMALL, evaluate=None)
    fp.recover(tmp_path / "run", tmp_path / "recovered", **recover)
    trained = inspect_checkpoint(tmp_path / "recovered" / "model")
    assert trained.violations == []
    names = {operator.name for operator in trained.operators if operator.claim is not None}
    assert len([name for name in names if "experts" in name]) > 2
    assert [name for name in names if "q_proj" in name]


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"structure": "experts=25%"}, "LlamaForCausalLM has no mixture of experts"),
        ("qwen3_moe", {"structure": "experts=4"}, "experts=4 leaves none of the 4 experts"),
        ("qwen3_moe", {"structure": "experts=10%"}, "experts=10% removes none of the 4 experts"),
        ("qwen3_moe", {"structure": "experts=3"}, "1 of the 4 experts of .* would remain, and the router chooses 2"),
        ("deepseek_v3", {"structure": "experts=1"}, "chooses among 2 groups of experts.* remove a multiple of 2"),
        ("qwen3_moe", {"structure": "25%"}, "widths are multiples of 64 and the model.s experts have 16 channels"),
        ("qwen3_moe", {"structure": "experts=1", "ignore": ["re:experts"]}, "targets and ignore leave out"),
        ("qwen3_moe", {"structure": "experts=1", "sparsity": "50%", "allocation": "owl"}, "--allocation uniform"),
        ("qwen3_moe", {"structure": "experts=1", "sparsity": "50%", "weighting": "fisher"}, "--weighting none"),
        ("qwen3_moe", {"structure": "experts=some"}, "experts=25% or experts=8"),
        ("mixtral", {"structure": {**QUARTER, "method": "goa"}}, "goa does not rate channels of experts"),
        ("mixtral", {"structure": {**QUARTER, "method": "bypass"}}, "bypass does not rate channels of experts"),
        ("mixtral", {"structure": {**QUARTER, "widths": "free"}}, "every expert keeps the same number of channels"),
        ("gemma4", {"structure": "mlp=12"}, r"have several \(16, 48 channels\): give a share"),
        ("mixtral", {"structure": "mlp=48"}, "is not less than the 48 channels"),
        ("gemma4", {"structure": {"remove": "90%", "multiple": 4}}, "give: .* leaves 4 of 16 channels"),
        ("mixtral", {"structure": QUARTER, "ignore": ["re:experts.3"]}, "channels are removed from all experts"),
        ("mixtral", {"structure": QUARTER, "sparsity": "2:8"}, "36 inputs"),
    ],
)
def test_what_cannot_be_removed_is_refused_by_name(
    tmp_path: Path, architecture: str, settings: dict[str, Any], message: str
) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    with pytest.raises(fp.FistaPrunerError, match=message):
        fp.prune(str(folder), tmp_path / "run", calibration=SMALL, **settings)
    assert not (tmp_path / "run" / "model").exists()


def test_layers_that_choose_different_numbers_of_experts_are_told_apart(tmp_path: Path) -> None:
    sizes = {**tiny.SIZES, **tiny.GQA, "head_dim": 8, "num_experts": 4, "moe_topk": [1, 3, 3]}
    config = transformers.HunYuanMoEV1Config(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"))
    assert list(mixtures.chosen_experts(model).values()) == [1, 3, 3]
    with pytest.raises(fp.FistaPrunerError, match=r"experts of model\.layers\.1\.mlp.* the router chooses 3"):
        mixtures.find_experts(model, discover(model), Structure(remove="experts=2"), {})


@pytest.mark.parametrize(("limit", "experts", "most"), [(1, 2, 3), (1, 4, 2), (2, 2, None), (2, 4, None)])
def test_a_token_needs_enough_experts_in_its_groups(tmp_path: Path, limit: int, experts: int, most: int | None) -> None:
    """The router chooses 4 of the experts of ``limit`` of its 2 groups, which have half of those that stay each."""
    folder = tiny.save("deepseek_v3", tmp_path, topk_group=limit, num_experts_per_tok=4, **MORE)
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    asked = Structure(remove=f"experts={experts}")
    if most is None:
        assert mixtures.find_experts(model, discover(model), asked, {})[0][1][0].after == 8 - experts
        return
    with pytest.raises(fp.FistaPrunerError, match=f"remain, {most} of them in the groups .* chooses 4 for every token"):
        mixtures.find_experts(model, discover(model), asked, {})

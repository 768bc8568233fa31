"""Experts, and channels of experts, are removed; the result is an ordinary smaller checkpoint."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import TOKENS, assert_alike
from torch import Tensor, nn

import fistapruner as fp
import tiny
from fistapruner.core import NM
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.runs.directory import PruneDirectory
from fistapruner.runs.records import Report

QUARTER = {"remove": "mlp=25%", "multiple": 4}
GOA = {**QUARTER, "method": "goa"}
WIDTHS = {
    "qwen2_moe": {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "intermediate_size": 48},
    "qwen3_moe": {"moe_intermediate_size": 12, "intermediate_size": 48},
    "mixtral": {"intermediate_size": 36},
    "olmoe": {"intermediate_size": 36},
    "gpt_oss": {"intermediate_size": 36},
    "granitemoe": {"intermediate_size": 36},
    "deepseek_v3": {"moe_intermediate_size": 12, "intermediate_size": 36},
    "gemma4": {"moe_intermediate_size": 12, "intermediate_size": 36},
}
"""What a quarter makes of the configs: entries that no MLP has its width from stay."""
SOME = ("deepseek_v3", "gpt_oss", "qwen2_moe")
"""Mixtures with groups, in one tensor, with a shared expert; the others are slow tests."""
EVERY = tiny.quick_first(tiny.MIXTURES, SOME)
MORE: dict[str, Any] = {"n_routed_experts": 8}
"""DeepSeek-V3 chooses among groups of experts first, and at least two must stay in each."""


def expert_inputs(dense: Any, layer: int, run: Path) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The experts of a layer of a whole model; the inputs of its tokens, their experts and weights."""
    calls, experts = [], dense.model.layers[layer].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        dense(PruneDirectory(run).tokens())
    return experts, *calls[0]


def kept(report: Report, layer: int) -> list[int]:
    (removal,) = report.layers[layer].removals
    return removal.kept


def mlps(model: Any) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Of every expert and MLP: (channels, n) of what writes each channel, (m, channels) of what reads it, its bias.

    They are views, but for the first.
    """
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate"):
            for number in range(len(module.down_proj)):
                write, read = module.gate_up_proj[number], module.down_proj[number]
                bias = module.down_proj_bias[number] if module.has_bias else None
                if module.is_transposed:  # GPT-OSS: gate and up take turns
                    found.append((torch.cat([write.T[::2], write.T[1::2]], 1), read.T, bias))
                else:
                    found.append((torch.cat(write.chunk(2), 1), read, bias))
        elif isinstance(getattr(module, "down_proj", None), nn.Linear):
            write = torch.cat([module.gate_proj.weight, module.up_proj.weight], 1)
            found.append((write, module.down_proj.weight, module.down_proj.bias))
    return found


@pytest.mark.parametrize("original", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", EVERY)
def test_the_smaller_checkpoint_loads_and_is_the_dense_model_without_those_experts(
    tmp_path: Path, architecture: str, original: bool
) -> None:
    """Every bit, where passes have fewer and where experts get another number, too."""
    changes: dict[str, Any] = MORE if architecture == "deepseek_v3" else {}
    model = {"original": original, **changes}
    report = tiny.prune(tmp_path, architecture, model, structure="experts=50%", dtype="bfloat16")
    small, dense = tiny.loaded(tmp_path / "run" / "model"), tiny.loaded(tmp_path / "model")
    before = 8 if changes else 4
    stay = {layer.index: kept(report, layer.index) for layer in report.layers if layer.removals}
    assert any(each != list(range(before // 2)) for each in stay.values())
    for each in stay.values():
        assert len(each) == before // 2
        assert each == sorted(each)
        assert not changes or [expert < 4 for expert in each] == [True, True, False, False]
    assert small.num_parameters() == report.totals.model_weights < dense.num_parameters() == report.model.parameters
    own, whole = small.state_dict(), dense.state_dict()
    assert own.keys() == whole.keys()
    cut = {name for name, tensor in own.items() if tensor.shape != whole[name].shape}
    assert len(cut) > 2 * len(stay)
    for name, tensor in own.items():
        expected = whole[name][stay[int(name.split(".")[2])]] if name in cut else whole[name]
        assert torch.equal(tensor, expected), name
        assert name.endswith("bias") or name not in cut or not torch.equal(tensor, tensor.bfloat16().float())
    assert not inspect_checkpoint(tmp_path / "run").violations
    assert small.generate(TOKENS, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (2, 19)


def test_scores_are_the_mean_of_weight_times_length_of_the_output(tmp_path: Path) -> None:
    report = tiny.prune(tmp_path, "qwen3_moe", structure="experts=1", propagate="dense")
    experts, inputs, chosen, weights = expert_inputs(tiny.loaded(tmp_path / "model"), 1, tmp_path / "run")
    with torch.no_grad():
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


def test_an_expert_that_no_token_reaches_goes_first_and_removing_it_changes_nothing(tmp_path: Path) -> None:
    folder = tiny.save_unused_expert(tmp_path / "model", 2)
    report = fp.prune(str(folder), tmp_path / "run", structure="experts=1", calibration=tiny.SMALL)
    assert kept(report, 0) == kept(report, 1) == [0, 1, 3]
    assert report.method == "reap"
    assert [removal.scores[2] for layer in report.layers for removal in layer.removals if removal.scores] == [0, 0]
    with torch.no_grad():
        expected, found = (tiny.loaded(path)(TOKENS).logits for path in (folder, tmp_path / "run" / "model"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["obs", pytest.param("flap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", EVERY)
def test_the_narrower_model_computes_what_the_dense_model_with_zeroed_channels_does(
    tmp_path: Path, architecture: str, method: str
) -> None:
    report = tiny.prune(tmp_path, architecture, structure={**QUARTER, "method": method})
    small, dense = tiny.loaded(tmp_path / "run" / "model"), tiny.loaded(tmp_path / "model")
    assert {name: getattr(small.config, name) for name in WIDTHS[architecture]} == WIDTHS[architecture]
    assert small.num_parameters() == report.totals.model_weights < dense.num_parameters()
    chosen = set()
    with torch.no_grad():
        for (before, whole, bias), (after, read, new) in zip(mlps(dense), mlps(small), strict=True):
            assert len(after) == 3 * len(before) // 4
            keep = [int((before == row).all(1).nonzero()) for row in after]
            chosen.add(tuple(keep))
            whole.zero_()
            whole[:, keep] = read
            if bias is not None and new is not None:
                bias.copy_(new)
    assert len(chosen) > 2  # every expert has its own
    assert_alike(small, dense)
    assert not inspect_checkpoint(tmp_path / "run").violations


@pytest.mark.parametrize("method", ["obs", "energy", "magnitude", "flap"])
def test_an_expert_loses_the_channel_that_the_definition_says(tmp_path: Path, method: str) -> None:
    """The last two are scores; least squares tries every channel, on the tokens that go to the expert."""
    report = tiny.prune(tmp_path, "qwen3_moe", structure={"remove": "mlp=15", "method": method}, propagate="dense")
    small, dense = tiny.loaded(tmp_path / "run" / "model"), tiny.loaded(tmp_path / "model")
    experts, inputs, routed, _ = expert_inputs(dense, 0, tmp_path / "run")
    dense.requires_grad_(requires_grad=False)
    for number, (write, read, _) in enumerate(mlps(small)[:4]):
        tokens = inputs[(routed == number).any(1)]
        gate, up = (experts.gate_up_proj[number] @ tokens.T).double().chunk(2)
        channels, down = (nn.functional.silu(gate) * up).T, experts.down_proj[number].double()
        norms, share = down.square().sum(0), report.layers[0].removals[number].shrink or 0.0
        penalty = torch.diag(share * channels.square().sum(0)).sqrt()
        rows, fits = torch.cat([(1 - share) ** 0.5 * channels, penalty]), []
        for gone in range(16):
            keep = [channel for channel in range(16) if channel != gone]
            weight = torch.linalg.lstsq(rows[:, keep], rows @ down.T, driver="gelsd").solution.T
            fits.append((float((rows[:, keep] @ weight.T - rows @ down.T).square().sum()), keep, weight))
        scores = {
            "obs": torch.tensor([error for error, _, _ in fits]),
            "energy": norms * channels.square().sum(0),
            "magnitude": norms,
            "flap": norms * channels.var(0, correction=0),
        }
        _, keep, weight = fits[int(scores[method].argmin())]
        before = mlps(dense)[number][0]
        assert torch.equal(write, before[keep])
        if method in ("obs", "energy"):
            torch.testing.assert_close(read, weight.float(), rtol=1e-3, atol=1e-3)
        elif method == "flap":
            assert torch.equal(read, down.float()[:, keep])


@pytest.mark.parametrize("method", ["obs", "energy", "magnitude", "flap"])
def test_experts_go_before_channels_which_go_before_zeros(tmp_path: Path, method: str) -> None:
    """Those that stay choose their channels on their new tokens; with heads, and a pattern, in one run."""
    structure = {"remove": "mlp=25%,heads=1,experts=25%", "multiple": 4, "method": method}
    report = tiny.prune(tmp_path, "qwen2_moe", structure=structure, sparsity="2:4")
    small = tiny.loaded(tmp_path / "run" / "model")
    assert small.num_parameters() == report.totals.model_weights
    config = small.config
    assert (config.num_experts, config.moe_intermediate_size, config.num_key_value_heads) == (3, 12, 1)
    for layer in report.layers:
        units = [removal.unit for removal in layer.removals]
        assert units.index("key/value groups") < units.index("experts") < units.index("expert channels")
        assert {removal.method for removal in layer.removals} == {"reap", method}
        tokens = [removal.tokens for removal in layer.removals if removal.unit == "expert channels"]
        assert len(tokens) == 3
        assert sum(filter(None, tokens)) == 2 * 4 * 32  # two experts for a token, of those that stay
    for write, read, _ in mlps(small):
        for matrix in (*write.detach().split(32, 1), read.detach()):
            assert NM(2, 4).satisfies(matrix)
    assert report.totals.operator_zeros == report.totals.operator_weights // 2
    assert not inspect_checkpoint(tmp_path / "run").violations


def test_narrower_experts_are_packed_and_keep_their_zeros_in_training(tmp_path: Path) -> None:
    structure = {"remove": "mlp=25%,heads=1,experts=25%", "multiple": 4}
    tiny.prune(tmp_path, "qwen2_moe", structure=structure, sparsity="2:4")
    fp.pack(tmp_path / "run" / "model", tmp_path / "packed", values="bf16")
    with torch.no_grad():
        packed, small = (
            model(TOKENS).logits for model in (fp.load(tmp_path / "packed"), tiny.loaded(tmp_path / "run/model"))
        )
    torch.testing.assert_close(packed.float(), small, rtol=0.05, atol=0.05)
    data = {"source": "python", "tokens": 300, "seqlen": 16}
    fp.recover(tmp_path / "run", tmp_path / "recovered", steps=1, parameters="full", data=data, evaluate=None)
    trained = inspect_checkpoint(tmp_path / "recovered")
    assert not trained.violations
    assert {(unit, after) for _, unit, _, after in trained.widths} >= {("expert channels", 12), ("experts", 3)}


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder = tiny.save("deepseek_v3", tmp_path / "model", num_hidden_layers=3, shard="40KB", **MORE)
    asked: dict[str, Any] = {"structure": {"remove": "mlp=25%,experts=25%", "multiple": 4}, "calibration": tiny.SMALL}
    asked |= {"method": "sparsegpt", "sparsity": "2:4", "error_correction": False}
    fp.prune(folder, tmp_path / "whole", **asked)
    tiny.begin(folder, tmp_path / "parts", layers=2, **asked)
    fp.resume(tmp_path / "parts")
    shards = tiny.weights(tmp_path / "whole")
    assert len(shards) > 2
    assert tiny.weights(tmp_path / "parts") == shards
    config = tiny.loaded(tmp_path / "whole" / "model").config
    assert (config.n_routed_experts, config.moe_intermediate_size, config.intermediate_size) == (6, 12, 36)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "structure"),
    [("qwen2_moe", "experts=2,heads=1"), ("llama", {**QUARTER, "remove": "mlp=25%,heads=1"})],
)
def test_several_processes_share_a_run(tmp_path: Path, architecture: str, structure: Any) -> None:
    folder = tiny.save(architecture, tmp_path / "model", num_hidden_layers=2)
    settings: dict[str, Any] = {"structure": structure, "calibration": tiny.SMALL, "propagate": "dense"}
    fp.prune(folder, tmp_path / "whole", **settings)
    fp.prune(folder, tmp_path / "parts", **settings, execution={"executor": "process", "workers": 2})
    assert tiny.weights(tmp_path / "whole") == tiny.weights(tmp_path / "parts")
    assert tiny.loaded(tmp_path / "whole" / "model").config.num_key_value_heads == 1


def test_windows_at_a_time_change_the_rounding_only(tmp_path: Path) -> None:
    """Also where a batch has windows of both halves, which cross-validation tells apart."""
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    shares, settings = [], {"structure": QUARTER, "propagate": "dense", "calibration": {**tiny.SMALL, "samples": 8}}
    for size in (1, 3):
        report = fp.prune(folder, tmp_path / str(size), **settings, execution={"batch_size": size})
        removals = [removal for layer in report.layers for removal in layer.removals]
        assert all(removal.validated_error is not None for removal in removals)
        shares.append([(removal.tokens, removal.shrink) for removal in removals])
    assert shares[0] == shares[1]


def test_an_expert_without_tokens_loses_its_smallest_channels_and_is_named(tmp_path: Path) -> None:
    tiny.save_unused_expert(tmp_path / "model", 2)
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    report = fp.prune(str(tmp_path / "model"), tmp_path / "run", structure=QUARTER, calibration=calibration)
    for layer in report.layers:
        tokens = {removal.consumer: removal.tokens for removal in layer.removals}
        assert tokens["mlp.experts.2.down_proj"] == 0
        named = " ".join(layer.warnings)
        assert "experts 2: no token was routed to them, so they are pruned by magnitude" in named
        few = [(name.split(".")[2], count) for name, count in tokens.items() if count and count < 48]
        assert few
        assert all(f"{number} ({count} tokens)" in named for number, count in few)
        for removal in layer.removals:
            if removal.tokens is not None and removal.tokens < 48:
                assert removal.shrink == pytest.approx(48 / (48 + removal.tokens))
    before, after = mlps(tiny.loaded(tmp_path / "model"))[2], mlps(tiny.loaded(tmp_path / "run" / "model"))[2]
    keep = before[1].norm(dim=0).topk(36).indices.sort().values
    assert torch.equal(after[0], before[0][keep])
    assert torch.equal(after[1], before[1][:, keep])


def test_shared_experts_keep_their_multiple(tmp_path: Path) -> None:
    """DeepSeek's have a multiple of the experts' width; rounded apart, 32 channels would be 20, and 16 are 12."""
    structure = {"remove": "mlp=36%", "multiple": 4}
    report = tiny.prune(tmp_path, "deepseek_v3", {"n_shared_experts": 2}, structure=structure)
    assert report.widths == {"MLP channels": (48, 32), "expert channels": (16, 12), "shared expert channels": (32, 24)}
    assert tiny.loaded(tmp_path / "run" / "model").config.moe_intermediate_size == 12


@pytest.mark.parametrize(("multiple", "said"), [(4, True), (8, False)])
def test_widths_that_transformers_refuses_by_default_are_named(tmp_path: Path, multiple: int, said: bool) -> None:
    listener, structure = tiny.Said(), {"remove": "mlp=30%", "multiple": multiple}
    tiny.prune(tmp_path, "qwen3_moe", {"dtype": torch.bfloat16}, structure=structure, listener=listener)
    assert any("no multiple of 8, do not run in transformers" in each for each in listener.sentences) == said
    result = tiny.loaded(tmp_path / "run" / "model", dtype="auto")
    with pytest.raises(RuntimeError, match="multiple of 16 bytes") if said else nullcontext():
        result(TOKENS)
    result.set_experts_implementation("eager")
    assert result(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("qwen3_moe", {"structure": "experts=1", "sparsity": "50%", "allocation": "owl"}, "allocation uniform"),
        ("mixtral", {"structure": GOA}, "goa does not rate channels of experts"),
        ("mixtral", {"structure": QUARTER, "sparsity": "2:8"}, "36 inputs"),
        ("llama", {"structure": GOA, "sparsity": "50%"}, r"goa has no zeros \(50%\)"),
        ("llama", {"structure": GOA, "allocation": {"v_proj": "0%", "down_proj": "2:4"}}, r"goa has no zeros \(2:4\)"),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(
    tmp_path: Path, architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(fp.FistaPrunerError, match=message):
        tiny.prune(tmp_path, architecture, **settings)
    assert not (tmp_path / "run" / "calibration.safetensors").exists()

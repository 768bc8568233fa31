"""Channels of experts are removed, every expert's own, and the result is an ordinary smaller checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.core import NM
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.recipes.structure_settings import Structure
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.structured.removal import removal_error, remove_channels
from fistapruner.structured.statistics import ChannelSums

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
QUARTER = {"remove": "mlp=25%", "multiple": 4}
TOKENS = torch.randint(3, tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
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


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


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


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
@pytest.mark.parametrize("method", ["obs", "flap"])
def test_the_result_computes_what_the_dense_model_with_zeroed_channels_does(
    tmp_path: Path, architecture: str, method: str
) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    structure = {**QUARTER, "method": method}
    report = fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=SMALL)
    small, dense = loaded(tmp_path / "run" / "model"), loaded(folder)
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
    torch.testing.assert_close(small(TOKENS).logits, dense(TOKENS).logits, rtol=1e-4, atol=1e-4)
    generated = [model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (small, dense)]
    assert torch.equal(*generated)
    assert not inspect_checkpoint(tmp_path / "run").violations


@pytest.mark.parametrize("method", ["obs", "energy", "magnitude", "flap"])
def test_an_expert_loses_the_channel_that_the_definition_says(tmp_path: Path, method: str) -> None:
    """The last two are scores; least squares tries every channel, on the tokens that go to the expert."""
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    structure = {"remove": "mlp=15", "method": method, **({"shrink": 0} if method in ("obs", "energy") else {})}
    fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=SMALL, propagate="dense")
    small, dense, calls = loaded(tmp_path / "run" / "model"), loaded(folder), []
    experts = dense.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        dense(PruneDirectory(tmp_path / "run").tokens())
    inputs, routed, _ = calls[0]
    dense.requires_grad_(requires_grad=False)
    for number, (write, read, _) in enumerate(mlps(small)[:4]):
        tokens = inputs[(routed == number).any(1)]
        gate, up = (experts.gate_up_proj[number] @ tokens.T).double().chunk(2)
        channels, down = (nn.functional.silu(gate) * up).T, experts.down_proj[number].double()
        norms = down.square().sum(0)
        fits = []
        for gone in range(16):
            keep = [channel for channel in range(16) if channel != gone]
            weight = torch.linalg.lstsq(channels[:, keep], channels @ down.T, driver="gelsd").solution.T
            fits.append((float((channels[:, keep] @ weight.T - channels @ down.T).square().sum()), keep, weight))
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


def test_experts_go_before_channels_which_go_before_zeros(tmp_path: Path) -> None:
    """Those that stay choose their channels on their new tokens; with heads, and a pattern, in one run."""
    folder = tiny.save("qwen2_moe", tmp_path / "model")
    structure = {"remove": "mlp=25%,heads=1,experts=25%", "multiple": 4}
    report = fp.prune(str(folder), tmp_path / "run", structure=structure, sparsity="2:4", calibration=SMALL)
    small = loaded(tmp_path / "run" / "model")
    assert small.num_parameters() == report.totals.model_weights
    config = small.config
    assert (config.num_experts, config.moe_intermediate_size, config.num_key_value_heads) == (3, 12, 1)
    for layer in report.layers:
        units = [removal.unit for removal in layer.removals]
        assert units.index("key/value groups") < units.index("experts") < units.index("expert channels")
        tokens = [removal.tokens for removal in layer.removals if removal.unit == "expert channels"]
        assert len(tokens) == 3
        assert sum(filter(None, tokens)) == 2 * 4 * 32  # two experts for a token, of those that stay
    for write, read, _ in mlps(small):
        for matrix in (*write.detach().split(32, 1), read.detach()):
            assert NM(2, 4).satisfies(matrix)
    assert report.totals.operator_zeros == report.totals.operator_weights // 2
    assert not inspect_checkpoint(tmp_path / "run").violations
    # Packed, it computes the same; recovered, it keeps its zeros.
    fp.pack(tmp_path / "run" / "model", tmp_path / "packed", values="bf16")
    with torch.no_grad():
        torch.testing.assert_close(
            fp.load(tmp_path / "packed")(TOKENS).logits.float(), small(TOKENS).logits, rtol=0.05, atol=0.05
        )
    data = {"source": "python", "tokens": 300, "seqlen": 16}
    fp.recover(tmp_path / "run", tmp_path / "recovered", steps=1, parameters="full", data=data, evaluate=None)
    trained = inspect_checkpoint(tmp_path / "recovered")
    assert not trained.violations
    assert {(unit, after) for _, unit, _, after in trained.widths} >= {("expert channels", 12), ("experts", 3)}


@pytest.mark.parametrize("settings", [{"sparsity": "0%"}, {"sparsity": "2:4", "error_correction": False}])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tiny.save("deepseek_v3", tmp_path / "model", num_hidden_layers=3, shard="40KB", n_routed_experts=8)
    asked: dict[str, Any] = {"structure": {"remove": "mlp=25%,experts=25%", "multiple": 4}, "calibration": SMALL}
    fp.prune(str(folder), tmp_path / "whole", method="sparsegpt", **asked, **settings)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fp.prune(str(folder), tmp_path / "parts", method="sparsegpt", listener=tiny.Stops(), **asked, **settings)
    fp.resume(tmp_path / "parts")
    shards = tiny.weights(tmp_path / "whole")
    assert len(shards) > 2
    assert tiny.weights(tmp_path / "parts") == shards
    config = loaded(tmp_path / "whole" / "model").config
    assert (config.n_routed_experts, config.moe_intermediate_size, config.intermediate_size) == (6, 12, 36)


def test_windows_at_a_time_change_the_rounding_only(tmp_path: Path) -> None:
    """Also where a batch has windows of both halves, which cross-validation tells apart."""
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    shares = []
    for size in (1, 3):
        calibration = {"source": "python", "samples": 8, "seqlen": 32}
        settings: dict[str, Any] = {"execution": {"batch_size": size}, "calibration": calibration}
        report = fp.prune(str(folder), tmp_path / str(size), structure=QUARTER, propagate="dense", **settings)
        removals = [removal for layer in report.layers for removal in layer.removals]
        assert all(removal.validated_error is not None for removal in removals)
        shares.append([(removal.tokens, removal.shrink) for removal in removals])
    assert shares[0] == shares[1]


def test_an_expert_without_tokens_loses_its_smallest_channels_and_is_named(tmp_path: Path) -> None:
    model = tiny.build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[2] = -1e4
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
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
    before, after = mlps(loaded(tmp_path / "model"))[2], mlps(loaded(tmp_path / "run" / "model"))[2]
    keep = before[1].norm(dim=0).topk(36).indices.sort().values
    assert torch.equal(after[0], before[0][keep])
    assert torch.equal(after[1], before[1][:, keep])


@pytest.mark.parametrize(("method", "shrink"), [("obs", "auto"), ("obs", 0), ("flap", "auto")])
def test_only_grams_that_are_shrunk_are_said_to_be(tmp_path: Path, method: str, shrink: Any) -> None:
    folder = tiny.save("qwen3_moe", tmp_path / "model")
    structure = {**QUARTER, "method": method, "shrink": shrink}
    calibration = {"source": "python", "samples": 1, "seqlen": 16}
    report = fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=calibration)
    (warning,) = (text for text in report.layers[0].warnings if "fewer tokens than inputs" in text)
    shrunk = [removal.shrink for removal in report.layers[0].removals]
    assert ("Grams are shrunk towards the diagonal" in warning) == any(shrunk) == ((method, shrink) == ("obs", "auto"))


@pytest.mark.parametrize("method", ["obs", "flap"])
def test_one_token_has_no_variance_and_is_rated_by_its_values(method: str) -> None:
    """Around their mean all of its channels are zero, and any choice would do."""
    generator = torch.Generator().manual_seed(0)
    weight, token = torch.randn(8, 24, generator=generator), torch.randn(1, 24, generator=generator)
    sums = ChannelSums(weight, 2, routed=True)
    sums.add_tokens(0, token)
    known = sums.statistics("down_proj", 0.5)
    found = remove_channels(known, 12, Structure(remove="mlp=12", method=method), biased=True)
    alike = "energy" if method == "flap" else "obs"
    assert torch.equal(found.keep, remove_channels(known, 12, Structure(remove="mlp=12", method=alike)).keep)
    added = weight.square().sum(0) * token[0].square()  # energy of what each channel adds
    assert added[found.keep].sum() > 0.8 * added.sum()
    assert removal_error(known, found.places, found.weight, found.bias) < 1e-6


def test_shared_experts_keep_their_multiple(tmp_path: Path) -> None:
    """DeepSeek's have a multiple of the experts' width; rounded apart, 32 channels would be 20, and 16 are 12."""
    folder = tiny.save("deepseek_v3", tmp_path / "model", n_shared_experts=2)
    structure = {"remove": "mlp=36%", "multiple": 4}
    report = fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=SMALL)
    assert report.widths == {
        "MLP channels": (48, 32),
        "expert channels": (16, 12),
        "shared expert channels": (32, 24),
    }
    assert loaded(tmp_path / "run" / "model").config.moe_intermediate_size == 12


@pytest.mark.parametrize(
    ("dtype", "multiple", "said"), [("bfloat16", 4, True), ("bfloat16", 8, False), ("float32", 4, False)]
)
def test_widths_that_transformers_refuses_by_default_are_named(
    tmp_path: Path, dtype: str, multiple: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save("qwen3_moe", tmp_path / "model", dtype=getattr(torch, dtype))
    listener, structure = tiny.Said(), {"remove": "mlp=30%", "multiple": multiple}
    fp.prune(str(folder), tmp_path / "run", structure=structure, calibration=SMALL, listener=listener)
    warning = "no multiple of 8, do not run in transformers"
    assert any(warning in sentence for sentence in listener.sentences) == said
    assert main(["plan", str(folder), "--structure", "mlp=30%", "--structure-multiple", str(multiple)]) == 0
    assert (warning in " ".join(capsys.readouterr().out.split())) == said
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto").eval()
    with pytest.raises(RuntimeError, match="multiple of 16 bytes") if said else nullcontext():
        result(TOKENS)
    result.set_experts_implementation("eager")
    assert result(TOKENS).logits.isfinite().all()


def test_a_share_of_the_parameters_is_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save("gemma4", tmp_path / "model")
    asked = ["--structure", "15%", "--structure-multiple", "1", "--calibration", "python", "--samples", "4"]
    assert main(["plan", str(folder), *asked, "--seqlen", "32"]) == 0
    said = capsys.readouterr().out
    assert "MLP channels" in said
    assert "of 16 expert channels stay in every decoder layer" in said
    report = fp.prune(str(folder), tmp_path / "run", structure={"remove": "15%", "multiple": 1}, calibration=SMALL)
    dense = loaded(folder)
    layers = sum(parameter.numel() for parameter in dense.model.layers.parameters())
    gone = dense.num_parameters() - loaded(tmp_path / "run" / "model").num_parameters()
    channels = 3 * 32 * (1 + 4) * 2  # one channel of every MLP and expert
    assert abs(gone - 0.15 * layers) <= channels / 2
    assert f"({gone / layers:.1%} fewer; {gone / dense.num_parameters():.1%} of the whole model's)" in said
    assert report.totals.model_weights == dense.num_parameters() - gone
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert (
        f"Every decoder layer keeps {report.widths['MLP channels'][1]} of 48 MLP channels; every expert keeps" in card
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "expert channels 16 →" in page
    assert "mean of 4 experts" in page


def test_a_token_costs_the_operations_of_the_experts_that_it_goes_through(tmp_path: Path) -> None:
    folder = tiny.save("mixtral", tmp_path / "model")
    totals = fp.prune(str(folder), tmp_path / "run", structure=QUARTER, calibration=SMALL).totals
    attention, router, head = 2 * (32 + 16) * 32, 4 * 32, 128 * 32
    for width, found in ((48, totals.dense_flops_per_token), (36, totals.flops_per_token)):
        assert found == 2 * (2 * (attention + router + 2 * 3 * 32 * width) + head)


def test_shared_experts_with_an_entry_of_their_own_keep_their_share(tmp_path: Path) -> None:
    """GraniteMoeShared has gate and up of its shared expert in one tensor; 18 of 24 is rounded to a multiple of 4."""
    tiny.need_transformers("5.16")  # as in tiny.build
    config = transformers.GraniteMoeSharedConfig(
        **tiny.SIZES, **tiny.ROUTED, num_local_experts=4, shared_intermediate_size=24
    )
    torch.manual_seed(0)
    tiny.spread(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    fp.prune(str(tmp_path / "model"), tmp_path / "run", structure=QUARTER, calibration=SMALL)
    found = loaded(tmp_path / "run" / "model").config
    assert (found.intermediate_size, found.shared_intermediate_size) == (36, 16)


@pytest.mark.parametrize("hidden", [32, 64])
def test_attention_is_not_taken_for_a_shared_expert(tmp_path: Path, hidden: int) -> None:
    """An output projection with twice as many outputs as inputs is no gate and up in one."""
    folder = tiny.save("qwen3_moe", tmp_path / "model", hidden_size=hidden)
    report = fp.prune(str(folder), tmp_path / "run", structure=QUARTER, calibration=SMALL)
    assert report.widths == {"expert channels": (16, 12)}

"""Experts are pruned on the tokens that are routed to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.core import NM, LayerProblem
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.passes.store import HiddenStates, RoutedTokens
from fistapruner.runs.directory import PruneDirectory

SMALL = {"source": "python", "samples": 8, "seqlen": 32}


@pytest.mark.parametrize("original", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(each, marks=[] if each in ("gpt_oss", "gemma4", "qwen2_moe") else pytest.mark.slow)
        for each in tiny.MIXTURES
    ],
)
def test_a_mixture_is_pruned_exactly_and_loads_under_its_own_names(
    tmp_path: Path, architecture: str, original: bool
) -> None:
    folder = tiny.save(architecture, tmp_path / "model", original=original, dtype=torch.bfloat16)
    report = fp.prune(str(folder), tmp_path / "run", sparsity="2:4", method="wanda+refit", calibration=SMALL)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "model"))
    assert list(before) == list(after)
    assert all(
        after[name].shape == tensor.shape and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    operators = {entry.name for entry in report.layers[1].operators}
    parts = 2 if any("gate_up_proj" in name for name in operators) else 3
    assert sum("experts" in name.split(".") for name in operators) == 4 * parts
    assert not any("router" in name for name in operators)
    written = Checkpoint.open(tmp_path / "run" / "model")
    model = LayerwiseModel(written, torch.device("cpu"), torch.float32)
    with model.layer(1) as layer:
        for name in operators:
            weight = layer.get_submodule(name).weight
            assert NM(2, 4).satisfies(weight), name
            assert int((weight == 0).sum()) == weight.numel() // 2, name
    # transformers computes what the run does. Gemma's factor of embeddings is rounded as the checkpoint is.
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(written.folder).eval().float()
        torch.testing.assert_close(model.own_logits(tokens), loaded(tokens).logits, rtol=1e-5, atol=1e-5)
    found = inspect_checkpoint(tmp_path / "run")
    assert not found.violations
    assert len(found.pruned) == sum(len(layer.operators) for layer in report.layers)


def routed_by_hand(model: Any, tokens: Tensor, layer: int) -> dict[int, Tensor]:
    """Loop over the tokens: the inputs of each expert of a decoder layer."""
    calls: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append((args[0], args[1])))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    inputs, chosen = calls[0]
    found: dict[int, list[Tensor]] = {}
    for token, experts_of_token in zip(inputs, chosen, strict=True):
        for expert in experts_of_token.tolist():
            found.setdefault(expert, []).append(token)
    return {expert: torch.stack(rows) for expert, rows in found.items()}


@pytest.mark.parametrize("error_correction", [True, False])
def test_the_gram_of_an_expert_is_that_of_the_tokens_routed_to_it(tmp_path: Path, error_correction: bool) -> None:
    """Routed by the model's own router on pruned inputs: layer 1 sees the pruned layer 0."""
    folder, seen = tiny.save("qwen3_moe", tmp_path / "model"), {}

    def note(layer: int, group: int, problem: LayerProblem) -> None:
        seen[problem.name] = problem, problem.gram.clone()

    settings = {"targets": ["re:experts"], "calibration": {**SMALL, "samples": 16}, "propagate": "pruned"}
    fp.prune(
        str(folder),
        tmp_path / "run",
        method="wanda",
        inspect=note,
        error_correction=error_correction,
        dense_target="pruned",
        **settings,
    )
    tokens = PruneDirectory(tmp_path / "run").tokens()
    pruned, dense = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "run" / "model", folder))
    routed = routed_by_hand(pruned, tokens, 1)
    assert sum(map(len, routed.values())) == 2 * tokens.numel()
    used = (pruned if error_correction else dense).model.layers[1].mlp.experts
    for expert, x in routed.items():
        name = f"model.layers.1.mlp.experts.{expert}"
        problem, gram = seen[f"{name}.gate_proj"]
        assert problem.tokens == len(x) >= 32
        assert torch.equal(gram, seen[f"{name}.up_proj"][1])
        torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        gate, up = (used.gate_up_proj[expert] @ x.T).T.chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(seen[f"{name}.down_proj"][1], inner.T @ inner / len(x), rtol=1e-4, atol=1e-5)


def test_experts_with_few_tokens_or_none_are_named(tmp_path: Path) -> None:
    folder = tiny.save_unused_expert(tmp_path / "model", 2)
    seen: dict[str, LayerProblem] = {}
    report = fp.prune(
        str(folder),
        tmp_path / "run",
        method="wanda",
        calibration={**SMALL, "samples": 2},
        targets=["re:experts"],
        inspect=lambda layer, group, problem: seen.update({problem.name: problem}),
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "model"))
    for layer in report.layers:
        tokens = {entry.name: entry.tokens for entry in layer.operators}
        assert all((tokens[name] == 0) == (".experts.2." in name) for name in tokens)
        few = {name.split(".")[2] for name, count in tokens.items() if 0 < count < 48}
        assert few
        none, shrunk = layer.warnings
        assert none.startswith(f"{layer.name}.mlp.experts: experts 2: no token was routed to them")
        assert shrunk.endswith("fewer tokens than inputs, so their Grams are shrunk towards the diagonal")
        assert all(f" {expert} (" in shrunk for expert in few)
        # Without tokens the largest weights stay as they were.
        name = f"{layer.name}.mlp.experts.down_proj"
        weight, pruned = before[name][2], after[name][2]
        kept = pruned != 0
        assert int(kept.sum()) == weight.numel() // 2
        assert torch.equal(pruned[kept], weight[kept])
        assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_a_gram_of_few_tokens_is_shrunk_towards_its_diagonal(tmp_path: Path) -> None:
    folder, seen = tiny.save("qwen3_moe", tmp_path / "model"), {}
    fp.prune(
        str(folder),
        tmp_path / "run",
        method="wanda",
        calibration={**SMALL, "samples": 1, "seqlen": 16},
        targets=["re:experts"],
        propagate="dense",
        inspect=lambda layer, group, problem: seen.update({problem.name: problem}),
    )
    tokens = PruneDirectory(tmp_path / "run").tokens()
    for expert, x in routed_by_hand(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens, 0).items():
        problem = seen[f"model.layers.0.mlp.experts.{expert}.gate_proj"]
        gram, share = x.T @ x / len(x), 32 / (32 + len(x))
        expected = (1 - share) * gram + share * torch.diag(gram.diagonal())
        torch.testing.assert_close(problem.gram, expected, rtol=1e-4, atol=1e-5)
        assert problem.relative_error(torch.zeros_like(problem.weight)) == pytest.approx(1.0)


def test_experts_that_no_measured_token_reaches_get_what_was_asked_for(tmp_path: Path) -> None:
    """Nothing is known of their errors, which is not that they make none."""
    folder = tiny.save_unused_expert(tmp_path / "model", 2)
    for sparsity, allocation in (("50%", "auto"), ("2:4", "error")):
        run = tmp_path / sparsity.replace(":", "-")
        report = fp.prune(str(folder), run, sparsity=sparsity, allocation=allocation, calibration=SMALL)
        found = {entry.name: entry.sparsity for entry in report.operators}
        assert {pattern for name, pattern in found.items() if ".experts.2." in name} == {sparsity}
        assert len(set(found.values())) > 1


def test_tokens_of_an_expert_are_the_same_from_memory_and_from_a_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(6, 4, 8, generator=generator), torch.rand(24, 2, generator=generator)
    chosen = torch.rand(24, 5, generator=generator).topk(2).indices
    stores = [RoutedTokens(HiddenStates((6, 4, 8), torch.float32, file)) for file in (None, tmp_path / "inputs")]
    for store in stores:
        for start, stop in ((0, 4), (4, 6)):
            rows = slice(4 * start, 4 * stop)
            store.keep(start, inputs[start:stop].reshape(-1, 8), chosen[rows], weights[rows])
    for expert in range(5):
        expected = inputs.reshape(-1, 8)[(chosen == expert).any(1)]
        for store in stores:
            found = list(store.weighted(expert, torch.device("cpu")))
            assert torch.equal(torch.cat([tokens for tokens, _ in found]), expected)
            assert torch.equal(torch.cat([given for _, given in found]), weights[chosen == expert])
    for store in stores:
        store.close()
    assert not (tmp_path / "inputs").exists()

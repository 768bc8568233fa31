"""GOA: both criteria against independent computations, its reconstruction against least squares on whole models."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from fistapruner import LayerProblem
from fistapruner.core.linalg import alive_gram
from fistapruner.models.operators import discover
from fistapruner.papers.goa import (
    DAMPING,
    attention_probabilities,
    channel_criterion,
    group_divergence,
    head_divergence,
    redundant,
)
from fistapruner.passes.store import HiddenStates
from fistapruner.runs.directory import PruneDirectory
from fistapruner.settings.structure import Structure
from fistapruner.structure.refit import ChannelStatistics, remove_channels
from fistapruner.structure.trial import plan_widths


def attention(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_the_divergence_of_heads_is_that_of_scipy() -> None:
    first, second = attention(2, 3, 5, 7), attention(1, 3, 4, 6, seed=1)
    first[0, 0, 0] = torch.eye(7)[2]  # zeros have no logarithm
    found = head_divergence([*first, *second])
    for i in range(3):
        for j in range(3):
            rows = [jensenshannon(p[i], q[j], axis=1) ** 2 for p, q in ((w, w) for w in (*first.numpy(), second[0]))]
            expected = sum(float(row.sum()) for row in rows) / sum(len(row) for row in rows)
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(found, found.T)
    same = attention(1, 5, 5).expand(2, 5, 5)
    assert float(head_divergence([same])[0, 1]) == pytest.approx(0.0, abs=1e-7)
    apart = torch.eye(2)[:, None].expand(2, 3, 2)
    assert float(head_divergence([apart])[0, 1]) == pytest.approx(math.log(2))


def test_groups_are_compared_by_the_best_assignment_of_their_heads() -> None:
    window = attention(1, 4, 6, 6)
    swapped = torch.cat([window[:, :2], window[:, [1, 0]]], 1)  # the second group is the first one, swapped
    assert float(group_divergence(head_divergence(swapped), 2)[0, 1]) == pytest.approx(0.0, abs=1e-7)
    heads = head_divergence(window)
    expected = min(heads[0, 2] + heads[1, 3], heads[0, 3] + heads[1, 2]) / 2
    assert float(group_divergence(heads, 2)[0, 1]) == pytest.approx(float(expected))
    assert torch.equal(group_divergence(heads, 1), heads)


def test_of_two_equal_heads_one_goes_and_its_refit_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    window = attention(1, 4, 6, 6)
    window[0, 3] = window[0, 1]
    gone = redundant(head_divergence(window), 1)
    assert gone == [1]
    assert len(set(redundant(head_divergence(window), 3))) == 3
    inputs = torch.randn(200, 8, generator=generator)
    inputs[:, 6:] = inputs[:, 2:4]
    problem = LayerProblem.from_activations(torch.randn(5, 8, generator=generator), inputs)
    known = ChannelStatistics(problem, inputs.mean(0), None)
    known = replace(known, halves=(problem.gram, problem.gram))  # alike, so that nothing is shrunk
    settings = Structure.model_validate({"remove": "25%", "method": "goa", "compensate": "refit"})
    removal = remove_channels(known, 3, settings, block=2, chosen=torch.tensor([0, 2, 3]))
    assert problem.restricted(removal.places).relative_error(removal.weight) < 1e-6
    published = settings.model_copy(update={"compensate": "auto"})
    untouched = remove_channels(known, 3, published, block=2, chosen=torch.tensor([0, 2, 3]))
    assert torch.equal(untouched.weight, problem.weight[:, untouched.places])


def test_a_head_that_goes_represents_no_other() -> None:
    """Pairs come in the order 1 and 2, 0 and 1, 2 and 3, 0 and 2."""
    divergence = torch.full((4, 4), 0.5)
    for i, j, near in ((1, 2, 0.1), (0, 1, 0.2), (2, 3, 0.3), (0, 2, 0.4)):
        divergence[i, j] = divergence[j, i] = near
    assert redundant(divergence, 1) == [1]  # 2 stands for it
    assert redundant(divergence, 2) == [1, 2]  # 3 stands for 2, and 1, which is gone, not for 0
    assert redundant(divergence, 3) == [1, 2, 0]


def test_criterion_b_is_the_energy_of_a_linear_channel() -> None:
    """Half of it: E |B_j a_j x|^2 by sampling, to three standard errors; the product of both for a gated module."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    inputs = (torch.randn(20_000, 6, generator=generator) @ mixing).double()
    up, gate = torch.randn(2, 4, 6, generator=generator)
    down = torch.randn(3, 4, generator=generator)
    found = channel_criterion(down, [up], mixing.T @ mixing)
    for channel in range(4):
        sampled = (inputs @ up[channel].double())[:, None] * down[:, channel].double()
        energies = sampled.square().sum(1)
        assert (
            abs(2 * float(found[channel]) - float(energies.mean())) < 3 * float(energies.std()) / len(energies) ** 0.5
        )
    moment = (inputs.T @ inputs / len(inputs)).float()
    both = channel_criterion(down, [up, gate], moment)
    norms = down.square().sum(0)
    expected = norms**2 / 4 * ((up @ moment) * up).sum(1) * ((gate @ moment) * gate).sum(1)
    torch.testing.assert_close(both, expected.double(), rtol=1e-4, atol=1e-4)


def test_attention_probabilities_are_those_of_the_causal_model(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    model = tiny.opened(folder)
    model.check()
    tokens = tiny.tokens(2, 12)
    with model.embeddings_and_head(head=False):
        entering = torch.cat([model.embed(window[None])[0] for window in tokens])
    states = HiddenStates(tuple(entering.shape), torch.float32)
    states.write(0, entering)
    before = model.config._attn_implementation
    unit = plan_widths(model, discover(model), Structure.model_validate({"remove": "heads=1"})).units[0][0]
    with model.layer(0):
        windows = (states.read(window, window + 1, model.device) for window in range(2))
        found = head_divergence(attention_probabilities(model, 0, unit, windows))
    assert model.config._attn_implementation == before
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        probabilities = whole(tokens, output_attentions=True).attentions[0]
    torch.testing.assert_close(found, head_divergence(probabilities), rtol=1e-4, atol=1e-6)


def fitted(weight: Tensor, seen: Tensor, dense: Tensor) -> Tensor:
    """Damped least squares on the outputs of the dense operator, written around its weights."""
    gram = alive_gram(seen.T @ seen / len(seen))
    gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    drift = (dense - seen) @ weight.T
    return weight + (torch.linalg.solve(gram, seen.T @ drift / len(seen))).T


@pytest.mark.parametrize(
    ("architecture", "remove", "corrected"),
    [("llama", "mlp=25%,heads=1", True), ("llama", "mlp=25%,heads=1", False), ("opt", "mlp=25%", True)],
)
def test_a_run_fits_both_levels_and_keeps_the_channels_of_criterion_b(
    tmp_path: Path, architecture: str, remove: str, corrected: bool
) -> None:
    """With two whole models in memory: the layer before, and this one's attention, are the smaller model's."""
    folder, structure = tmp_path / "model", {"remove": remove, "multiple": 4, "method": "goa"}
    report = tiny.prune(tmp_path, architecture, structure=structure, error_correction=corrected)
    assert (report.recipe["propagate"], report.recipe["dense_target"], report.recipe["residual"]) == (
        ("pruned", 1.0, "none")
    )
    tokens = PruneDirectory(tmp_path / "run").tokens()
    dense = tiny.loaded(folder)
    small = tiny.loaded(tmp_path / "run" / "model")
    producers, consumer = (
        (["fc1"], "fc2") if architecture == "opt" else (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
    )
    layer = report.layers[1].name
    mixed = tiny.loaded(folder)
    layers = mixed.get_submodule(layer.rpartition(".")[0])
    layers[0] = small.get_submodule(report.layers[0].name)
    layers[1].self_attn = small.get_submodule(layer).self_attn
    new = {}
    for name in producers:
        seen, true = (tiny.inputs_of(model, f"{layer}.{name}", tokens) for model in (mixed, dense))
        weight = dense.get_parameter(f"{layer}.{name}.weight").detach().double()
        new[name] = fitted(weight, seen, true)
    moment = seen.T @ seen / len(seen)
    for name, weight in new.items():
        mixed.get_parameter(f"{layer}.{name}.weight").data.copy_(weight)
    seen, true = (tiny.inputs_of(model, f"{layer}.{consumer}", tokens) for model in (mixed, dense))
    down = fitted(dense.get_parameter(f"{layer}.{consumer}.weight").detach().double(), seen, true)
    scores = channel_criterion(down, list(new.values()), moment)
    keep = scores.argsort(descending=True)[: report.layers[1].removals[-1].after].sort().values
    for name, weight in new.items():
        found = small.get_parameter(f"{layer}.{name}.weight").detach().double()
        torch.testing.assert_close(found, weight[keep], rtol=1e-3, atol=1e-4)
    found = small.get_parameter(f"{layer}.{consumer}.weight").detach().double()
    torch.testing.assert_close(found, down[:, keep], rtol=1e-3, atol=1e-4)
    wanted = true @ dense.get_parameter(f"{layer}.{consumer}.weight").detach().double().T
    error = (seen[:, keep] @ found.T - wanted).square().sum() / wanted.square().sum()
    assert report.layers[1].removals[-1].relative_error == pytest.approx(float(error), rel=1e-3)
    assert report.layers[1].removals[0].compensate == "none"
    assert {removal.method for removal in report.layers[0].removals} == {"goa"}

"""Sensitivities measured layer by layer, against automatic differentiation of the whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fistapruner import FistaPrunerError, Recipe, prune
from fistapruner.allocate.fisher import DensePasses, draw_labels, measure_sensitivity, row_importance
from fistapruner.allocate.measure import decide
from fistapruner.models.operators import discover
from fistapruner.passes.store import scratch_factory as store

WINDOWS, SEQLEN = 3, 12
PASSES = DensePasses(store(None, torch.float32))


TOKENS = tiny.tokens(WINDOWS, SEQLEN, seed=3)


@pytest.mark.parametrize(
    ("architecture", "on_disk"), [("llama", False), ("gpt2", True), ("opt", False), ("gpt_neox", False)]
)
def test_streamed_equals_whole_model_differentiation(tmp_path: Path, architecture: str, on_disk: bool) -> None:
    changes = {"word_embed_proj_dim": 32} if architecture == "opt" else {}
    folder = tiny.save(architecture, tmp_path / "model", **changes)
    skeleton = tiny.opened(folder)
    layout = discover(skeleton)
    passes = DensePasses(store(tmp_path if on_disk else None, skeleton.dtype), batch_size=2)
    found = measure_sensitivity(skeleton, layout, TOKENS, passes, seed=5)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())

    model = tiny.loaded(folder)
    grads: dict[str, Tensor] = {}
    names = [name for name, _ in layout.operators()]
    names += [f"{layout.layers_name}.{index}" for index in range(len(skeleton))]

    def note(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda grad: grads.__setitem__(name, grad.reshape(-1, grad.shape[-1])))

    prefixed = {name for name, _ in model.named_modules()}
    for name in names:
        target = name if name in prefixed else f"{model.base_model_prefix}.{name}"
        model.get_submodule(target).register_forward_hook(lambda _, __, output, name=name: note(name, output))
    logits = model(input_ids=TOKENS).logits
    # The same draws: a uniform number for each token, from one generator.
    uniform = torch.rand(WINDOWS, SEQLEN, 1, generator=torch.Generator().manual_seed(5))
    drawn = (torch.softmax(logits.detach().double(), -1).cumsum(-1) < uniform).sum(-1)
    torch.log_softmax(logits, -1).gather(-1, drawn[..., None]).sum().backward()
    count = WINDOWS * SEQLEN
    for name, _ in layout.operators():
        torch.testing.assert_close(found.rows[name], grads[name].square().sum(0) / count, rtol=1e-3, atol=1e-7)
    for index, metric in enumerate(found.outputs):
        gradient = grads[f"{layout.layers_name}.{index}"]
        torch.testing.assert_close(metric, gradient.T @ gradient / count, rtol=1e-3, atol=1e-6)


def test_labels_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw_labels(probabilities.expand(20000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    share = torch.bincount(drawn[:, 0], minlength=5) / 20000
    torch.testing.assert_close(share, probabilities, rtol=0, atol=0.01)
    assert share[1] == share[4] == 0


@pytest.mark.parametrize("allocation", ["owl", "error"])
def test_a_decision_is_deterministic_and_spares_sensitive_operators(tmp_path: Path, allocation: str) -> None:
    skeleton = tiny.opened(tiny.save("llama", tmp_path / "model"))
    layout = discover(skeleton)
    recipe = Recipe.build({"allocation": allocation, "sparsity": "60%", "reconstruct": 2})
    first, second = (decide(recipe, layout, skeleton, TOKENS, {}, PASSES) for _ in range(2))
    assert first.sparsity == second.sparsity
    sizes = {name: operator.rows * operator.columns for name, operator in layout.operators()}
    assert sum(first.sparsity[name].zeros(1, size) for name, size in sizes.items()) == sum(
        round(0.6 * size) for size in sizes.values()
    )
    assert len({pattern.fraction for pattern in first.sparsity.values()}) > 1
    assert [tuple(metric.shape) for metric in first.metrics] == [(skeleton.width, skeleton.width)] * len(skeleton)


def test_operators_that_reach_no_prediction_are_pruned_by_the_default_method(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    folder = tiny.store(model, tmp_path / "model")
    report = prune(folder, tmp_path / "run", sparsity="50%", calibration=tiny.SMALL)
    assert report.totals.operator_zeros >= 0.5 * report.totals.operator_weights


def test_gradients_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    """Hidden states of zero are a fine forward pass, but the norms' gradients there are beyond fp32."""
    model = tiny.build("llama", rms_norm_eps=1e-38)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    folder = tiny.store(model, tmp_path / "model")
    with pytest.raises(
        FistaPrunerError, match=r"layers\.\d.*: the gradients of the predictions are NaN or infinite in float32 passes"
    ):
        prune(folder, tmp_path / "run", calibration=tiny.SMALL)


@pytest.mark.parametrize(
    ("settings", "weighed"),
    [
        ({}, True),
        ({"method": "sparsegpt"}, False),
        ({"method": "sparsegpt", "weighting": "fisher"}, True),
        ({"method": "wanda+refit", "weighting": "fisher"}, False),  # rows do not compete
        ({"weighting": "none", "allocation": "uniform"}, False),
    ],
)
def test_rows_are_weighed_where_they_compete(tmp_path: Path, settings: dict[str, str], weighed: bool) -> None:
    skeleton = tiny.opened(tiny.save("llama", tmp_path / "model"))
    layout = discover(skeleton)
    found = decide(Recipe.build(settings), layout, skeleton, TOKENS, {}, PASSES)
    assert found.metrics is None
    assert (found.importance is not None) == weighed
    for name, operator in layout.operators() if found.importance else ():
        assert found.importance[name].shape == (operator.rows,)
        assert bool((found.importance[name] > 0).all())
        assert float(found.importance[name].mean()) == pytest.approx(1.0)


def test_rows_that_reach_no_prediction_count_alike_and_tiny_gradients_like_large_ones() -> None:
    assert torch.equal(row_importance(torch.zeros(6)), torch.ones(6))
    rows = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.5])
    usual = row_importance(rows)
    assert bool((usual > 0).all())
    for scale in (
        2.0**-126,
        2.0**-146,
        2.0**120,
    ):  # of the first two, rows or their sums are below what fp32 holds in full
        torch.testing.assert_close(row_importance(rows * scale), usual, rtol=1e-5, atol=0)

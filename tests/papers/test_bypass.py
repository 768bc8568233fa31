"""Bypass-BP: its projection and gradient against enumeration, its losses against whole models, kill and resume."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fistapruner as fp
import tiny
from fistapruner.models.operators import discover
from fistapruner.models.safetensors import SafetensorsFile
from fistapruner.papers.bypass import Bypass, descend, policy_gradient, project
from fistapruner.passes.store import scratch_factory
from fistapruner.runs.directory import PruneDirectory
from fistapruner.runs.log import Listener
from fistapruner.settings.prune import Recipe
from fistapruner.settings.structure import Structure
from fistapruner.structure.units import find_units


def test_the_projection_meets_the_budget_and_keeps_the_order() -> None:
    keep = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.4 - 0.2
    for budget in (3, 10, 20):
        found = project(keep, budget)
        assert float(found.sum()) == pytest.approx(budget)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        torch.testing.assert_close(project(found, budget), found)
        assert (found[keep.argsort()].diff() >= 0).all()
        # The nearest point: of what is strictly inside, all moved alike.
        inside = (found > 0) & (found < 1)
        assert float((keep - found)[inside].std()) < 1e-9
    assert torch.equal(project(keep, 50), keep.clamp(0, 1))


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_gradient_is_unbiased_for_its_target(baseline: float) -> None:
    """All pairs of masks of four units, enumerated; the target is twice the gradient times sqrt(s (1 - s))."""
    keep = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    masks = [torch.tensor(mask, dtype=torch.float64) for mask in itertools.product((0, 1), repeat=4)]

    def loss(mask: Tensor) -> float:
        return float(1 - mask[0] + 2 * (1 - mask[1]) * mask[2] - 0.3 * mask[3] * mask[0])

    def expected_loss(keep: Tensor) -> Tensor:
        probabilities = torch.stack([(mask * keep + (1 - mask) * (1 - keep)).prod() for mask in masks])
        return (probabilities * torch.tensor([loss(mask) for mask in masks], dtype=torch.float64)).sum()

    point = keep.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_loss(point), point)
    target = 2 * gradient * (keep * (1 - keep)).sqrt()
    mean = torch.zeros(4, dtype=torch.float64)
    for first, second in itertools.product(masks, masks):
        weight = float(torch.stack([(m * keep + (1 - m) * (1 - keep)).prod() for m in (first, second)]).prod())
        mean += weight * policy_gradient(keep, [first, second], [loss(first), loss(second)], baseline)
    torch.testing.assert_close(mean, target, rtol=1e-5, atol=1e-6)


def begin(folder: Path, remove: str, batch_size: int = 8) -> tuple[Bypass, str]:
    """What learns the units of a model, on four windows; and the name of its decoder layers."""
    model = tiny.opened(folder)
    layout = discover(model).select(Recipe())
    units = find_units(model, layout, Structure.model_validate({"remove": remove, "multiple": 4}))
    tokens = tiny.tokens(4, 16)
    store = scratch_factory(None, torch.float32)
    return Bypass(model, units, tokens, 1, 0, store, Listener(), batch_size), layout.layers_name


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "remove"), [("llama", "mlp=25%,heads=1"), ("gpt2", "mlp=25%")])
def test_the_first_probabilities_come_from_what_a_unit_adds(tmp_path: Path, architecture: str, remove: str) -> None:
    """By transformers: the second layer is fed by the first with its worst units masked."""
    folder = tiny.save(architecture, tmp_path / "model", num_hidden_layers=2)
    learning, layers_name = begin(folder, remove)
    slots, found = learning.slots, learning.first(3)

    whole, masks, inputs = tiny.loaded(folder), dict[int, Tensor](), dict[int, Tensor]()

    def before(number: int, value: Tensor) -> Tensor:
        inputs[number] = value
        return value * masks[number] if number in masks else value

    modules = [whole.get_submodule(f"{layers_name}.{at}.{unit.name}") for at, unit, _ in slots]
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(lambda _, args, number=number: (before(number, args[0]),))
    for index in range(2):
        whole(learning.tokens[:3])
        for number, ((at, unit, places), module) in enumerate(zip(slots, modules, strict=True)):
            if at != index:
                continue
            weight = module.weight.T if architecture == "gpt2" else module.weight
            root = inputs[number].flatten(0, 1).double().square().mean(0).sqrt()
            metric = (weight.double().abs().mean(0) * root).view(unit.before, -1).sum(1)
            odds = torch.sigmoid((metric - metric.mean()) / metric.std())
            expected = (odds + unit.after / unit.before - odds.mean()).clamp(0, 1)
            torch.testing.assert_close(found[places], project(expected, unit.after), rtol=0, atol=1e-5)
            kept = torch.zeros(unit.before).index_fill(0, metric.topk(unit.after).indices, 1.0)
            masks[number] = kept.repeat_interleave(unit.columns)


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "remove"), [("llama", "mlp=25%,heads=1"), ("gpt2", "mlp=25%")])
def test_losses_are_those_of_a_model_whose_inputs_are_masked(tmp_path: Path, architecture: str, remove: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    learning, layers_name = begin(folder, remove)
    tokens, generator = learning.tokens, torch.Generator().manual_seed(1)
    masks = [(torch.rand(learning.count, generator=generator) < 0.6).double() for _ in range(2)]
    found = learning.losses(tokens, masks)
    assert begin(folder, remove, batch_size=1)[0].losses(tokens, masks) == pytest.approx(found, rel=1e-5)
    whole = tiny.loaded(folder)
    for mask, loss in zip(masks, found, strict=True):
        handles = []
        for index, unit, places in learning.slots:
            columns = mask[places].float().repeat_interleave(unit.columns)
            module = whole.get_submodule(f"{layers_name}.{index}.{unit.consumer.name}")
            handles.append(module.register_forward_pre_hook(lambda _, args, columns=columns: (args[0] * columns,)))
        logits = whole(tokens).logits
        expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert loss == pytest.approx(float(expected), rel=1e-4)
        for handle in handles:
            handle.remove()


class Stopping(tiny.Said):
    """Interrupts a run after 22 steps."""

    def tick(self, what: str, done: int, total: int) -> None:
        if what == "steps of bypass" and done == 22:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=2)
    structure: dict[str, Any] = {"remove": "mlp=25%,heads=1", "multiple": 4, "method": "bypass", "steps": 25}
    settings = {"structure": structure, "calibration": tiny.SMALL}
    report = fp.prune(str(folder), tmp_path / "whole", **settings)
    assert report.totals.time_split["sensitivity"] > 0
    stopping, resumed = Stopping(), tiny.Said()
    with pytest.raises(KeyboardInterrupt):
        fp.prune(str(folder), tmp_path / "parts", listener=stopping, **settings)
    assert any("25 steps of 2 forward passes take about" in sentence for sentence in stopping.sentences)
    fp.prune(str(folder), tmp_path / "parts", listener=resumed, **settings)
    assert "bypass: 20 of 25 steps were taken before" in resumed.sentences
    assert tiny.weights(tmp_path / "parts") == tiny.weights(tmp_path / "whole")
    records = [PruneDirectory(tmp_path / run).record() for run in ("parts", "whole")]
    assert records[0].decision.numerics == records[1].decision.numerics
    assert [removal.compensate for layer in report.layers for removal in layer.removals] == ["none"] * 4
    # The channels with the largest probabilities stay, their weights as they were.
    dense = tiny.loaded(folder)
    small = tiny.loaded(tmp_path / "whole" / "model")
    metrics = SafetensorsFile(tmp_path / "whole" / "metrics.safetensors")
    for layer in report.layers:
        name = f"{layer.name}.mlp.down_proj"
        keep = metrics.read(f"scores.{name}").argsort(descending=True, stable=True)[:36].sort().values
        assert torch.equal(small.get_parameter(f"{name}.weight"), dense.get_parameter(f"{name}.weight")[:, keep])


def test_two_steps_by_hand() -> None:
    """In plain Python: the baseline takes in the losses before it is used."""
    masks = [[[1, 0, 0, 0], [0, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 1, 1]]]
    losses = [[2.0, 1.0], [2.4, 1.4]]
    keep, baselines = [0.4, 0.5, 0.6, 0.5], [1.5, 0.8 * 1.5 + 0.2 * 1.9]
    found, baseline = torch.tensor(keep, dtype=torch.float64), math.nan
    for step, rate in enumerate((0.1, 0.05)):
        drawn = [torch.tensor(mask, dtype=torch.float64) for mask in masks[step]]
        found, baseline = descend(found, baseline, drawn, losses[step], rate, [(slice(0, 2), 2), (slice(2, 4), 1)])
        assert baseline == pytest.approx(baselines[step])
        for unit, s in enumerate(keep):
            gradient = sum(
                (loss - baselines[step]) * (mask[unit] - s) / math.sqrt(s * (1 - s))
                for mask, loss in zip(masks[step], losses[step], strict=True)
            )
            keep[unit] = s - rate * gradient
        assert all(0 < s < 1 for s in keep)
        over = keep[2] + keep[3] - 1  # the first two have room for both
        assert over > 0
        keep[2:] = [s - over / 2 for s in keep[2:]]
        assert found.tolist() == pytest.approx(keep, abs=1e-5)

"""Losses and gradients of recovery on a stand-in GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fistapruner
import tiny
from fistapruner.activations.store import scratch_factory
from fistapruner.calibration.training_text import TrainingText
from fistapruner.evaluation.scoring import compare_tokens, score_tokens
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.files.low_rank import LowRankAdapter
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.models.whole import load_whole
from fistapruner.recipes.recover_settings import RecoverRecipe
from fistapruner.runtime.numerics import Budgets
from fistapruner.tuning.forms import Spp
from fistapruner.tuning.losses import TokenLoss
from fistapruner.tuning.objective import Objective
from fistapruner.tuning.steppers import FirstOrder
from fistapruner.tuning.teacher import PredictionKind, Teacher
from fistapruner.tuning.trained import Trained
from fistapruner.tuning.zeroth_order import Directions
from standin.gpu import StandIn
from standin.hardware import LAST

CUDA = torch.device("cuda:0")


def text_of(tokens: Tensor) -> TrainingText:
    """Windows whose tokens all carry the loss."""
    nothing = torch.zeros(len(tokens), dtype=torch.int64)
    return TrainingText(tokens, torch.ones_like(tokens).bool(), nothing.bool(), nothing, ("text",), {})


def values(index: int, layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 2:4 zeros and low-rank parts, made on the CPU."""
    folder = tmp_path_factory.mktemp("factored")
    dense, text = tiny.save("llama", folder / "dense", num_hidden_layers=1), {"samples": 2, "seqlen": 16}
    settings = {"sparsity": "2:4", "method": "magnitude", "low_rank": 2, "evaluate": None}
    calibration, execution = {"source": "python", **text}, {"device": "cpu"}
    fistapruner.prune(dense, folder / "run", calibration=calibration, execution=execution, **settings)
    return folder / "run"


def test_factors_of_low_rank_parts_are_moved_once(factored: Path, gpu: StandIn, tmp_path: Path) -> None:
    """A recovery has the losses of the CPU; its passes do not wait for the factors."""
    data = {"source": "python", "seqlen": 16, "tokens": 400}
    execution = {"device": "cuda:0"}
    training = {"steps": 3, "windows_per_step": 2, "data": data, "evaluate": None}
    gpu.waits.clear()
    there = fistapruner.recover(factored, tmp_path / "there", execution=execution, **training)
    factors = LowRankAdapter.beside(factored / "model")
    assert factors is not None
    of_factors = [count for (_, place), count in Counter(gpu.waits).items() if "low_rank.py" in place]
    assert sum(of_factors) <= 2 * len(factors.factors)  # once for the plan, once for the training
    whole = [load_whole(factored / "model", device).state_dict() for device in (CUDA, torch.device("cpu"))]
    assert all(torch.equal(tensor.cpu(), whole[1][name]) for name, tensor in whole[0].items())
    here = fistapruner.recover(factored, tmp_path / "here", execution={"device": "cpu"}, **training)
    assert there.recovery is not None
    assert here.recovery is not None
    assert there.recovery.kept_step
    assert there.recovery.checks[-1].held_out == pytest.approx(here.recovery.checks[-1].held_out, rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "kind", "keep_graphs"),
    [
        ("llama", "hidden", False),
        ("llama", "hidden", True),
        ("llama", "top128", False),
        ("llama", "top128", True),
        ("qwen3_moe", "hidden", False),
        ("gpt_oss", "hidden", True),
    ],
)
def test_gradients_are_the_cpus(
    gpu: StandIn, tmp_path: Path, architecture: str, kind: PredictionKind, keep_graphs: bool
) -> None:
    """Nothing adds in no fixed order; hidden states stay on the device; nothing is left there."""
    folders = [tiny.save(architecture, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    tokens = torch.randint(3, tiny.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    text = text_of(tokens)

    def measured(place: str) -> tuple[float, Tensor, dict[str, Tensor]]:
        device = torch.device(place)
        dense, model = (LayerwiseModel(Checkpoint.open(folder), device) for folder in folders)
        teacher = Teacher(dense, tokens, tmp_path / f"{place[:3]} {kind}", batch_size=2, kind=kind)
        store = scratch_factory(None, model.dtype, device)
        objective = Objective(model, text, TokenLoss(0.5), teacher, 2, store, keep_graphs=keep_graphs)
        found: dict[str, Tensor] = {}
        with objective.resident():
            sums = objective.losses([0, 1, 2], lambda index, layer: [{}, values(index, layer)])
            gpu.moved.clear()
            loss = objective.gradient(
                [2, 0], values, lambda index, _, grads: found.update({f"{index}.{n}": g for n, g in grads.items()})
            )
        return loss, sums, {name: gradient.cpu() for name, gradient in found.items()}

    loss, sums, gradients = measured("cuda:0")
    # Experts add their outputs to tokens that are there once.
    assert all(name == "index_add" and place.startswith("models/experts.py") for name, place in gpu.unordered)
    assert not any("store" in place for _, place in gpu.moved)
    assert sum(gpu.live.values()) < 100
    expected = measured("cpu")
    assert loss == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[2][name], rtol=1e-4, atol=1e-6)


def test_the_host_waits_no_more_often_for_more_slices_of_tokens(gpu: StandIn, tmp_path: Path) -> None:
    """Of the losses and gradients of training, and of the sums of an evaluation."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path / "model")), CUDA)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(12, model.width, device=CUDA)
    targets = tokens[0].to(CUDA)
    waits = []
    for rows in (24, 1):
        budgets = Budgets(2 * 4 * model.vocabulary * rows)
        store = scratch_factory(None, model.dtype, CUDA)
        objective = Objective(model, text_of(tokens), TokenLoss(0.0), None, 2, store, budgets=budgets)
        with objective.resident():
            objective.losses([0], lambda index, layer: [{}])
            gpu.waits.clear()
            objective.losses([0, 1], lambda index, layer: [{}, values(index, layer)])
            objective.gradient([0, 1], values, lambda index, layer, gradients: None)
            score_tokens(hidden, targets, model.head, model.vocabulary, budgets)
            compare_tokens(hidden, hidden, targets, model.head, model.head, model.vocabulary, budgets)
        waits.append(Counter(gpu.waits))
        for what, place in gpu.waits:
            if what == "_local_scalar_dense" and place.startswith("models/layerwise.py"):
                del waits[-1][what, place]  # transformers looks for packed windows
    assert waits[0] == waits[1]


def test_a_step_waits_once_for_the_norms_of_all_gradients(gpu: StandIn, tmp_path: Path) -> None:
    """And for nothing else of the trained tensors."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path / "model")), CUDA)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    recipe = RecoverRecipe.build({"parameters": "full"})
    objective = Objective(model, text_of(tokens), TokenLoss(0.0), None, 2, scratch_factory(None, model.dtype, CUDA))
    with objective.resident():
        steps = FirstOrder(Trained(model, discover(model), recipe), objective)
        steps.step(0, [0, 1], 1.0)
        gpu.waits.clear()
        steps.step(1, [0, 1], 1.0)
    places = ("tuning/forms", "tuning/masked", "tuning/steppers", "tuning/trained.py")
    assert [what for what, place in gpu.waits.elements() if place.startswith(places)] == ["tolist"]


def test_batches_are_sent_without_a_wait(gpu: StandIn, tmp_path: Path) -> None:
    """Token ids, their places and the teacher's predictions."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path / "model")), CUDA)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    teacher = Teacher(model, tokens, tmp_path / "teacher", batch_size=2, kind="top64")
    store = scratch_factory(None, model.dtype, CUDA)
    objective = Objective(model, text_of(tokens), TokenLoss(0.5), teacher, 2, store)
    with objective.resident():
        objective.gradient([0, 1], values, lambda index, layer, gradients: None)
        gpu.waits.clear()
        objective.gradient([0, 1], values, lambda index, layer, gradients: None)
    assert "to device" not in {what for what, _ in gpu.waits}


def test_spp_and_directions_in_a_subspace_are_the_cpus_but_for_random_numbers(gpu: StandIn) -> None:
    weight, form = torch.arange(24.0).view(6, 4), Spp(2, 2.0)
    trained = form.start(weight, weight != 0, torch.Generator().manual_seed(0))
    trained["b"] += 1
    there = {name: value.to(CUDA) for name, value in trained.items()}
    torch.testing.assert_close(
        form.weight(weight.to(CUDA), weight.to(CUDA) != 0, there).cpu(), form.weight(weight, weight != 0, trained)
    )
    assert Directions(0, 2).matrix(1, "w", 6, 4, CUDA).device == CUDA


def test_zeros_of_a_model_that_moves_to_gpus_are_held(gpu: StandIn) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for part in model:
        part.weight.data[:, :2] = 0
    with fistapruner.hold_mask(model) as held:
        for part, device in zip(model, (CUDA, LAST), strict=True):
            part.to(device)(torch.ones(3, 4, device=device)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert held.operators == ("0.weight", "1.weight")
    for part in model:
        assert (part.weight == 0).tolist() == [[True, True, False, False]] * 4

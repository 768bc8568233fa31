"""Trained tensors of a model: the start is the checkpoint, zeros stay, the live values are those that are written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_objective import make_text
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

import tiny
from fistapruner.activations.store import scratch_factory
from fistapruner.errors import FistaPrunerError
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.models.layout import Layout
from fistapruner.recipes.recover_settings import RecoverRecipe
from fistapruner.tuning.losses import TokenLoss
from fistapruner.tuning.objective import Objective
from fistapruner.tuning.trained import Trained

FORMS = ["full", "lora", "spp", "hira", "norms"]


def pruned(architecture: str, folder: Path, dtype: torch.dtype = torch.float32, *, two_four: bool = False) -> Path:
    """Save a tiny model whose decoder layers' matrices are half zeros, one of them negative."""
    model = tiny.build(architecture)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("layers.", ".h.")):
                groups = weight.view(-1, 4) if two_four else weight.view(1, -1)
                dropped = groups.abs().topk(groups.shape[1] // 2, largest=False).indices
                groups.scatter_(1, dropped, 0.0)
                flat = weight.view(-1)
                flat[flat.eq(0).nonzero()[0]] = -0.0
    model.to(dtype).save_pretrained(folder)
    return folder


def opened(folder: Path) -> tuple[LayerwiseModel, Layout]:
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    return model, discover(model)


def recipe(**settings: Any) -> RecoverRecipe:
    return RecoverRecipe.build({"lr": 0.01, "lr_unit": "absolute", "rank": 4, **settings})


def gradients(values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in sorted(values.items())}


def step(trained: Trained, seed: int, order: list[int] | None = None) -> None:
    """Take one step with random gradients, layers in the given order."""
    for index in order or range(len(trained)):
        with trained.model.layer(index) as layer:
            changes = gradients(trained.values(index, layer), 100 * seed + index)
            assert any(trained.step(index, layer, trained.chain(index, layer, changes), 1.0))


def live(trained: Trained) -> dict[str, Tensor]:
    found = {}
    for index in range(len(trained)):
        with trained.model.layer(index) as layer:
            found.update({f"{index}.{name}": value for name, value in trained.values(index, layer).items()})
    return found


def written(trained: Trained) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index in range(len(trained)):
        with trained.model.layer(index) as layer:
            found.update(trained.result(index, layer))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_checkpoint_bit_for_bit(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    model, layout = opened(pruned("gpt2", tmp_path, dtype))
    trained = Trained(model, layout, recipe(parameters=form))
    for index in range(len(model)):
        with model.layer(index) as layer:
            for name, value in trained.values(index, layer).items():
                before = layer.get_parameter(name)
                assert value.dtype == before.dtype
                assert torch.equal(value, before)
                assert torch.equal(value.signbit()[before != 0], before.signbit()[before != 0])
    assert not written(trained)
    assert trained.tensors().keys() == {"steps"}


@pytest.mark.parametrize("form", ["lora", "hira", "spp"])
def test_the_factors_start_from_the_seed_and_the_name_of_the_operator(tmp_path: Path, form: str) -> None:
    """Uniformly within 1/sqrt(n) of zero, for every operator of its own."""
    model, layout = opened(pruned("llama", tmp_path))

    def starts(seed: int) -> dict[str, Tensor]:
        trained, found = Trained(model, layout, recipe(parameters=form, seed=seed, rank=8)), dict[str, Tensor]()
        for index in range(len(model)):
            with model.layer(index) as layer:
                masters = trained.parameters(index, layer).masters
                found.update({name: value.detach() for name, value in masters.items() if name.endswith(".A")})
        return found

    zero, again, one = starts(0), starts(0), starts(1)
    assert len(zero) == len(layout.operators())
    assert all(torch.equal(value, again[name]) for name, value in zero.items())
    for first, second in itertools.combinations([*zero.values(), *one.values()], 2):
        assert not torch.equal(first, second)
    for value in (*zero.values(), *one.values()):
        bound = value.shape[1] ** -0.5
        assert 0.9 * bound < float(value.max()) <= bound
        assert -bound <= float(value.min()) < -0.9 * bound
        assert float(value.square().mean()) == pytest.approx(bound**2 / 3, rel=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_a_rate_may_be_a_share_of_the_root_mean_square_at_the_start(tmp_path: Path, form: str) -> None:
    """Of A for low-rank tensors, whose size is known without drawing it; of the tensor itself for others."""
    model, layout = opened(pruned("llama", tmp_path))
    trained = Trained(model, layout, recipe(parameters=form, lr_unit="share", rank=8))
    with model.layer(0) as layer:
        parameters = trained.parameters(0, layer)
        rates = trained.rates(0, parameters)
    assert rates.keys() == parameters.masters.keys()
    for name, source in parameters.origin.items():
        start = parameters.masters[name if name == source else f"{source}.A"].detach()
        root_mean_square = float(start[start != 0].square().mean().sqrt())
        assert rates[name] == pytest.approx(0.01 * root_mean_square, rel=0.1)


def test_the_start_of_a_vector_that_is_kept_in_fp32_is_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gemma2ForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    built = tiny.build("gemma2").bfloat16()
    for layer in built.model.layers:
        layer.input_layernorm.float().weight.data.uniform_()
    built.save_pretrained(tmp_path)
    model = LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"), torch.bfloat16)
    trained = Trained(model, discover(model), recipe(parameters="norms"))
    for index in range(len(model)):
        with model.layer(index) as layer:
            value, before = trained.values(index, layer)["input_layernorm.weight"], layer.input_layernorm.weight
            assert before.dtype == torch.float32
            assert torch.equal(value, before)
    step(trained, 0)
    results = written(trained)
    for name, value in live(trained).items():
        assert torch.equal(results[f"model.layers.{name}"], value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_and_the_live_model_is_the_one_that_is_written(
    tmp_path: Path, form: str, dtype: torch.dtype, architecture: str
) -> None:
    model, layout = opened(pruned(architecture, tmp_path, dtype, two_four=True))
    trained = Trained(model, layout, recipe(parameters=form))
    for seed in range(3):
        step(trained, seed)
    result = written(trained)
    operators = {f"{name}.weight" for name, _ in layout.operators()}
    changed = {name for name in result if result[name].ndim == 2}
    assert changed == (set() if form == "norms" else {model.source(name) for name in operators})
    assert any(tensor.ndim == 1 for tensor in result.values())
    for name, tensor in result.items():
        before = model.checkpoint.read(name)
        assert tensor.dtype == before.dtype
        assert not torch.equal(tensor, before)
        if tensor.ndim == 2:
            assert torch.equal(tensor == 0, before == 0)
            assert not tensor[tensor == 0].signbit().any()
    for full, value in live(trained).items():
        name = model.source(f"{model.layers_name}.{full}")
        assert torch.equal(value.to(dtype), result.get(name, model.checkpoint.read(name)))


@pytest.mark.parametrize("form", ["full", "lora", "spp", "hira"])
def test_a_weight_that_is_zero_in_the_passes_only_is_written_as_it_was(tmp_path: Path, form: str) -> None:
    file = pruned("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    before = tensors["model.layers.0.mlp.up_proj.weight"]
    place = tuple(before.nonzero()[0])
    before[place] = 1e-9
    save_file(tensors, file, {"format": "pt"})
    model = LayerwiseModel(Checkpoint.open(tmp_path), torch.device("cpu"), torch.float16)
    trained = Trained(model, discover(model), recipe(parameters=form))
    step(trained, 0)
    after = written(trained)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(after == 0, before == 0)
    assert after[place] == before[place]
    assert not torch.equal(after, before)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_layers_and_a_snapshot_change_no_bit(tmp_path: Path, form: str) -> None:
    model, layout = opened(pruned("llama", tmp_path))
    ahead, back = (Trained(model, layout, recipe(parameters=form)) for _ in range(2))
    for seed in range(2):
        step(ahead, seed, [0, 1, 2])
        step(back, seed, [2, 1, 0])
    again = Trained(model, layout, recipe(parameters=form))
    again.load(ahead.tensors())
    step(ahead, 5)
    step(again, 5)
    step(back, 5)
    for other in (back, again):
        assert other.tensors().keys() == ahead.tensors().keys()
        assert all(torch.equal(tensor, ahead.tensors()[name]) for name, tensor in other.tensors().items())


@pytest.mark.parametrize("form", FORMS)
def test_going_back_restores_the_best_and_begins_anew(tmp_path: Path, form: str) -> None:
    model, layout = opened(pruned("llama", tmp_path))
    trained, fresh = (Trained(model, layout, recipe(parameters=form)) for _ in range(2))
    start = live(trained)
    step(trained, 0)
    trained.restore()  # nothing was kept: the start is the best
    assert all(torch.equal(value, start[name]) for name, value in live(trained).items())
    step(trained, 1)
    step(fresh, 1)
    assert all(torch.equal(value, live(fresh)[name]) for name, value in live(trained).items())
    trained.keep()
    kept = live(trained)
    step(trained, 2)
    trained.restore()
    assert all(torch.equal(value, kept[name]) for name, value in live(trained).items())
    assert not any(name.startswith("first_moment") for name in trained.tensors())


@pytest.mark.parametrize("form", ["spp", "hira", "lora"])
def test_rescalings_are_those_of_the_written_weights(tmp_path: Path, form: str) -> None:
    model, layout = opened(pruned("gpt2", tmp_path))
    trained = Trained(model, layout, recipe(parameters=form))
    assert not any(b.any() for _, b in trained.rescalings().values())
    step(trained, 0)
    result, found = written(trained), trained.rescalings()
    assert found.keys() == (set() if form == "lora" else {name for name, _ in layout.operators()})
    for name, (a, b) in found.items():
        source = model.source(f"{name}.weight")
        expected = model.checkpoint.read(source) * (1 + b @ a).T
        torch.testing.assert_close(result[source], expected)


def test_a_snapshot_of_other_tensors_is_refused(tmp_path: Path) -> None:
    model, layout = opened(pruned("llama", tmp_path / "model"))
    trained = Trained(model, layout, recipe(parameters="lora"))
    step(trained, 0)
    with pytest.raises(FistaPrunerError, match=r"snapshot's tensor 'trained/.*q_proj.weight.A' is not trained"):
        Trained(model, layout, recipe(parameters="norms")).load(trained.tensors())


def effective(form: str, weight: Tensor, trained: dict[str, Tensor]) -> Tensor:
    """The published formulas, at rank 4 and scale 2, of an (m, n) weight."""
    if form == "full":
        return trained[""] * (weight != 0)
    if form == "lora":
        return weight + 2.0 * (trained["B"] @ trained["A"]) * (weight != 0)
    if form == "hira":
        return weight * (1 + trained["B"] @ trained["A"])
    rows = torch.arange(len(weight)) * len(trained["A"]) // len(weight)
    return weight * (1 + 2.0 * trained["b"] * trained["A"][rows])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_torch_on_the_whole_model(tmp_path: Path, form: str, architecture: str) -> None:
    folder = pruned(architecture, tmp_path)
    model, layout = opened(folder)
    trained = Trained(model, layout, recipe(parameters=form, decay=0.1))
    text, numbers = make_text(), [0, 1, 2, 3]
    objective = Objective(model, text, TokenLoss(0.0), None, 4, scratch_factory(None, torch.float32))

    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    parameters = dict(whole.named_parameters())
    transposed = {f"{name}.weight" for name, operator in layout.operators() if operator.transposed}
    operators = [] if form == "norms" else [f"{name}.weight" for name, _ in layout.operators()]
    leaves: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        if name in operators or (parameter.ndim == 1 and name.startswith(f"{model.layers_name}.")):
            leaves[name] = {"": parameter.detach().clone()}
    for index in range(len(model)) if form not in ("full", "norms") else ():
        with model.layer(index) as layer:
            for name, master in trained.parameters(index, layer).masters.items():
                found = next((operator for operator in operators if name.startswith(model.source(operator) + ".")), "")
                if found:
                    leaves[found].pop("", None)
                    leaves[found][name.rpartition(".")[2]] = master.detach().clone()
    flat = [leaf.requires_grad_() for each in leaves.values() for leaf in each.values()]
    groups = [
        {"params": list(each.values()), "weight_decay": 0.1 if name in operators else 0.0}
        for name, each in leaves.items()
    ]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False, fused=False)  # type: ignore[arg-type]

    def weights() -> dict[str, Tensor]:
        found = {}
        for name, each in leaves.items():
            weight = parameters[name].detach()
            if name not in operators:
                found[name] = each[""]
            elif name in transposed:
                found[name] = effective(
                    form, weight.T, {key: leaf.T if not key else leaf for key, leaf in each.items()}
                ).T
            else:
                found[name] = effective(form, weight, each)
        return found

    norms: list[Tensor] = []
    for _ in range(3):
        logits = torch.func.functional_call(whole, weights(), (text.tokens,), {"use_cache": False}).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.tokens[:, 1:].flatten())
        oracle.zero_grad()
        expected.backward()
        norms.clear()
        loss = objective.gradient(
            numbers,
            trained.values,
            lambda index, layer, gradients: norms.extend(
                trained.step(index, layer, trained.chain(index, layer, gradients), 1.0)
            ),
        )
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        gradients = [leaf.grad * (leaf != 0) if form == "full" else leaf.grad for leaf in flat if leaf.grad is not None]
        assert sum(float(norm) ** 2 for norm in norms) == pytest.approx(
            sum(float(each.square().sum()) for each in gradients), rel=1e-4
        )
        oracle.step()
    result = written(trained)
    for name, weight in weights().items():
        source = model.source(name)
        after = result.get(source, model.checkpoint.read(source))
        # Adam divides a gradient by its own size, so entries without one but rounding (key biases) move at random.
        assert float((after - weight.detach()).abs().quantile(0.6)) < 1e-5
        assert torch.equal(after == 0, weight == 0) or name not in operators


@pytest.mark.parametrize("also", [(), ("norms",), ("biases",)])
def test_vectors_are_trained_as_asked(tmp_path: Path, also: tuple[str, ...]) -> None:
    model, layout = opened(pruned("opt", tmp_path))
    trained = Trained(model, layout, recipe(parameters="full", also=also))
    step(trained, 0)
    names = {name for name, tensor in written(trained).items() if tensor.ndim == 1}
    norms = {name for name in model.checkpoint.names() if "layer_norm" in name and "layers." in name}
    biases = {name for name in model.checkpoint.names() if name.endswith("bias") and "layers." in name} - norms
    assert names == {(): set(), ("norms",): norms, ("biases",): biases}[also]


def test_vectors_of_experts_are_trained_and_those_of_routers_are_not(tmp_path: Path) -> None:
    model, layout = opened(tiny.save("gpt_oss", tmp_path))
    trained = Trained(model, layout, recipe(parameters="norms", also=("norms", "biases")))
    step(trained, 0)
    names = {name for name, tensor in written(trained).items() if ".layers.1.mlp" in name}
    prefix, experts = "model.layers.1.mlp", ("gate_up_proj_bias", "down_proj_bias")
    assert f"{prefix}.router.bias" in model.checkpoint.names()
    assert names == {f"{prefix}.experts.{name}[{number}]" for name in experts for number in range(4)}

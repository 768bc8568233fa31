"""One decoder layer, streamed from its checkpoint, against a plain whole-model implementation."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from fistapruner import FistaPrunerError, Recipe, solve
from fistapruner.core import LayerProblem, ProblemSums, parse_sparsity
from fistapruner.core.constraints import stack
from fistapruner.core.problem import unweighted
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import Layout, discover
from fistapruner.passes.store import HiddenStates, scratch_factory
from fistapruner.passes.stream import Calls
from fistapruner.pruning.context import LayerContext, LayerMeasures, LayerStreams
from fistapruner.pruning.drift import DRIFT_NOISE, dense_windows, drift_sources
from fistapruner.pruning.layer import Inspect, prune_layer
from fistapruner.pruning.run import prune
from fistapruner.runs.directory import PruneDirectory

SAMPLES, SEQLEN, BATCH = 5, 24, 2


def stream(
    folder: Path,
    recipe: Recipe,
    scratch: Path | None,
    inspect: Inspect | None = None,
    noise: float = DRIFT_NOISE,
    dtype: torch.dtype | None = None,
    measures: LayerMeasures | None = None,
) -> dict[str, Tensor]:
    """Prune all layers of a checkpoint, one in memory at a time."""
    recipe = recipe.resolved()
    skeleton = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"), dtype)
    layout = discover(skeleton)
    tokens = calibration()

    def states(windows: int, name: str | None = None) -> HiddenStates:
        file = scratch / name if scratch and name else None
        return HiddenStates((windows, SEQLEN, skeleton.width), skeleton.dtype, file)

    dense, pruned = states(SAMPLES), None
    with skeleton.embeddings_and_head():
        calls = Calls.of(skeleton, SAMPLES, SEQLEN, BATCH)
        for start, stop in calls.batches(SAMPLES):
            dense.write(start, skeleton.embed(tokens[start:stop])[0])
    beside = dense_windows(recipe, layout, SAMPLES, SEQLEN, BATCH, noise=noise)
    if beside < SAMPLES:
        dense, pruned = states(beside), dense
        dense.write(0, pruned.read(0, beside))
    sparsity = {name: parse_sparsity(recipe.sparsity) for name, _ in layout.operators()}
    store = scratch_factory(scratch, skeleton.dtype)
    context = LayerContext(skeleton, layout, recipe, sparsity, calls=calls, scratch=store)
    weights: dict[str, Tensor] = {}
    for index in range(len(skeleton)):
        more = index < len(skeleton) - 1
        dense_on = more and (recipe.propagate == "dense" or recipe.dense_share > 0)
        pruned_on = more and recipe.propagate == "pruned"
        onward = (
            states(beside, f"d{index}") if dense_on else None,
            states(SAMPLES, f"p{index}") if pruned_on else None,
        )
        streams = LayerStreams(dense, pruned, *onward)
        result = prune_layer(context, index, streams, measures, inspect=inspect)
        weights |= result.weights
        dense, pruned = streams.dense_out, streams.pruned_out
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    return weights


def in_memory(folder: Path, recipe: Recipe, layout: Layout, adding: tuple[str, ...], noise: float) -> dict[str, Tensor]:
    """The same by the definition, with two whole models in memory and every operator's inputs kept."""
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    pruned = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = calibration()
    weights: dict[str, Tensor] = {}
    skeleton = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    context = LayerContext(skeleton, layout, recipe, {}, scratch=scratch_factory(None, skeleton.dtype))

    def recorded(model: Any, start: int, stop: int, *modules: tuple[str, bool]) -> list[Tensor]:
        """The inputs (or the outputs, where True) of modules in a forward pass of some windows."""
        found: dict[int, Tensor] = {}
        handles = []
        for number, (name, output) in enumerate(modules):
            module = model.get_submodule(name)
            if output:
                hook = module.register_forward_hook(lambda _, __, out, at=number: found.update({at: out.clone()}))
            else:
                hook = module.register_forward_pre_hook(lambda _, args, at=number: found.update({at: args[0].clone()}))
            handles.append(hook)
        with torch.no_grad():
            model(tokens[start:stop])
        for handle in handles:
            handle.remove()
        return [found[number].flatten(0, 1) for number in range(len(modules))]

    def inputs_of(model: Any, name: str, start: int, stop: int) -> Tensor:
        return recorded(model, start, stop, (name, False))[0]

    def outputs_of(model: Any, name: str, start: int, stop: int) -> Tensor:
        bias, output = model.get_submodule(name).bias, recorded(model, start, stop, (name, True))[0]
        return output if bias is None else output - bias.detach()

    of_dense = {"inputs": inputs_of, "outputs": outputs_of}

    def added_to(model: Any, index: int, name: str, start: int, stop: int) -> Tensor:
        """What operator ``name`` of a layer adds its output to."""
        layer = f"{layout.layers_name}.{index}"
        hidden, first = recorded(model, start, stop, (layer, False), (f"{layer}.{adding[0]}", True))
        return hidden if name == adding[0] else hidden + first

    def drift(index: int, name: str, start: int, stop: int) -> Tensor | None:
        if (
            recipe.residual == "none"
            or name not in adding
            or ((recipe.propagate == "dense" or index == 0) and name == adding[0])
        ):
            return None
        drift = added_to(dense, index, name, start, stop) - added_to(pruned, index, name, start, stop)
        length = drift.norm(dim=1, keepdim=True)
        return drift * (1.5 * length.median() / length).clamp_max(1.0)

    for index, groups in enumerate(layout.layers):
        if recipe.propagate == "dense" and index:
            # This layer is fed by the dense model: the layers before it stand dense again.
            for earlier, module in dense.named_modules():
                if hasattr(module, "weight") and f"{layout.layers_name}.{index - 1}." in earlier + ".":
                    pruned.get_submodule(earlier).weight.data.copy_(module.weight)
        for number, group in enumerate(groups):
            drifts = number > 0 or (index > 0 and recipe.propagate == "pruned")
            source = drift_sources(context, index, same=False).get(number) if drifts else None
            names = [layout.full_name(index, operator) for operator in group]
            stacked = torch.cat(
                [operator.weight(dense.get_submodule(f"{layout.layers_name}.{index}")) for operator in group]
            )
            sums = ProblemSums(stacked.detach(), drift_from=source)
            for start in range(0, SAMPLES, BATCH):
                stop = min(start + BATCH, SAMPLES)
                seen = inputs_of(pruned, names[0], start, stop)
                if source is None or start >= dense_windows(recipe, layout, SAMPLES, SEQLEN, BATCH, noise=noise):
                    sums.add(seen)
                else:
                    sums.add(
                        seen, of_dense[source](dense, names[0], start, stop), drift(index, group[0].name, start, stop)
                    )
            rows = [operator.rows for operator in group]
            solution = solve(sums.problem(target=recipe.dense_share), stack(recipe.sparsity, rows), recipe.method)
            for operator, name, part in zip(group, names, solution.weight.split(rows), strict=True):
                operator.weight(pruned.get_submodule(f"{layout.layers_name}.{index}")).data.copy_(part)
                weights[f"{name}.weight"] = pruned.get_submodule(name).weight.detach().clone()
    return weights


def calibration() -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("settings", "noise"),
    [
        ({"propagate": "dense", "dense_target": "dense"}, 0),
        ({"propagate": "pruned", "dense_target": "pruned"}, 0),
        ({"propagate": "pruned", "dense_target": 0.5}, 0),
        ({"propagate": "dense", "dense_target": "dense", "residual": "correct"}, 1),
        ({"propagate": "pruned", "dense_target": 0.5, "residual": "correct"}, 0),
        ({"propagate": "pruned", "dense_target": 0.5, "residual": "correct"}, 1),
    ],
    ids=["dense", "pruned", "mixed", "dense-corrected", "mixed-corrected", "mixed-corrected-by-some-windows"],
)
def test_streaming_equals_in_memory_bit_for_bit(
    tmp_path: Path, architecture: str, settings: dict[str, Any], noise: float
) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    recipe = Recipe.build({"method": "sparsegpt", "sparsity": "50%", **settings}).resolved()
    layout = discover(LayerwiseModel(Checkpoint.open(folder), torch.device("cpu")))
    assert layout.residual_writers == (tiny.ADDING[architecture],) * len(layout.layers)
    some = dense_windows(recipe, layout, SAMPLES, SEQLEN, BATCH, noise=noise) < SAMPLES
    assert some == (noise == 1 and recipe.propagate == "pruned")
    expected = in_memory(folder, recipe, layout, tiny.ADDING[architecture], noise)
    streamed = stream(folder, recipe, None, noise=noise)
    assert {name.removeprefix("transformer.") for name in streamed} == {
        name.removeprefix("transformer.") for name in expected
    }
    for name, tensor in expected.items():
        assert torch.equal(streamed[name if name in streamed else name.removeprefix("transformer.")], tensor), name


def test_without_error_correction_all_operators_see_the_unpruned_layer_behind_pruned_ones(tmp_path: Path) -> None:
    """As the programs of the published methods: one pass of the layer before any of its operators is pruned."""
    folder, seen = tiny.save("llama", tmp_path / "model"), {}
    prune(
        str(folder),
        tmp_path / "run",
        method="wanda",
        error_correction=False,
        calibration={"source": "python", "samples": SAMPLES, "seqlen": SEQLEN},
        inspect=lambda layer, group, problem: seen.__setitem__((layer, group), problem),
    )
    tokens = PruneDirectory(tmp_path / "run").tokens()
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "run" / "model"))
    dense.model.layers[0].load_state_dict(pruned.model.layers[0].state_dict())
    for group, name in enumerate(("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")):
        x = tiny.inputs_of(dense, f"model.layers.1.{name}", tokens)
        torch.testing.assert_close(seen[1, group].gram.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        assert seen[1, group].drift is None


def test_an_interrupted_run_whose_dense_model_sees_some_of_the_windows(tmp_path: Path) -> None:
    """The hidden states of both models are made again up to where it stopped."""
    folder = tiny.save("llama", tmp_path / "model", max_position_embeddings=256)
    settings: dict[str, Any] = {
        "calibration": {"source": "python", "samples": 20, "seqlen": 256},
        "execution": {"batch_size": 4},
    }
    recipe = Recipe.build(settings)
    layout = discover(LayerwiseModel(Checkpoint.open(folder), torch.device("cpu")))
    assert dense_windows(recipe.resolved(), layout, 20, 256, 4) < 20
    prune(str(folder), tmp_path / "whole", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        prune(str(folder), tmp_path / "parts", recipe=recipe, listener=tiny.Stops(2))
    prune(str(folder), tmp_path / "parts", recipe=recipe)
    assert tiny.weights(tmp_path / "whole") == tiny.weights(tmp_path / "parts")


def test_hidden_states_on_disk_change_no_bit(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    recipe = Recipe.build(
        {"method": "wanda+refit", "sparsity": "2:4", "propagate": "pruned", "dense_target": 0.5, "residual": "correct"}
    )
    (tmp_path / "scratch").mkdir()
    in_ram, on_disk = stream(folder, recipe, None), stream(folder, recipe, tmp_path / "scratch")
    for name, tensor in in_ram.items():
        assert torch.equal(tensor, on_disk[name]), name
    assert len(list((tmp_path / "scratch").glob("dense-*"))) == 0


def test_drift_is_taken_back(tmp_path: Path) -> None:
    """On hidden states that drift, correction leaves less of the drift behind the last layer, at the same sparsity."""
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    left = {}
    for residual in ("none", "correct"):
        settings = {"method": "sparsegpt+refit", "propagate": "pruned", "dense_target": "dense", "residual": residual}
        pruned_model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for name, tensor in stream(folder, Recipe.build(settings), None).items():
            pruned_model.get_parameter(name).data.copy_(tensor)
        seen = []
        for model in (AutoModelForCausalLM.from_pretrained(folder).eval(), pruned_model):
            with torch.no_grad():
                seen.append(model(calibration(), output_hidden_states=True).hidden_states[-1])
        left[residual] = float((seen[0] - seen[1]).square().mean())
    assert left["correct"] < left["none"]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_what_the_checkpoint_can_hold_whatever_the_passes_compute_in(
    tmp_path: Path, stored: torch.dtype
) -> None:
    folder = tiny.save("llama", tmp_path / "model", dtype=stored)
    recipe = Recipe.build({"method": "sparsegpt", "reconstruct": 2})
    for name, tensor in stream(folder, recipe, None, dtype=torch.float32).items():
        assert tensor.dtype == stored, name
        if name.endswith("_proj.weight"):
            assert int((tensor == 0).sum()) == tensor.numel() // 2, name


def test_weights_that_the_checkpoint_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    """Where what makes up for zeros goes beyond the largest number of the checkpoint's dtype."""
    model = tiny.build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data = 60000 * layer.self_attn.q_proj.weight.data.sign()
    model.half().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    expected = r"layers\.0\.self_attn\.q_proj: a pruned weight of .* beyond 65504, the largest of float16"
    with pytest.raises(FistaPrunerError, match=expected):
        stream(tmp_path / "model", Recipe.build({"method": "sparsegpt"}), None, dtype=torch.float32)


@pytest.mark.parametrize("settings", [{"weighting": "fisher"}, {"dtype": "bfloat16"}], ids=str)
def test_weights_that_stay_keep_every_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Whether row weights have scaled them, or passes have fewer bits than the checkpoint, and no step changes them."""
    folder = tiny.save("llama", tmp_path / "model", dtype=torch.float32, num_hidden_layers=1)
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    allocation = {"re:mlp": "0%", "k_proj": "0%"}
    prune(folder, tmp_path / "run", method="magnitude", allocation=allocation, calibration=calibration, **settings)
    dense, pruned = (Checkpoint.open(path) for path in (folder, tmp_path / "run" / "model"))
    for name in dense.names():
        before, after = dense.read(name), pruned.read(name)
        zeros = name.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight"))
        assert bool((after == 0).any()) == zeros, name
        assert torch.equal(before, after) or zeros, name
        if settings.get("weighting"):
            assert torch.equal(before[after != 0], after[after != 0]), name


def test_rows_are_weighted_by_their_importance(tmp_path: Path) -> None:
    """Each operator's rows by its own weights, so that important rows keep more."""
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    recipe = Recipe.build({"method": "sparsegpt", "sparsity": "50%", "reconstruct": 0}).resolved()
    operators = dict(discover(LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))).operators())
    generator = torch.Generator().manual_seed(3)
    importance = {name: (2 * torch.randn(each.rows, generator=generator)).exp() for name, each in operators.items()}
    problems: list[LayerProblem] = []
    weights = stream(
        folder,
        recipe,
        None,
        lambda _, number, problem: problems.append(problem),
        measures=LayerMeasures(importance=importance),
    )
    assert [problem.name for problem in problems] == list(importance)
    for problem in problems:
        name, rows = problem.name, importance[problem.name]
        expected = unweighted(solve(problem.weighted(rows), recipe.sparsity, recipe.method).weight, rows)
        found = weights[f"{name}.weight"]
        assert torch.equal(found == 0, expected == 0), name
        torch.testing.assert_close(found, expected)
        order, kept = rows.argsort(), (found != 0).sum(1)
        less, more = (kept[half].sum() for half in order.chunk(2))
        assert int(more) > 1.5 * int(less), name


@pytest.mark.parametrize("target", ["dense", "pruned"])
def test_a_group_is_freed_before_the_next_one(tmp_path: Path, target: str) -> None:
    alive: list[tuple[tuple[int, int], weakref.ref[Tensor]]] = []

    def inspect(layer: int, group: int, problem: LayerProblem) -> None:
        assert not any(tensor() is not None for earlier, tensor in alive if earlier != (layer, group))
        tensors = (problem.weight, problem.gram, problem.drift)
        alive.extend(((layer, group), weakref.ref(each)) for each in tensors if each is not None)

    stream(
        tiny.save("llama", tmp_path / "model"), Recipe.build({"method": "wanda", "dense_target": target}), None, inspect
    )
    assert len(alive) >= 8

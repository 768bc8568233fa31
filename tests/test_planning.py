"""The plan before a run: a bound that runs keep, what it changes to fit, when it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from fistapruner import Recipe
from fistapruner.core import LayerProblem, parse_sparsity
from fistapruner.errors import FistaPrunerError
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.source import UNTRUSTED
from fistapruner.planning import Bound, Choice, Plan, make_plan, solve_bytes
from fistapruner.pruning.run import plan_pruning, prune
from fistapruner.pruning.settle import open_operators
from fistapruner.runtime.devices import peak_bytes
from fistapruner.runtime.show import size
from fistapruner.settings.train import RecoverRecipe
from fistapruner.solvers import parse_method, solve
from fistapruner.training.run import plan_recovery, recover

CALIBRATION = {"source": "python", "samples": 8, "seqlen": 32}
WANDA: dict[str, Any] = {"method": "wanda", "propagate": "dense", "calibration": CALIBRATION}
WIDE = {"hidden_size": 64, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("plan") / "model")


def bound_of(folder: Path, **settings: Any) -> Bound:
    recipe = Recipe.build(settings).resolved()
    return Bound(open_operators(UNTRUSTED.find(folder), recipe).context)


def plan_of(folder: Path, out: Path = Path(), **settings: Any) -> Plan:
    """The plan of a run, without a timed layer."""
    return make_plan(bound_of(folder, **settings).context, out)


def peak(bound: Bound, choice: Choice) -> int:
    return max(bound.stages(choice).values())


def test_bytes_of_a_computation_are_counted_while_they_live() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        third = second.view(5, 100) + 1
        del second, third

    assert peak_bytes(work) == 4000


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "fista"])
def test_small_solve_predicts_a_large_one(method: str) -> None:
    """From a problem of 256 inputs to one of 512: never much too little, never far too much."""
    n, rows = 512, 160
    sparsity, steps = parse_sparsity("50%"), parse_method(method)
    activations = torch.randn(2 * n, n)
    weight = torch.randn(rows, n)
    problem = LayerProblem(weight, activations.T @ activations / n)
    measured = 4 * (weight.numel() + n * n) + peak_bytes(lambda: solve(problem, sparsity, steps))
    assert 0.9 * measured < solve_bytes(rows, n, sparsity, tuple(steps)) < 1.7 * measured


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "drift": ("llama", {"method": "sparsegpt", "dense_target": "dense", "residual": "correct"}),
    "together": ("llama", {"method": "sparsegpt", "propagate": "dense", "error_correction": False}),
    "reconstructed": ("llama", {"method": "wanda", "reconstruct": 2}),
    "channels": ("llama", {"structure": {"remove": "mlp=25%", "multiple": 4}, "sparsity": "50%", "method": "wanda"}),
    "heads": ("llama", {"structure": "heads=1"}),
    "compared heads": ("llama", {"structure": {"remove": "heads=1", "method": "goa"}}),
    "experts": ("mixtral", {"method": "sparsegpt"}),
    "fewer experts": ("mixtral", {"structure": "experts=25%"}),
    "narrower experts": ("mixtral", {"structure": {"remove": "mlp=25%", "multiple": 4}}),
    "low rank": ("llama", {"method": "sparsegpt", "sparsity": "2:4", "low_rank": 4}),
}


QUICK = ("default", "drift", "reconstructed", "channels", "heads", "experts")


@pytest.mark.parametrize("name", tiny.quick_first(RUNS, QUICK))
def test_runs_keep_the_bound(name: str, tmp_path: Path) -> None:
    """Bytes of tensors are counted while a run works: at most those of the bound, which is not far above them."""
    architecture, settings = RUNS[name]
    folder = tiny.save(architecture, tmp_path / "model", **WIDE)
    settings = {**settings, "calibration": CALIBRATION, "execution": {"threads": 1}}
    bound, out = bound_of(folder, **settings), tmp_path / "run"
    choice = Choice(8)
    used = peak_bytes(lambda: prune(folder, out, **settings))
    counted = peak(bound, choice) - bound.base
    assert used <= counted < 4 * used
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.suffix == ".safetensors")
    assert disk <= bound.disk(choice, 1) + 2**16 < 3 * disk + 2**16  # of the headers of small files


@pytest.mark.parametrize("settings", [{}, {"parameters": "full"}, {"optimizer": "mezo"}], ids=["lora", "full", "mezo"])
def test_training_keeps_the_bound(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Bytes of tensors are counted; that of the process, which leaves room for fragments, is left out."""
    bench = tiny.Bench(tmp_path)
    pruned, data = bench.pruned(**WIDE), {"source": str(bench.text), "seqlen": 32, "tokens": 600}
    recipe = RecoverRecipe.build({**settings, "data": data, "steps": 2})
    plan = plan_recovery(str(pruned), recipe, str(tmp_path / "out"), None, UNTRUSTED)
    used = peak_bytes(lambda: recover(pruned, tmp_path / "out", recipe=recipe, evaluate=None))
    counted = sum(plan.memory.values()) - plan.memory["this process"]
    assert 0.95 * used <= counted < 1.3 * used


def test_hidden_states_go_to_disk_before_batches_shrink(folder: Path) -> None:
    """Limits between the peaks of two choices; workers hand hidden states to each other in files."""
    asked = {**WANDA, "calibration": {"source": "python", "samples": 2**16, "seqlen": 32}}
    bound = bound_of(folder, **asked)
    batch = plan_of(folder, **asked).choice.batch_size
    here, there, fewer = Choice(batch), Choice(batch, on_disk=True), Choice(1, on_disk=True)
    peaks = [peak(bound, choice) for choice in (here, there, fewer)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] - peaks[1] > 2 * 2**16 * bound.window
    between = (peaks[0] + peaks[1]) // 2
    found = plan_of(folder, **asked, execution={"memory_limit": between})
    assert found.choice == there
    assert found.says[0] == f"to fit memory_limit {size(between)}: hidden states go to disk"
    process = {"executor": "process", "workers": 1, "memory_limit": 2**40}
    assert plan_of(folder, **asked, execution=process).choice.on_disk


def test_a_run_that_cannot_fit_is_refused_before_it_works(folder: Path, tmp_path: Path) -> None:
    settings = {**WANDA, "execution": {"memory_limit": "1MiB", "batch_size": 4}}
    refusal = r"^memory_limit 1\.00 MiB is not enough: .* needs .*iB, even with .* 4 windows at a time; give more"
    with pytest.raises(FistaPrunerError, match=refusal):
        plan_pruning(folder, Recipe.build(settings), tmp_path / "run")
    with pytest.raises(FistaPrunerError, match=refusal):
        prune(folder, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "run.json").exists()
    workers = {"executor": "process", "workers": 64, "threads": 1, "memory_limit": "1MiB"}
    with pytest.raises(FistaPrunerError, match=r"in each of 4 processes \(fewer: workers\)"):  # of three layers
        plan_of(folder, **{**WANDA, "execution": workers})
    many = {**WANDA, "calibration": {"source": "python", "samples": 2**31 - 1}}
    with pytest.raises(FistaPrunerError, match=r"is not enough: .* needs "):  # no tokens are made
        plan_of(folder, **many)


def test_a_full_disk_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(FistaPrunerError, match=r"run needs .* KiB of disk and .* has 1000 B free"):
        plan_of(folder, tmp_path / "run", **WANDA)


def test_text_that_the_model_generates_needs_all_of_it(folder: Path) -> None:
    asked = {**WANDA, "calibration": {**CALIBRATION, "source": "self"}}
    generating = plan_of(folder, **asked).memory["generating text with the whole model"]
    assert generating > Checkpoint.open(folder).nbytes


def test_layers_without_operators_are_no_hindrance(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.build({**WANDA, "targets": [r"re:layers\.1\."]})
    plan = plan_pruning(folder, recipe, tmp_path)
    assert plan.seconds > 0


def test_prune_prints_the_plan_and_exits(folder: Path, tmp_path: Path, cli: tiny.Cli) -> None:
    command = ["prune", folder, "--out", tmp_path / "run", "--method", "sparsegpt", "--samples", "4"]
    command += ["--seqlen", "32", "--calibration", "python", "--plan"]
    said = cli(*command).out
    assert "plan: at most " in said
    assert "pruning gate_proj+up_proj" in said
    assert " of pruning; " in said
    found = json.loads(cli(*command, "--json").out)
    assert found["seconds"] > 0
    assert found["disk"] > 0
    assert not (tmp_path / "run").exists()


def test_a_timed_layer_leaves_the_model_as_it_was(folder: Path) -> None:
    """Of which channels were removed."""
    bound = bound_of(folder, structure={"remove": "mlp=16,heads=1", "multiple": 1}, calibration=CALIBRATION)
    before = {name: tensor.shape for name, tensor in bound.model.model.state_dict(keep_vars=True).items()}
    assert bound.seconds(Choice(4)) > 0
    assert {name: tensor.shape for name, tensor in bound.model.model.state_dict(keep_vars=True).items()} == before

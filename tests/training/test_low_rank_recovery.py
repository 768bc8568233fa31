"""Recovery of models with a low-rank part: it stays, zeros stay, and the sum of both parts is what the passes use."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.cli import main
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.low_rank import LowRankAdapter
from fistapruner.models.operators import discover
from fistapruner.reporting.facts import summary
from fistapruner.runs.records import Report
from fistapruner.settings.train import RecoverRecipe
from fistapruner.training.masked import Trained

PRUNING: dict[str, Any] = {"sparsity": "2:4", "method": "wanda", "low_rank": 4}
TEXT: dict[str, Any] = {"source": "python", "samples": 4, "seqlen": 32}
TRAINING: dict[str, Any] = {"steps": 6, "windows_per_step": 2, "rank": 4}
PARTS = ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pruned(request: pytest.FixtureRequest, bench: tiny.Bench) -> Path:
    """A pruning run; GPT-2 stores its matrices transposed."""
    run = bench.folder / f"{request.param} with a low-rank part"
    fp.prune(bench.dense(request.param), run, calibration=TEXT, **PRUNING)
    return run


llama = pytest.mark.parametrize("pruned", ["llama"], indirect=True)


def recover(run: Path, out: Path, **settings: Any) -> Report:
    data = {"source": "python", "seqlen": 32, "tokens": 1000}
    return fp.recover(run, out, **{"evaluate": None, "data": data, **TRAINING, **settings})


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in PARTS}


def opened(run: Path) -> LayerwiseModel:
    """Open the model of a run, as the sum of both parts."""
    model = LayerwiseModel(Checkpoint.open(run / "model"), torch.device("cpu"))
    model.low_rank = LowRankAdapter.beside(run / "model")
    return model


@pytest.mark.parametrize("settings", [{}, {"parameters": "full"}, {"parameters": "norms"}, {"targets": ["re:mlp"]}])
def test_training_begins_with_the_sum_of_both_parts(pruned: Path, settings: dict[str, Any]) -> None:
    """Bit for bit what an evaluation uses, also where only some operators are trained."""
    whole, model = opened(pruned), LayerwiseModel(Checkpoint.open(pruned / "model"), torch.device("cpu"))
    adapter, recipe = LowRankAdapter.beside(pruned / "model"), RecoverRecipe.build({"rank": 4, **settings})
    layout = discover(model).select(recipe, "train")
    model.low_rank = adapter.without(
        () if settings.get("parameters") == "norms" else {n for n, _ in layout.operators()}
    )
    with model.resident():
        trained = Trained(model, layout, recipe, adapter)
        for index, layer in enumerate(trained.layers):
            with whole.layer(index) as expected:
                values = dict(layer.layer.named_parameters()) | layer.values()
                for name, parameter in expected.named_parameters():
                    assert torch.equal(values[name], parameter), name


@pytest.mark.parametrize("parameters", ["lora", "full", "spp"])
def test_the_sparse_part_is_trained_beside_it(pruned: Path, tmp_path: Path, parameters: str) -> None:
    report = recover(pruned, tmp_path / "out", parameters=parameters, evaluate="python", evaluate_windows=2)
    assert report.recovery.kept_step
    before, after = (Checkpoint.open(run / "model") for run in (pruned, tmp_path / "out"))
    for name in before.names():
        assert torch.equal(before.read(name) == 0, after.read(name) == 0), name
    assert not inspect_checkpoint(tmp_path / "out" / "model").violations
    changed = [name for name, content in results(pruned).items() if content != results(tmp_path / "out")[name]]
    assert changed == ["model/model.safetensors"]
    totals, adapter = report.totals, LowRankAdapter.beside(tmp_path / "out" / "model")
    assert (totals.low_rank, totals.low_rank_weights) == (4, adapter.weights)
    assert totals.low_rank_bytes == sum(path.stat().st_size for path in (tmp_path / "out" / "adapter").iterdir())
    assert [evaluation.low_rank for evaluation in report.evaluations] == [adapter.weights]
    assert "low-rank part of rank 4" in summary(report, tmp_path / "out")
    assert "PeftModel.from_pretrained" in (tmp_path / "out" / "model" / "README.md").read_text()


def begin(run: Path, out: Path) -> None:
    """Train to the middle."""
    with pytest.raises(KeyboardInterrupt):
        recover(run, out, listener=tiny.StopsAt("step 3 of 6"))


@llama
def test_a_run_that_goes_on_has_the_same_bytes(pruned: Path, tmp_path: Path) -> None:
    recover(pruned, tmp_path / "whole")
    begin(pruned, out := tmp_path / "out")
    assert main(["resume", str(out)]) == 0
    assert "going on after step" in (out / "log.txt").read_text()
    assert results(out) == results(tmp_path / "whole")


@llama
def test_a_run_whose_low_rank_part_was_exchanged_is_refused(pruned: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(pruned, tmp_path / "run"))
    begin(run, tmp_path / "out")
    file = run / PARTS[1]
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FistaPrunerError, match="is damaged, or is the low-rank part of another model"):
        recover(run, tmp_path / "out")


@llama
def test_a_dense_model_with_a_low_rank_part_is_refused(bench: tiny.Bench, pruned: Path, tmp_path: Path) -> None:
    """Its predictions would be those of its sparse part alone."""
    with pytest.raises(FistaPrunerError, match="which --dense would leave out: give --dense the dense model that"):
        recover(bench.pruned(), tmp_path / "out", dense=pruned / "model")
    assert not (tmp_path / "out").exists()

"""The speed measurement: what it returns, not how fast anything is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from fistapruner import FistaPrunerError, pack
from fistapruner.measure import QUANTISE_FIRST
from fistapruner.measure.speed import Run, Speed, Variant, bench, compare, time_generation, weight_bytes
from forked import FORKS
from packed.pruned import pickle_weights, save_pruned

DENSE, PACKED = ["dense float32", "dense bfloat16"], ["packed", "packed int8"]
SMALLER = ["smaller float32", "smaller bfloat16"]


def speed(name: str, rate: float = 10, spread: float = 0.0) -> Speed:
    return Speed(name, rate, (rate - spread, rate + spread), 0.1, (0.1, 0.1), 100, 10, 1, 4, 4, 3, 2, "cpu")


def named(variants: list[Variant], **_: object) -> list[Speed]:
    return [speed(variant.name) for variant in variants]


def forms(model: Path, **settings: object) -> list[str]:
    return [one.variant for one in bench(model, measure=named, **settings)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_decoding_is_timed(architecture: str) -> None:
    run = time_generation(tiny.build(architecture), torch.arange(3, 13).view(2, 5), 4)
    assert run.first_token > 0
    assert run.tokens_per_second > 0


def test_runs_are_summarised_by_median_and_range() -> None:
    settings = {name: 1 for name in ("peak_memory", "file_size", "batch", "prompt", "tokens", "threads")}
    found = Speed.of("packed", [Run(1.0, 5.0), Run(2.0, 7.0), Run(9.0, 6.0)], **settings, device="cpu")
    assert (found.first_token, found.first_token_range) == (2.0, (1.0, 9.0))
    assert (found.tokens_per_second, found.tokens_per_second_range) == (6.0, (5.0, 7.0))
    assert found.runs == 3


def test_every_form_of_a_pruned_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.measure.speed.get_context", lambda *_: FORKS)
    source = save_pruned(tmp_path / "m")
    pack(source, tmp_path / "p")
    legacy = pickle_weights(save_pruned(tmp_path / "legacy"))
    with pytest.raises(FistaPrunerError, match=r"legacy has only legacy pickle weights .* --allow-pickle"):
        bench(legacy)
    assert forms(legacy, allow_pickle=True) == forms(tmp_path / "p") == DENSE + PACKED
    speeds = bench(source, prompt=4, tokens=3, runs=1)
    assert [one.variant for one in speeds] == DENSE + PACKED
    pack(source, tmp_path / "int8", values="int8")
    assert forms(tmp_path / "int8") == [*DENSE, "packed int8"]


def test_a_smaller_model_is_not_called_the_dense_one(tmp_path: Path) -> None:
    source = save_pruned(tmp_path / "m")
    stages = [{"settings": {"structure": {"remove": "mlp=25%"}}}]
    (source / "fistapruner.json").write_text(json.dumps({"lineage": {"stages": stages}}))
    pack(source, tmp_path / "p")
    assert forms(tmp_path / "p") == SMALLER + PACKED
    assert forms(source) == SMALLER
    assert forms(source, before=save_pruned(tmp_path / "d")) == DENSE + SMALLER
    names = [name for name in load_file(source / "model.safetensors") if "_proj" in name]
    claims = {name: {"sparsity": "50%"} for name in names}
    (source / "fistapruner.json").write_text(json.dumps({"lineage": {"stages": stages}, "operators": claims}))
    assert forms(source) == SMALLER + PACKED


@pytest.mark.parametrize("settings", [{"sparsity": "5%"}, {"dtype": torch.float64}])
def test_a_model_that_is_not_packed_is_measured_as_it_is(tmp_path: Path, settings: dict) -> None:
    source = save_pruned(tmp_path / "m", **settings)
    claims = {name: {"sparsity": "5%"} for name in load_file(source / "model.safetensors") if "_proj" in name}
    (source / "fistapruner.json").write_text(json.dumps({"operators": claims}))
    assert forms(source) == DENSE


def test_the_command_prints_a_table_or_json(tmp_path: Path, cli: tiny.Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(model, **settings):
        settings.pop("tick")("forms timed", 1, 2)
        asked.append((model, settings))
        return [speed("dense float32", 10), speed("packed", 20)]

    monkeypatch.setattr("fistapruner.measure.run.bench_forms", measured)
    command = ["bench", tmp_path, "--prompt", "4", "--tokens", "3", "--runs", "1", "--threads", "1"]
    printed = cli(*command).out
    assert "dense float32" in printed
    assert "20.0 (20.0 to 20.0) (dense 10.0); ×2.00 of dense float32" in printed
    assert printed.endswith(f"{QUANTISE_FIRST}\n")
    rows = json.loads(cli(*command, "--json").out)["speeds"]
    assert [row["variant"] for row in rows] == ["dense float32", "packed"]
    numbers = {"batch": 1, "prompt": 4, "tokens": 3, "runs": 1, "threads": 1}
    assert asked == 2 * [(str(tmp_path), {**numbers, "allow_pickle": False})]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for model, settings, said in (
        (save_pruned(tmp_path / "m"), {"batch": 0}, "batch 0 is not a whole number of at least 1"),
        (tmp_path / "m", {"tokens": 1}, "tokens 1 is not a whole number of at least 2"),
        (tmp_path / "m", {"runs": "8"}, "runs '8' is not a whole number of at least 1"),
        (tmp_path / "none", {}, r"none has no config\.json|none does not exist"),
    ):
        with pytest.raises(FistaPrunerError, match=said):
            bench(model, measure=named, **settings)


def test_every_variant_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a variant name it, in one line."""
    short = Variant("dense", save_pruned(tmp_path / "gpt2", "gpt2"))  # of 128 positions
    pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    packed = Variant("packed", tmp_path / "p")
    (found,) = compare([packed], prompt=4, tokens=3, runs=2, threads=1)
    assert (found.variant, found.runs, found.threads) == ("packed", 2, 1)
    assert found.peak_memory > 2**20
    assert found.file_size > 0
    monkeypatch.setattr("fistapruner.measure.speed.get_context", lambda *_: FORKS)
    with pytest.raises(FistaPrunerError, match=r"^dense: IndexError: index out of range"):
        compare([short, packed], prompt=200, tokens=2, threads=1)
    (tmp_path / "p" / "packed.json").write_text("{}")
    with pytest.raises(FistaPrunerError, match=r"packed\.json is damaged: it does not describe"):
        compare([packed], threads=1)


def test_weights_that_are_stored_twice_are_counted_once(tmp_path: Path) -> None:
    folder = save_pruned(tmp_path / "m")
    size = weight_bytes(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_bytes(folder) == size == (folder / "model.safetensors").stat().st_size
    assert weight_bytes(pickle_weights(folder)) > 2**10

"""Runs whose operators have a low-rank part: checkpoint and adapter are measured, packed and refused as one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError, SparseLinear
from fistapruner.cli import main
from fistapruner.core import NM
from fistapruner.measure.bench import Speeds, bench
from fistapruner.measure.speed import Speed, Variant, compare, load_variant, weight_bytes
from fistapruner.models.build import load_whole
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.low_rank import LowRankAdapter, sum_of_parts
from fistapruner.models.safetensors import SafetensorsFile
from fistapruner.packed.checkpoint import PackedCheckpoint
from fistapruner.pipeline.measure_run import bench_run
from fistapruner.pruning.run import plan_pruning
from fistapruner.reporting.summary import summary
from fistapruner.runs.records import load_run
from fistapruner.runtime.files import PARTIAL
from fistapruner.training import reconstruct as block_reconstruction

SMALL: dict[str, Any] = {"sparsity": "2:4", "calibration": {"source": "python", "samples": 4, "seqlen": 32}}
RANK = 4


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    fp.prune(dense, out, low_rank=RANK, evaluate="python", evaluate_windows=2, **SMALL)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tokens() -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def summed(run: Path) -> Any:
    """The model of a run: its checkpoint, with the products of the adapter's factors added."""
    model, adapter = load(run / "model"), SafetensorsFile(run / "adapter" / "adapter_model.safetensors")
    for name in adapter.entries:
        if name.endswith(".lora_A.weight"):
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            product = adapter.read(name.replace("lora_A", "lora_B")).float() @ adapter.read(name).float()
            module.weight.data += product.T if type(module).__name__ == "Conv1D" else product
    return model


def results(run: Path) -> dict[str, bytes]:
    names = ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    return {name: (run / name).read_bytes() for name in names}


def test_operators_are_sparse_and_their_sum_is_nearer_to_the_dense_one(dense: Path, finished: Path) -> None:
    plain = fp.prune(dense, finished.parent / "plain", **SMALL)
    entries = json.loads((finished / "report.json").read_text())["layers"]
    sparse = load(finished / "model")
    for layer, before in zip(entries, plain.layers, strict=True):
        assert len(layer["operators"]) == len(before.operators)
        for operator in layer["operators"]:
            assert NM(2, 4).satisfies(sparse.get_submodule(f"{layer['name']}.{operator['name']}").weight)
            assert operator["low_rank"] == RANK
            assert operator["steps"][-1]["method"] == "low_rank"
    first, alone = entries[0]["operators"][0], plain.layers[0].operators[0]
    assert first["relative_error"] < alone.relative_error  # of the same problem: nothing is pruned before it


def test_additional_weights_are_counted_and_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    totals = json.loads((run / "report.json").read_text())["totals"]
    adapter = SafetensorsFile(run / "adapter" / "adapter_model.safetensors")
    assert totals["low_rank_weights"] == sum(entry.shape[0] * entry.shape[1] for entry in adapter.entries.values())
    assert totals["low_rank_bytes"] == sum(path.stat().st_size for path in (run / "adapter").iterdir())
    said = f"{totals['low_rank_weights']}"
    card = (run / "model" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "beside the checkpoint" not in card  # it may be shared without the rest of the run
    assert said in card.replace(",", "").replace("\u202f", "").replace("\u00a0", "")
    assert main(["inspect", str(run)]) == 0
    assert f"{said} weights of rank {RANK}" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Additional weights" in page
    assert "Low-rank adapter beside it" in page
    assert "bench RUN" in page
    assert "2:4 + rank 4" in page
    assert "additional weights" in summary(load_run(run), run)


def test_rank_zero_is_a_run_without_a_low_rank_part(dense: Path, tmp_path: Path) -> None:
    for name, settings in (("plain", {}), ("zero", {"low_rank": 0})):
        fp.prune(dense, tmp_path / name, **SMALL, **settings)
    one, two = (tiny.weights(tmp_path / name) for name in ("plain", "zero"))
    assert one == two
    assert not (tmp_path / "zero" / "adapter").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_the_sum_of_both_parts_is_what_is_evaluated(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "dense")
    report = fp.prune(folder, tmp_path / "run", low_rank=RANK, **SMALL)
    whole = summed(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    pruned = {f"{layer.name}.{operator.name}" for layer in report.layers for operator in layer.operators}
    assert set(config["target_modules"]) == pruned
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    whole.save_pretrained(tmp_path / "whole")
    tiny.tokenizer().save_pretrained(tmp_path / "whole")
    settings: dict[str, Any] = {"seqlen": 32, "windows": 3}
    found = fp.evaluate(tmp_path / "run" / "model", "python", **settings)
    expected = fp.evaluate(tmp_path / "whole", "python", **settings)
    assert found.perplexity is not None
    assert expected.perplexity is not None
    assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, rel=1e-6)
    alone = fp.evaluate(tmp_path / "whole", "python", against=folder, **settings)
    of_run = fp.evaluate(tmp_path / "run" / "model", "python", against=folder, **settings)
    assert of_run.divergence is not None
    assert alone.divergence is not None
    assert of_run.divergence.kl == pytest.approx(alone.divergence.kl, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_sum_of_both_parts_is_the_whole_model_of_tasks_and_examples(tmp_path: Path, architecture: str) -> None:
    """Also where matrices are stored transposed."""
    run = tmp_path / "run"
    fp.prune(tiny.save(architecture, tmp_path / "dense"), run, low_rank=RANK, **SMALL)
    with torch.no_grad():
        found = load_whole(run / "model", torch.device("cpu"))(tokens()).logits
        expected, alone = (model(tokens()).logits for model in (summed(run), load(run / "model")))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, alone, atol=1e-2)


@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_a_layer_sees_what_the_sum_of_the_layers_before_it_makes(dense: Path, tmp_path: Path, propagate: str) -> None:
    """Continued from the journal, hidden states are those of sparse plus low rank: the same bits."""
    out = tmp_path / "run"
    fp.prune(dense, out, low_rank=RANK, propagate=propagate, **SMALL)
    expected = results(out)
    for name in ("0002.json", "0001.json"):
        (out / "layers" / name).unlink()
        shutil.rmtree(out / "model")
        (out / "model.json").unlink()
        fp.prune(dense, out, low_rank=RANK, propagate=propagate, **SMALL)
        assert results(out) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_block_reconstruction_trains_both_parts(tmp_path: Path, architecture: str) -> None:
    layers = {"n_layer": 2} if architecture == "gpt2" else {"num_hidden_layers": 2}
    folder = tiny.save(architecture, tmp_path / "dense", **layers)
    calibration = {"source": "python", "samples": 48, "seqlen": 32}
    settings: dict[str, Any] = {"sparsity": "2:4", "calibration": calibration, "low_rank": 1, "method": "wanda"}
    fp.prune(folder, tmp_path / "solved", **settings)
    report = fp.prune(folder, tmp_path / "run", reconstruct=24, **settings)
    for layer in report.layers:
        found = (layer.model_extra or {})["reconstruct"]
        assert found["held_out_after"] < found["held_out_before"]
    sparse, before = load(tmp_path / "run" / "model"), load(tmp_path / "solved" / "model")
    first = report.layers[0]
    for operator in first.operators:
        weights = [model.get_submodule(f"{first.name}.{operator.name}").weight for model in (sparse, before)]
        assert torch.equal(weights[0] == 0, weights[1] == 0)
        assert not torch.equal(*weights)
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "solved")]
    assert adapters[0] != adapters[1]
    expected = results(tmp_path / "run")
    (tmp_path / "run" / "layers" / "0001.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "model.json").unlink()
    fp.prune(folder, tmp_path / "run", reconstruct=24, **settings)
    assert results(tmp_path / "run") == expected


def test_block_reconstruction_leaves_the_exact_sum_of_both_parts_in_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains a bf16 model with products in bf16; a run continued from the journal adds the parts in fp32."""
    precisions = []

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        precisions.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return sum_of_parts(*args, **kwargs)

    monkeypatch.setattr(block_reconstruction, "sum_of_parts", noting)
    folder = tiny.save("llama", tmp_path / "dense", num_hidden_layers=1, dtype=torch.bfloat16)
    calibration = {"source": "python", "samples": 16, "seqlen": 32}
    settings: dict[str, Any] = {"method": "wanda", "dtype": "bfloat16", "calibration": calibration}
    report = fp.prune(folder, tmp_path / "run", sparsity="2:4", low_rank=1, reconstruct=16, **settings)
    assert (report.layers[0].model_extra or {})["reconstruct"]["kept_step"]
    assert len(precisions) == 7
    assert set(precisions) == {"ieee"}


@pytest.mark.parametrize("executor", ["process"])
def test_parallel_layers_give_the_same_bits(dense: Path, tmp_path: Path, executor: str) -> None:
    for name, execution in (("one", {"threads": 1}), ("two", {"executor": executor, "workers": 2, "threads": 1})):
        fp.prune(dense, tmp_path / name, low_rank=RANK, propagate="dense", execution=execution, **SMALL)
    assert results(tmp_path / "one") == results(tmp_path / "two")


@pytest.mark.parametrize("how", ["gone", "damaged", "config gone", "config cut"])
def test_a_lost_adapter_is_made_again_from_the_layers(run: Path, dense: Path, how: str) -> None:
    expected, file = results(run), run / "adapter" / "adapter_model.safetensors"
    config = file.with_name("adapter_config.json")
    if how == "gone":
        shutil.rmtree(run / "adapter")
    elif how == "damaged":
        file.write_bytes(file.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    elif how == "config gone":
        config.unlink()
    else:
        config.write_bytes(config.read_bytes()[:40])
    with pytest.raises(FistaPrunerError, match="adapter_config" if "config" in how else "adapter_model"):
        fp.evaluate(run / "model", "python", seqlen=16, windows=1)
    fp.prune(dense, run, low_rank=RANK, evaluate="python", evaluate_windows=2, **SMALL)
    assert results(run) == expected


def test_an_adapter_is_made_again_after_a_kill_between_its_name_and_its_mark(run: Path, dense: Path) -> None:
    expected = results(run)
    (run / "adapter" / PARTIAL).touch()
    shutil.rmtree(run / "model")
    fp.prune(dense, run, low_rank=RANK, evaluate="python", evaluate_windows=2, **SMALL)
    assert results(run) == expected
    assert not (run / "adapter" / PARTIAL).exists()


def test_verbs_that_would_leave_it_out_refuse_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pairs, adapter = str(tmp_path / "out"), tmp_path / "pairs.jsonl", str(run / "adapter")
    pairs.write_text('{"prompt": "After 1 comes", "chosen": " 2.", "rejected": " 1."}\n' * 8)
    for command in (
        ["export", str(run), out + ".gguf"],
        ["recover", str(run), "--merge", adapter, "--out", out],
        ["align", str(run), "--data", str(pairs), "--out", out],
        ["compare", str(run / "model"), "--methods", "wanda", "--out", f"{out}-compared"],
        ["prune", str(run / "model"), "--out", out],
        ["prune", str(run / "model"), "--out", out, "--plan"],
    ):
        assert main(command) != 0, command
        said = capsys.readouterr().err
        assert "is the sparse part of a model whose low-rank part is" in said, command
        assert "prune again without --low-rank" in said, command
        takes_dense = command[0] not in ("align", "recover")  # these keep zeros, which a merged model does not have
        assert ("merge_and_unload" in said) == takes_dense, command


FORMS = [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("phi3", {}), ("opt", {})]
"""Separate, fused and transposed operators, with and without biases, heads that are tied and that are not."""


@pytest.fixture(params=["bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)  # type: ignore[no-any-return]


def packed_run(tmp_path: Path, architecture: str, **changes: Any) -> tuple[Path, Path]:
    """Prune a model with a low-rank part and pack it; return the run and the packed folder."""
    folder = tiny.save(architecture, tmp_path / "dense", **{"dtype": torch.bfloat16, **changes})
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    fp.prune(folder, tmp_path / "run", low_rank=RANK, sparsity="2:4", method="wanda", calibration=calibration)
    fp.pack(tmp_path / "run" / "model", tmp_path / "packed")
    return tmp_path / "run", tmp_path / "packed"


@pytest.mark.parametrize(("architecture", "changes"), FORMS)
def test_packed_and_loaded_it_is_the_sum_of_both_parts(
    tmp_path: Path, architecture: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    run, packed = packed_run(tmp_path, architecture, dtype=dtype, **changes)
    whole, adapter = load_whole(run / "model", torch.device("cpu"), dtype), LowRankAdapter.beside(run / "model")
    assert adapter is not None
    model = fp.load(packed)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for name in adapter.operators:
        module = model.get_submodule(name)
        assert isinstance(module, SparseLinear)
        assert torch.equal(module.weight, whole.get_submodule(name).weight)
        a, b = (adapter.factors[f"{name}.lora_{part}.weight"] for part in "AB")
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        alone = SparseLinear(module.operator, module.bias)
        with torch.no_grad():
            torch.testing.assert_close(module(x), alone(x) + (x @ a.T) @ b.T, **close)
    with torch.no_grad():
        expected = whole(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, **close)
        for dense in (fp.load(packed, packed=False), load_whole(packed, torch.device("cpu"), dtype)):
            assert torch.equal(dense(tokens()).logits, expected)
        base = transformers.AutoModel.from_pretrained(packed, dtype=dtype)
        assert torch.equal(base(tokens()).last_hidden_state, dense.base_model(tokens()).last_hidden_state)
        model.save_pretrained(tmp_path / "saved")
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
        assert torch.equal(saved(tokens()).logits, expected)


@pytest.mark.parametrize(("architecture", "changes"), FORMS[1:3])
def test_unpacked_it_is_the_sparse_checkpoint_with_its_adapter(
    tmp_path: Path, architecture: str, changes: dict[str, Any], dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    run, packed = packed_run(tmp_path, architecture, dtype=dtype, **changes)
    again = tmp_path / "again"
    assert main(["unpack", str(packed), str(again)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"its low-rank part: {again / 'adapter'}"
    before, after = Checkpoint.open(run / "model"), Checkpoint.open(again)
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    assert (again / "fistapruner.json").read_bytes() == (run / "model" / "fistapruner.json").read_bytes()
    found = [
        fp.evaluate(folder, "python", seqlen=16, windows=3, against=tmp_path / "dense", dtype="float32")
        for folder in (run / "model", packed, again)
    ]
    assert len({(each.perplexity, each.divergence, each.low_rank) for each in found}) == 1
    shutil.rmtree(packed)
    fp.pack(again, packed)
    assert PackedCheckpoint(packed).low_rank is not None
    assert main(["export", str(again), str(tmp_path / "out.gguf")]) != 0
    assert f"whose low-rank part is {again / 'adapter'}, which export" in capsys.readouterr().err


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values_are_those_of_the_sparse_part_alone(run: Path, tmp_path: Path, values: str) -> None:
    fp.pack(run / "model", tmp_path / "packed", values=values)
    assert (tmp_path / "packed" / "adapter" / "adapter_model.safetensors").read_bytes() == results(run)[
        "adapter/adapter_model.safetensors"
    ]
    with torch.no_grad():
        found, expected = (model(tokens()).logits for model in (fp.load(tmp_path / "packed"), summed(run)))
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98


def test_a_weight_that_is_loaded_takes_the_place_of_both_parts(run: Path, tmp_path: Path) -> None:
    fp.pack(run / "model", tmp_path / "packed", values="bf16")
    model = fp.load(tmp_path / "packed")
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    model.load_state_dict(model.state_dict())
    assert "low_rank=4" in str(module)
    module.load_state_dict({"weight": 2 * module.weight})
    assert "low_rank" not in str(module)
    x = torch.ones(1, module.in_features, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x), x @ module.weight.T, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("lost", ["adapter", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_a_packed_model_without_its_adapter_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    packed = tmp_path / "packed"
    fp.pack(run / "model", packed, values="bf16")
    path = packed / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for command in (["evaluate"], ["bench"], ["unpack", str(tmp_path / "out")], ["inspect"]):
        assert main([command[0], str(packed), *command[1:]]) != 0
        said = "".join(capsys.readouterr())
        assert f"{path}" in said
        assert "is gone" in said
    with pytest.raises(FistaPrunerError, match=r"adapter/adapter_.* is gone"):
        fp.load(packed)


def test_an_adapter_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    fp.pack(run / "model", tmp_path / "packed", values="bf16")
    file = tmp_path / "packed" / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FistaPrunerError, match="is damaged, or is the low-rank part of another model"):
        fp.load(tmp_path / "packed")
    adapter = LowRankAdapter.beside(run / "model")
    assert adapter is not None
    other = tiny.build("llama", intermediate_size=64)
    with pytest.raises(FistaPrunerError, match=r"of another model: .*mlp\.down_proj has factors .* has \[32, 64\]"):
        adapter.add_to(other)
    with pytest.raises(FistaPrunerError, match=r"of another model: .*GPT2LMHeadModel has no such operator"):
        adapter.add_to(tiny.build("gpt2"))


def counted(variants: list[Variant], **_: Any) -> list[Speed]:
    """Measure only the bytes of each form."""
    setting = {"batch": 1, "prompt": 4, "tokens": 3, "runs": 1, "threads": 1, "device": "cpu", "peak_memory": 1}
    times: tuple[Any, ...] = (1.0, (1.0, 1.0), 1.0, (1.0, 1.0))
    return [Speed(one.name, *times, file_size=weight_bytes(one.folder), **setting) for one in variants]


def test_bench_measures_the_sum_and_counts_its_bytes(tmp_path: Path) -> None:
    run, _ = packed_run(tmp_path, "llama")
    report = fp.pack(run / "model", tmp_path / "again")
    adapter = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    for folder in (run / "model", tmp_path / "packed"):
        found = bench(folder, measure=counted)
        assert [one.variant for one in found] == ["dense float32", "dense bfloat16", "packed", "packed int8"]
        sizes = {one.variant: one.file_size for one in found}
        assert sizes["packed"] == (tmp_path / "packed" / "model.safetensors").stat().st_size + adapter
    bench_run(run, measure=counted)
    written = load_run(run)
    assert written.totals.compressed_bytes == sizes["packed"]
    page = (run / "report.html").read_text()
    assert "the adapter is counted" in page
    factors = LowRankAdapter.beside(run / "model")
    assert factors is not None
    assert report.low_rank == factors.nbytes
    plain = report.dense_total - report.dense_operators
    assert report.packed_total == plain + report.packed_operators
    packed = PackedCheckpoint(tmp_path / "packed")
    stored = sum(entry.nbytes for file in packed.checkpoint.files.values() for entry in file.entries.values())
    assert report.packed_total == stored + factors.nbytes
    assert "of it the low-rank part" in str(report)


def test_the_form_that_is_timed_is_the_sum(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fp.pack(run / "model", tmp_path / "packed", values="bf16")
    form = Variant("packed", tmp_path / "packed", "bfloat16")
    with torch.no_grad():
        found, expected = (model(tokens()).logits for model in (load_variant(form), summed(run)))
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)
    speeds = compare([form], prompt=4, tokens=3, runs=1, threads=1)
    assert f"{weight_bytes(form.folder) / 2**20:.1f}" in str(Speeds(speeds))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "0%"}, "low_rank 4 with sparsity 0%: operators without zeros have no low-rank part"),
        ({"low_rank": 17}, "k_proj is 16 x 32: its low-rank part has a rank from 0 to 16, not 17"),
        ({"structure": "25%"}, "low_rank 4 with structure"),
    ],
)
def test_what_cannot_have_a_low_rank_part_is_refused_before_any_work(
    dense: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        fp.prune(dense, tmp_path / "run", **{**SMALL, "low_rank": RANK, **settings})
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_plan_refuses_what_a_run_does(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--low-rank", "17", "--sparsity", "2:4", "--plan"]
    assert main(["prune", str(dense), "--out", str(tmp_path / "run"), *asked]) == 2
    assert "k_proj is 16 x 32: its low-rank part has a rank from 0 to 16, not 17" in capsys.readouterr().err


def test_experts_are_refused(tmp_path: Path) -> None:
    folder = tiny.save("qwen2_moe", tmp_path / "dense")
    with pytest.raises(FistaPrunerError, match=r"no LoRA for .*experts.*: leave such operators dense"):
        fp.prune(folder, tmp_path / "run", low_rank=RANK, **SMALL)


def test_what_peft_refuses_of_mamba_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4, time_step_rank=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    recipe = fp.Recipe.build({**SMALL, "low_rank": RANK})
    with pytest.raises(FistaPrunerError, match=r"no LoRA for .*out_proj: .* dense with --ignore re:out_proj, or"):
        plan_pruning(tmp_path / "dense", recipe, tmp_path / "run")
    plan_pruning(tmp_path / "dense", recipe.model_copy(update={"ignore": ["re:out_proj"]}), tmp_path / "run")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_the_adapter_and_has_the_same_logits(tmp_path: Path, architecture: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = tiny.save(architecture, tmp_path / "dense")
    fp.prune(folder, tmp_path / "run", low_rank=RANK, **SMALL)
    with torch.no_grad():
        expected = summed(tmp_path / "run")(tokens()).logits
        wrapped = peft.PeftModel.from_pretrained(load(tmp_path / "run" / "model"), tmp_path / "run" / "adapter").eval()
        found = wrapped(tokens()).logits
        alone = load(tmp_path / "run" / "model")(tokens()).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, alone, atol=1e-2)

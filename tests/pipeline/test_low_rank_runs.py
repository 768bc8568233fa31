"""Runs whose operators have a low-rank part: checkpoint and adapter are measured, packed and refused as one model."""

import importlib.util
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
from fistapruner.core import NM
from fistapruner.measure.speed import Speed, Variant, bench, load_variant, weight_bytes
from fistapruner.models.build import load_whole
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.low_rank import LowRankAdapter
from fistapruner.models.safetensors import SafetensorsFile
from fistapruner.packed.checkpoint import PackedCheckpoint
from fistapruner.reporting.facts import summary
from fistapruner.runs.records import load_run

CALIBRATION = {"source": "python", "samples": 4, "seqlen": 32}
SMALL: dict[str, Any] = {"sparsity": "2:4", "method": "sparsegpt", "calibration": CALIBRATION}
RANK = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2)


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
    """Of rank zero, a run is one without a low-rank part."""
    plain, zero = fp.prune(dense, finished.parent / "plain", **SMALL), finished.parent / "0"
    fp.prune(dense, zero, low_rank=0, **SMALL)
    assert tiny.weights(finished.parent / "plain") == tiny.weights(zero)
    assert not (zero / "adapter").exists()
    entries, sparse = load_run(finished).layers, load(finished / "model")
    for layer, before in zip(entries, plain.layers, strict=True):
        assert len(layer.operators) == len(before.operators)
        for operator in layer.operators:
            assert NM(2, 4).satisfies(sparse.get_submodule(f"{layer.name}.{operator.name}").weight)
            assert operator.low_rank == RANK
            assert operator.steps[-1]["method"] == "low_rank"
    first, alone = entries[0].operators[0], plain.layers[0].operators[0]
    assert first.relative_error < alone.relative_error  # type: ignore[operator]  # of the same problem


def test_additional_weights_are_counted_and_said(run: Path, cli: tiny.Cli) -> None:
    totals = load_run(run).totals
    adapter = SafetensorsFile(run / "adapter" / "adapter_model.safetensors")
    assert totals.low_rank_weights == sum(entry.shape[0] * entry.shape[1] for entry in adapter.entries.values())
    assert totals.low_rank_bytes == sum(path.stat().st_size for path in (run / "adapter").iterdir())
    card = (run / "model" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert f"{totals.low_rank_weights}" in card.replace(",", "").replace("\u202f", "").replace("\u00a0", "")
    assert f"{totals.low_rank_weights} weights of rank {RANK}" in cli("inspect", run).out
    cli("report", run)
    for text in ((run / "report.html").read_text(), summary(load_run(run), run)):
        assert "additional weights" in text.lower()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.filterwarnings("ignore")
def test_the_sum_of_both_parts_is_the_model(tmp_path: Path, architecture: str) -> None:
    """Of evaluations, of tasks and examples, and of peft; also where matrices are fused, or stored transposed."""
    folder, run = tiny.save(architecture, tmp_path / "dense", num_hidden_layers=2), tmp_path / "run"
    report = fp.prune(folder, run, low_rank=RANK, **SMALL)
    whole = summed(run)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        f"{layer.name}.{operator.name}" for layer in report.layers for operator in layer.operators
    }
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    whole.save_pretrained(tmp_path / "whole")
    tiny.tokenizer().save_pretrained(tmp_path / "whole")
    found, expected = (
        fp.evaluate(model, "python", seqlen=32, windows=3, against=folder)
        for model in (run / "model", tmp_path / "whole")
    )
    assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, rel=1e-6)
    assert found.divergence.kl == pytest.approx(expected.divergence.kl, rel=1e-4)
    models = [load_whole(run / "model", CPU)]
    if importlib.util.find_spec("peft"):
        from peft import PeftModel

        models.append(PeftModel.from_pretrained(load(run / "model"), run / "adapter").eval())
    with torch.no_grad():
        for model in models:
            assert torch.allclose(model(tokens()).logits, whole(tokens()).logits, atol=1e-4)
        assert not torch.allclose(load(run / "model")(tokens()).logits, whole(tokens()).logits, atol=1e-2)


def test_a_layer_sees_what_the_sum_of_the_layers_before_it_makes(dense: Path, run: Path, tmp_path: Path) -> None:
    """Continued from the journal, hidden states are those of sparse plus low rank: the same bits."""
    tiny.begin(dense, tmp_path / "begun", low_rank=RANK, **SMALL)
    fp.resume(tmp_path / "begun")
    assert results(tmp_path / "begun") == results(run)


def test_block_reconstruction_trains_both_parts(tmp_path: Path) -> None:
    """In bf16, where the parts are added in fp32: continued from the journal, the bits are the same."""
    folder = tiny.save("gpt2", tmp_path / "dense", num_hidden_layers=2, dtype=torch.bfloat16)
    calibration = {"source": "python", "samples": 48, "seqlen": 32}
    settings: dict[str, Any] = {"sparsity": "2:4", "calibration": calibration, "low_rank": 1, "method": "wanda"}
    settings["dtype"] = "bfloat16"
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
    expected, solved = (results(tmp_path / name) for name in ("run", "solved"))
    assert expected["adapter/adapter_model.safetensors"] != solved["adapter/adapter_model.safetensors"]
    tiny.begin(folder, tmp_path / "begun", reconstruct=24, **settings)
    fp.resume(tmp_path / "begun")
    assert results(tmp_path / "begun") == expected


@pytest.mark.slow
def test_parallel_layers_give_the_same_bits(dense: Path, tmp_path: Path) -> None:
    for name, execution in (("one", {"threads": 1}), ("two", {"executor": "process", "workers": 2, "threads": 1})):
        fp.prune(dense, tmp_path / name, low_rank=RANK, propagate="dense", execution=execution, **SMALL)
    assert results(tmp_path / "one") == results(tmp_path / "two")


@pytest.mark.parametrize("how", ["gone", "damaged", "config cut"])
def test_a_lost_adapter_is_named(run: Path, how: str) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    config = file.with_name("adapter_config.json")
    if how == "gone":
        shutil.rmtree(run / "adapter")
    elif how == "damaged":
        file.write_bytes(file.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    else:
        config.write_bytes(config.read_bytes()[:40])
    with pytest.raises(FistaPrunerError, match="adapter_config" if "config" in how else "adapter_model|does not exist"):
        fp.evaluate(run / "model", "python", seqlen=16, windows=1)


def test_verbs_that_would_leave_it_out_refuse_the_run(run: Path, tmp_path: Path, cli: tiny.Cli) -> None:
    out, pairs, adapter = str(tmp_path / "out"), tiny.write_pairs(tmp_path / "pairs.jsonl"), str(run / "adapter")
    for command in (
        ["export", run, out + ".gguf"],
        ["recover", run, "--merge", adapter, "--out", out],
        ["align", run, "--data", pairs, "--out", out],
        ["compare", run / "model", "--methods", "wanda", "--out", f"{out}-compared"],
        ["prune", run / "model", "--out", out],
    ):
        status = 1 if command[0] == "compare" else 2  # its only row fails
        assert f"low-rank part is {adapter}" in cli(*command, status=status).err, command


def packed_run(tmp_path: Path, architecture: str, **changes: Any) -> tuple[Path, Path]:
    """Prune a model with a low-rank part and pack it; return the run and the packed folder."""
    folder = tiny.save(architecture, tmp_path / "dense", dtype=torch.bfloat16, num_hidden_layers=2, **changes)
    calibration = {"source": "python", "samples": 2, "seqlen": 16}
    fp.prune(folder, tmp_path / "run", low_rank=RANK, sparsity="2:4", method="wanda", calibration=calibration)
    fp.pack(tmp_path / "run" / "model", tmp_path / "packed")
    return tmp_path / "run", tmp_path / "packed"


@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("phi3", {}), ("opt", {})]
)
def test_packed_it_is_the_sum_of_both_parts_and_unpacked_both_are_back(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    """Separate, fused and transposed operators, with and without biases."""
    run, packed = packed_run(tmp_path, architecture, **changes)
    dtype, close = torch.bfloat16, {"rtol": 0.05, "atol": 0.1}
    whole, adapter = load_whole(run / "model", CPU, dtype), LowRankAdapter.beside(run / "model")
    model = fp.load(packed)
    with torch.no_grad():
        for name in adapter.operators:
            module = model.get_submodule(name)
            assert isinstance(module, SparseLinear)
            assert torch.equal(module.weight, whole.get_submodule(name).weight)
            a, b = (adapter.factors[f"{name}.lora_{part}.weight"] for part in "AB")
            x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
            alone = SparseLinear(module.operator, module.bias)
            torch.testing.assert_close(module(x), alone(x) + (x @ a.T) @ b.T, **close)
        expected = whole(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected, **close)
        model.save_pretrained(tmp_path / "saved")
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
        for other in (fp.load(packed, packed=False), load_whole(packed, CPU, dtype), saved):
            assert torch.equal(other(tokens()).logits, expected)
        base = transformers.AutoModel.from_pretrained(packed, dtype=dtype)
        assert torch.equal(base(tokens()).last_hidden_state, saved.base_model(tokens()).last_hidden_state)
    again = fp.unpack(packed, tmp_path / "again")
    before, after = Checkpoint.open(run / "model"), Checkpoint.open(again)
    assert sorted(before.names()) == sorted(after.names())
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert (again / "fistapruner.json").read_bytes() == (run / "model" / "fistapruner.json").read_bytes()
    found = [
        fp.evaluate(folder, "python", seqlen=16, windows=2, against=tmp_path / "dense", dtype="float32")
        for folder in (run / "model", packed, again)
    ]
    assert len({(each.perplexity, each.divergence, each.low_rank) for each in found}) == 1
    shutil.rmtree(packed)
    fp.pack(again, packed)
    assert PackedCheckpoint(packed).low_rank is not None


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values_are_those_of_the_sparse_part_alone(run: Path, tmp_path: Path, values: str) -> None:
    """A weight that is loaded takes the place of both parts."""
    fp.pack(run / "model", tmp_path / "packed", values=values)
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "packed" / adapter).read_bytes() == results(run)[adapter]
    model, timed = fp.load(tmp_path / "packed"), load_variant(Variant("packed", tmp_path / "packed", "bfloat16"))
    with torch.no_grad():
        expected = summed(run)(tokens()).logits.flatten()
        for each in (model, timed):
            found = each(tokens()).logits.float().flatten()
            assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.98
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert "low_rank=4" in str(module)
    module.load_state_dict({"weight": 2 * module.weight})
    assert "low_rank" not in str(module)
    x = torch.ones(1, module.in_features, dtype=module.weight.dtype)
    torch.testing.assert_close(module(x), x @ module.weight.T, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_packed_model_without_its_adapter_or_with_another_is_refused(
    run: Path, tmp_path: Path, cli: tiny.Cli, lost: str
) -> None:
    packed = tmp_path / "packed"
    fp.pack(run / "model", packed, values="bf16")
    file = packed / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FistaPrunerError, match="is damaged, or is the low-rank part of another model"):
        fp.load(packed)
    (packed / "adapter" / lost).unlink()
    for verb, *more in (["evaluate"], ["unpack", tmp_path / "out"], ["inspect"]):
        assert f"{packed / 'adapter' / lost}, is gone" in cli(verb, packed, *more, status=2).err
    adapter = LowRankAdapter.beside(run / "model")
    with pytest.raises(FistaPrunerError, match=r"of another model: .*mlp\.down_proj has factors .* has \[32, 64\]"):
        adapter.add_to(tiny.build("llama", intermediate_size=64, num_hidden_layers=2))


def counted(variants: list[Variant], **_: Any) -> list[Speed]:
    """Measure only the bytes of each form."""
    setting = {"batch": 1, "prompt": 4, "tokens": 3, "runs": 1, "threads": 1, "device": "cpu", "peak_memory": 1}
    times: tuple[Any, ...] = (1.0, (1.0, 1.0), 1.0, (1.0, 1.0))
    return [Speed(one.name, *times, file_size=weight_bytes(one.folder), **setting) for one in variants]


def test_bench_counts_the_bytes_of_both_parts(tmp_path: Path) -> None:
    run, packed = packed_run(tmp_path, "llama")
    report, factors = fp.pack(run / "model", tmp_path / "again"), LowRankAdapter.beside(run / "model")
    adapter = sum(path.stat().st_size for path in (run / "adapter").iterdir())
    for folder in (run / "model", packed):
        sizes = {one.variant: one.file_size for one in bench(folder, measure=counted)}
        assert list(sizes) == ["dense float32", "dense bfloat16", "packed", "packed int8"]
        assert sizes["packed"] == (packed / "model.safetensors").stat().st_size + adapter
    fp.bench(run, measure=counted)
    assert load_run(run).totals.compressed_bytes == sizes["packed"]
    assert report.low_rank == factors.nbytes
    assert report.packed_total == report.dense_total - report.dense_operators + report.packed_operators
    files = PackedCheckpoint(packed).checkpoint.files.values()
    assert (
        report.packed_total == sum(entry.nbytes for file in files for entry in file.entries.values()) + factors.nbytes
    )


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"low_rank": 17}, "k_proj is 16 x 32: its low-rank part has a rank from 0 to 16, not 17"),
        ("llama", {"structure": "25%"}, "low_rank 4 needs structure.remove none"),
        ("qwen2_moe", {}, r"no LoRA for .*experts.*: leave such operators dense"),
    ],
)
def test_what_cannot_have_a_low_rank_part_is_refused_before_any_work(
    tmp_path: Path, architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(FistaPrunerError, match=message):
        fp.prune(
            tiny.save(architecture, tmp_path / "dense"), tmp_path / "run", **{**SMALL, "low_rank": RANK, **settings}
        )
    assert not (tmp_path / "run" / "run.json").exists()

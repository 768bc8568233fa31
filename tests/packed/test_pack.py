"""Packed folders: there and back, what the command line prints, what is refused, what a killed writer leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned import pickle_weights, save_pruned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from fistapruner import FistaPrunerError, load, pack, prune, unpack
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.source import ModelSource
from fistapruner.packed.checkpoint import PackedCheckpoint
from fistapruner.packed.pack import NoPackedFormError
from fistapruner.runtime.files import sha256_file
from fistapruner.runtime.show import size
from tiny import VOCABULARY


def same_tensors(one: Path, other: Path) -> None:
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        a, b = first.read(name), second.read(name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


def test_there_and_back(tmp_path, cli):
    """To the byte, as ``cmp`` compares: -0.0 aside, in the order of the tensors, too."""
    sparsity = "60%"
    source = save_pruned(tmp_path / "m", sparsity=sparsity, shard="40KB")
    for path in source.glob("*.safetensors"):
        tensors = {name: torch.where(tensor == 0, 0.0, tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    assert len(Checkpoint.open(source).files) > 1
    (source / "fistapruner.json").write_text(json.dumps({"recipe": {"sparsity": sparsity}, "version": "1"}))
    printed = cli("pack", source, tmp_path / "p").out
    report = pack(source, tmp_path / "q")
    assert report.operators == 21
    assert str(report) in printed
    assert str(report) in (tmp_path / "p" / "README.md").read_text()
    assert f"{size(report.dense_total)} -> {size(report.packed_total)} (" in str(report)
    for path in (tmp_path / "p").iterdir():
        assert path.read_bytes() == (tmp_path / "q" / path.name).read_bytes()
    assert PackedCheckpoint(tmp_path / "p").record["recipe"]["sparsity"] == sparsity
    cli("unpack", tmp_path / "p", tmp_path / "u")
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "u" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "u" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "u" / "fistapruner.json").exists()
    assert (tmp_path / "u" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "exists already" in cli("pack", source, tmp_path / "p", status=2).err


@pytest.mark.parametrize("tied", [True, False])
def test_int8_rounds_operators_embedding_and_head(tmp_path, tied):
    source = save_pruned(tmp_path / "m", hidden_size=128, tie_word_embeddings=tied)
    report = pack(source, tmp_path / "p", values="int8")
    first, second = Checkpoint.open(source), Checkpoint.open(unpack(tmp_path / "p", tmp_path / "u"))
    specs = PackedCheckpoint(tmp_path / "p").specs
    tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name for name, spec in specs.items() if spec.dense} == tables
    assert report.operators == len(specs) - len(tables) == 21
    assert report.tables[0] == sum(first.entry(name).nbytes for name in tables) == len(tables) * VOCABULARY * 256
    assert f"embedding and head in int8: {size(report.tables[0])} -> {size(report.tables[1])} (" in str(report)
    assert report.packed_total == Checkpoint.open(tmp_path / "p").nbytes
    for name in first.names():
        a, b = first.read(name).float(), second.read(name).float()
        bound = a.abs().amax(-1, keepdim=True) * (0.51 / 127 + 2**-8) if name in specs else 0
        assert bool(((a - b).abs() <= bound).all())


def test_a_writer_that_is_stopped_leaves_nothing(tmp_path):
    source = save_pruned(tmp_path / "m")

    def stop(what, done, total):
        if what == "operators packed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "p", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_verbs_that_need_a_checkpoint_say_how_to_make_one(tmp_path, cli):
    pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    pairs, out = tiny.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out.gguf"
    more = {"compare": ["--methods", "wanda", "--out", out], "align": ["--data", pairs, "--out", out], "export": [out]}
    before = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for verb in ("prune", "compare", "recover", "align", "export"):
        said = cli(verb, tmp_path / "p", *more.get(verb, ["--out", out]), status=2).err
        assert f"'fistapruner unpack {tmp_path / 'p'} DIR'" in said.splitlines()[-1]
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == before


def test_pickles_are_packed_where_they_are_allowed(tmp_path, cli):
    source = save_pruned(tmp_path / "m", shard="40KB")
    pack(source, tmp_path / "expected")
    shutil.copytree(source, tmp_path / "legacy")
    command = ["pack", pickle_weights(tmp_path / "legacy"), tmp_path / "p"]
    assert "or trust them with --allow-pickle" in cli(*command, status=2).err
    cli(*command, "--allow-pickle")
    assert list(Checkpoint.open(tmp_path / "p").files) == list(Checkpoint.open(source).files)
    same_tensors(tmp_path / "expected", tmp_path / "p")
    same_tensors(source, unpack(tmp_path / "p", tmp_path / "u"))


def claim(folder: Path, operators: dict[str, str]) -> None:
    """Write the record of a pruned checkpoint: sparsities by names."""
    claims = {name: {"sparsity": sparsity} for name, sparsity in operators.items()}
    (folder / "fistapruner.json").write_text(json.dumps({"operators": claims}))


def test_only_operators_with_recorded_zeros_are_packed(tmp_path):
    """The others are not rounded."""
    source = save_pruned(tmp_path / "m", dtype=torch.float32)
    names = [name for name in Checkpoint.open(source).names() if "_proj" in name]
    claim(source, {name: "0%" if "self_attn" in name else "50%" for name in names[3:]})
    pruned = {name for name in names[3:] if "self_attn" not in name}
    assert pack(source, tmp_path / "p", values="int8").operators == len(pruned) > 0
    assert {name for name, spec in PackedCheckpoint(tmp_path / "p").specs.items() if not spec.dense} == pruned
    before, after = Checkpoint.open(source), Checkpoint.open(unpack(tmp_path / "p", tmp_path / "u"))
    assert all(torch.equal(before.read(name), after.read(name)) for name in names if name not in pruned)
    claim(source, dict.fromkeys(names, "0%"))
    with pytest.raises(FistaPrunerError, match="no pruned operators: its record claims no zeros"):
        pack(source, tmp_path / "q", values="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_values_than_bf16_are_packed_rounded_only(tmp_path, dtype):
    source = save_pruned(tmp_path / "m", dtype=dtype)
    for values in ("same", "int8") if dtype is torch.float64 else ("same",):
        with pytest.raises(NoPackedFormError, match=rf"m: model.*weight is {str(dtype)[6:]}; .*give --values bf16"):
            pack(source, tmp_path / "p", values=values)
    assert pack(source, tmp_path / "p", values="bf16").operators == 21
    unpack(tmp_path / "p", tmp_path / "u")
    first, second = Checkpoint.open(source), Checkpoint.open(tmp_path / "u")
    for name in PackedCheckpoint(tmp_path / "p").specs:
        assert torch.equal(second.read(name), first.read(name).bfloat16())
    with pytest.raises(FistaPrunerError, match="no pruned operators"):
        pack(save_pruned(tmp_path / "d", sparsity="0%", dtype=dtype), tmp_path / "q")


def test_licence_and_base_model_are_kept(tmp_path):
    source = save_pruned(tmp_path / "m", hidden_size=64)
    origin = {"license": "other", "license_name": "own", "license_link": "LICENSE", "base_model": ["owner/name"]}
    (source / "README.md").write_text(f"---\n{json.dumps(origin)}\n---\n")
    pack(source, tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "u")
    for folder in ("p", "u"):
        card = ModelSource(tmp_path / folder).card()
        assert card.items() >= {**origin, "library_name": "transformers"}.items(), folder
    (source / "README.md").unlink()
    pack(source, tmp_path / "p2")
    assert "README.md" not in {path.name for path in unpack(tmp_path / "p2", tmp_path / "u2").iterdir()}


def test_an_operator_that_does_not_fit_leaves_nothing(tmp_path):
    """Its checksum is right; the last one is damaged, when others were written."""
    pack(save_pruned(tmp_path / "m", sparsity="60%"), tmp_path / "p")
    path, name = tmp_path / "p" / "model.safetensors", list(PackedCheckpoint(tmp_path / "p").specs)[-1]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = load_file(path)
    changed[f"{name}.mask"][0, 0] ^= 1
    save_file(changed, path, metadata)
    record = json.loads((tmp_path / "p" / "packed.json").read_text())
    record["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (tmp_path / "p" / "packed.json").write_text(json.dumps(record))
    with pytest.raises(FistaPrunerError, match=rf"{name}.* has "):
        unpack(tmp_path / "p", tmp_path / "u")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "p"]


def test_what_is_refused(tmp_path):
    source, dense = save_pruned(tmp_path / "m"), save_pruned(tmp_path / "d", sparsity="0%")
    few, packed = save_pruned(tmp_path / "f", sparsity="5%"), tmp_path / "p"
    claim(few, {name: "5%" for name in Checkpoint.open(few).names() if "_proj" in name})
    pack(source, packed)
    for given, values, said in (
        (dense, "same", "no pruned operators"),
        (few, "same", "no operator becomes smaller without its zeros: a mask takes one bit"),
        (source, "int4", "int4"),
        (packed, "same", "is packed: unpack it first"),
    ):
        with pytest.raises(FistaPrunerError, match=said):
            pack(given, tmp_path / "q", values=values)
    with pytest.raises(FistaPrunerError, match="not a packed checkpoint"):
        unpack(source, tmp_path / "u")
    record = json.loads((packed / "packed.json").read_text())
    (packed / "packed.json").write_text(json.dumps({**record, "version": 2}))
    for reader in (lambda: unpack(packed, tmp_path / "u"), lambda: load(packed)):
        with pytest.raises(FistaPrunerError, match=r"format version 2, and this program reads version 3: pack"):
            reader()
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not valid JSON"),
        ('{"operators": [1]}', "no mapping of operators"),
        ('{"operators": {"h.9.mlp": {"sparsity": "2:4"}}}', "is of another checkpoint: h.9.mlp"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, record, message):
    source = save_pruned(tmp_path / "m")
    (source / "fistapruner.json").write_text(record)
    with pytest.raises(FistaPrunerError, match=message):
        pack(source, tmp_path / "p")
    (source / "fistapruner.json").unlink()
    assert pack(source, tmp_path / "p").operators == 21


def run_of(architecture: str, folder: Path, **settings: Any) -> Path:
    """The model of a pruning run."""
    tiny.prune(folder, architecture, {"dtype": torch.bfloat16}, method="wanda", **{"sparsity": "2:4", **settings})
    return folder / "run" / "model"


def test_the_experts_of_a_run_are_packed(tmp_path: Path) -> None:
    model = run_of("mixtral", tmp_path)
    report = pack(model, tmp_path / "p")
    packed = PackedCheckpoint(tmp_path / "p")
    claims = packed.record["operators"]
    assert packed.specs.keys() == claims.keys()
    assert report.operators == len(claims) == 2 * (4 + 3 * 4)
    assert not inspect_checkpoint(tmp_path / "p").violations
    unpack(tmp_path / "p", tmp_path / "u")
    assert (tmp_path / "u" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_experts_in_one_tensor_are_refused_before_any_work_and_the_others_packed(tmp_path: Path) -> None:
    model = run_of("gpt_oss", tmp_path / "all")
    with pytest.raises(FistaPrunerError, match=r"experts\.gate_up_proj is one tensor of all experts.*--set ignore="):
        pack(model, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    model = run_of("gpt_oss", tmp_path / "rest", ignore=["re:experts"])
    assert pack(model, tmp_path / "p").operators == 2 * 4
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
        for loaded in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=torch.float32),
            load(tmp_path / "p", dtype=torch.float32),
        ):
            torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_run_is_taken_where_its_model_is(tmp_path: Path, cli: tiny.Cli) -> None:
    run = run_of("llama", tmp_path).parent
    assert str(pack(run, tmp_path / "p")) == str(pack(run / "model", tmp_path / "q"))
    again = prune(run, tmp_path / "again", method="wanda", sparsity="2:4", calibration={"samples": 2, "seqlen": 16})
    assert again.status == "finished"
    assert len(load(tmp_path / "p").model.layers) == 3
    shutil.rmtree(run / "model")
    (run / "report.json").unlink()
    for command in (["pack", run], ["prune", run, "--out"]):
        assert f"fistapruner resume {run}'" in cli(*command, tmp_path / "new", status=2).err

"""A finished model knows its lineage: the dense model, then every run, with command, settings and figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import fistapruner as fp
import tiny
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.record import read_pruning_record
from fistapruner.models.source import ModelSource
from fistapruner.runs.records import load_run

CALIBRATION: dict[str, Any] = {"source": "python", "samples": 2, "seqlen": 16}
CARD = "---\nlicense: apache-2.0\ntags: [a]\n---\n\n# The dense model\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DENSE = f"models--a--b/snapshots/{COMMIT}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model as the hub's cache holds it, a run of it, and a run of the run's model."""
    folder = tmp_path_factory.mktemp("lineage")
    dense = tiny.save("llama", folder / DENSE, num_hidden_layers=2)
    (dense / "README.md").write_text(CARD)
    settings: dict[str, Any] = {"method": "magnitude", "sparsity": "30%", "calibration": CALIBRATION}
    fp.prune(dense, folder / "once", command="first command", **settings)
    fp.prune(folder / "once" / "model", folder / "twice", method="wanda", calibration=CALIBRATION)
    return folder


def stored(run: Path) -> dict[str, Any]:
    """The lineage in a finished model's own record."""
    found: dict[str, Any] = json.loads((run / "model" / "fistapruner.json").read_text())["lineage"]
    return found


def test_every_run_adds_a_stage(runs: Path) -> None:
    once, twice = stored(runs / "once"), stored(runs / "twice")
    assert [stage["settings"]["sparsity"] for stage in twice["stages"]] == ["30%", "50%"]
    assert twice["stages"][0] == once["stages"][0]
    assert twice["source"] == once["source"]
    first = twice["stages"][0]
    assert (first["kind"], first["command"]) == ("prune", "first command")
    assert first["versions"]["fistapruner"]
    assert first["finished"]
    figures = first["figures"]
    assert figures["operator_zeros"] / figures["operator_weights"] == pytest.approx(0.3, abs=0.01)
    report = load_run(runs / "twice")
    assert report.lineage.model_dump(mode="json") == twice


def test_licence_and_revision_are_those_of_the_dense_model(runs: Path) -> None:
    source = stored(runs / "twice")["source"]
    assert (source["license"], source["revision"]) == ("apache-2.0", COMMIT)
    for run in ("once", "twice"):  # the card of a pruned model hands the licence on
        report = load_run(runs / run)
        assert report.model.license == "apache-2.0"
        assert "license: apache-2.0" in (runs / run / "model" / "README.md").read_text()
    assert load_run(runs / "once").model.revision == COMMIT
    assert load_run(runs / "twice").model.revision is None


@pytest.mark.parametrize(
    "card",
    ["", "license: mit\n", "---\n: [\n---\n", "---\nlicense: [a, b]\n---\n", "---\nlicense: !!bool maybe\n---\n"],
)
def test_a_card_without_a_licence_names_none(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert ModelSource(tmp_path).license() is None
    assert ModelSource(tmp_path / "nowhere").license() is None
    assert ModelSource(tmp_path / "snapshots" / "main").revision() is None


def test_what_is_measured_later_reaches_the_stage(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "twice", tmp_path / "run"))
    assert stored(run)["stages"][-1]["figures"]["perplexity"] is None
    found = fp.evaluate(run, "python", seqlen=16, windows=2)
    first, last = stored(run)["stages"]
    assert last["figures"]["perplexity"]["perplexity"] == found.perplexity.perplexity
    assert last["figures"]["divergence"]["kl"] is not None
    alone = fp.evaluate(runs / DENSE, "python", seqlen=16, windows=2).perplexity
    assert last["figures"]["reference"]["perplexity"] == pytest.approx(alone.perplexity)
    assert alone.perplexity != pytest.approx(found.perplexity.perplexity, rel=0.01)
    assert first["figures"]["perplexity"] is None
    card = (run / "model" / "README.md").read_text()
    assert f"perplexity {found.perplexity.perplexity:.2f}" in card.split("## Lineage")[1]
    assert fp.resume(run).status == "finished"
    assert len(stored(run)["stages"]) == 2


def test_the_dense_model_of_a_second_run_is_that_before_the_first(runs: Path, tmp_path: Path) -> None:
    """Of every verb: figures are against it and training goes towards it, also where the first run is gone."""
    dense, data = runs / DENSE, {"source": "python", "seqlen": 16}
    settings: dict[str, Any] = {"method": "magnitude", "calibration": CALIBRATION}
    again = fp.prune(runs / "once" / "model", tmp_path / "again", evaluate="python", evaluate_windows=2, **settings)
    assert again.evaluations[0].against == str(dense)
    assert fp.evaluate(runs / "twice", "python", seqlen=16, windows=2).against == str(dense)
    recovered = fp.recover(tmp_path / "again", tmp_path / "out", data=data, steps=1, evaluate=None)
    assert recovered.recovery.loss == "kl"
    changed = shutil.copytree(dense, tmp_path / "changed")
    fp.prune(changed, tmp_path / "first", **settings)
    fp.prune(tmp_path / "first" / "model", tmp_path / "second", **settings)
    tiny.save("llama", changed, num_hidden_layers=2, seed=1)
    changed_file = r"changed/model\.safetensors has changed: its checksum was .*: name .* pruned with --dense"
    with pytest.raises(fp.FistaPrunerError, match=changed_file):  # known by the first run, not by the second
        fp.recover(tmp_path / "second", tmp_path / "no", data=data, steps=1)
    shutil.rmtree(changed)
    told = tiny.Said()
    measured = {"evaluate": "python", "evaluate_windows": 2, "listener": told}
    last = fp.prune(tmp_path / "first" / "model", tmp_path / "third", **measured, **settings)
    assert last.evaluations[0].perplexity.windows == 2
    assert last.evaluations[0].reference is None
    assert any(f"no figures of the dense model, which is not at {changed}" in line for line in told.sentences)
    trained = fp.recover(tmp_path / "first", tmp_path / "text", data=data, steps=1, evaluate=None)
    (warning,) = [each for each in trained.warnings if "(ce)" in each]
    assert warning.startswith(f"the dense model is not found, which was {changed}: ")


def test_what_a_second_run_leaves_alone_is_still_claimed(runs: Path, tmp_path: Path) -> None:
    """And nothing else: zeros of tensors that lost channels are counted again, and lost patterns go."""
    dense = runs / DENSE
    settings: dict[str, Any] = {"method": "magnitude", "calibration": CALIBRATION}
    small: dict[str, Any] = {"calibration": CALIBRATION}
    fp.prune(dense, tmp_path / "a", sparsity="2:4", **settings)
    report = fp.prune(tmp_path / "a" / "model", tmp_path / "b", structure="mlp=16", **small)
    found = inspect_checkpoint(tmp_path / "b")
    assert found.violations == []
    assert sum(operator.claim is not None for operator in found.operators) == 14
    assert len(found.pruned) == 14
    claims = {operator.name.removeprefix("model.layers.0."): operator.claim for operator in found.operators[:7]}
    down = found.operators[0]
    share = f"{down.zeros / down.weights:.4%}"
    assert claims.pop("mlp.down_proj.weight") == share  # it lost inputs
    assert set(claims.values()) == {"2:4"}
    assert found.operators[1].shape == (16, 32)  # gate_proj
    assert report.totals.model_zeros == found.zeros
    # A third run prunes a part, and a rule leaves another dense: the rest is as the two before it claim.
    report = fp.prune(
        tmp_path / "b" / "model",
        tmp_path / "c",
        sparsity="70%",
        ignore=["re:mlp"],
        allocation={"o_proj": "0%"},
        **settings,
    )
    found = inspect_checkpoint(tmp_path / "c")
    assert found.violations == []
    assert [operator.claim for operator in found.operators[:7]] == [share, "2:4", "2:4", "70%", "2:4", "70%", "70%"]
    assert [width[1:] for width in found.widths] == [("MLP channels", 48, 16)] * 2
    assert report.totals.model_zeros == found.zeros
    # A claim that the input itself did not keep is not handed on.
    refilled = Path(shutil.copytree(tmp_path / "a" / "model", tmp_path / "refilled"))
    tensors = load_file(refilled / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:, :] = 1.0
    tensors["model.layers.0.mlp.gate_proj.weight"][:, ::4] = 1.0
    save_file(tensors, refilled / "model.safetensors", metadata={"format": "pt"})
    fp.prune(refilled, tmp_path / "f", sparsity="70%", ignore=["re:mlp"], **settings)
    found = inspect_checkpoint(tmp_path / "f")
    assert found.violations == []
    down, gate, up = found.operators[:3]
    assert (down.claim, gate.claim, up.claim) == ("2:4", f"{gate.sparsity:.4%}", None)
    # A share is counted again, and the widths before are those before the first run.
    fp.prune(dense, tmp_path / "d", structure="mlp=32", sparsity="50%", method="wanda", **small)
    tensors = load_file(tmp_path / "d" / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"].zero_()
    save_file(tensors, tmp_path / "d" / "model" / "model.safetensors", metadata={"format": "pt"})
    fp.prune(tmp_path / "d" / "model", tmp_path / "e", structure="mlp=12", **small)
    found = inspect_checkpoint(tmp_path / "e")
    assert found.violations == []
    gate = found.operators[1]
    assert gate.claim == f"{gate.zeros / gate.weights:.4%}"
    emptied = found.operators[8]
    assert (emptied.sparsity, emptied.claim) == (1, "99.9999%")  # which a third run can read
    assert [width[1:] for width in found.widths] == [("MLP channels", 48, 12)] * 2


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe"])
def test_experts_that_stay_keep_their_claims(tmp_path: Path, architecture: str) -> None:
    """Under the numbers that they have now."""
    folder = tiny.save(architecture, tmp_path / "model")
    settings: dict[str, Any] = {"sparsity": "2:4", "permutation": "channels", "calibration": CALIBRATION}
    fp.prune(folder, tmp_path / "a", method="magnitude", **settings)
    report = fp.prune(tmp_path / "a" / "model", tmp_path / "b", structure="experts=1", calibration=CALIBRATION)
    assert any(layer.removals[0].kept != [0, 1, 2] for layer in report.layers)  # some have moved
    found = inspect_checkpoint(tmp_path / "b")
    assert found.violations == []
    experts = [operator for operator in found.operators if "expert" in operator.name]
    assert len(experts) == 2 * 3 * (2 if architecture == "gpt_oss" else 3)
    assert {operator.claim for operator in experts} == {"2:4"}
    before, after = (set(read_pruning_record(tmp_path / run / "model")["permuted"]) for run in "ab")
    assert any(".experts." in name for name in before) == (architecture == "qwen3_moe")
    assert after == {name for name in before if ".experts.3." not in name}  # three stay
    if architecture == "qwen3_moe":
        claims = read_pruning_record(tmp_path / "b" / "model")["operators"]
        assert all(claim["operator"] == name.removesuffix(".weight") for name, claim in claims.items())


def test_claims_of_weights_that_are_stored_inputs_first_stay(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path / "model", num_hidden_layers=1)
    for model, out, settings in (
        (folder, "a", {"sparsity": "2:4"}),
        (tmp_path / "a" / "model", "b", {"ignore": ["re:mlp"]}),
    ):
        fp.prune(model, tmp_path / out, method="magnitude", calibration=CALIBRATION, **settings)
    records = [read_pruning_record(tmp_path / run / "model")["operators"] for run in "ab"]
    kept = [name for name in records[0] if ".mlp." in name]
    assert len(kept) == 2
    assert all(records[1][name] == records[0][name] for name in kept)


def test_inspect_and_card_show_the_chain(runs: Path, cli: tiny.Cli) -> None:
    shown = cli("inspect", runs / "twice", "--quiet").out
    chain = (f"{COMMIT} (LlamaForCausalLM", "pruned to 30% with magnitude", "pruned to 50% with wanda")
    assert (places := [shown.index(words) for words in chain]) == sorted(places)
    assert json.loads(cli("inspect", runs / "twice", "--json").out)["lineage"] == stored(runs / "twice")
    card = (runs / "twice" / "model" / "README.md").read_text()
    assert card.index("→ pruned to 30% with magnitude") < card.index("→ pruned to 50% with wanda")
    assert str(runs) not in card.split("## Lineage")[1]  # cards are published


@pytest.mark.parametrize("record", ['{"lineage": [', '{"lineage": {"stages": 3}}'])
def test_a_lineage_that_cannot_be_read_is_refused(runs: Path, record: str, tmp_path: Path) -> None:
    dense = runs / DENSE
    folder = Path(shutil.copytree(dense, tmp_path / "dense"))
    (folder / "fistapruner.json").write_text(record)
    with pytest.raises(fp.FistaPrunerError, match=r"fistapruner\.json"):
        fp.prune(folder, tmp_path / "run", method="magnitude", calibration=CALIBRATION)
    if "[" not in record:
        assert any("lineage that cannot be read" in fault for fault in inspect_checkpoint(folder).violations)

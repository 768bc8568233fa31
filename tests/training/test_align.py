"""Alignment from end to end: every zero kept bit for bit, preferences measured, told in report and lineage."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.safetensors import SafetensorsFile
from fistapruner.runs.records import Report, load_run
from tiny import Bench, tensors

SETTINGS: dict[str, Any] = {"evaluate": None, "pairs_per_step": 4, "rank": 4, "lr": 1e-3}


def align(bench: Bench, out: Path, model: Path | None = None, **settings: Any) -> Report:
    data = {"pairs": str(bench.pairs), **settings.pop("data", {})}
    return fp.align(model or bench.pruned(), out, **{**SETTINGS, "data": data, **settings})


@torch.no_grad()
def of_pairs(run: Path, model: Path, side: str = "test") -> tuple[Tensor, Tensor]:
    """(pairs, 2) log-probabilities and tokens of the answers, by transformers, one window at a time."""
    file = SafetensorsFile(run / "windows.safetensors")
    where = file.read(side).to(torch.bool)
    tokens, marks = file.read("tokens")[where], file.read("marks").to(torch.bool)[where]
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for ids, carries in zip(tokens, marks, strict=True):
        end = int(carries.nonzero().max()) + 1
        logs = whole(ids[None, :end]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:end, None])[:, 0]
        found.append(logs[carries[1:end]].double().sum())
    return torch.stack(found).view(-1, 2), marks.sum(1).view(-1, 2)


CASES = [
    ("llama", "50%", {"parameters": "lora"}),
    ("llama", "2:4", {"parameters": "full", "lr": 0.01}),
    ("gpt2", "2:4", {"parameters": "spp", "lr": 0.1, "loss": "geometric", "weights": "held-out-margin"}),
    ("qwen3_moe", "50%", {"parameters": "lora"}),
    ("gpt_oss", "50%", {"parameters": "full", "lr": 0.01}),
]


@pytest.mark.parametrize(("architecture", "sparsity", "settings"), CASES)
def test_the_result_prefers_the_chosen_answers_and_has_the_zeros(
    bench: Bench, tmp_path: Path, architecture: str, sparsity: str, settings: dict[str, Any]
) -> None:
    """Preferences of dense, pruned and aligned model are what transformers computes of the files."""
    pruned, out = bench.pruned(architecture, sparsity), tmp_path / "out"
    report = align(bench, out, pruned, **{"epochs": 2, **settings})
    before, after = tensors(pruned / "model"), tensors(out / "model")
    operators = inspect_checkpoint(pruned / "model").pruned
    assert operators
    for name in {operator.name.partition("[")[0] for operator in operators}:
        assert torch.equal(after[name] == 0, before[name] == 0)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert {name for name in before if "experts" in name} <= changed
    assert inspect_checkpoint(out / "model").violations == []
    found = report.alignment
    models = {"dense": bench.dense(architecture), "pruned": pruned / "model", "aligned": out / "model"}
    margins = {}
    for name, folder in models.items():
        own, counts = of_pairs(out, folder)
        margins[name] = own[:, 0] - own[:, 1]
        assert found.test[name].accuracy == float((margins[name] > 0).double().mean())
        by_token = own / counts
        assert found.test[name].normalised == float((by_token[:, 0] > by_token[:, 1]).double().mean())
    assert bool((counts[:, 0] != counts[:, 1]).any())
    assert float(margins["aligned"].mean()) > float(margins["pruned"].mean()) + 0.5
    for error in (found.test["pruned"].normalised_error, found.reward_accuracy_error):
        assert 0 <= error <= 0.5
    assert found.chosen_reward_error is not None
    references = {"pruned": 1.0}
    if report.recovery.loss == "geometric":  # in proportion to their mean margin on the held-out pairs
        held_out = {name: of_pairs(out, models[name], "held_out")[0] for name in ("pruned", "dense")}
        sizes = {name: float((own[:, 0] - own[:, 1]).abs().mean()) for name, own in held_out.items()}
        references = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    else:
        assert report.recovery.checks[0].held_out == pytest.approx(math.log(2), abs=1e-6)
    assert found.references == pytest.approx(references)
    moved = 0.1 * (margins["aligned"] - sum(share * margins[name] for name, share in references.items()))
    assert found.margin == pytest.approx(float(moved.mean()), abs=1e-4)
    assert found.reward_accuracy == float((moved > 0).double().mean())
    assert (found.pairs + found.held_out_pairs + found.test_pairs, found.left_out) == (40, 0)
    assert [stage.kind for stage in report.lineage.stages] == ["prune", "align"]


@pytest.mark.parametrize("verb", ["align", "recover"])
def test_a_padding_token_that_the_model_does_not_have(bench: Bench, tmp_path: Path, verb: str) -> None:
    """It was added to the tokenizer alone; windows are padded with the end-of-text token."""
    pruned, out = Path(shutil.copytree(bench.pruned() / "model", tmp_path / "pruned")), tmp_path / "out"
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == tiny.VOCABULARY
    tokenizer.save_pretrained(pruned)
    if verb == "align":
        align(bench, out, pruned, loss="sft", steps=1)
    else:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{n} and", "completion": " so on"}) + "\n" for n in range(20)))
        fp.recover(
            pruned,
            out,
            loss="ce",
            parameters="full",
            data={"source": str(data), "tokens": 200, "seqlen": 40, "held_out": 0.2},
            evaluate=None,
        )
    tokens = SafetensorsFile(out / "windows.safetensors").read("tokens")
    assert bool((tokens[:, -1] == tokenizer.eos_token_id).any())


LOSSES: list[dict[str, Any]] = [
    {"loss": "dpo", "references": "dense"},
    {"loss": "multi-dpo"},
    {"loss": "harmonic"},
    {"loss": "harmonic", "clip": "none"},
    {"loss": "harmonic", "weights": "per-pair"},
    {"loss": "geometric", "weights": "held-out-margin"},
    {"loss": "sft", "beta": 0.2},
    {"loss": "none"},
    {"loss": "dpo", "anchor": 0.3},
    {"loss": "dpo", "optimizer": "mezo", "lr": 1e-3},
]


@pytest.mark.parametrize("settings", LOSSES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_loss_falls(bench: Bench, tmp_path: Path, settings: dict[str, Any]) -> None:
    """And the run has the same bytes where it is made again."""
    report = align(bench, tmp_path / "one", **settings)
    checks = report.recovery.checks
    assert checks[-1].held_out < checks[0].held_out
    expected = {"sft": (), "none": (), "dpo": ("dense",) if "references" in settings else ("pruned",)}
    names = expected.get(settings["loss"], ("pruned", "dense"))
    assert tuple(report.alignment.references) == names
    assert sum(report.alignment.references.values()) == pytest.approx(1.0 if names else 0.0)
    align(bench, tmp_path / "two", **settings)
    one, two = (tiny.weights(tmp_path / name) for name in ("one", "two"))
    assert one == two


def test_a_model_whose_channels_were_removed(bench: Bench, tmp_path: Path) -> None:
    """Nothing is masked in it; its operators stay as wide as they are, and all of them are trained."""
    calibration = {"source": str(bench.text), "samples": 2, "seqlen": 16}
    structure = {"remove": {"mlp": 0.25}, "multiple": 4}
    fp.prune(
        bench.dense(), tmp_path / "cut", sparsity="0%", structure=structure, calibration=calibration, evaluate=None
    )
    report = align(bench, tmp_path / "out", tmp_path / "cut")
    before, after = tensors(tmp_path / "cut" / "model"), tensors(tmp_path / "out" / "model")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    operators = [name for name in after if "_proj" in name]
    assert len(operators) > 7
    assert not [name for name in operators if torch.equal(after[name], before[name])]
    assert report.totals.operator_zeros == 0
    assert inspect_checkpoint(tmp_path / "out" / "model").violations == []


def test_of_one_run_to_the_next(bench: Bench, tmp_path: Path, cli: tiny.Cli) -> None:
    """Prune, recover, align, align: each from the run before it, all in the lineage; the verbs read such a run."""
    recovered = tmp_path / "recovered"
    data = {"source": str(bench.text), "seqlen": 16, "tokens": 200}
    fp.recover(bench.pruned(), recovered, evaluate=None, data=data, steps=2)
    align(bench, tmp_path / "aligned", recovered)
    report = align(bench, tmp_path / "again", tmp_path / "aligned", evaluate=str(bench.text))
    assert [stage.kind for stage in report.lineage.stages] == ["prune", "recover", "align", "align"]
    assert report.evaluations[0].reference is not None
    assert report.recovery.before
    with pytest.raises(FistaPrunerError, match="say what to train on with --data"):  # pairs are no text
        fp.recover(tmp_path / "again", tmp_path / "out", evaluate=None)
    verbs = (["status"], ["report"], ["inspect"], ["resume"], ["evaluate", "--data", bench.text])
    said = "".join(cli(verb, tmp_path / "again", *more).out for verb, *more in verbs)
    assert "alignment (lora, dpo" in said
    assert "preference accuracy, %" in said
    card = (tmp_path / "again" / "model" / "README.md").read_text()
    assert "| Preference accuracy, % |" in card
    assert str(tmp_path) not in card.partition("Recipe:")[0]
    page = (tmp_path / "again" / "report.html").read_text()
    assert "Before alignment" in page
    assert load_run(tmp_path / "again").alignment == report.alignment


def test_a_finished_run_is_not_made_again(bench: Bench, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tiny.Said()
    found = align(bench, out, lr=1e-30, steps=1).alignment
    assert found is not None  # an alignment that changed nothing is neither right nor wrong
    assert (found.margin, found.reward_accuracy, found.reward_accuracy_error) == (0.0, 0.5, 0.0)
    align(bench, out, lr=1e-30, steps=1, listener=said)
    assert said.sentences == [f"{out} holds the finished run of this recipe", f"report: {out / 'report.html'}"]
    with pytest.raises(FistaPrunerError, match=r"holds a run with loss = \"dpo\", this one has \"sft\""):
        align(bench, out, lr=1e-30, steps=1, loss="sft")
    with pytest.raises(FistaPrunerError, match="holds a run of 'fistapruner align', not of recover"):
        fp.recover(bench.pruned(), out, evaluate=None)


def test_a_checkpoint_from_elsewhere_needs_the_dense_model_for_some_losses(bench: Bench, tmp_path: Path) -> None:
    """It is measured beside the others where it is known."""
    folder = Path(shutil.copytree(bench.pruned() / "model", tmp_path / "model"))
    (folder / "fistapruner.json").unlink()
    report = align(bench, tmp_path / "out", folder)
    assert set(report.alignment.test) == {"pruned", "aligned"}
    for settings, flag in (({"loss": "harmonic"}, "--loss harmonic"), ({"anchor": 0.1}, "anchor")):
        with pytest.raises(FistaPrunerError, match=f"{flag} needs the dense model"):
            align(bench, tmp_path / "other", folder, **settings)
    report = align(bench, tmp_path / "known", folder, dense=bench.dense(), loss="harmonic", weights="per-pair", steps=2)
    assert set(report.alignment.test) == {"dense", "pruned", "aligned"}
    assert sum(report.alignment.references.values()) == pytest.approx(1.0)
    # References are computed of the pairs that are used.
    used = 2 * SETTINGS["pairs_per_step"] + report.alignment.held_out_pairs + report.alignment.test_pairs
    file = SafetensorsFile(tmp_path / "known" / "references.safetensors")
    assert {int(file.read(name)[:, 0].isfinite().sum()) for name in ("pruned", "dense")} == {used}
    assert used < 40
    assert not (tmp_path / "other").exists() or not [*(tmp_path / "other").glob("run.json")]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"references": "pruned,dense"}, "references pruned,dense: one for the loss dpo"),
        ({"loss": "sft", "references": "dense"}, "and that is sft"),
        ({"data": {"max_length": 5000}}, "data.max_length 5000 is more than"),
        ({"data": {"pairs": "none.jsonl"}}, "is not a .jsonl file that exists"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    bench: Bench, tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(FistaPrunerError) as error:
        align(bench, tmp_path / "out", **settings)
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "references.safetensors").exists()


def test_bad_pairs_are_refused_before_the_model_is_opened(bench: Bench, tmp_path: Path) -> None:
    """Whatever the model is: it does not exist here."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    )
    with pytest.raises(FistaPrunerError, match="line 2: chosen and rejected have to be two different answers"):
        fp.align(tmp_path / "no model", tmp_path / "out", **SETTINGS, data={"pairs": str(path)})
    with pytest.raises(FistaPrunerError, match="say what to train on with --data"):
        fp.align(bench.pruned(), tmp_path / "out", **SETTINGS)


def test_any_models_of_the_same_tokens_are_references(bench: Bench, tmp_path: Path) -> None:
    """MRPO with three references, a run and a folder among them; a model of other tokens is refused."""
    other = tiny.save("gpt2", tmp_path / "other")
    names = (str(bench.pruned("llama", "50%")), "pruned", str(other))
    report = align(bench, tmp_path / "out", loss="harmonic", references=names, weights="per-pair", steps=2)
    folders = [str(bench.pruned("llama", "50%") / "model"), str(other)]
    assert list(report.alignment.references) == ["pruned", *folders]
    file = SafetensorsFile(tmp_path / "out" / "references.safetensors")
    assert not torch.equal(file.read(str(other)), file.read("pruned"))
    assert align(bench, tmp_path / "out", loss="harmonic", references=names, weights="per-pair", steps=2) == report
    strange = tiny.save("llama", tmp_path / "strange", vocab_size=tiny.VOCABULARY + 8)
    with pytest.raises(FistaPrunerError, match=r"references .*strange: its tokens are not those of"):
        align(bench, tmp_path / "refused", loss="multi-dpo", references=("pruned", str(strange)))


def test_a_finished_run_needs_no_dense_model(bench: Bench, tmp_path: Path) -> None:
    dense, out = Path(shutil.copytree(bench.dense(), tmp_path / "dense")), tmp_path / "out"
    begun = align(bench, out, bench.pruned() / "model", dense=dense, steps=1, anchor=0.1)
    assert begun.method.startswith("aligned: lora, dpo + anchor 0.1, ")
    shutil.rmtree(dense)
    assert fp.resume(out).alignment == begun.alignment

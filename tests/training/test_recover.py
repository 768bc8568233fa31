"""Recovery from end to end: every zero kept bit for bit, never worse on held-out text, told in report and lineage."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.cli import main
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.safetensors import SafetensorsFile
from fistapruner.packed.checkpoint import is_packed
from fistapruner.reporting.facts import lineage_lines, summary, training_facts
from fistapruner.reporting.figures import mean_error
from fistapruner.runs.directory import TrainingDirectory
from fistapruner.runs.log import hold
from fistapruner.runs.records import Report, load_run
from tiny import tensors

SEQLEN = 16
SETTINGS: dict[str, Any] = {
    "evaluate": None,
    "steps": 4,
    "windows_per_step": 2,
    "rank": 4,
}


class Bench(tiny.Bench):
    """With a recovery."""

    @cached_property
    def recovered(self) -> Path:
        """A recovery of the pruned Llama, to be copied."""
        recover(self.pruned(), self.folder / "recovered", command="the command")
        return self.folder / "recovered"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("recover"))


def recover(model: Path, out: Path, **settings: Any) -> Report:
    """A short recovery."""
    data = {"seqlen": SEQLEN, "tokens": 300, **settings.pop("data", {})}
    return fp.recover(model, out, **{**SETTINGS, "data": data, **settings})


@torch.no_grad()
def held_out_loss(run: Path, model: Path, dense: Path, task: int = 0) -> float:
    """The divergence of a model from the dense one on the held-out windows of a task, by transformers and torch."""
    file = SafetensorsFile(run / "windows.safetensors")
    tokens = file.read("tokens")[file.read("held_out").to(torch.bool) & (file.read("task") == task)]
    ours, theirs = (
        log_softmax(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[:, :-1], -1)
        for folder in (model, dense)
    )
    return float(kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean())


def assert_only_survivors_changed(pruned: Path, out: Path, dense_model: Path, parameters: str) -> None:
    """Zeros are kept bit for bit, what is not trained is that of the dense model."""
    before, after, dense = (tensors(folder) for folder in (pruned / "model", out / "model", dense_model))
    assert before.keys() == after.keys()
    operators = inspect_checkpoint(pruned / "model").pruned
    assert operators
    for operator in operators:
        name = operator.name
        assert torch.equal(after[name] == 0, before[name] == 0)
        assert parameters == "norms" or not torch.signbit(after[name][after[name] == 0]).any()  # +0.0
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    vectors = {name for name in after if after[name].ndim == 1}
    names = {operator.name for operator in operators}
    assert changed <= (vectors if parameters == "norms" else vectors | names)
    outside = [name for name in after if ".layers." not in name and ".h." not in name]
    assert outside
    assert all(torch.equal(after[name], dense[name]) for name in outside)


CASES = [
    ("llama", "2:4", "lora"),
    ("gpt2", "50%", "full"),
    ("opt", "2:4", "spp"),
    ("gemma2", "50%", "norms"),
    ("qwen3_moe", "2:4", "spp"),
    ("mixtral", "2:4", "lora"),
    ("gpt_oss", "2:4", "lora"),
    ("deepseek_v3", "2:4", "full"),
    ("olmoe", "2:4", "spp"),
]


@pytest.mark.parametrize(("architecture", "sparsity", "parameters"), CASES)
def test_the_written_model_has_the_zeros_and_is_better(
    bench: Bench, tmp_path: Path, architecture: str, sparsity: str, parameters: str
) -> None:
    """On transposed and fused weights (gpt2), with biases (opt), norms around operators (gemma2), and experts.

    Experts are matrices of single ones, or one tensor of all (gpt_oss); routers are not trained.
    """
    pruned, out = bench.pruned(architecture, sparsity), tmp_path / "out"
    rate = {"lr": 0.02} if parameters == "norms" else {}  # at the automatic rate they gain next to nothing
    report = recover(pruned, out, parameters=parameters, **rate)
    before, after = (tensors(folder) for folder in (pruned / "model", out / "model"))
    experts = {name for name in before if ".experts." in name and not name.endswith("bias")}
    if not experts:
        assert_only_survivors_changed(pruned, out, bench.dense(architecture), parameters)
    whole = {operator.name for operator in inspect_checkpoint(pruned / "model").pruned if "[" not in operator.name}
    for name in whole | experts if experts else ():
        assert torch.equal(after[name] == 0, before[name] == 0), name
        changed = (after[name] != before[name]).flatten(1).any(1)
        assert bool(changed.any()), name
        assert len(changed) > 4 or bool(changed.all()), name  # of a tensor of all experts, every one
    routers = [name for name in before if "router" in name or name.endswith(".gate.weight")]
    assert bool(routers) == bool(experts)
    assert all(torch.equal(after[name], before[name]) for name in routers)
    assert report.stacked_experts == (architecture == "gpt_oss")
    # Never worse on the held-out windows, by another implementation of model and loss.
    checks = report.recovery.checks
    losses = [held_out_loss(out, model / "model", bench.dense(architecture)) for model in (pruned, out)]
    assert losses[1] < losses[0]
    assert checks[0].held_out == pytest.approx(losses[0], rel=1e-4)
    assert min(check.held_out for check in checks) == pytest.approx(losses[1], rel=1e-4)
    operators = 0 if parameters == "norms" else len(report.operators)
    assert report.recovery.operators == operators
    (trained,) = [fact.after for fact in training_facts(report) if fact.label == "Trained"]
    assert (f"of {operators} operators" in trained) == (operators > 0)
    assert not inspect_checkpoint(out / "model").violations
    assert main(["inspect", str(out / "model")]) == 0


FORMS = ["lora", "full", "spp", "norms"]


@pytest.mark.parametrize("number", range(len(tiny.ARCHITECTURES)), ids=list(tiny.ARCHITECTURES))
def test_every_architecture_keeps_its_zeros(bench: Bench, tmp_path: Path, number: int) -> None:
    """In either dtype, of either pattern, in every form."""
    architecture, parameters = list(tiny.ARCHITECTURES)[number], FORMS[number % len(FORMS)]
    changes = {"dtype": [torch.bfloat16, torch.float32][number % 2]}
    pruned, out = bench.pruned(architecture, ["50%", "2:4"][number // 2 % 2], **changes), tmp_path / "out"
    settings = {"rank": 2, "steps": 2}
    # Two steps of the automatic rate may change nothing in bf16, or gain no more than rounding.
    settings["lr"] = 2e-3 if parameters == "full" else 0.02
    report = recover(pruned, out, parameters=parameters, **settings)
    assert_only_survivors_changed(pruned, out, bench.dense(architecture, **changes), parameters)
    assert {tensor.dtype for tensor in tensors(out / "model").values()} == set(changes.values())
    assert report.recovery.steps == 2
    assert not inspect_checkpoint(out / "model").violations


def test_operators_that_were_left_dense_are_not_trained(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those with patterns of their own keep them, packed too."""
    calibration = {"source": str(bench.text), "samples": 2, "seqlen": SEQLEN}
    allocation = {"re:mlp": "0%", "q_proj": "1:4"}
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    settings = {"method": "magnitude", "sparsity": "2:4", "allocation": allocation, "calibration": calibration}
    made = fp.prune(bench.dense(), pruned, **settings)
    assert main(["inspect", str(pruned), "--quiet"]) == 0
    assert "pruned operators: 8 of 14" in capsys.readouterr().out
    report = recover(pruned, out, parameters="full")
    assert report.recovery.operators == 8
    assert report.recovery.trained == 6144 - 3584 + 4 * 32  # survivors, and two norms of every layer
    assert {(entry.name[-6:], entry.sparsity, entry.zeros / math.prod(entry.shape)) for entry in report.operators} == {
        ("q_proj", "1:4", 0.75),
        *((f"{name}_proj", "2:4", 0.5) for name in "kvo"),
    }
    before, after = (tensors(run / "model") for run in (pruned, out))
    for name in before:
        assert before[name].ndim < 2 or torch.equal(after[name], before[name]) == ("self_attn" not in name), name
    assert not inspect_checkpoint(out / "model").violations
    # Shares of zeros say in whose weights they are; errors are of operators that were pruned.
    assert made.totals.operator_zeros == report.totals.operator_zeros == made.totals.model_zeros
    assert "weights of the operators are zero" in summary(made, pruned)
    assert "weights of the pruned operators are zero" in summary(report, out)
    assert ["zeros in its operators" in line for line in lineage_lines(report.lineage)] == [False, True, False]
    errors = [entry.relative_error for entry in made.operators if entry.sparsity != "0%"]
    assert made.relative_errors == errors
    assert mean_error(made.layers[0]) == pytest.approx(sum(errors[:4]) / 4)
    assert "over 8 operators" in summary(made, pruned)


def test_the_report_tells_what_was_trained_and_the_lineage_where_the_model_comes_from(bench: Bench) -> None:
    run = bench.recovered
    report = load_run(run)
    assert (report.kind, report.status, report.warnings) == ("recover", "finished", [])
    found = report.recovery
    assert (found.parameters, found.optimizer, found.loss) == ("lora", "adamw", "kl")
    assert (found.steps, found.asked_steps, found.operators) == (4, 4, 14)
    assert found.tokens == 4 * 2 * (SEQLEN - 1)  # the first token of a window is not predicted
    assert [check.step for check in found.checks] == [0, 1, 2, 3, 4]
    assert found.kept_step == min(found.checks, key=lambda check: check.held_out).step
    assert [step for step, _ in found.curve] == [1, 2, 3, 4]
    file = SafetensorsFile(run / "windows.safetensors")
    assert int(file.read("held_out").sum()) == found.held_out_windows
    assert len(file.read("held_out")) == found.windows + found.held_out_windows
    before, after = tensors(bench.pruned() / "model"), tensors(run / "model")
    names = [operator.name for operator in inspect_checkpoint(run / "model").pruned]
    survivors = sum(int((before[name] != 0).sum()) for name in names)
    assert found.changed == sum(int((after[name] != before[name]).sum()) for name in names) / survivors
    norms = [float((after[name] - before[name]).norm() / before[name].norm()) for name in names]
    assert found.change == pytest.approx(max(norms))
    assert [layer.name for layer in report.layers] == ["model.layers.0", "model.layers.1"]
    record = json.loads((run / "model" / "fistapruner.json").read_text())
    assert [stage["kind"] for stage in record["lineage"]["stages"]] == ["prune", "recover"]
    assert record["lineage"]["source"]["source"] == str(bench.dense())
    assert record["lineage"]["stages"][1]["command"] == "the command"
    assert report.lineage.model_dump(mode="json") == record["lineage"]
    assert record["operators"] == json.loads((bench.pruned() / "model" / "fistapruner.json").read_text())["operators"]


def test_a_recovered_run_is_recovered_again(bench: Bench, tmp_path: Path) -> None:
    """The dense model and the text are those of the chain's first run."""
    report = recover(bench.recovered, tmp_path / "again", parameters="norms")
    assert report.recovery.loss == "kl"
    first = load_run(bench.recovered).recovery
    assert report.recovery.checks[0].held_out == pytest.approx(min(check.held_out for check in first.checks), rel=1e-5)
    record = json.loads((tmp_path / "again" / "model" / "fistapruner.json").read_text())
    assert [stage["kind"] for stage in record["lineage"]["stages"]] == ["prune", "recover", "recover"]
    assert not inspect_checkpoint(tmp_path / "again" / "model").violations


def test_a_plain_checkpoint_with_zeros_is_recovered(bench: Bench, tmp_path: Path) -> None:
    """Somebody else's: no record, so the zeros themselves say which operators are pruned."""
    plain = Path(shutil.copytree(bench.pruned() / "model", tmp_path / "plain"))
    record = (plain / "fistapruner.json").read_text()
    (plain / "fistapruner.json").unlink()
    report = recover(plain, tmp_path / "out", dense=bench.dense(), data={"source": str(bench.text)})
    before, after = tensors(plain), tensors(tmp_path / "out" / "model")
    assert all(torch.equal(after[name] == 0, before[name] == 0) for name in before if before[name].ndim == 2)
    assert report.recovery.operators == 14
    assert tiny.weights(tmp_path / "out") == tiny.weights(bench.recovered)
    for out, why in (("text only", "not known"), ("of a dense model elsewhere", f"not found, which was {tmp_path}")):
        without = recover(plain, tmp_path / out, data={"source": str(bench.text)})
        assert without.recovery.loss == "ce"
        assert any(warning.startswith(f"the dense model is {why}") for warning in without.warnings)
        (plain / "fistapruner.json").write_text(record.replace(str(bench.dense()), str(tmp_path / "nowhere")))


def test_the_text_to_evaluate_on_is_that_of_the_run_or_python(bench: Bench, tmp_path: Path) -> None:
    """As the input was evaluated; a checkpoint that is of no run as prune evaluates by default."""
    settings = {"evaluate": "auto", "evaluate_windows": 1, "steps": 1, "data": {"source": str(bench.text)}}
    [measured] = recover(plain(bench, tmp_path), tmp_path / "out", **settings).evaluations
    assert (measured.perplexity.data, measured.perplexity.seqlen, measured.perplexity.windows) == ("python", SEQLEN, 1)
    assert recover(bench.pruned(), tmp_path / "of a run", **settings).evaluations == []
    with pytest.raises(fp.FistaPrunerError, match="evaluate_windows 1 has no effect: evaluate names no text"):
        recover(bench.pruned(), tmp_path / "refused", **{**settings, "evaluate": None})


def test_a_given_dense_model_is_compared_with_whatever_the_loss(bench: Bench, tmp_path: Path) -> None:
    """Training for ce does not need it: its weights are those without."""
    model, out = plain(bench, tmp_path), tmp_path / "out"
    (model / "fistapruner.json").unlink()
    settings = {"loss": "ce", "steps": 1, "data": {"source": str(bench.text)}}
    measured = {"evaluate": str(bench.text), "evaluate_windows": 1}
    with pytest.raises(
        fp.FistaPrunerError, match=r"predicts 160 tokens, .* 128: name the model that was pruned with --dense"
    ):
        recover(model, tmp_path / "wrong", dense=bench.dense(vocab_size=160), **settings)
    report = recover(model, out, dense=bench.dense(), **settings, **measured)
    assert report.evaluations[0].divergence is not None
    record = TrainingDirectory(out, "recover").record()
    assert record.decision.dense == bench.dense()
    assert not (out / "teacher").exists()
    (out / "report.json").unlink()
    assert fp.resume(out).evaluations[0].divergence is not None
    assert recover(model, out, dense=bench.dense(), **settings, **measured).status == "finished"
    recover(model, tmp_path / "without", **settings)
    assert tiny.weights(tmp_path / "without") == tiny.weights(out)
    with pytest.raises(fp.FistaPrunerError, match=r"dense = null, this one has .*llama\": name another"):
        recover(model, tmp_path / "without", dense=bench.dense(), **settings)


def test_the_dense_model_generates_the_text_of_every_loss(bench: Bench, tmp_path: Path) -> None:
    """That of the loss ce, too, which does not need its predictions."""
    generated = []
    for loss in ("kl", "ce"):
        out = tmp_path / loss
        report = recover(bench.pruned(), out, loss=loss, steps=1, data={"source": "self", "tokens": 16000})
        # What the step takes is generated, and as much is held out as ever.
        assert (report.recovery.windows, report.recovery.held_out_windows) == (SETTINGS["windows_per_step"], 16)
        generated.append((out / "windows.safetensors").read_bytes())
    assert generated[0] == generated[1]


def test_of_several_tasks_the_held_out_loss_is_the_mean(bench: Bench, tmp_path: Path) -> None:
    other, out = tmp_path / "other.jsonl", tmp_path / "out"
    other.write_text("".join(json.dumps({"text": f"THE SQUARE OF {n} IS {n * n}."}) + "\n" for n in range(20)))
    tasks = {"counting": str(bench.text), "squares": str(other)}
    report = recover(bench.pruned(), out, data={"source": tasks, "held_out": 0.2}, parameters="full")
    file = SafetensorsFile(out / "windows.safetensors")
    counts = file.read("task")[file.read("held_out").to(torch.bool)].bincount().tolist()
    assert len(set(counts)) == 2  # a mean over all windows would be another
    checks = report.recovery.checks
    best = min(checks, key=lambda check: check.held_out)
    assert best.held_out < checks[0].held_out
    for check, model in ((checks[0], bench.pruned()), (best, out)):
        losses = {name: held_out_loss(out, model / "model", bench.dense(), task) for task, name in enumerate(tasks)}
        assert check.by_task == pytest.approx(losses, rel=1e-4)
        assert check.held_out == pytest.approx(sum(losses.values()) / 2, rel=1e-4)
    page = (out / "report.html").read_text()
    assert all(name in page for name in tasks)


@pytest.mark.parametrize("steps", [4, 20])
def test_a_rate_that_is_too_high_gives_the_input_back(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    """Or the loss is not a number, and the command fails; given again, it says so again and does nothing."""
    out, fails = tmp_path / "out", steps == 20
    command = ["recover", str(bench.pruned()), "--out", str(out), "--evaluate", "none", "--quiet", "--lr", "1e30"]
    command += ["--set", f"data.seqlen={SEQLEN}", "--tokens", "300", "--set", "windows_per_step=2"]
    for _ in range(2):
        assert main([*command, "--steps", str(steps)]) == fails
        assert tiny.weights(out) == tiny.weights(bench.pruned())
        report, printed = load_run(out), capsys.readouterr().out
        assert report.status == "finished"
        assert report.recovery.kept_step == 0
        assert (report.recovery.changed, report.recovery.change) == (0, 0)
        said = "training stopped: the loss is nan at step 2" if fails else "no step was better than the start"
        assert said in report.warnings[0]
        assert said in printed
        # What overrides --tokens is named.
        assert ("e+29 to 1e+30: try a lower --lr" if fails else "or more --steps") in report.warnings[0]
        assert re.search(r"changed +0 % of the surviving weights\n", printed)  # no operator changed most


# --- bad input: one line each, before any long work


def plain(bench: Bench, folder: Path) -> Path:
    """A copy of the pruned checkpoint."""
    return Path(shutil.copytree(bench.pruned() / "model", folder / "plain"))


def claim_violated(bench: Bench, folder: Path) -> dict[str, Any]:
    model = plain(bench, folder)
    stored = load_file(model / "model.safetensors")
    stored["model.layers.0.self_attn.q_proj.weight"][0] = 1.0
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    return {"model": model, "data": {"source": str(bench.text)}}


def packed(bench: Bench, folder: Path) -> dict[str, Any]:
    assert main(["pack", str(bench.pruned()), str(folder / "packed"), "--values", "bf16"]) == 0
    assert is_packed(folder / "packed")
    return {"model": folder / "packed"}


def no_dense(bench: Bench, folder: Path) -> dict[str, Any]:
    model = plain(bench, folder)
    (model / "fistapruner.json").unlink()
    return {"model": model, "loss": "kl", "data": {"source": str(bench.text)}}


def dense_changed(bench: Bench, folder: Path) -> dict[str, Any]:
    """Of a pruning run."""
    dense = Path(shutil.copytree(bench.dense(), folder / "dense"))
    calibration = {"source": str(bench.text), "samples": 2, "seqlen": SEQLEN}
    fp.prune(dense, folder / "run", method="magnitude", calibration=calibration)
    tiny.save("llama", dense, num_hidden_layers=2, seed=7)
    return {"model": folder / "run"}


def token_of_no_model(bench: Bench, folder: Path) -> dict[str, Any]:
    """In the evaluation text alone."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(plain(bench, folder))
    text = folder / "new.txt"
    text.write_text("one <new> token " * 20)
    data = {"source": str(bench.text)}
    return {"model": folder / "plain", "data": data, "evaluate": text}


def unfinished(bench: Bench, folder: Path) -> dict[str, Any]:
    run = Path(shutil.copytree(bench.pruned(), folder / "run"))
    shutil.rmtree(run / "model")
    return {"model": run}


def damaged(bench: Bench, folder: Path) -> dict[str, Any]:
    run = Path(shutil.copytree(bench.pruned(), folder / "run"))
    with (run / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        last = file.read()
        file.seek(-4, 2)
        file.write(bytes(255 - byte for byte in last))
    return {"model": run}


CHANGED = r"has changed: its checksum was [0-9a-f]{12} and is [0-9a-f]{12}"

BAD: dict[str, tuple[Callable[[Bench, Path], dict[str, Any]], str]] = {
    "no zeros": (
        lambda bench, folder: {"model": bench.dense(), "dense": bench.dense(), "data": {"source": str(bench.text)}},
        r"has no operator with zeros to keep; prune it first",
    ),
    "claim violated": (
        claim_violated,
        r"q_proj\.weight: has \d+ zeros, 512 are claimed; 'fistapruner inspect .*plain'",
    ),
    "packed": (packed, r"is packed: unpack it first with 'fistapruner unpack .*packed DIR'"),
    "other vocabulary": (
        lambda bench, folder: {"dense": bench.dense(vocab_size=160)},
        r"predicts 160 tokens, .* 128: name the model that was pruned with --dense",
    ),
    "no dense model": (no_dense, r"--loss kl needs the dense model, which .*plain does not name: name .* with --dense"),
    "dense model is the input": (
        lambda bench, folder: {"dense": bench.pruned() / "model"},
        r"the dense model .*model is the model that is trained: name the model that was pruned",
    ),
    "text of no model": (
        lambda bench, folder: {**no_dense(bench, folder), "loss": "ce", "data": {"source": "self"}},
        r"--data self needs the dense model, which .*plain does not name",
    ),
    "dense model not there": (lambda bench, folder: {"dense": folder / "nowhere"}, r"model '.*nowhere' does not exist"),
    "dense model changed": (
        dense_changed,
        rf"dense.model\.safetensors {CHANGED}: name the model that was pruned with --dense",
    ),
    "evaluation text not there": (
        lambda bench, folder: {
            "model": folder / "nowhere",
            "evaluate": "nowhere.txt",
        },  # before the model is looked for
        r"'nowhere\.txt'",
    ),
    "evaluation token that the model does not have": (
        token_of_no_model,
        r"token id \d+ is beyond the model's vocabulary",
    ),
    "no text": (lambda bench, folder: {"data": {"source": ""}}, r"training source '' is neither"),
    "long windows": (lambda bench, folder: {"data": {"seqlen": 10**6}}, r"data\.seqlen 1000000 is more than the 2048"),
    "unfinished": (unfinished, r"has no finished checkpoint: go on with 'fistapruner resume .*run'"),
    "damaged": (damaged, r"is damaged: .*: make the checkpoint again with 'fistapruner resume .*run'"),
    "no model": (lambda bench, folder: {"model": folder / "nowhere"}, r"model '.*nowhere' does not exist"),
    "out is the input": (
        lambda bench, folder: {"out": bench.pruned()},
        r"holds the model .* itself: name a folder outside of it",
    ),
}


@pytest.mark.parametrize(("case", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_before_any_work(
    bench: Bench, tmp_path: Path, case: Callable[[Bench, Path], dict[str, Any]], message: str
) -> None:
    settings = {"model": bench.pruned(), "out": tmp_path / "out", **case(bench, tmp_path)}
    with pytest.raises(fp.FistaPrunerError, match=message) as refused:
        recover(**settings)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "run.json").exists()


# --- the run directory


@pytest.fixture
def run(bench: Bench, tmp_path: Path) -> Path:
    """A copy of the finished recovery."""
    return Path(shutil.copytree(bench.recovered, tmp_path / "run"))


OTHERS: dict[str, tuple[Callable[[Bench], dict[str, Any]], str]] = {
    "form": (lambda bench: {"parameters": "full"}, r'parameters = "lora", this one has "full"'),
    "rate": (lambda bench: {"lr": 1e-3}, r'lr = "auto", this one has 0\.001'),
    "tokens": (lambda bench: {"data": {"tokens": 400}}, r"data\.tokens = 300, this one has 400"),
    "model": (
        lambda bench: {"model": bench.pruned("llama", "50%")},
        r"model = .*2:4\", this one has .*50 percent\": name another folder",
    ),
    "dense model": (
        lambda bench: {"dense": bench.dense("gpt2")},
        r"dense = .*llama\", this one has .*gpt2\": name another folder",
    ),
}


def test_a_finished_run_is_not_made_again_and_another_is_refused(bench: Bench, run: Path) -> None:
    said, stamp = tiny.Said(), (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert recover(bench.pruned(), run, listener=said).status == "finished"
    assert any("holds the finished run of this recipe" in sentence for sentence in said.sentences)
    assert len(recover(bench.pruned(), run, evaluate="python", evaluate_windows=1).evaluations) == 1
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    for settings, message in OTHERS.values():
        with pytest.raises(fp.FistaPrunerError, match=message):
            recover(**{"model": bench.pruned(), "out": run, **settings(bench)})
    with hold(run), pytest.raises(fp.FistaPrunerError, match=r"is in use by process \d+"):
        recover(bench.pruned(), run)


def test_too_few_steps_for_the_tasks_are_refused_before_any_text_is_cut(bench: Bench, tmp_path: Path) -> None:
    tasks = {f"task {number}": str(bench.text) for number in range(4)}
    with pytest.raises(fp.FistaPrunerError, match=r"needs 4 windows for .* and there are 2: take at least 2 steps"):
        recover(bench.pruned(), tmp_path / "out", steps=1, data={"source": tasks})
    assert not [*tmp_path.glob("out/windows*")]


def test_a_run_goes_on_from_another_folder(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are kept absolute; the same file by another way to write it is the same."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copy(bench.text, tmp_path / "text.jsonl")
    monkeypatch.chdir(tmp_path / "a")
    arguments = {"model": bench.pruned(), "out": tmp_path / "out", "steps": 1}
    recover(**arguments, data={"source": "../text.jsonl"})
    assert recover(**arguments, data={"source": "../text.jsonl"}).status == "finished"
    monkeypatch.chdir(tmp_path / "b")
    arguments["model"] = bench.pruned() / ".." / bench.pruned().name
    assert recover(**arguments, data={"source": "../a/../text.jsonl"}).status == "finished"
    (tmp_path / "out" / "report.json").unlink()
    assert fp.resume(Path("../out")).status == "finished"


def test_a_damaged_checkpoint_is_written_again(bench: Bench, run: Path) -> None:
    """From the last state; what was measured stays."""
    whole, report = tiny.weights(run), load_run(run)
    (run / "model" / "model.safetensors").write_bytes(whole["model.safetensors"][:-1])
    said = tiny.Said()
    assert recover(bench.pruned(), run, listener=said).recovery == report.recovery
    assert tiny.weights(run) == whole
    assert any("the checkpoint is made again: " in sentence for sentence in said.sentences)
    assert not (run / "teacher").exists()
    assert not any("held-out loss" in sentence for sentence in said.sentences)  # nothing was trained again


def test_the_report_of_a_finished_run_outlives_a_failure(bench: Bench, tmp_path: Path) -> None:
    """Its checkpoint is gone and cannot be made again, since the input has gone too."""
    model = plain(bench, tmp_path)
    recover(model, tmp_path / "out", data={"source": str(bench.text)}, steps=1)
    before = (tmp_path / "out" / "report.json").read_text()
    shutil.rmtree(tmp_path / "out" / "model")
    shutil.rmtree(model)
    with pytest.raises(fp.FistaPrunerError, match=r"plain"):
        fp.resume(tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == before


def test_a_text_is_cut_into_windows_of_the_run_before_whatever_training_takes(bench: Bench, tmp_path: Path) -> None:
    """So that perplexities before and after can be compared with those of the pruning run."""
    data = {"seqlen": SEQLEN // 2}
    report = recover(bench.pruned(), tmp_path / "out", evaluate="python", evaluate_windows=1, data=data)
    assert report.evaluations[0].perplexity.seqlen == SEQLEN


def test_several_processes_need_a_launcher(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in (fp.recover, fp.align):
        with pytest.raises(ValueError, match="MASTER_ADDR expected, but not set"):
            verb(bench.pruned(), tmp_path / "run")
    assert not (tmp_path / "run").exists()

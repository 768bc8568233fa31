"""Recovery from end to end: every zero kept bit for bit, never worse on held-out text, told in report and lineage."""

import json
import math
import re
import shutil
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
from tiny import Bench, tensors

SEQLEN = 16
SETTINGS: dict[str, Any] = {"evaluate": None, "steps": 4, "windows_per_step": 2, "rank": 4}


@pytest.fixture(scope="module")
def recovered(bench: Bench) -> Path:
    """A recovery of the pruned Llama, to be copied."""
    recover(bench.pruned(), bench.folder / "recovered", command="the command")
    return bench.folder / "recovered"


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
    assert not experts or any(entry.changed for entry in report.operators if ".experts." in entry.name)
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


def test_operators_that_were_left_dense_are_not_trained(bench: Bench, tmp_path: Path, cli: tiny.Cli) -> None:
    """And those with patterns of their own keep them, packed too."""
    calibration = {"source": str(bench.text), "samples": 2, "seqlen": SEQLEN}
    allocation = {"re:mlp": "0%", "q_proj": "1:4"}
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    settings = {"method": "magnitude", "sparsity": "2:4", "allocation": allocation, "calibration": calibration}
    made = fp.prune(bench.dense(), pruned, **settings)
    assert "pruned operators: 8 of 14" in cli("inspect", pruned, "--quiet").out
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


def test_the_report_tells_what_was_trained_and_the_lineage_where_the_model_comes_from(
    bench: Bench, recovered: Path
) -> None:
    run = recovered
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


def test_a_recovered_run_is_recovered_again(bench: Bench, recovered: Path, tmp_path: Path) -> None:
    """The dense model and the text are those of the chain's first run."""
    report = recover(recovered, tmp_path / "again", parameters="norms")
    assert report.recovery.loss == "kl"
    first = load_run(recovered).recovery
    assert report.recovery.checks[0].held_out == pytest.approx(min(check.held_out for check in first.checks), rel=1e-5)
    record = json.loads((tmp_path / "again" / "model" / "fistapruner.json").read_text())
    assert [stage["kind"] for stage in record["lineage"]["stages"]] == ["prune", "recover", "recover"]
    assert not inspect_checkpoint(tmp_path / "again" / "model").violations


def test_a_plain_checkpoint_with_zeros_is_recovered(bench: Bench, recovered: Path, tmp_path: Path) -> None:
    """Somebody else's: no record, so the zeros themselves say which operators are pruned."""
    plain = Path(shutil.copytree(bench.pruned() / "model", tmp_path / "plain"))
    record = (plain / "fistapruner.json").read_text()
    (plain / "fistapruner.json").unlink()
    report = recover(plain, tmp_path / "out", dense=bench.dense(), data={"source": str(bench.text)})
    before, after = tensors(plain), tensors(tmp_path / "out" / "model")
    assert all(torch.equal(after[name] == 0, before[name] == 0) for name in before if before[name].ndim == 2)
    assert report.recovery.operators == 14
    assert tiny.weights(tmp_path / "out") == tiny.weights(recovered)
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
    # Cut into windows of the pruning run, whatever training takes, so that perplexities can be compared.
    data = {"seqlen": SEQLEN // 2}
    [measured] = recover(
        bench.pruned(), tmp_path / "short", **{**settings, "evaluate": "python", "data": data}
    ).evaluations
    assert measured.perplexity.seqlen == SEQLEN
    with pytest.raises(fp.FistaPrunerError, match="evaluate_windows 1 has no effect: evaluate names no text"):
        recover(bench.pruned(), tmp_path / "refused", **{**settings, "evaluate": None})


def test_a_given_dense_model_is_compared_with_whatever_the_loss(bench: Bench, tmp_path: Path) -> None:
    """Training for ce does not need it: its weights are those without."""
    model, out = plain(bench, tmp_path), tmp_path / "out"
    (model / "fistapruner.json").unlink()
    settings = {"loss": "ce", "steps": 1, "data": {"source": str(bench.text)}}
    measured = {"evaluate": str(bench.text), "evaluate_windows": 1}
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


def plain(bench: Bench, folder: Path, name: str = "plain") -> Path:
    """A copy of the pruned checkpoint."""
    return Path(shutil.copytree(bench.pruned() / "model", folder / name))


def test_bad_input_is_one_line_before_any_work(bench: Bench, tmp_path: Path, cli: tiny.Cli) -> None:
    nowhere, text, other = tmp_path / "nowhere", {"source": str(bench.text)}, bench.dense(vocab_size=160)
    (unknown := plain(bench, tmp_path, "unknown") / "fistapruner.json").unlink()
    file = plain(bench, tmp_path, "refilled") / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.self_attn.q_proj.weight"][0] = 1.0
    save_file(stored, file, {"format": "pt"})
    cli("pack", bench.pruned(), tmp_path / "packed", "--values", "bf16")
    assert is_packed(tmp_path / "packed")
    shutil.rmtree(Path(shutil.copytree(bench.pruned(), tmp_path / "gone")) / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])  # which the model does not have; in the evaluation text alone
    tokenizer.save_pretrained(plain(bench, tmp_path))
    (tmp_path / "new.txt").write_text("one <new> token " * 20)
    without: dict[str, Any] = {"model": unknown.parent, "data": text}
    vocabulary = r"predicts 160 tokens, .* 128: name the model that was pruned with --dense"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": bench.dense(), "dense": bench.dense(), "data": text}, "has no operator with zeros to keep; prune"),
        (
            {"model": file.parent, "data": text},
            r"q_proj\.weight: has \d+ zeros, 512 are claimed; 'fistapruner inspect .*refilled'",
        ),
        ({"model": tmp_path / "packed"}, r"is packed: unpack it first with 'fistapruner unpack .*packed DIR'"),
        ({"dense": other}, vocabulary),
        ({"dense": other, "loss": "ce"}, vocabulary),
        (
            {**without, "loss": "kl"},
            r"--loss kl needs the dense model, which .*unknown does not name: name .* with --dense",
        ),
        ({"dense": bench.pruned() / "model"}, "the dense model .*model is the model that is trained: name the model t"),
        (
            {**without, "loss": "ce", "data": {"source": "self"}},
            "--data self needs the dense model, which .*unknown does not name",
        ),
        ({"dense": nowhere}, r"model '.*nowhere' does not exist"),
        ({"model": nowhere, "evaluate": "nowhere.txt"}, r"'nowhere\.txt'"),  # before the model is looked for
        (
            {"model": tmp_path / "plain", "data": text, "evaluate": tmp_path / "new.txt"},
            r"token id \d+ is beyond the model's vocabulary",
        ),
        ({"data": {"source": ""}}, "training source '' is neither"),
        ({"data": {"seqlen": 10**6}}, r"data\.seqlen 1000000 is more than the 2048"),
        ({"model": tmp_path / "gone"}, r"gone/model is gone, .*: run it again in another folder"),
        ({"model": nowhere}, r"model '.*nowhere' does not exist"),
    ]
    for settings, message in cases:
        with pytest.raises(fp.FistaPrunerError, match=message) as refused:
            recover(**{"model": bench.pruned(), "out": tmp_path / "out", **settings})
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out" / "run.json").exists()


def test_a_finished_run_is_not_made_again_and_another_is_refused(bench: Bench, recovered: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(recovered, tmp_path / "run"))
    said, stamp = tiny.Said(), (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert recover(bench.pruned(), run, listener=said).status == "finished"
    assert any("holds the finished run of this recipe" in sentence for sentence in said.sentences)
    assert len(recover(bench.pruned(), run, evaluate="python", evaluate_windows=1).evaluations) == 1
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    others: list[tuple[dict[str, Any], str]] = [
        ({"parameters": "full"}, r'parameters = "lora", this one has "full"'),
        ({"lr": 1e-3}, r'lr = "auto", this one has 0\.001'),
        ({"data": {"tokens": 400}}, r"data\.tokens = 300, this one has 400"),
        ({"model": bench.pruned("llama", "50%")}, r"model = .*2:4\", this one has .*50 percent\": name another folder"),
        ({"dense": bench.dense("gpt2")}, r"dense = .*llama\", this one has .*gpt2\": name another folder"),
    ]
    for settings, message in others:
        with pytest.raises(fp.FistaPrunerError, match=message):
            recover(**{"model": bench.pruned(), "out": run, **settings})
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


def test_several_processes_need_a_launcher(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in (fp.recover, fp.align):
        with pytest.raises(ValueError, match="MASTER_ADDR expected, but not set"):
            verb(bench.pruned(), tmp_path / "run")
    assert not (tmp_path / "run").exists()

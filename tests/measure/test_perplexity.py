"""Streamed perplexity against an independent implementation and against lm-eval, on the same windows."""

import json
import math
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fistapruner as fp
import tiny
from fistapruner.cli.arguments import show
from fistapruner.measure.logits import KeptStates, score_windows, shown_name
from fistapruner.measure.run import generate_side_by_side
from fistapruner.measure.tasks import task_result
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.runs.records import Report
from fistapruner.runtime.devices import usable_threads

evaluate: Any = fp.evaluate

TEXT = "it was the best of times, it was the worst of times, it was the age of wisdom. " * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def plain_perplexity(folder: Path, text: str, seqlen: int) -> tuple[float, list[float]]:
    """The textbook loop: the whole model, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"])
    means = []
    for window in ids[: len(ids) // seqlen * seqlen].view(-1, seqlen):
        with torch.no_grad():
            means.append(float(model(input_ids=window[None], labels=window[None]).loss))
    return math.exp(sum(means) / len(means)), means


def test_threads_are_those_that_the_caller_has_now(tmp_path: Path, text: Path) -> None:
    """Not those of the import; they come back as they were."""
    folder, before, seen = tiny.save("llama", tmp_path / "model"), torch.get_num_threads(), set[int]()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            evaluate(folder, str(text), seqlen=24, tick=lambda *_: seen.add(torch.get_num_threads()))
            assert seen == {usable_threads()}
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(before)
            seen.clear()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_equals_the_textbook_loop(tmp_path: Path, text: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    expected, means = plain_perplexity(folder, TEXT, 24)
    found = evaluate(folder, str(text), seqlen=24, batch_size=5).perplexity
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.windows == len(means)
    assert found.tokens == len(means) * 23
    error = torch.tensor(means, dtype=torch.float64).std().item() / math.sqrt(len(means))
    assert found.nll_standard_error == pytest.approx(error, rel=1e-3)
    assert (found.data, found.split, found.seqlen, found.dtype) == ("text.txt", "file", 24, "float32")


@pytest.mark.parametrize(("longest", "seqlen"), [(4096, 2048), (64, 64)])
def test_windows_are_by_default_those_of_the_model_up_to_2048(tmp_path: Path, longest: int, seqlen: int) -> None:
    folder = tiny.save("llama", tmp_path / "model", max_position_embeddings=longest)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    found = evaluate(folder, tmp_path / "text.txt", windows=1).perplexity
    assert found.seqlen == seqlen


def test_dense_and_pruned_see_the_same_tokens(tmp_path: Path, text: Path) -> None:
    dense = tiny.save("llama", tmp_path / "dense")
    other = tiny.save("llama", tmp_path / "other", seed=3)
    result = evaluate(other, str(text), seqlen=16, against=dense)
    alone = evaluate(dense, str(text), seqlen=16).perplexity
    assert result.reference.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert result.reference.text_sha256 == result.perplexity.text_sha256 == alone.text_sha256
    assert result.divergence.nll_difference == pytest.approx(result.perplexity.nll - result.reference.nll)
    assert result.divergence.kl > 0
    assert 0 <= result.divergence.top1_agreement < 1
    same = evaluate(dense, str(text), seqlen=16, against=dense).divergence
    assert (same.top1_agreement, same.nll_difference) == (1.0, 0.0)
    assert same.kl < 1e-6


def test_two_models_run_in_one_precision(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tasks: Mock
) -> None:
    """The wider one, for text and for tasks: the same weights stored in two precisions are the same model."""
    monkeypatch.setattr("fistapruner.runtime.numerics.has_bf16_units", lambda device: True)
    half = tiny.save("llama", tmp_path / "half", dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).save_pretrained(tmp_path / "full")
    AutoTokenizer.from_pretrained(half).save_pretrained(tmp_path / "full")
    for model, against, expected in ((half, half, "bfloat16"), (half, "full", "float32"), ("full", half, "float32")):
        found = evaluate(tmp_path / model, str(text), seqlen=16, windows=4, against=tmp_path / against, tasks=["boolq"])
        assert found.perplexity == found.reference
        assert found.perplexity.dtype == expected
        assert (found.divergence.top1_agreement, found.divergence.nll_difference) == (1.0, 0.0)
    assert [call.args[3] for call in tasks.call_args_list] == [torch.bfloat16, torch.float32, torch.float32]


def test_hidden_states_that_memory_does_not_hold_are_in_a_file(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are the same, and the file is gone."""
    folder, other = (tiny.save("llama", tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "scratch").mkdir()
    files: list[int] = []

    def tick(what: str, done: int, total: int) -> None:
        files.append(len(list((tmp_path / "scratch").glob("*/states"))))

    settings: dict[str, Any] = {"seqlen": 16, "against": other, "tick": tick}
    free = evaluate(folder, text, **settings)
    assert not any(files)
    limited = evaluate(folder, text, memory_limit="1MiB", **settings)
    assert max(files) == 2
    assert not list((tmp_path / "scratch").iterdir())
    assert (limited.perplexity, limited.reference) == (free.perplexity, free.reference)
    assert limited.divergence == free.divergence


def test_a_folder_that_is_no_model_is_not_blamed_on_its_tokenizer(tmp_path: Path, text: Path) -> None:
    with pytest.raises(fp.FistaPrunerError, match=r"config\.json"):
        evaluate(tmp_path, str(text), seqlen=16)


def test_models_of_different_vocabulary_are_refused(tmp_path: Path, text: Path) -> None:
    dense = tiny.save("llama", tmp_path / "dense")
    other = tiny.save("llama", tmp_path / "other", vocab_size=160)
    with pytest.raises(fp.FistaPrunerError, match="do not share a vocabulary"):
        evaluate(other, str(text), seqlen=16, against=dense)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": None}, "nothing to evaluate"),
        ({"data": ""}, "data '' is neither a .txt"),
        ({"seqlen": 100_000}, "seqlen 100000 is more than"),
        ({"dtype": "float8"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"bos": "maybe"}, "bos: Input should be 'auto', 'none', 'text' or 'window'"),
        ({"tasks": 3}, "tasks: Input should be a valid list"),
        ({"tasks": [3]}, "tasks.0: Input should be a valid string"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"seqlen": 1}, r"seqlen: Input should be greater than or equal to 2 \(got 1\)"),
        ({"windows": 0}, r"windows: Input should be greater than 0 \(got 0\)"),
        ({"windows": "3"}, "windows: Input should be a valid integer"),
        ({"batch_size": 0}, "batch_size: Input should be greater than 0"),
        ({"limit": 0, "tasks": ["piqa"]}, "limit: Input should be greater than 0"),
        ({"limit": 5}, "limit 5 has no effect, because no task is given: leave it out"),
        ({"data": None, "tasks": ["piqa"], "seqlen": 16}, "seqlen 16 has no effect, because no text to cut is given"),
        ({"memory_limit": "much"}, "memory_limit: 'much' is not a size: write 8GiB"),
        ({"tasks_dir": "nowhere"}, r"--tasks-dir nowhere has no \.yaml file"),
    ],
)
def test_bad_settings_are_named_before_any_work(
    tmp_path: Path, text: Path, settings: dict[str, Any], message: str
) -> None:
    passes: list[str] = []
    folder = tiny.save("llama", tmp_path / "model")
    with pytest.raises(fp.FistaPrunerError, match=message):
        evaluate(folder, **{"data": str(text), **settings}, tick=lambda what, done, total: passes.append(what))
    assert not passes


def test_a_model_that_gives_nan_is_refused(tmp_path: Path, text: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    for dtype, advice in (("float32", "'fistapruner inspect .*model' names NaN"), ("bfloat16", "try dtype float32")):
        with pytest.raises(fp.FistaPrunerError, match=rf"gives NaN \(dtype torch.{dtype}\); {advice}"):
            evaluate(tmp_path / "model", str(text), seqlen=16, dtype=dtype)


def test_the_command_line_prints_what_the_figure_depends_on(tmp_path: Path, text: Path, cli: tiny.Cli) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    command = ["evaluate", folder, "--data", text, "--seqlen", "16"]
    printed = cli(*command, "--against", folder, "--quiet").out
    for part in ("perplexity", "dense", "KL", "top-1", "text.txt (file)", "windows of 16 tokens", "float32"):
        assert part in printed
    assert json.loads(cli(*command, "--windows", "3", "--json").out)["perplexity"]["windows"] == 3


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("hub/models--org--small-model/snapshots/" + "0123456789" * 4, "org/small-model"),
        ("cache/fistapruner/small-q4-0123456789ab", "small-q4"),
        ("mine/small-0123456789ab", "small-0123456789ab"),
        ("mine/model", "model"),
    ],
)
def test_progress_calls_a_model_as_its_user_does(tmp_path: Path, folder: str, name: str) -> None:
    assert shown_name(tmp_path / folder) == name


def test_an_undefined_error_is_null_in_json(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    one = evaluate(folder, str(text), seqlen=16, windows=1, against=folder)
    found = replace(one, tasks=(task_result("t", "acc", {0: 1.0}, {0: 1.0}), task_result("t", "acc_norm", {0: 1.0})))
    show(found, Namespace(json=True))
    printed = json.loads(capsys.readouterr().out)
    for written in (printed, Report(evaluations=[found]).model_dump(mode="json")["evaluations"][0]):
        assert written["perplexity"]["standard_error"] is None
        (back,) = Report.model_validate_json(json.dumps({"evaluations": [written]}, allow_nan=False)).evaluations
        errors = (
            back.perplexity.nll_standard_error,
            back.divergence.kl_standard_error,
            *(task.standard_error for task in back.tasks),
        )
        assert all(math.isnan(error) for error in errors)
        assert [task.reference for task in back.tasks] == [1.0, None]
        assert back.tasks[0].reference_standard_error is None
        assert back.tasks[1].reference_standard_error is None


@pytest.mark.slow
def test_equals_the_rolling_likelihood_of_lm_eval(tmp_path: Path, text: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    folder = tiny.save("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    total = count = 0.0
    for start in range(0, len(ids) // 24 * 24, 24):
        window = ids[start : start + 24]
        # Rolling windows of one of our windows: its first token is only context, the others are predicted.
        rolling = get_rolling_token_windows(window[1:], prefix_token=window[0], max_seq_len=24, context_len=1)
        requests = [((None, None), *make_disjoint_window(pair)) for pair in rolling]
        total -= sum(likelihood for likelihood, _ in runner._loglikelihood_tokens(requests, disable_tqdm=True))
        count += len(window) - 1
    found = evaluate(folder, str(text), seqlen=24).perplexity
    assert found.nll == pytest.approx(total / count, rel=1e-4)


def test_kept_states_give_the_same_figures_and_their_model_runs_once(tmp_path: Path) -> None:
    """As reference and alone; other windows are not mixed up with them."""
    folders = [tiny.save("llama", tmp_path / name, seed=seed) for seed, name in enumerate(("dense", "one", "two"))]
    dense, one, two = (LayerwiseModel(Checkpoint.open(folder), torch.device("cpu")) for folder in folders)
    tokens = torch.arange(5 * 16).remainder(dense.vocabulary).view(5, 16)
    run: list[str] = []
    settings: dict[str, Any] = {
        "batch_size": 2,
        "tick": lambda what, done, total: run.append(what) if done == total else None,
    }
    expected = [score_windows(model, tokens, dense, **settings) for model in (one, two)]
    run.clear()
    kept = KeptStates(folders[0], tmp_path / "states")
    alone = score_windows(dense, tokens, kept=kept, **settings)
    found = [score_windows(model, tokens, dense, kept=kept, **settings) for model in (one, two)]
    assert run.count("decoder layers of dense") == 1
    assert torch.equal(alone[0], expected[0][1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    others = tokens[:2].flip(1)
    other = score_windows(one, others, dense, kept=kept, **settings)
    assert torch.equal(other, score_windows(one, others, dense, **settings))
    assert (tmp_path / "states").exists()
    half = LayerwiseModel(Checkpoint.open(folders[0]), torch.device("cpu"), torch.bfloat16)  # of the same folder
    rounded = score_windows(half, others, kept=kept, **settings)
    assert torch.equal(rounded, score_windows(half, others, **settings))
    kept.close()
    assert not (tmp_path / "states").exists()


def test_what_a_model_does_not_take_of_its_tokenizer_is_left_out(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "model_input_names": ["input_ids", "token_type_ids"]})
    )
    assert set(AutoTokenizer.from_pretrained(folder)("once")) == {"input_ids", "token_type_ids"}
    models = {"dense": folder, "pruned": folder}
    for found in generate_side_by_side(models, torch.device("cpu")):
        assert found.dense == found.pruned
        assert found.recovered is None
        assert found.dense

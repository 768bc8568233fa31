"""The speed measurement: what it returns, not how fast anything is."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import Mock

import psutil
import pytest
import torch
import transformers
from pruned import pickle_weights, save_pruned
from safetensors.torch import load_file

from fistapruner import FistaPrunerError, pack
from fistapruner.cli import main
from fistapruner.evaluation.bench import bench, record, sentence, table
from fistapruner.evaluation.speed import Run, Speed, Variant, Worker, compare, serve, time_generation, weight_bytes
from fistapruner.reporting.size_and_speed import QUANTISE_FIRST
from speeds import in_this_process
from tiny import SIZES, build, save_image_text, spread


def speed(name: str, rate: float, spread: float = 0.0) -> Speed:
    return Speed(name, rate, (rate - spread, rate + spread), 0.1, (0.1, 0.1), 100, 10, 1, 4, 4, 3, 2, "cpu")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_decoding_is_timed(architecture):
    run = time_generation(build(architecture), torch.arange(3, 13).view(2, 5), 4)
    assert run.first_token > 0
    assert run.tokens_per_second > 0


def test_the_first_token_and_those_after_it_are_timed_apart(monkeypatch):
    clock = iter([0.0, 1.0, 3.0])  # at the begin, at the first token, at the end
    monkeypatch.setattr("fistapruner.evaluation.speed.time", Mock(perf_counter=lambda: next(clock)))
    assert time_generation(build("llama"), torch.zeros(2, 3, dtype=torch.int64), 5) == Run(1.0, 4.0)


def test_runs_are_summarised_by_median_and_range():
    found = Speed.of(
        "packed",
        [Run(1.0, 5.0), Run(2.0, 7.0), Run(9.0, 6.0)],
        **{name: 1 for name in ("peak_memory", "file_size", "batch", "prompt", "tokens", "threads")},
        device="cpu",
    )
    assert (found.first_token, found.first_token_range) == (2.0, (1.0, 9.0))
    assert (found.tokens_per_second, found.tokens_per_second_range) == (6.0, (5.0, 7.0))
    assert found.runs == 3


def test_a_cache_that_a_model_does_not_return_is_filled():
    sizes = {**SIZES, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 8}
    config = transformers.RecurrentGemmaConfig(**sizes, num_hidden_layers=3, lru_width=32, attention_window_size=8)
    model = spread(transformers.AutoModelForCausalLM.from_config(config).eval())
    seen = []
    hook = model.register_forward_hook(lambda *call: seen.append((call[2]["input_ids"], call[3])), with_kwargs=True)
    time_generation(model, torch.arange(3, 8)[None], 5)
    hook.remove()
    whole = torch.cat([ids for ids, _ in seen[1:]], dim=1)  # the prompt is read twice
    with torch.no_grad():
        expected = model(whole, use_cache=False).logits[:, -5:]
    torch.testing.assert_close(torch.cat([out.logits[:, -1:] for _, out in seen[1:]], dim=1), expected)


def test_a_model_without_a_cache_is_refused_before_packing(tmp_path):
    config = transformers.OpenAIGPTConfig(**SIZES, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(FistaPrunerError, match="OpenAIGPTLMHeadModel takes no cache"):
        bench(tmp_path)


def test_too_few_tokens():
    with pytest.raises(FistaPrunerError, match="at least 2"):
        time_generation(build("llama"), None, 1)


def test_sentence_tells_wins_losses_and_doubt():
    won = sentence({"dense float32": speed("dense float32", 10), "packed": speed("packed", 20)})
    assert "2.00 times faster" in won
    assert "spread" not in won
    lost = sentence({"dense float32": speed("dense float32", 20), "packed": speed("packed", 10)})
    assert "2.00 times slower" in lost
    assert "spread" not in lost
    for rate, verdict in ((11, "1.10 times faster"), (8, "1.25 times slower")):
        doubtful = sentence({"dense float32": speed("dense float32", 10, 3), "packed": speed("packed", rate, 3)})
        assert verdict in doubtful
        assert "within the spread" in doubtful
    for rate in (10.04, 9.96):
        assert "decodes as fast as the fastest dense one" in sentence(
            {"dense float32": speed("dense float32", 10), "packed": speed("packed", rate)}
        )
    once = sentence(
        {name: replace(speed(name, rate), runs=1) for name, rate in (("dense float32", 10), ("packed", 20))}
    )
    assert "2.00 times faster than the fastest dense one (dense float32), in one run, whose spread is not known" in once
    assert Run(1.0, 2.0).tokens_per_second == 2.0


def test_one_run_and_one_thread_are_singular():
    assert "1 interleaved run, 1 thread, kernel" in table([replace(speed("packed", 10), runs=1, threads=1)])
    assert "3 interleaved runs, 2 threads, kernel" in table([speed("packed", 10)])


def test_ranges_are_printed_from_the_slowest_run_to_the_fastest():
    printed = table([replace(speed("packed", 20), tokens_per_second_range=(18, 22), first_token_range=(0.1, 0.3))])
    assert "(18.0 - 22.0)" in printed
    assert "(300 - 100)" in printed


def test_sentence_compares_the_smaller_model_with_the_dense_one():
    forms = {"dense float32": speed("dense float32", 10), "smaller float32": speed("smaller float32", 15)}
    said = sentence(forms)
    assert "fastest form of the smaller model (smaller float32) decodes 1.50 times faster" in said
    assert (
        "reads a prompt of 4 tokens fastest (smaller float32) is as fast as the dense one that does (dense float32)."
        in said
    )
    both = sentence({**forms, "packed": speed("packed", 20)})
    assert "packed form (packed) decodes 2.00 times faster than the fastest dense one (dense float32)" in both
    assert "nothing to compare with" in sentence({"smaller float32": speed("smaller float32", 15)})


def test_every_form_of_a_pruned_model_is_measured(tmp_path):
    source = save_pruned(tmp_path / "m")
    pack(source, tmp_path / "p")
    legacy = pickle_weights(save_pruned(tmp_path / "legacy"))
    with pytest.raises(FistaPrunerError, match=r"legacy has only legacy pickle weights .* --allow-pickle"):
        bench(legacy, measure=in_this_process)
    for folder in (source, tmp_path / "p", legacy):
        allowed = folder == legacy
        speeds = bench(folder, prompt=4, tokens=3, runs=1, measure=in_this_process, allow_pickle=allowed)
        printed = table(speeds)
        for name in ("dense float32", "dense bfloat16", "pruned float32", "pruned bfloat16", "packed", "packed int8"):
            assert name in printed
        assert record(speeds, folder)["sentence"].startswith("On this machine")


def test_a_packed_smaller_model_is_not_called_the_dense_one(tmp_path):
    source = save_pruned(tmp_path / "m")
    stages = [{"settings": {"structure": {"remove": "mlp=25%"}}}]
    (source / "fistapruner.json").write_text(json.dumps({"lineage": {"stages": stages}}))
    pack(source, tmp_path / "p")
    measured = bench(tmp_path / "p", measure=lambda variants, **_: [variant.name for variant in variants])
    assert measured == ["smaller float32", "smaller bfloat16", "packed", "packed int8"]
    assert bench(source, measure=lambda variants, **_: [variant.name for variant in variants]) == measured[:2]
    names = [name for name in load_file(source / "model.safetensors") if "_proj" in name]
    claims = {name: {"sparsity": "50%"} for name in names}
    (source / "fistapruner.json").write_text(json.dumps({"lineage": {"stages": stages}, "operators": claims}))
    assert bench(source, measure=lambda variants, **_: [variant.name for variant in variants]) == measured


def test_a_model_that_packing_makes_no_smaller_is_measured_as_it_is(tmp_path):
    source = save_pruned(tmp_path / "m", sparsity="5%")
    claims = {name: {"sparsity": "5%"} for name in load_file(source / "model.safetensors") if "_proj" in name}
    (source / "fistapruner.json").write_text(json.dumps({"operators": claims}))
    found = bench(source, measure=lambda variants, **_: [speed(variant.name, 10) for variant in variants])
    assert [one.variant for one in found] == ["dense float32", "dense bfloat16", "pruned float32", "pruned bfloat16"]
    said = "No operator has a smaller packed form, so there is nothing packed to compare with."
    assert record(found, source)["sentence"] == said


def test_fp64_weights_are_the_reason_for_no_packed_form(tmp_path):
    wide = pickle_weights(save_pruned(tmp_path / "m", dtype=torch.float64))
    found = bench(wide, measure=lambda variants, **_: [speed(each.name, 10) for each in variants], allow_pickle=True)
    assert not any(one.variant.startswith("packed") for one in found)
    assert "packed rounded only" in record(found, wide, allow_pickle=True)["sentence"]


def test_a_folder_with_int8_values_is_measured_once_and_called_so(tmp_path):
    pack(save_pruned(tmp_path / "m"), tmp_path / "p", values="int8")
    measured = bench(tmp_path / "p", measure=lambda variants, **_: [(one.name, one.folder) for one in variants])
    assert [each for each in measured if each[0].startswith("packed")] == [("packed int8", tmp_path / "p")]


def test_the_command_prints_a_table_or_json(tmp_path, capsys, monkeypatch):
    asked = []

    def measured(model, **settings):
        settings.pop("tick")("forms timed", 1, 2)
        asked.append((model, settings))
        return [speed("dense float32", 10), speed("packed", 20)]

    importlib.import_module("fistapruner.pipeline.measure_run")  # which would keep the replacement for other tests
    monkeypatch.setattr("fistapruner.evaluation.bench.bench", measured)  # six processes less
    command = ["bench", str(tmp_path), "--prompt", "4", "--tokens", "3", "--runs", "1", "--threads", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "dense float32" in printed
    assert "2.00 times faster" in printed
    assert printed.endswith(f"{QUANTISE_FIRST}\n")
    assert main([*command, "--json"]) == 0
    assert [row["variant"] for row in json.loads(capsys.readouterr().out)["speeds"]] == ["dense float32", "packed"]
    assert asked == 2 * [
        (
            str(tmp_path),
            {"batch": 1, "prompt": 4, "tokens": 3, "runs": 1, "threads": 1, "gguf": [], "allow_pickle": False},
        )
    ]


def test_bad_settings_of_the_command_are_refused(tmp_path, capsys):
    source = save_pruned(tmp_path / "m")
    assert main(["bench", str(source), "--tokens", "1"]) == 2
    assert "tokens 1 is too small: at least 2" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("settings", [{"batch": 0}, {"prompt": 0}, {"tokens": 1}, {"runs": 0}, {"threads": 0}])
def test_numbers_that_are_too_small_are_refused_before_packing(tmp_path, monkeypatch, settings):
    monkeypatch.setattr("fistapruner.evaluation.bench.pack", None)
    [(name, value)] = settings.items()
    with pytest.raises(FistaPrunerError, match=f"{name} {value} is too small: at least {value + 1}"):
        bench(save_pruned(tmp_path / "m"), **settings)
    with pytest.raises(FistaPrunerError, match=f"{name} '8' is not a whole number of at least {value + 1}"):
        bench(tmp_path / "m", **{name: "8"})


def test_a_missing_temporary_folder_is_named(tmp_path, monkeypatch):
    source = save_pruned(tmp_path / "m")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with pytest.raises(FistaPrunerError, match=r"no temporary folder can be written \(.*nothing.*\): set TMPDIR$"):
        bench(source)


def test_more_tokens_than_positions_are_refused(tmp_path):
    source = save_pruned(tmp_path / "m", "gpt2")  # 128 positions
    assert bench(source, prompt=100, tokens=29, measure=lambda *_, **__: []) == []
    with pytest.raises(FistaPrunerError, match="prompt 100 and 30 new tokens are more than the 128"):
        bench(source, prompt=100, tokens=30)
    with pytest.raises(FistaPrunerError, match=r"prompt 126 and 2 new tokens \(4 to warm up\) are more than the 128"):
        bench(source, prompt=126, tokens=2)
    with pytest.raises(FistaPrunerError, match="prompt 127998 and 4 new tokens are more than the 128000"):
        bench(save_image_text(tmp_path / "images"), prompt=127998, tokens=4)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2, max_seq_len=64),
        transformers.RobertaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=66,
            is_decoder=True,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_positions_are_those_that_text_may_fill(tmp_path, config):
    """Whatever the config calls them, and without those of RoBERTa that no token has."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(FistaPrunerError, match="prompt 55 and 11 new tokens are more than the 64"):
        bench(tmp_path, prompt=55, tokens=11)
    with pytest.raises(FistaPrunerError, match="no pruned operators"):
        bench(tmp_path, prompt=55, tokens=10)


def test_as_many_tokens_as_positions_are_decoded():
    prompt = torch.zeros(1, 100, dtype=torch.int64)
    time_generation(build("gpt2"), prompt, 29)  # 128 positions; the last token is not fed


def test_a_process_says_what_went_wrong(tmp_path, monkeypatch):
    class Pipe(list):
        send = list.append

    pipe = Pipe()
    serve(Variant("dense", save_pruned(tmp_path / "m", "gpt2")), 1, 200, 4, 1, pipe)  # 128 positions
    monkeypatch.setattr("fistapruner.evaluation.speed.load_variant", lambda variant: variant.cache)
    serve(Variant("dense", tmp_path), 1, 4, 4, 1, pipe)
    assert pipe == [
        {"error": "IndexError: index out of range in self"},
        {"error": "AttributeError: 'Variant' object has no attribute 'cache'"},
    ]


def test_a_process_nobody_listens_to_ends_quietly(tmp_path):
    here, there = multiprocessing.Pipe()
    here.close()
    serve(Variant("dense", save_pruned(tmp_path / "m")), 1, 4, 4, torch.get_num_threads(), there)


def test_a_process_that_is_killed_is_named(tmp_path):
    worker = Worker(Variant("dense", tmp_path), 1, 4, 3, 1)
    process = psutil.Process(worker.pid)
    process.kill()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(FistaPrunerError, match="'dense' ended early"):
        worker.send("run")
    with pytest.raises(FistaPrunerError, match="'dense' ended early"):
        worker.receive()


def test_an_interrupt_is_left_to_the_process_that_asks(tmp_path):
    """Which then ends the others at once, also in the midst of a run."""
    worker = Worker(Variant("dense", save_pruned(tmp_path / "m")), 1, 4, 100_000, 1)
    assert os.getpgid(worker.pid) != os.getpgid(0)  # the terminal's Ctrl-C, too, while the process imports
    assert worker.receive() == {}
    worker.send("run")
    os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.5)
    assert psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE
    begin = time.monotonic()
    worker.close()
    assert not psutil.pid_exists(worker.pid)
    assert time.monotonic() - begin < 5


def test_a_script_that_measures_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from fistapruner.evaluation.speed import Variant, compare\n"
        "print('begun', flush=True)\n"
        "found = compare([Variant('dense', Path(sys.argv[1]))], prompt=4, tokens=3, runs=1, threads=1)\n"
        "print([speed.variant for speed in found])\n"
    )
    program = [sys.executable, script, save_pruned(tmp_path / "m")]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    assert done.stdout == "begun\n['dense']\n"
    assert "Loading weights" not in done.stderr


def test_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    (found,) = compare([Variant("packed", tmp_path / "p")], prompt=4, tokens=3, runs=2, threads=1)
    assert weight_bytes(pickle_weights(tmp_path / "m")) > 2**10
    assert (found.variant, found.runs, found.threads) == ("packed", 2, 1)
    assert found.peak_memory > 2**20
    assert found.file_size > 0
    (tmp_path / "p" / "packed.json").write_text("{}")
    with pytest.raises(FistaPrunerError, match="packed"):
        compare([Variant("packed", tmp_path / "p")], threads=1)


def test_weights_that_are_stored_twice_are_counted_once(tmp_path):
    folder = save_pruned(tmp_path / "m")
    size = weight_bytes(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_bytes(folder) == size == (folder / "model.safetensors").stat().st_size

"""The speed measurement: what it returns, not how fast anything is."""

from __future__ import annotations

import pytest
from pruned import save_pruned

from fistapruner import FistaPrunerError, pack
from fistapruner.cli import main
from fistapruner.sparse.bench import bench
from fistapruner.sparse.speed import Run, Speed, Variant, _serve, compare, load_variant, measure_speed, sentence, time_generation
from tiny import build


def speed(name: str, rate: float, spread: float = 0.0) -> Speed:
    return Speed(name, rate, (rate - spread, rate + spread), 0.1, (0.1, 0.1), 100, 10, 1, 4, 4, 3, 2, "cpu")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_decoding_is_timed(architecture):
    measured = measure_speed(build(architecture), prompt=5, tokens=4, runs=3, batch=2)
    assert measured.runs == 3
    assert measured.tokens_per_second_range[0] <= measured.tokens_per_second <= measured.tokens_per_second_range[1]
    assert measured.first_token > 0
    assert measured.peak_memory > 2**20


def test_too_few_tokens():
    with pytest.raises(FistaPrunerError, match="at least 2"):
        time_generation(build("llama"), None, 1)


def test_sentence_tells_wins_losses_and_doubt():
    won = sentence({"dense float32": speed("dense float32", 10), "packed": speed("packed", 20)})
    assert "2.00 times faster" in won
    assert "spread" not in won
    assert "2.00 times slower" in sentence({"dense float32": speed("dense float32", 20), "packed": speed("packed", 10)})
    doubtful = sentence({"dense float32": speed("dense float32", 10, 3), "packed": speed("packed", 11, 3)})
    assert "within the spread" in doubtful
    assert Run(1.0, 2.0).tokens_per_second == 2.0


def test_bench_command(tmp_path, capsys, monkeypatch):
    def in_this_process(variants, **settings):
        settings.pop("threads")
        return [measure_speed(load_variant(variant), variant=variant.name, **settings) for variant in variants]

    monkeypatch.setattr("fistapruner.sparse.bench.compare", in_this_process)
    source = save_pruned(tmp_path / "m")
    pack(source, tmp_path / "p")
    for folder in (source, tmp_path / "p"):
        assert main(["bench", str(folder), "--prompt", "4", "--tokens", "3", "--runs", "1"]) == 0
        printed = capsys.readouterr().out
        for name in ("dense float32", "dense bfloat16", "pruned float32", "packed", "packed int8", "On this machine"):
            assert name in printed
    assert main(["bench", str(source), "--tokens", "1"]) == 2
    assert main(["bench", str(tmp_path / "none")]) == 2


def test_more_tokens_than_positions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fistapruner.sparse.bench.compare", lambda *args, **settings: [])
    source = save_pruned(tmp_path / "m", "gpt2")  # 128 positions
    assert bench(source, prompt=100, tokens=28) == []
    with pytest.raises(FistaPrunerError, match="prompt 100 and 29 new tokens are more than the 128"):
        bench(source, prompt=100, tokens=29)


def test_a_process_says_what_went_wrong(tmp_path, monkeypatch):
    class Pipe(list):
        send = list.append

    def out_of_range(variant):
        raise IndexError("index out of range in self")

    monkeypatch.setattr("fistapruner.sparse.speed.load_variant", out_of_range)
    pipe = Pipe()
    _serve(Variant("dense", tmp_path), 1, 4, 4, 1, pipe)
    assert pipe == [{"error": "IndexError: index out of range in self"}]


def test_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pack(save_pruned(tmp_path / "m"), tmp_path / "p")
    (found,) = compare([Variant("packed", tmp_path / "p")], prompt=4, tokens=3, runs=2, threads=1)
    assert (found.variant, found.runs, found.threads) == ("packed", 2, 1)
    assert found.peak_memory > 2**20
    assert found.file_size > 0
    (tmp_path / "p" / "packed.json").write_text("{}")
    with pytest.raises(FistaPrunerError, match="packed"):
        compare([Variant("packed", tmp_path / "p")], threads=1)

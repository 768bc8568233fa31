"""From a checkpoint to a pruned checkpoint that transformers loads, for many architectures, through the public API."""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.core import NM
from fistapruner.models.build import load_whole
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.models.safetensors import SafetensorsFile
from fistapruner.runs.listener import Listener
from fistapruner.runs.prune_directory import PruneDirectory
from fistapruner.text import tokens_sha256

SMALL = {"source": "python", "samples": 4, "seqlen": 32}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_is_pruned_exactly_and_loads(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=torch.bfloat16)
    hard = {"propagate": "pruned", "dense_target": 0.5, "residual": "correct"}
    report = fp.prune(str(folder), tmp_path / "run", sparsity="2:4", method="wanda+refit", calibration=SMALL, **hard)
    assert report.status == "finished"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    source = AutoModelForCausalLM.from_pretrained(folder).eval()
    layout = discover(LayerwiseModel(Checkpoint.open(folder), torch.device("cpu")))
    pruned = set()
    for name, operator in layout.operators():
        index = int(name.removeprefix(layout.layers_name + ".").partition(".")[0])
        weight = operator.weight(model.get_submodule(f"{layout.layers_name}.{index}"))
        assert NM(2, 4).satisfies(weight), name
        assert int((weight == 0).sum()) == weight.numel() // 2, name
        pruned.add(f"{name}.weight")
    # Everything else is untouched, tied weights stay tied.
    for name, tensor in source.state_dict().items():
        if name not in pruned:
            assert torch.equal(model.state_dict()[name], tensor), name
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    # The pruned model is the one whose error was reported: it still behaves, and it generates.
    tokens = torch.randint(3, tiny.VOCABULARY, (1, 12))
    assert torch.isfinite(model(tokens).logits).all()
    assert model.generate(tokens, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 16)


def test_a_model_of_images_and_text_stays_one_and_its_language_model_is_pruned(tmp_path: Path) -> None:
    folder = tiny.save_image_text(tmp_path / "model")
    recipe = {"sparsity": "2:4", "method": "wanda+refit", "calibration": SMALL}
    assert fp.prune(str(folder), tmp_path / "run", **recipe).status == "finished"
    out = tmp_path / "run" / "model"
    assert (out / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()
    auto = transformers.AutoModelForImageTextToText
    model, source = auto.from_pretrained(out).eval(), auto.from_pretrained(folder).state_dict()
    linear = "model.language_model.layers.*_proj.weight"
    for name, tensor in model.state_dict().items():
        if fnmatch(name, linear):
            assert NM(2, 4).satisfies(tensor), name
        else:
            assert torch.equal(source[name], tensor), name
    tokens = torch.randint(4, tiny.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    generated = model.generate(tokens, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 16)
    fp.pack(out, tmp_path / "packed", values="bf16")
    with torch.no_grad():
        logits = model(tokens).logits
        for packed in (auto.from_pretrained(tmp_path / "packed"), fp.load(tmp_path / "packed")):
            torch.testing.assert_close(packed(tokens).logits.float(), logits, rtol=0.05, atol=0.05)  # rounded
    for card in (out / "README.md", tmp_path / "packed" / "README.md"):
        assert "AutoModelForImageTextToText.from_pretrained" in card.read_text("utf-8")
        assert "AutoModelForCausalLM" not in card.read_text("utf-8")
    recovery = {"steps": 2, "windows_per_step": 2, "evaluate": None}
    data = {"source": "python", "seqlen": 16, "tokens": 300}
    fp.recover(out, tmp_path / "recovered", data=data, **recovery)
    trained = auto.from_pretrained(tmp_path / "recovered" / "model").state_dict()
    assert all(NM(2, 4).satisfies(tensor) for name, tensor in trained.items() if fnmatch(name, linear))


def test_sharded_checkpoint_keeps_its_file_names(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", shard="40KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    fp.prune(str(folder), tmp_path / "run", method="magnitude", calibration=SMALL)
    out = tmp_path / "run" / "model"
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    AutoModelForCausalLM.from_pretrained(out)


def test_same_recipe_same_bits(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    for run in ("a", "b"):
        fp.prune(str(folder), tmp_path / run, method="sparsegpt", calibration={**SMALL, "source": "self"})
    files = [tiny.weights(tmp_path / run) for run in ("a", "b")]
    assert files[0] == files[1]


def test_calibration_text_is_generated_on_the_threads_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def loaded(*arguments: Any, **keywords: Any) -> Any:
        threads.append(torch.get_num_threads())
        return load_whole(*arguments, **keywords)

    monkeypatch.setattr("fistapruner.text.generate.load_whole", loaded)
    before = torch.get_num_threads()
    settings = {"calibration": {**SMALL, "source": "self"}, "execution": {"threads": before + 1}}
    report = fp.prune(tiny.save("llama", tmp_path / "model"), tmp_path / "run", method="magnitude", **settings)
    assert threads == [before + 1]
    assert report.machine.threads == before + 1
    assert torch.get_num_threads() == before


def test_targets_and_ignore_choose_operators(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    report = fp.prune(
        str(folder),
        tmp_path / "run",
        method="wanda",
        calibration=SMALL,
        targets=["re:mlp"],
        ignore=["re:layers\\.1\\.", "down_proj"],
    )
    names = {f"{layer.name}.{operator.name}" for layer in report.layers for operator in layer.operators}
    assert names == {f"model.layers.{index}.mlp.{kind}" for index in (0, 2) for kind in ("gate_proj", "up_proj")}


def test_an_allocation_by_pattern_is_exact(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    report = fp.prune(
        str(folder), tmp_path / "run", method="wanda", calibration=SMALL, allocation={"re:mlp": "70%", "o_proj": "2:4"}
    )
    for layer in report.layers:
        for operator in layer.operators:
            rows, columns = operator.shape
            asked = fp.parse_sparsity(
                "70%" if "mlp" in operator.name else "2:4" if "o_proj" in operator.name else "50%"
            )
            assert operator.zeros == asked.zeros(rows, columns), operator.name


def test_dense_model_at_sparsity_zero(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path / "model", dtype=torch.bfloat16)
    fp.prune(str(folder), tmp_path / "run", sparsity=0.0, method="sparsegpt", calibration=SMALL)
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "run" / "model")
    for name in before.names():
        assert torch.equal(before.read(name), after.read(name)), name


def test_report_holds_what_fista_did(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    report = fp.prune(
        str(folder), tmp_path / "run", method="fista", calibration=SMALL, evaluate="python", evaluate_windows=2
    )
    stored = json.loads((tmp_path / "run" / "report.json").read_text())
    step = stored["layers"][0]["operators"][0]["steps"][-1]
    assert step["method"] == "fista"
    assert {"lipschitz", "rounds", "iterations", "e_total"} <= set(step)
    assert {"lambda", "steps", "e_total", "e_fista"} <= set(step["rounds"][0])
    assert {"capture", "gram", "solve"} <= set(stored["totals"]["time_split"])
    written, dense = ((place / "model.safetensors").stat().st_size for place in (tmp_path / "run" / "model", folder))
    assert (report.totals.checkpoint_bytes, report.model.bytes) == (written, dense)
    evaluation = report.evaluations[0]
    assert evaluation.perplexity is not None
    assert evaluation.reference is not None
    assert evaluation.perplexity.perplexity != evaluation.reference.perplexity
    assert (tmp_path / "run" / "model" / "README.md").read_text().startswith("---")


class TestRefusals:
    """Bad input: one line that names thing and value, before any layer is touched."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tiny.save("llama", tmp_path / "model")

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"sparsity": "1.5"}, ["1.5"]),
            ({"sparsity": "5:7"}, ["5:7", "32 inputs", "q_proj"]),
            ({"sparsity": "half"}, ["half"]),
            ({"method": "magic"}, ["magic", "wanda"]),
            ({"method": "refit"}, ["refit"]),
            ({"method": [{"fista": {"speed": 3}}]}, ["fista", "speed"]),
            ({"nonsense": 1}, ["nonsense"]),
            ({"targets": ["no_such"]}, ["no_such", "model.layers.0.self_attn.q_proj"]),
            ({"targets": ["re:("]}, ["re:("]),
            ({"ignore": ["re:."]}, ["no operator"]),
            ({"calibration": {"source": "missing.txt"}}, ["missing.txt"]),
            ({"calibration": {"source": "python", "seqlen": 999999}}, ["999999"]),
            ({"evaluate": "missing.txt"}, ["missing.txt"]),
            ({"execution": {"device": "tpu:7"}}, ["tpu:7"]),
        ],
    )
    def test_settings(self, folder: Path, tmp_path: Path, settings: dict[str, object], words: list[str]) -> None:
        base: dict[str, object] = {"calibration": SMALL}
        with pytest.raises(fp.FistaPrunerError) as caught:
            fp.prune(str(folder), tmp_path / "run", **{**base, **settings})  # type: ignore[arg-type]
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message
        assert not list((tmp_path / "run" / "layers").glob("*")) if (tmp_path / "run").exists() else True

    def test_missing_model(self, tmp_path: Path) -> None:
        with pytest.raises(fp.FistaPrunerError, match="no-such-model"):
            fp.prune(str(tmp_path / "no-such-model"), tmp_path / "run")

    def test_truncated_weights(self, folder: Path, tmp_path: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(fp.FistaPrunerError, match=r"model\.safetensors"):
            fp.prune(str(folder), tmp_path / "run", calibration=SMALL)

    def test_nan_in_weights_names_the_operator(self, folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(fp.FistaPrunerError, match=r"layers\.1\.mlp\.up_proj"):
            fp.prune(str(folder), tmp_path / "run", method="wanda", calibration=SMALL)
        assert (tmp_path / "run" / "layers" / "0000.json").exists()  # what was computed is kept
        assert not (tmp_path / "run" / "model").exists()

    def test_too_short_calibration_text(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("a few words")
        with pytest.raises(fp.FistaPrunerError, match=r"short\.txt"):
            fp.prune(str(folder), tmp_path / "run", calibration={**SMALL, "source": str(tmp_path / "short.txt")})

    def test_a_run_of_another_recipe(self, folder: Path, tmp_path: Path) -> None:
        fp.prune(str(folder), tmp_path / "run", method="wanda", calibration=SMALL)
        with pytest.raises(fp.FistaPrunerError, match="sparsity"):
            fp.prune(str(folder), tmp_path / "run", method="wanda", sparsity="60%", calibration=SMALL)

    def test_a_folder_with_other_things(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("x")
        with pytest.raises(fp.FistaPrunerError, match="other things"):
            fp.prune(str(folder), tmp_path / "run", calibration=SMALL)

    def test_encoder_decoder(self, tmp_path: Path) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        with pytest.raises(fp.FistaPrunerError, match="encoder-decoder"):
            fp.prune(str(tmp_path / "t5"), tmp_path / "run")


def test_code_that_comes_with_a_checkpoint_goes_with_the_pruned_one(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": code})
    )
    settings = {"method": "magnitude", "calibration": SMALL, "evaluate": "python", "evaluate_windows": 2}
    report = fp.prune(str(folder), tmp_path / "run", trust_remote_code=True, **settings)
    assert report.evaluations
    assert report.generations
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"


def test_bad_input_is_refused_before_anything_is_generated_or_measured(tmp_path: Path) -> None:
    folder = str(tiny.save("llama", tmp_path / "model"))

    class NoLongWork(Listener):
        """Fails where long work begins."""

        def say(self, message: str) -> None:
            assert not message.startswith(("calibration:", "measuring"))

    refused: list[tuple[dict[str, Any], str]] = [
        ({"evaluate": "python", "evaluate_windows": 0}, "windows 0 is out of range"),
        ({"evaluate": "python", "evaluate_windows": "all"}, "evaluate_windows 'all': a whole number from 1"),
        ({"evaluate": "python", "evaluate_windows": True}, "evaluate_windows True: a whole number from 1"),
        ({"evaluate_windows": 4}, "evaluate_windows 4 has no effect: evaluate names no text"),
        ({"evaluate": "none"}, "evaluate 'none' is no text: give None to evaluate nothing"),
        ({"evaluate": Path("nowhere.txt")}, "'nowhere.txt' is neither a file nor a known data set"),
        ({"evaluate": "nowhere.txt"}, "'nowhere.txt' is neither a file nor a known data set"),
        ({"tokens": torch.ones(2, 16)}, "tokens is of the class Tensor, and two are expected: a tensor"),
        ({"tokens": (torch.ones(2, 16), {})}, "tokens is of the class tuple, and two are expected"),
        ({"tokens": ([[1, 2], [3, 4]], {})}, "tokens is of the class tuple, and two are expected"),
        ({"tokens": (torch.ones(2, 16).int(), {})}, "tokens, how they were drawn: source: Field required"),
        ({"tokens": (torch.ones(2, 16).int(), {"source": "x", "by": 1j})}, "tokens, how they were drawn: "),
        ({"execution": {"memory_limit": "1MiB"}}, "--memory-limit 1.00 MiB is not enough"),
        ({"allocation": {"re:[": "40%"}}, "is not a regular expression"),
        ({"calibration": {"source": "self", "seqlen": 4096}}, "seqlen 4096 is more than"),
    ]
    if find_spec("ray") is None:
        refused.append(({"execution": {"executor": "ray"}}, "--executor ray needs the package 'ray'"))
    for settings, message in refused:
        with pytest.raises(fp.FistaPrunerError, match=re.escape(message)):
            fp.prune(folder, tmp_path / "run", listener=NoLongWork(), **settings)


def test_text_that_a_stopped_attempt_generated_is_not_generated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = str(tiny.save("llama", tmp_path / "model")), tmp_path / "run"
    settings: dict[str, Any] = {"sparsity": "50%", "calibration": {"source": "self", "samples": 4, "seqlen": 32}}

    class Stops(Listener):
        """Interrupts the run once the text is there."""

        def say(self, message: str) -> None:
            if message.startswith("measuring"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^interrupted before the first decoder layer; give the same command"):
        fp.prune(folder, run, listener=Stops(), **settings)
    assert not (run / "run.json").exists()
    # Other text in its place is taken for the generated one: nothing is generated again.
    marked = PruneDirectory(Path(shutil.copytree(run, tmp_path / "marked")))
    drawing = SafetensorsFile(marked.calibration_file).metadata["drawing"]
    tokens, how = marked.drawn(drawing) or pytest.fail("the text is not there")
    sha256 = tokens_sha256(tokens.flip(0))
    marked.write_tokens(tokens.flip(0), drawing, {**how, "sha256": sha256})
    with monkeypatch.context() as patched:  # nor does the plan count what generating takes
        patched.setattr("fistapruner.planning.generation_bytes", lambda *_: 2**50)
        with pytest.raises(fp.FistaPrunerError, match="--calibration self needs the whole model on cpu, 1,024 TiB"):
            fp.prune(folder, tmp_path / "refused", **settings)
        taken = fp.prune(folder, marked.folder, **settings).calibration
    assert taken is not None
    assert taken.sha256 == sha256
    report = fp.prune(folder, run, **settings)
    other = fp.prune(folder, tmp_path / "other", **settings)
    assert report.calibration == other.calibration
    assert tiny.weights(run) == tiny.weights(tmp_path / "other")


def test_a_run_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over it. " * 60)
    monkeypatch.chdir(tmp_path)
    tiny.begin("model", "run", method="magnitude", calibration=SMALL, evaluate="text.txt", layers=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = fp.resume(tmp_path / "run")
    assert report.status == "finished"
    assert report.evaluations[0].perplexity is not None
    again = fp.resume(tmp_path / "run")  # of a finished run: nothing that was measured goes away
    assert again.evaluations == report.evaluations
    assert again.totals.peak_memory == report.totals.peak_memory


def test_layers_that_are_told_of_tokens_are_refused(tmp_path: Path) -> None:
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this release of transformers has no Gemma 4")
    own = {
        "head_dim": 8,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
    }
    config = transformers.Gemma4TextConfig(**{**tiny.GQA, **own})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(fp.FistaPrunerError, match=r"Gemma4ForCausalLM: decoder layer 0 is given .*token ids"):
        fp.prune(str(tmp_path / "model"), tmp_path / "run", calibration=SMALL)
    with pytest.raises(fp.FistaPrunerError, match="token ids"):
        fp.evaluate(tmp_path / "model", "python", seqlen=32, windows=2)

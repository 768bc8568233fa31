"""Export to GGUF: what is written is read back as the same checkpoint, and other models' files are refused."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.cli import main
from fistapruner.models.files.gguf_export import Order

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
from fistapruner.models.files.gguf import convert_gguf  # noqa: E402
from fistapruner.models.files.widths import widths_section  # noqa: E402
from tiny_gguf import HEADS, KEY_HEADS, NAMES, TOKENS, permuted, write_gemma2, write_gguf, write_gpt2  # noqa: E402


@pytest.fixture
def dense(tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model as a GGUF file, and the fp32 folder made of it."""
    write_gguf(tmp_path / "dense.gguf", settings={"general.size_label": "60K"})
    convert_gguf(tmp_path / "dense.gguf", tmp_path / "dense", torch.float32)
    return tmp_path / "dense.gguf", tmp_path / "dense"


def change_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | entries), "utf-8")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("values", "error"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)])
@pytest.mark.parametrize("structure", [{}, {"remove": "mlp=64"}])
def test_what_is_written_is_read_back(
    dense: tuple[Path, Path], tmp_path: Path, values: Any, error: float, structure: dict[str, Any]
) -> None:
    source, _ = dense
    recipe = {"sparsity": "50%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    fp.prune(str(source), tmp_path / "run", **recipe, structure=structure)
    assert fp.export(tmp_path / "run", tmp_path / "out.gguf", values=values) == tmp_path / "out.gguf"
    convert_gguf(tmp_path / "out.gguf", tmp_path / "back", torch.float32)
    asked, found = tensors(tmp_path / "run" / "model"), tensors(tmp_path / "back")
    assert asked.keys() == found.keys()
    for name, tensor in asked.items():
        assert float((found[name] - tensor.float()).norm()) <= error * float(tensor.float().norm()), name
        if values != "q8_0":
            assert bool((found[name][tensor == 0] == 0).all()), name
    config = json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))
    assert config["intermediate_size"] == (64 if structure else 96)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert ("general.size_label" in fields) == (not structure)
    assert fields["general.name"].contents() == "tiny (pruned)"
    assert (tmp_path / "back" / "tokenizer.json").read_text("utf-8") == (dense[1] / "tokenizer.json").read_text("utf-8")


@pytest.mark.parametrize(("values", "error"), [("f32", 1e-3), ("q8_0", 0.1)])
@pytest.mark.parametrize("remove", ["", "mlp=64", "mlp=32,heads=1"])
def test_llama_cpp_predicts_what_transformers_does(
    dense: tuple[Path, Path], tmp_path: Path, values: Any, error: float, remove: str
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    recipe = {"sparsity": "50%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    fp.prune(str(dense[0]), tmp_path / "run", **recipe, structure={"remove": remove} if remove else {})
    folder = tmp_path / "run" / "model"
    # So that positions, and the order of rows for them, decide predictions.
    wide = {name: value * 8 if "_proj" in name else value for name, value in tensors(folder).items()}
    save_file(wide, folder / "model.safetensors", {"format": "pt"})
    fp.export(folder, tmp_path / "out.gguf", like=dense[0], values=values)
    assert_llama_cpp_predicts(tmp_path / "out.gguf", folder, error)


def assert_llama_cpp_predicts(path: Path, folder: Path, error: float) -> None:
    """llama.cpp gives the file's next tokens the logarithms of probabilities that transformers gives the folder's."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    prompt, vocabulary = [1, 5, 9, 17, 8, 20, 5, 9], len(TOKENS)
    asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocabulary, "ignore_eos": False}
    answer = xllamacpp.Server(params).handle_completions(asked)
    found = {top["id"]: top["logprob"] for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).tolist()
    assert [found[token] for token in range(vocabulary)] == pytest.approx(expected, abs=error)


MLP = {"intermediate_size": 64}
ALL = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def cut_to(folder: Path, widths: dict[int, dict[str, int]]) -> None:
    """Leave the first channels and heads of every decoder layer, as many as its widths say."""
    found = tensors(folder)  # times 8, so that positions, and the order of rows for them, decide predictions
    for index, sizes in widths.items():
        channels, queries, keys = (sizes.get(name, usual) for name, usual in zip(ALL, (96, 4, 2), strict=True))
        rows = {"up": channels, "gate": channels, "q": 16 * queries, "k": 16 * keys, "v": 16 * keys}
        for stem, kept in rows.items():
            name = f"model.layers.{index}.{'mlp' if stem in ('up', 'gate') else 'self_attn'}.{stem}_proj.weight"
            found[name] = found[name][:kept].clone() * 8
        for stem, kept in (("mlp.down", channels), ("self_attn.o", 16 * queries)):
            name = f"model.layers.{index}.{stem}_proj.weight"
            found[name] = found[name][:, :kept].clone() * 8
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=widths_section(widths))


WIDTHS = pytest.mark.parametrize("widths", [{0: MLP, 1: ALL}, {1: ALL}, {0: ALL}], ids=["both", "second", "first"])


@WIDTHS
def test_layers_may_have_widths_of_their_own(
    dense: tuple[Path, Path], tmp_path: Path, widths: dict[int, dict[str, int]]
) -> None:
    """The file is of the architecture that llama.cpp has for them, with a count for every layer."""
    source, folder = dense
    cut_to(folder, widths)
    fp.export(folder, tmp_path / "out.gguf", like=source, values="f32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "deci"
    assert not [key for key in reader.fields if key.startswith("llama.")]
    counts = {"feed_forward_length": 96, "attention.head_count": HEADS, "attention.head_count_kv": KEY_HEADS}
    for (key, usual), name in zip(counts.items(), ALL, strict=True):
        changed = any(name in sizes for sizes in widths.values())
        expected = [widths.get(index, {}).get(name, usual) for index in range(2)] if changed else usual
        assert reader.fields[f"deci.{key}"].contents() == expected
    assert [reader.fields[f"deci.attention.{each}_length"].contents() for each in ("key", "value")] == [16, 16]
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name, tensor in tensors(folder).items():
        if (layer := re.match(r"model\.layers\.(\d)\.(.*)\.weight", name)) is None:
            continue
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(layer[2], 0)
        sizes = widths.get(int(layer[1]), {})
        own = sizes.get("num_attention_heads" if heads == HEADS else "num_key_value_heads", heads)
        expected = permuted(tensor.numpy(), own) if heads else tensor.numpy()
        np.testing.assert_array_equal(stored[f"blk.{layer[1]}.{NAMES[layer[2]]}.weight"], expected)


@WIDTHS
def test_llama_cpp_reads_the_widths_of_layers(
    dense: tuple[Path, Path], tmp_path: Path, widths: dict[int, dict[str, int]]
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    source, folder = dense
    cut_to(folder, widths)
    fp.export(folder, tmp_path / "out.gguf", like=source, values="f32")
    assert_llama_cpp_predicts(tmp_path / "out.gguf", folder, 1e-3)


@pytest.mark.parametrize(
    ("said_of_a_layer", "said"),
    [
        ({**ALL, "intermediate_size": 16}, r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' has 32 rows, and interm"),
        ({**ALL, "num_attention_heads": 4}, r"q_proj\.weight' has 32 rows, and num_attention_heads of its layer is 4"),
        ({**ALL, "num_key_value_heads": 2}, r"k_proj\.weight' has 16 rows, and num_key_value_heads of its layer is 2"),
        ({**ALL, "hidden_size": 64}, "dense: hidden_size of single decoder layers is not exported"),
    ],
)
def test_widths_that_are_not_those_of_the_tensors_are_refused(
    dense: tuple[Path, Path], tmp_path: Path, said_of_a_layer: dict[str, int], said: str
) -> None:
    """llama.cpp would not load the file."""
    source, folder = dense
    cut_to(folder, {1: ALL})
    change_config(folder, quantization_config=widths_section({1: said_of_a_layer}))
    with pytest.raises(FistaPrunerError, match=said):
        fp.export(folder, tmp_path / "out.gguf", like=source)
    assert not list(tmp_path.glob("*out.gguf*"))


def test_widths_of_layers_are_refused_where_llama_cpp_has_none(tmp_path: Path) -> None:
    write_gemma2(tmp_path / "dense.gguf", layers=2)
    convert_gguf(tmp_path / "dense.gguf", tmp_path / "dense", torch.float32)
    change_config(tmp_path / "dense", quantization_config=widths_section({0: {"intermediate_size": 4}}))
    said = (
        "decoder layers have different widths, which llama.cpp reads of the architecture llama only, and .* has gemma2"
    )
    with pytest.raises(FistaPrunerError, match=said):
        fp.export(tmp_path / "dense", tmp_path / "out.gguf", like=tmp_path / "dense.gguf")


@pytest.mark.parametrize(("values", "most"), [("f16", 7e4), ("q8_0", 9e6)])
def test_values_that_the_file_cannot_hold_are_refused(
    dense: tuple[Path, Path], tmp_path: Path, values: Any, most: float
) -> None:
    source, folder = dense
    name = "model.layers.0.mlp.up_proj.weight"
    changed = tensors(folder)
    changed[name][0, 0] = -most
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    said = f"{name}' has values up to {most:g}, which {values} cannot hold: give --values bf16"
    with pytest.raises(FistaPrunerError, match=re.escape(said)):
        fp.export(folder, tmp_path / "out.gguf", like=source, values=values)
    assert not list(tmp_path.glob("out.gguf*"))
    fp.export(folder, tmp_path / "out.gguf", like=source, values="bf16")
    with pytest.raises(FistaPrunerError, match=r"^values 'int4': one of bf16, f16, f32, q8_0 is expected"):
        fp.export(folder, tmp_path / "other.gguf", like=source, values="int4")  # type: ignore[arg-type]


def test_a_very_sparse_model_is_of_its_dense_file(dense: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = dense
    sparse = tensors(folder)
    for name, tensor in sparse.items():
        if "_proj" in name:
            tensor[tensor.abs() < tensor.abs().flatten().quantile(0.95)] = 0.0
    save_file(sparse, folder / "model.safetensors", {"format": "pt"})
    fp.export(folder, tmp_path / "out.gguf", like=source, values="f32")
    convert_gguf(tmp_path / "out.gguf", tmp_path / "back", torch.float32)
    assert all(torch.equal(tensor, sparse[name]) for name, tensor in tensors(tmp_path / "back").items())


def test_rotary_positions_are_those_of_the_dense_file(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """Factors of 1 scale nothing; another number of turned dimensions is another model's."""
    write_gguf(tmp_path / "ones.gguf", more={"rope_freqs.weight": np.ones(8, np.float32)})
    fp.export(dense[1], tmp_path / "out.gguf", like=tmp_path / "ones.gguf")
    write_gguf(tmp_path / "half.gguf", settings={"llama.rope.dimension_count": 8})
    with pytest.raises(FistaPrunerError, match=r"its rope\.dimension_count is 8, that of .* 16"):
        fp.export(dense[1], tmp_path / "other.gguf", like=tmp_path / "half.gguf")


def test_kinds_of_models_are_refused_before_a_file_of_the_dense_model_is_asked_for(tmp_path: Path) -> None:
    tiny.save_image_text(tmp_path / "images")
    tiny.save("qwen3_moe", tmp_path / "experts")
    tiny.save("gpt_oss", tmp_path / "stacked")
    for name, said in (
        ("images", "images: qwen3_vl is a model of images and text"),
        ("experts", "experts is a mixture of experts"),
        ("stacked", "stacked is a mixture of experts"),
    ):
        with pytest.raises(FistaPrunerError, match=said):
            fp.export(tmp_path / name, tmp_path / "out.gguf")


@pytest.mark.parametrize(("values", "kept"), [("f16", False), ("q8_0", True)])
def test_facts_of_the_dense_files_quantisation_are_left_out(tmp_path: Path, values: Any, kept: bool) -> None:
    settings = {"general.quantization_version": 2, "quantize.imatrix.entries_count": 224}
    write_gguf(tmp_path / "dense.gguf", settings=settings)
    convert_gguf(tmp_path / "dense.gguf", tmp_path / "dense", torch.float32)
    fp.export(tmp_path / "dense", tmp_path / "out.gguf", like=tmp_path / "dense.gguf", values=values)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert ("general.quantization_version" in fields) == kept
    assert "quantize.imatrix.entries_count" not in fields


def test_an_empty_array_of_the_dense_file_is_left_out(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """The writer of the package refuses one, so it takes the place of a string here."""
    write_gguf(tmp_path / "like.gguf", settings={"general.tags": "tags"})
    (tmp_path / "like.gguf").write_bytes(
        (tmp_path / "like.gguf")
        .read_bytes()
        .replace(
            b"general.tags" + struct.pack("<IQ", gguf.GGUFValueType.STRING, 4) + b"tags",
            b"general.tags" + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, 0),
        )
    )
    assert gguf.GGUFReader(tmp_path / "like.gguf").fields["general.tags"].contents() == []
    fp.export(dense[1], tmp_path / "out.gguf", like=tmp_path / "like.gguf")
    assert "general.tags" not in gguf.GGUFReader(tmp_path / "out.gguf").fields


def test_a_relative_name_says_what_it_is_relative_to(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"sparsity": "50%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    fp.prune(dense[0].name, "run", **recipe)
    fp.export("run", "out.gguf")
    monkeypatch.chdir("run")
    with pytest.raises(fp.FistaPrunerError, match=r"dense\.gguf, .* exist here .*where its run began\): .* --like"):
        fp.export("../run", "out.gguf")


def test_the_dense_file_is_found_in_its_folder_and_by_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    write_gguf(tmp_path / "alone" / "dense.gguf")
    (tmp_path / "DENSE.GGUF").write_bytes((tmp_path / "alone" / "dense.gguf").read_bytes())
    recipe = {"sparsity": "50%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    for model in ("alone", "DENSE.GGUF"):
        fp.prune(str(tmp_path / model), tmp_path / f"run-{model}", **recipe)
        fp.export(tmp_path / f"run-{model}", tmp_path / f"{model}-out.gguf")


def test_the_home_folder_is_understood(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "dense.gguf").write_bytes(dense[0].read_bytes())
    for number, like in enumerate(("~/dense.gguf", "~/alone")):
        fp.export(dense[1], tmp_path / f"{number}.gguf", like=like)
    recipe = {"sparsity": "0%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    fp.prune("~/alone", tmp_path / "run", **recipe)
    fp.export(tmp_path / "run", tmp_path / "out.gguf")
    with pytest.raises(FistaPrunerError, match=r"~nobody-here/x\.gguf: there is no such home folder"):
        fp.export(dense[1], tmp_path / "other.gguf", like="~nobody-here/x.gguf")


def test_a_folder_that_cannot_be_written_shows_before_the_weights_are_converted(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp.export(dense[1], tmp_path / "new" / "folder" / "out.gguf", like=dense[0])
    (tmp_path / "file").touch()
    quantize = Mock()
    monkeypatch.setattr(gguf, "quantize", quantize)
    monkeypatch.setattr(Path, "touch", Mock(side_effect=PermissionError(13, "Permission denied")))
    for out in (tmp_path / "file" / "out.gguf", tmp_path / "other.gguf"):
        with pytest.raises(FistaPrunerError, match=f"cannot write {out}"):
            fp.export(dense[1], out, like=dense[0])
    assert not quantize.called


def test_fewer_heads_keep_their_size(dense: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = dense
    fp.prune(
        str(folder),
        tmp_path / "run",
        sparsity="0%",
        method="magnitude",
        calibration={"source": "self", "samples": 2, "seqlen": 16},
        structure={"remove": "heads=1"},
    )
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "o.gguf"), "--like", str(source), "--values", "f32"]) == 0
    )
    reader = gguf.GGUFReader(tmp_path / "o.gguf")
    keys = ("head_count", "head_count_kv", "key_length")
    counts = {key: reader.fields[f"llama.attention.{key}"].contents() for key in keys}
    assert counts == {"head_count": 2, "head_count_kv": 1, "key_length": 16}
    exported = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kept = tensors(tmp_path / "run" / "model")
    for letter, heads in (("q", 2), ("k", 1)):
        weight = kept[f"model.layers.0.self_attn.{letter}_proj.weight"].float().numpy()
        assert np.array_equal(exported[f"blk.0.attn_{letter}.weight"], permuted(weight, heads))
    check_read_back(tmp_path / "o.gguf", tmp_path / "run" / "model", tmp_path / "back")


def check_read_back(file: Path, asked: Path, out: Path) -> None:
    """Check that a file is converted to the weights that it was written from."""
    convert_gguf(file, out, torch.float32)
    wanted, found = tensors(asked), tensors(out)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.float()), name
    AutoModelForCausalLM.from_pretrained(out)


def test_fewer_heads_are_refused_where_they_scale_attention(tmp_path: Path) -> None:
    """As in Gemma 2 27B."""
    write_gemma2(tmp_path / "dense.gguf", 2)
    convert_gguf(tmp_path / "dense.gguf", tmp_path / "model", torch.float32)
    change_config(tmp_path / "model", num_attention_heads=1, query_pre_attn_scalar=24)
    with pytest.raises(FistaPrunerError, match=r"query_pre_attn_scalar 24 .* a head, 8: .*fewer heads \(1\)"):
        fp.export(tmp_path / "model", tmp_path / "out.gguf", like=tmp_path / "dense.gguf")


def test_width_is_that_of_the_weights(tmp_path: Path) -> None:
    """The config of GPT-2 calls it ``n_inner``, which the reader does not know."""
    write_gpt2(tmp_path / "dense.gguf")
    recipe = {"sparsity": "0%", "method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    fp.prune(str(tmp_path / "dense.gguf"), tmp_path / "run", **recipe, structure={"remove": "mlp=192"})
    fp.export(tmp_path / "run", tmp_path / "out.gguf", values="f32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["gpt2.feed_forward_length"].contents() == 192
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["blk.0.ffn_up.weight"] == shapes["blk.0.ffn_down.weight"][::-1] == (64, 192)
    assert shapes["blk.0.ffn_up.bias"] == (192,)
    check_read_back(tmp_path / "out.gguf", tmp_path / "run" / "model", tmp_path / "back")


def test_models_with_another_name_than_their_files(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """Files of Mistral models call their architecture llama; old checkpoints have tensors that no model asks for."""
    source, folder = dense
    change_config(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    more = tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(more, folder / "model.safetensors", {"format": "pt"})
    fp.export(folder, tmp_path / "out.gguf", like=source, values="f32")
    ours, theirs = (
        {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "out.gguf", source)
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_head_is_written_where_the_checkpoint_has_one(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """Without one, llama.cpp takes the embeddings; a file without one has no place for one."""
    source, folder = dense
    tied = tensors(folder)
    head = tied.pop("lm_head.weight")
    change_config(folder, tie_word_embeddings=True)
    save_file(tied, folder / "model.safetensors", {"format": "pt"})
    fp.export(folder, tmp_path / "out.gguf", like=source, values="f32")
    names = {tensor.name for tensor in gguf.GGUFReader(source).tensors}
    assert names - {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors} == {"output.weight"}
    change_config(folder, tie_word_embeddings=False)
    save_file(tied | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FistaPrunerError, match=r"out\.gguf is not .*: it has no place for 'lm_head\.weight' of"):
        fp.export(folder, tmp_path / "other.gguf", like=tmp_path / "out.gguf")


def test_fewer_heads_of_a_mistral(dense: tuple[Path, Path], tmp_path: Path) -> None:
    """Three heads are left, which the rows of the dense file's tensors cannot be divided into."""
    source, folder = dense
    change_config(folder, num_attention_heads=3, num_key_value_heads=1, head_dim=16)
    change_config(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    rows = {"q_proj": 48, "k_proj": 16, "v_proj": 16}
    cut = {}
    for name, tensor in tensors(folder).items():
        kept = tensor[: rows.get(name.split(".")[-2], len(tensor))]
        cut[name] = (kept[:, :48] if "o_proj" in name else kept).contiguous()
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    fp.export(folder, tmp_path / "out.gguf", like=source, values="f32")
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    found = [shapes[f"blk.0.attn_{name}.weight"] for name in ("q", "k", "v", "output")]
    assert found == [(64, 48), (64, 16), (64, 16), (48, 64)]


def test_pickles_are_exported_where_they_are_allowed(
    dense: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = dense
    how = ["--like", str(source), "--values", "f32"]
    assert main(["export", str(folder), str(tmp_path / "expected.gguf"), *how]) == 0
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = ["export", str(folder), str(tmp_path / "out.gguf"), *how]
    assert main(command) == 2
    assert "or trust them with --allow-pickle" in capsys.readouterr().err
    monkeypatch.setattr("fistapruner.cli.progress.EVERY", 0)
    assert main([*command, "--allow-pickle"]) == 0
    said = capsys.readouterr().err
    assert said.index("tensors written: ") < said.index("checking the written file")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("values", ["f32", "f16", "q8_0"])
def test_the_file_alone_takes_room(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: Any
) -> None:
    """As much as its tensors, without its header; there is no temporary file."""
    source, folder = dense
    fp.export(folder, tmp_path / "measured.gguf", like=source, values=values)
    nbytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "measured.gguf").tensors)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=nbytes - 1))
    with pytest.raises(FistaPrunerError, match=r"out\.gguf needs .* are free; free 1 B more"):
        fp.export(folder, tmp_path / "out.gguf", like=source, values=values)
    left = tmp_path / ".out.gguf.partial"  # by an export that was killed
    left.write_bytes(b"0")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=nbytes - left.exists()))
    fp.export(folder, tmp_path / "out.gguf", like=source, values=values)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "measured.gguf").read_bytes()


def test_the_order_of_a_kind_of_tensor_is_found_once(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the matrices whose rows llama.cpp orders, it is kept as one number for every row."""
    found: list[Order] = []
    find = Order.of
    monkeypatch.setattr(Order, "of", lambda read, shape: found.append(order := find(read, shape)) or order)
    fp.export(dense[1], tmp_path / "out.gguf", like=dense[0])
    assert len(found) == 3 + 9  # outside the two decoder layers, and in one of them
    assert sorted(order.places.size for order in found if order.places is not None) == [32, 64]


def test_the_names_of_tensors_are_built_once(
    dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would build them for every module."""
    build = Mock(side_effect=gguf.get_tensor_name_map)
    monkeypatch.setattr(gguf, "get_tensor_name_map", build)
    fp.export(dense[1], tmp_path / "out.gguf", like=dense[0])
    assert build.call_count == 1
    assert gguf.get_tensor_name_map is build


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (5,)])
def test_readers_are_turned_round(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    readers = {
        "as it is": lambda x: x,
        "transposed": lambda x: x.T,
        "shifted": lambda x: x - 1,
        "rows in another order": lambda x: x[::-1],
    }
    for what, read in readers.items():
        order = Order.of(read, shape)
        assert order is not None, what
        assert np.allclose(read(order.stored(values)), values, atol=1e-6), what
    assert Order.of(lambda x: 2 * x, shape) is None
    assert Order.of(lambda x: x * 0, shape) is None


def test_bad_input_is_refused_and_leaves_nothing(
    dense: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = dense
    (tmp_path / "there.gguf").write_bytes(b"mine")
    other = tmp_path / "other"
    convert_gguf(source, other, torch.float32)
    changed = tensors(other)
    changed["model.embed_tokens.weight"] = torch.randn_like(changed["model.embed_tokens.weight"])
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    turned = tmp_path / "turned"
    convert_gguf(source, turned, torch.float32)
    rows = tensors(turned)
    rows["model.layers.0.self_attn.q_proj.weight"] = rows["model.layers.0.self_attn.q_proj.weight"].flip(0)
    save_file(rows, turned / "model.safetensors", {"format": "pt"})
    write_gguf(tmp_path / "unknown.gguf", architecture="smollm3")
    deeper = tmp_path / "deeper"
    convert_gguf(source, deeper, torch.float32)
    change_config(deeper, num_hidden_layers=3)
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    for name, change in (
        ("base", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("scaled", {"rope_parameters": scaled}),
        ("epsilon", {"rms_norm_eps": 1e-5}),
    ):
        convert_gguf(source, tmp_path / name, torch.float32)
        change_config(tmp_path / name, **change)
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").touch()
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "other.gguf").symlink_to(source)
    monkeypatch.chdir(tmp_path / "alone")  # whose only file is not taken unasked
    unfinished = tmp_path / "run"
    recipe = {"method": "magnitude", "calibration": {"source": "self", "samples": 2, "seqlen": 16}}
    tiny.begin(folder, unfinished, **recipe)
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, said in (
        ([folder, "there.gguf", "--like", source], "exists already"),
        ([folder, "out.bin", "--like", source], "must end in .gguf"),
        ([folder, "out.gguf"], "with --like, or convert the folder by its own tokenizer with llama.cpp's convert_hf"),
        ([folder, "out.gguf", "--like", tmp_path / "no.gguf"], "does not exist"),
        ([folder, "out.gguf", "--like", folder], f"--like {folder} is a folder, not a GGUF file: convert the dense"),
        (
            [folder, "out.gguf", "--like", tmp_path / "two"],
            "two is a folder, not a GGUF file; it holds GGUF files (a.gg",
        ),
        ([folder, "out.gguf", "--like", folder / "config.json"], "is not a GGUF file"),
        ([other, "out.gguf", "--like", source], "its embeddings differ"),
        ([turned, "out.gguf", "--like", source], "its blk.0.attn_q.weight is not 'model.layers.0.self_attn.q_proj"),
        ([folder, "out.gguf", "--like", tmp_path / "unknown.gguf"], "of the architecture 'smollm3'"),
        ([deeper, "out.gguf", "--like", source], "its block_count is 2, that of"),
        ([tmp_path / "base", "out.gguf", "--like", source], "its rope.freq_base is 10000, that of"),
        ([tmp_path / "scaled", "out.gguf", "--like", source], "its rotary positions are scaled by nothing, those of"),
        ([tmp_path / "epsilon", "out.gguf", "--like", source], "its attention.layer_norm_rms_epsilon is 1e-06, that"),
        ([tmp_path / "nothing", "out.gguf", "--like", source], "nothing is neither a run directory nor a folder with"),
        (["facebook/opt-125m", "out.gguf"], "facebook/opt-125m is neither a run directory nor a folder with"),
        ([folder / "config.json", "out.gguf"], "config.json is neither a run directory nor a folder with"),
        ([unfinished, "out.gguf"], f"no finished checkpoint: go on with 'fistapruner resume {unfinished}'"),
        ([unfinished, "out.gguf", "--like", source], f"go on with 'fistapruner resume {unfinished}'"),
    ):
        model, out, *rest = arguments
        assert main(["export", str(model), str(tmp_path / str(out)), *map(str, rest)]) == 2
        error = capsys.readouterr().err
        assert said in error, (arguments, error)
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"

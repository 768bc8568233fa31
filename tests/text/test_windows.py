"""Windows of calibration tokens: how they are drawn, that the seed decides them, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    PreTrainedTokenizerFast,
)

from fistapruner import FistaPrunerError
from fistapruner.errors import MissingExtraError
from fistapruner.measure.data import check_data
from fistapruner.models.files.checkpoint import Checkpoint
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.settings.calibration_settings import Calibration
from fistapruner.text import calibration_tokens
from fistapruner.text import windows as drawing
from fistapruner.text.self_generated import generate_tokens
from fistapruner.text.windows import (
    calibration_length,
    check_source,
    draw_from_documents,
    tokens_sha256,
    window_length,
)
from tiny import save

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters_tokenizer(bos: bool = False, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """One token a letter, one for a line break; everything else is unknown."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS, "\n"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token=eos)


def text_of(tokenizer: Any, ids: torch.Tensor) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_long_documents_give_one_window_each() -> None:
    tokenizer = letters_tokenizer()
    documents = [letter * 20 for letter in LETTERS[:10]] + ["zz"] * 50
    tokens, how = draw_from_documents(documents, tokenizer, 8, 16, seed=3)
    assert tokens.shape == (8, 16)
    assert "long documents" in how
    rows = [text_of(tokenizer, row) for row in tokens]
    assert all(len(set(row)) == 1 for row in rows)
    assert len(set(rows)) == 8
    again, _ = draw_from_documents(documents, tokenizer, 8, 16, seed=3)
    other, _ = draw_from_documents(documents, tokenizer, 8, 16, seed=4)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


class Bytes:
    """A tokenizer that makes one token of ``size`` bytes."""

    bos_token_id = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, texts: list[str] | str, **_: Any) -> dict[str, Any]:
        found = [list(text.encode()[:: self.size]) for text in ([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": found[0] if isinstance(texts, str) else found}


@pytest.mark.parametrize(
    ("document", "size", "long"),
    [("a" * 9, 1, True), ("a" * 8, 1, False), ("é" * 6, 1, True), ("a" * 18, 2, True), ("a" * 16, 2, False)],
)
def test_long_is_a_document_of_more_tokens_than_a_window(document: str, size: int, long: bool) -> None:
    """Whatever its characters are; as many long documents as windows are enough."""
    _, how = draw_from_documents([document] * 5 + ["b"], Bytes(size), 5, 8)
    assert ("long documents" in how) == long


def test_every_window_of_a_long_document_may_be_drawn() -> None:
    tokens, _ = draw_from_documents([LETTERS[:5]] * 100, letters_tokenizer(), 60, 3)
    assert {text_of(letters_tokenizer(), row) for row in tokens} == {"abc", "bcd", "cde"}


def test_every_window_of_a_concatenation_may_be_drawn() -> None:
    drawn = [draw_from_documents([LETTERS], letters_tokenizer(), 3, 4, seed=seed)[0] for seed in range(20)]
    assert {text_of(letters_tokenizer(), row)[0] for tokens in drawn for row in tokens} == set("aeimqu")


def test_passages_are_joined_by_one_blank_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many the document ends with: whole passages of them are left out."""
    for name, value in (("LARGE", 1000), ("PASSAGE", 100)):
        monkeypatch.setattr(drawing, name, value)
    document = "\n\n".join([LETTERS] * 60) + "\n" * 350
    tokens, how = draw_from_documents([document], letters_tokenizer(), 100, 16)
    assert "concatenation of all passages" in how
    assert not any("\n\n\n" in text_of(letters_tokenizer(), row) for row in tokens)


def test_too_few_long_documents_fall_back_on_the_concatenation() -> None:
    tokenizer = letters_tokenizer()
    tokens, how = draw_from_documents([LETTERS] * 10, tokenizer, 4, 50)
    assert how == "windows that do not overlap, from the concatenation of all documents (278 tokens)"
    rows = [text_of(tokenizer, row) for row in tokens]
    joined = "\n\n".join([LETTERS] * 10)
    assert all(row in joined for row in rows)
    assert len({tuple(row.tolist()) for row in tokens}) == 4
    tokens, how = draw_from_documents([LETTERS] * 2, tokenizer, 6, 30)
    assert how == "overlapping windows from the concatenation of all documents (only 54 tokens)"
    assert tokens.shape == (6, 30)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("samples", [3, 6])
def test_windows_of_a_concatenation_do_not_overlap(samples: int, bos: bool) -> None:
    """No letter comes twice in the text, so a letter is a place in it."""
    tokenizer = letters_tokenizer(bos)
    tokens, how = draw_from_documents([LETTERS], tokenizer, samples, 4 + bos)
    assert "do not overlap" in how
    starts = [LETTERS.index(text_of(tokenizer, row[int(bos) :])) for row in tokens]
    assert set(starts) <= set(range(0, 24, 4))
    assert len(set(starts)) == samples


def test_a_concatenation_that_stops_early_says_of_how_many_documents_it_is() -> None:
    _, how = draw_from_documents([LETTERS] * 100, letters_tokenizer(), 1, 50)  # 28 tokens each, and 16 * 50 are enough
    said = "windows that do not overlap, from the concatenation of 29 of 100 documents, drawn at random (810 tokens)"
    assert how == said


class Counting:
    """A tokenizer that notes the most characters it was given at once, and how many in all."""

    def __init__(self) -> None:
        self.inner = letters_tokenizer()
        self.bos_token_id = None
        self.most = self.all = 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        characters = sum(map(len, texts))
        self.most, self.all = max(self.most, characters), self.all + characters
        return self.inner(texts, **options)


@pytest.mark.parametrize(("samples", "how"), [(4, "each of that many long passages"), (60, "of 54 passages, drawn at")])
def test_a_large_document_is_drawn_from_by_passages(monkeypatch: pytest.MonkeyPatch, samples: int, how: str) -> None:
    for name, value in (("LARGE", 1000), ("PASSAGE", 100), ("TOGETHER", 200), ("ENOUGH", 4)):
        monkeypatch.setattr(drawing, name, value)
    document = "\n\n".join(LETTERS[i % 26 :] + LETTERS[: i % 26] for i in range(160))
    for documents in ([document], [document, LETTERS]):
        tokenizer = Counting()
        tokens, said = draw_from_documents(documents, tokenizer, samples, 8)
        assert tokenizer.most <= 200
        assert tokenizer.all < len(document) * 2 / 3 or samples == 60
        assert len(documents) == 2 or how in said
        assert len(documents) == 1 or "documents and passages" in said
        assert all(part in document for row in tokens for part in text_of(tokenizer.inner, row).split("\n"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(LETTERS, min_size=1, max_size=40), min_size=1, max_size=80), st.integers(1, 100))
def test_other_documents_are_tokenised_whole_however_many_together(documents: list[str], together: int) -> None:
    tokenizer = Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "TOGETHER", together)
        got = list(drawing.tokenise(documents, tokenizer, "text"))
    assert got == letters_tokenizer()(documents, add_special_tokens=False)["input_ids"]
    assert tokenizer.most <= max(together, *map(len, documents), 0)


def test_documents_without_tokens_beside_others_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "TOGETHER", 1)
    assert list(drawing.tokenise(["a", "", ""], letters_tokenizer(), "text")) == [[3], [], []]
    monkeypatch.setattr(drawing, "TOGETHER", 0)
    assert list(drawing.tokenise(["a", "b", ""], letters_tokenizer(), "text")) == [[3], [4], []]


def test_few_windows_need_few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "TOGETHER", 640 * len(LETTERS))
    tokenizer = Counting()
    draw_from_documents([LETTERS] * 60, tokenizer, 2, 8)
    assert tokenizer.all <= 10 * len(LETTERS)


def test_bos_begins_every_window_where_the_tokenizer_wants_it() -> None:
    tokenizer = letters_tokenizer(bos=True)
    for documents in ([LETTERS] * 4, [LETTERS * 3]):
        tokens, _ = draw_from_documents(documents, tokenizer, 3, 10)
        assert tokens[:, 0].tolist() == [1, 1, 1]
        assert not (tokens[:, 1:] == 1).any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(2, 20),
    st.booleans(),
)
def test_windows_are_pieces_of_the_text_or_refused(documents: list[str], samples: int, seqlen: int, bos: bool) -> None:
    tokenizer = letters_tokenizer(bos)
    try:
        tokens, how = draw_from_documents(documents, tokenizer, samples, seqlen)
    except FistaPrunerError as error:
        assert "too short" in str(error) or "no tokens" in str(error)  # noqa: PT017
        return
    assert tokens.shape == (samples, seqlen)
    rows = [text_of(tokenizer, row[int(bos) :]) for row in tokens]
    if "long documents" in how:
        assert all(any(row in document for document in documents) for row in rows)
    else:
        assert all(set(row) <= set(LETTERS + "\n") for row in rows)


def test_short_empty_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer()
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text(" \n")
    for source, words in (
        (str(tmp_path / "short.txt"), "its 3 tokens do not fill one window of 64"),
        (str(tmp_path / "empty.txt"), "is empty"),
        (str(tmp_path / "absent.txt"), "neither a"),
        ("wikitext3", "'wikitext3' is neither a"),
        ("self", "needs the model"),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            calibration_tokens(Calibration(source=source, samples=2), tokenizer, 64)
    (tmp_path / "few.txt").write_text("a" * 64)
    assert calibration_tokens(Calibration(source=str(tmp_path / "few.txt"), samples=1), tokenizer, 64)[0].shape == (
        1,
        64,
    )
    (tmp_path / "few.txt").write_text("a" * 66)
    assert calibration_tokens(Calibration(source=str(tmp_path / "few.txt"), samples=3), tokenizer, 64)[0].shape == (
        3,
        64,
    )
    with pytest.raises(FistaPrunerError, match="3 different windows of 64 and --samples asks for 4"):
        calibration_tokens(Calibration(source=str(tmp_path / "few.txt"), samples=4), tokenizer, 64)


def test_a_missing_extra_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.parquet"
    table.touch()
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    for check in (check_source, check_data):
        check("python")
        with pytest.raises(MissingExtraError, match=r"^the data set 'c4' needs .*'datasets': pip .*\[data\]"):
            check("c4")
        with pytest.raises(MissingExtraError, match=r"^reading .*table\.parquet needs the package 'pyarrow'"):
            check(str(table))


def test_facts_say_what_was_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefghijklmn"}\n' * 5)
    tokens, facts = calibration_tokens(
        Calibration(source=str(tmp_path / "a.jsonl"), samples=3, seed=5), letters_tokenizer(), 8
    )
    assert tokens.shape == (3, 8)
    assert facts["documents"] == 5
    assert facts["seed"] == 5
    assert len(facts["sha256"]) == 64
    python, facts = calibration_tokens(Calibration(source="python", samples=4), letters_tokenizer(), 64)
    assert python.shape == (4, 64)
    assert facts["documents"] > 10


SIZES: dict[str, dict[str, Any]] = {
    "bamba": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
    },
    "roberta": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "is_decoder": True,
        "pad_token_id": 0,
    },
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},  # which share a key
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 4,
        "n_groups": 1,
    },
    "qwen3_5_text": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    },
}
"""Of further tiny models."""


def tiny(kind: str, vocabulary: int = 40) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, n_positions=128, n_embd=16, n_layer=2, n_head=2)
        ).eval()
    if kind != "llama":
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, vocab_size=vocabulary, **SIZES[kind])
        ).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(10)  # so that positions show
        return model
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_self_generated_tokens_are_the_models_own(kind: str) -> None:
    model, tokenizer = tiny(kind), letters_tokenizer()
    tokens = generate_tokens(model, tokenizer, 5, 40, seed=1)
    assert tokens.shape == (5, 40)
    assert torch.equal(tokens, generate_tokens(model, tokenizer, 5, 40, seed=1))
    assert not torch.equal(tokens, generate_tokens(model, tokenizer, 5, 40, seed=2))
    # <unk> and <s> are never drawn, nor the columns beyond the tokenizer's 30 tokens; </s> may end a text.
    assert set(tokens.unique().tolist()) <= set(range(2, 30))
    started = letters_tokenizer(bos=True)
    assert (generate_tokens(model, started, 5, 8)[:, 0] == 1).all()


def test_a_text_that_begins_with_the_end_of_text_token_goes_on() -> None:
    """As in OPT, whose tokenizer begins a text with its end-of-text token."""
    model, tokenizer = tiny("llama"), letters_tokenizer(bos=True, eos="<s>")
    tokens = generate_tokens(model, tokenizer, 40, 40)
    assert (tokens[:, 0] == 1).all()
    assert 0.85 < (tokens > 2).float().mean() < 0.98  # the model draws all of its tokens about equally often
    # A text that ended is followed by the first token of the next, which ends nothing.
    assert ((tokens[:, 1:-2] == 1) & (tokens[:, 2:-1] == 1) & (tokens[:, 3:] != 1)).any()


@pytest.mark.parametrize("kind", ["llama", "bamba"])
def test_draws_follow_the_whole_past_at_temperature_1(kind: str) -> None:
    """Of texts with the same past, next tokens are as frequent as one pass over the text says they are likely."""
    model, tokenizer = tiny(kind), letters_tokenizer(bos=True)
    tokens = generate_tokens(model, tokenizer, 3000, 3)
    assert (tokens[:, 0] == 1).all()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1]])).logits[0, -1]
    logits[[0, 1, *range(30, len(logits))]] = -torch.inf  # special tokens, and columns beyond the tokenizer's
    counts = torch.bincount(tokens[:, 1], minlength=len(logits)) / 3000
    assert float((counts - logits.softmax(-1)).abs().max()) < 0.04
    most = int(counts.argmax())
    past = tokens[tokens[:, 1] == most]
    with torch.no_grad():
        logits = model(input_ids=past[:1, :2]).logits[0, -1]
    logits[[0, 1, *range(30, len(logits))]] = -torch.inf
    counts = torch.bincount(past[:, 2], minlength=len(logits)) / len(past)
    assert float((counts - logits.softmax(-1)).abs().max()) < 4 / len(past) ** 0.5


def test_windows_longer_than_a_text_pack_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fistapruner.text.self_generated.TEXT_LENGTH", 16)
    steps: list[tuple[int, int]] = []
    tokenizer = letters_tokenizer(bos=True)
    tokens = generate_tokens(tiny("llama"), tokenizer, 3, 39, progress=lambda *at: steps.append(at))
    assert tokens.shape == (3, 39)
    assert (tokens[:, [0, 13, 26]] == 1).all()
    assert steps[-1] == (117, 117)


def test_a_broken_model_is_named() -> None:
    model = tiny("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FistaPrunerError, match="LlamaForCausalLM cannot generate text: its logits are NaN"):
        generate_tokens(model, letters_tokenizer(), 2, 8)
    with pytest.raises(FistaPrunerError, match="GPT2LMHeadModel cannot generate text"):
        generate_tokens(tiny("gpt2"), letters_tokenizer(), 2, 300)


def test_an_interruption_of_generation_loses_no_finished_text() -> None:
    model, tokenizer, kept = tiny("llama"), letters_tokenizer(), []
    whole = generate_tokens(model, tokenizer, 70, 8, keep=lambda *at: kept.append(at))
    assert [len(texts) for texts, _ in kept] == [32, 64, 70]
    steps: list[int] = []
    again = generate_tokens(model, tokenizer, 70, 8, begun=kept[1], progress=lambda done, _: steps.append(done))
    assert torch.equal(again, whole)
    assert steps[0] > 64 * 8


def test_text_that_a_cpu_writes_has_shorter_windows(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", max_position_embeddings=4096)
    model = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    lengths = {"self": 1024, "python": 2048}
    for source, length in lengths.items():
        assert calibration_length(Calibration(source=source), model) == length
    assert calibration_length(Calibration(source="self", seqlen=4096), model) == 4096


def test_generation_says_how_far_it_is() -> None:
    said: list[str] = []
    calibration_tokens(
        Calibration(source="self", samples=2), letters_tokenizer(), 32, lambda: tiny("llama"), said.append
    )
    assert len(said) == 10
    assert said[-1].startswith("generating calibration text: 1.8 of 2 windows, about ")


def test_only_a_length_that_the_config_states_is_a_limit(tmp_path: Path) -> None:
    """Bloom has none; MPT calls its own another name."""
    for config in (
        BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2),
        MptConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, max_seq_len=64),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
    opened = (Checkpoint.open(tmp_path / name) for name in ("bloom", "mpt"))
    bloom, mpt = (LayerwiseModel(checkpoint, torch.device("cpu")) for checkpoint in opened)
    assert (bloom.max_length, mpt.max_length) == (None, 64)
    assert window_length(4096, bloom) == 4096
    assert window_length(None, bloom) == 2048
    assert bloom.check_window(16).shape == (1, 16)
    assert window_length(None, mpt) == 64
    with pytest.raises(FistaPrunerError, match="seqlen 65 is more than the 64 tokens"):
        window_length(65, mpt)


def test_tokens_have_one_hash_however_they_lie_in_memory() -> None:
    tokens = torch.arange(16).view(2, 8)[:, ::2]
    assert tokens_sha256(tokens) == tokens_sha256(tokens.clone())

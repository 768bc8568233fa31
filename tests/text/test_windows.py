"""Windows of calibration tokens: how they are drawn, that the seed decides them, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MptConfig, PreTrainedTokenizerFast

from fistapruner import FistaPrunerError
from fistapruner.papers.mamf import Mixture
from fistapruner.settings.prune import Calibration
from fistapruner.text import calibration_length, calibration_tokens, tokens_sha256
from fistapruner.text import windows as drawing
from fistapruner.text.windows import draw_from_documents, window_length
from tiny import opened, save

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


def tiny_model(kind: str = "llama") -> Any:
    """A random model with more columns than :func:`letters_tokenizer` has tokens."""
    torch.manual_seed(0)
    config = {
        "gpt2": GPT2Config(vocab_size=40, n_positions=128, n_embd=16, n_layer=2, n_head=2),
        "llama": LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4
        ),
    }[kind]
    return AutoModelForCausalLM.from_config(config).eval()


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
    drawn, _ = draw_from_documents([LETTERS[:5]] * 100, tokenizer, 60, 3)
    assert {text_of(tokenizer, row) for row in drawn} == {"abc", "bcd", "cde"}


def test_the_same_seed_draws_the_windows_of_earlier_versions() -> None:
    documents = [LETTERS[place:] * 3 for place in range(20)]
    long, _ = draw_from_documents(documents, letters_tokenizer(), 3, 8, seed=7)
    joined, _ = draw_from_documents(documents, letters_tokenizer(), 3, 100, seed=7)
    assert [text_of(letters_tokenizer(), row) for row in long] == ["tuvwxyzr", "vwxyzpqr", "xyzlmnop"]
    assert [text_of(letters_tokenizer(), row)[:8] for row in joined] == ["rstuvwxy", "klmnopqr", "stuvwxyz"]


class Bytes:
    """A tokenizer that makes one token of ``size`` bytes."""

    bos_token_id = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": list(text.encode()[:: self.size])}


@pytest.mark.parametrize(
    ("document", "size", "long"),
    [("a" * 9, 1, True), ("a" * 8, 1, False), ("é" * 6, 1, True), ("a" * 18, 2, True), ("a" * 16, 2, False)],
)
def test_long_is_a_document_of_more_tokens_than_a_window(document: str, size: int, long: bool) -> None:
    """Whatever its characters are; as many long documents as windows are enough."""
    _, how = draw_from_documents([document] * 5 + ["b"], Bytes(size), 5, 8)
    assert ("long documents" in how) == long


def test_too_few_long_documents_fall_back_on_the_concatenation() -> None:
    tokenizer = letters_tokenizer()
    tokens, how = draw_from_documents([LETTERS] * 10, tokenizer, 4, 50)
    assert how == "windows that do not overlap, from the concatenation of all documents (278 tokens)"
    joined = "\n\n".join([LETTERS] * 10)
    assert all(text_of(tokenizer, row) in joined for row in tokens)
    assert len({tuple(row.tolist()) for row in tokens}) == 4
    tokens, how = draw_from_documents([LETTERS] * 2, tokenizer, 6, 30)
    assert how == "overlapping windows from the concatenation of all documents (only 54 tokens)"
    assert tokens.shape == (6, 30)
    _, how = draw_from_documents([LETTERS] * 100, tokenizer, 1, 50)  # 28 tokens each, and 16 * 50 are enough
    said = "windows that do not overlap, from the concatenation of 29 of 100 documents, drawn at random (810 tokens)"
    assert how == said


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("samples", [3, 6])
def test_windows_of_a_concatenation_do_not_overlap(samples: int, bos: bool) -> None:
    """No letter comes twice in the text, so a letter is a place in it; each place may be drawn."""
    tokenizer = letters_tokenizer(bos)
    found = set()
    for seed in range(20):
        tokens, how = draw_from_documents([LETTERS], tokenizer, samples, 4 + bos, seed=seed)
        assert "do not overlap" in how
        starts = {LETTERS.index(text_of(tokenizer, row[int(bos) :])) for row in tokens}
        assert len(starts) == samples
        found |= starts
    assert found == set(range(0, 24, 4))


@pytest.mark.parametrize(("samples", "how"), [(4, "each of that many long passages"), (60, "of 54 passages, drawn at")])
def test_a_large_document_is_drawn_from_by_passages(monkeypatch: pytest.MonkeyPatch, samples: int, how: str) -> None:
    """Whole passages of line ends are left out."""
    for name, value in (("LARGE", 1000), ("PASSAGE", 100), ("ENOUGH", 4)):
        monkeypatch.setattr(drawing, name, value)
    document = "\n\n".join(LETTERS[i % 26 :] + LETTERS[: i % 26] for i in range(160)) + "\n" * 350
    for documents in ([document], [document, LETTERS]):
        tokens, said = draw_from_documents(documents, letters_tokenizer(), samples, 8)
        assert len(documents) == 2 or how in said
        assert len(documents) == 1 or "documents and passages" in said
        rows = [text_of(letters_tokenizer(), row) for row in tokens]
        assert all(part in document for row in rows for part in row.split("\n"))
        assert not any("\n\n\n" in row for row in rows)


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
        assert "too short" in str(error)  # noqa: PT017
        return
    assert tokens.shape == (samples, seqlen)
    assert ((tokens == 1).sum(1) == int(bos)).all()
    rows = [text_of(tokenizer, row[int(bos) :]) for row in tokens]
    if "long documents" in how:
        assert all(any(row in document for document in documents) for row in rows)
    else:
        assert all(set(row) <= set(LETTERS + "\n") for row in rows)


def test_short_empty_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    def drawn(text: str, samples: int) -> torch.Tensor:
        (tmp_path / "a.txt").write_text(text)
        settings_ = Calibration(source=str(tmp_path / "a.txt"), samples=samples)
        return calibration_tokens(settings_, letters_tokenizer(), 64)[0]

    assert drawn("a" * 64, 1).shape == (1, 64)
    assert drawn("a" * 66, 3).shape == (3, 64)
    for text, words in (
        ("a" * 66, "3 different windows of 64, and 4 are asked"),
        ("abc", "its 3 tokens have 0 "),
        ("\n", "is empty"),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            drawn(text, 4)
    with pytest.raises(FistaPrunerError, match="'wikitext3' is neither a"):
        calibration_tokens(Calibration(source="wikitext3", samples=2), letters_tokenizer(), 64)


def test_facts_say_what_was_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefghijklmn"}\n' * 5)
    settings_ = Calibration(source=str(tmp_path / "a.jsonl"), samples=3, seed=5)
    tokens, facts = calibration_tokens(settings_, letters_tokenizer(), 8)
    assert tokens.shape == (3, 8)
    assert (facts["documents"], facts["seed"], facts["sha256"]) == (5, 5, tokens_sha256(tokens))
    python, facts = calibration_tokens(Calibration(source="python", samples=4), letters_tokenizer(), 64)
    assert python.shape == (4, 64)
    assert facts["documents"] > 10
    wide = torch.arange(16).view(2, 8)[:, ::2]
    assert tokens_sha256(wide) == tokens_sha256(wide.clone())  # however tokens lie in memory


def test_calibration_draws_uniformly_over_tasks(tmp_path: Path) -> None:
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in "abc"}
    for name, size in zip("abc", (300, 60, 60), strict=True):
        Path(sources[name]).write_text("".join(f'{{"text": "{name}{LETTERS[i % 20 :]}"}}\n' for i in range(size)))
    settings_ = Calibration(source={"own": "self", **sources}, samples=14, seed=3)
    tokens, facts = calibration_tokens(settings_, letters_tokenizer(), 24, tiny_model)
    assert tokens.shape == (14, 24)
    assert facts["source"] == "own, a, b, c"
    assert facts["documents"] == 420
    assert sorted(task["samples"] for task in facts["tasks"].values()) == [3, 3, 4, 4]
    assert facts["tasks"]["own"]["how"].startswith("generated")
    assert "windows of a.jsonl" in facts["how"]
    assert str(tmp_path) not in facts["how"]
    for task, name in enumerate("abc", start=1):
        # Windows of one task alone are drawn as without the mixture.
        alone = Calibration(source=sources[name], samples=facts["tasks"][name]["samples"], seed=3)
        expected, _ = calibration_tokens(alone, letters_tokenizer(), 24)
        assert torch.equal(tokens[Mixture(4, seed=3).draw(14) == task], expected)
    with pytest.raises(FistaPrunerError, match="and there are 3: take at least 4 samples"):
        calibration_tokens(settings_.model_copy(update={"samples": 3}), letters_tokenizer(), 24)


def test_text_that_a_cpu_writes_has_shorter_windows(tmp_path: Path) -> None:
    model = opened(save("llama", tmp_path / "model", max_position_embeddings=4096))
    for source, length in (("self", 1024), ("python", 2048)):
        assert calibration_length(Calibration(source=source), model) == length
    assert calibration_length(Calibration(source="self", seqlen=4096), model) == 4096


def test_only_a_length_that_the_config_states_is_a_limit(tmp_path: Path) -> None:
    """Bloom has none; MPT calls its own another name."""
    for config in (
        BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2),
        MptConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, max_seq_len=64),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
    bloom, mpt = (opened(tmp_path / name) for name in ("bloom", "mpt"))
    assert (window_length(4096, bloom), window_length(None, bloom), window_length(None, mpt)) == (4096, 2048, 64)
    with pytest.raises(FistaPrunerError, match="seqlen 65 is more than the 64 tokens"):
        window_length(65, mpt)

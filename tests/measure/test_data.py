"""Texts become windows by the papers' protocol."""

import json
import os
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fistapruner as fp
import tiny
from fistapruner import FistaPrunerError
from fistapruner.measure import data as reading
from fistapruner.measure.data import cut_windows, load_windows, read_text
from fistapruner.text.sources import DATA_SETS, load_documents

TEXT = "the quick brown fox jumps over the lazy dog; " * 20


def bos_tokenizer() -> Any:
    """The tiny tokenizer, set to begin every text with BOS."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def test_bos_stands_where_the_tokenizer_says() -> None:
    plain, adding = tiny.tokenizer(), bos_tokenizer()
    assert cut_windows(TEXT, plain, 16).bos == "none"
    every = cut_windows(TEXT, adding, 16)
    assert every.bos == "window"
    assert every.tokens[:, 0].tolist() == [1] * len(every.tokens)
    assert every.tokens[:, 1:].flatten().tolist() == cut_windows(TEXT, adding, 15, bos="none").tokens.flatten().tolist()
    once = cut_windows(TEXT, adding, 16, bos="text")
    assert once.tokens.flatten().tolist()[0] == 1
    assert 1 not in once.tokens.flatten().tolist()[1:]


class Runs:
    """A tokenizer that cuts as GPT-2's does, and notes the longest text it was given, and the sum of all."""

    bos_token_id = None

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.longest = self.read = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.longest, self.read = max(self.longest, len(text)), self.read + len(text)
        found = re.findall(r" ?\S+|\s+(?!\S)|\s+", text)
        self.tokens += set(found).difference(self.tokens)
        return {"input_ids": [self.tokens.index(token) for token in found]}


def test_a_large_text_is_tokenised_by_parts_and_no_further_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"word{i % 7}" + ("\n" * 5 if i % 9 == 0 else " ") for i in range(5000))
    tokenizer = Runs()
    whole = cut_windows(text, tokenizer, 16).tokens
    assert tokenizer.longest == len(text)
    monkeypatch.setattr(reading, "LARGE", len(text))
    assert cut_windows(text, tokenizer, 16).tokens.equal(whole)
    monkeypatch.setattr(reading, "LARGE", 8000)
    tokenizer.longest = 0
    by_parts = cut_windows(text, tokenizer, 16).tokens
    assert 4000 < tokenizer.longest <= 8000
    joined = "".join(tokenizer.tokens[token] for token in by_parts.flatten())
    assert text.startswith(joined)
    assert len(text) - len(joined) < 16 * 6
    assert not by_parts[: len(whole)].equal(whole[: len(by_parts)])  # where it is cut, five line ends are two tokens
    for windows in (1, 50, 300):
        tokenizer.read = 0
        asked = cut_windows(text, tokenizer, 16, windows).tokens
        assert asked.equal(by_parts[:windows])
        assert tokenizer.read <= 8000 * (1 + windows // 50)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_local_files(tmp_path: Path, suffix: str) -> None:
    documents = ["first document", "second document\nwith two lines"]
    path = tmp_path / f"text.{suffix}"
    if suffix == "txt":
        path.write_text("\n\n".join(documents))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": documents}), path)
    assert read_text(str(path)) == ("\n\n".join(documents), "file", None)
    assert load_windows(str(path), tiny.tokenizer(), 8).data == path.name


@pytest.mark.parametrize(("asked", "taken"), [(None, 3), (5, 3), (2, 2)])
def test_no_more_windows_are_taken_than_the_protocol_takes(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, taken: int
) -> None:
    monkeypatch.setattr("fistapruner.measure.data.read_text", lambda data: (TEXT, "validation", 3))
    windows = load_windows("c4", tiny.tokenizer(), 8, asked)
    assert len(windows.tokens) == taken
    assert len(cut_windows(TEXT, tiny.tokenizer(), 8).tokens) > 5


def test_python_text_is_held_out_from_calibration() -> None:
    from fistapruner.text.sources import PYTHON, python_documents

    text, split, _ = read_text("python")
    assert split == "held out"
    calibration = {paragraph.strip() for document in python_documents(PYTHON) for paragraph in document.split("\n\n")}
    assert not calibration & {paragraph.strip() for paragraph in text.split("\n\n")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nothing-here"}, "is neither a .txt"),
        ({"bos": "window"}, "bos 'window' cannot be done: this tokenizer has no BOS token"),
        ({"seqlen": 10_000_000}, "do not fill one window"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"data": "python", "seqlen": 8, **arguments}
    with pytest.raises(FistaPrunerError, match=message):
        load_windows(settings.pop("data"), Runs(), **settings)


def test_known_data_sets_are_joined_as_in_the_papers() -> None:
    held_out = {name: known.held_out for name, known in DATA_SETS.items()}
    assert {name: split.joint for name, split in held_out.items()} == {"wikitext2": "\n\n", "ptb": " ", "c4": " "}
    assert (held_out["c4"].rows, held_out["c4"].windows) == (1100, 256)


@pytest.mark.parametrize(("held_out", "split"), [(False, "train"), (True, "test")])
def test_penn_treebank_is_read_without_its_script(monkeypatch: pytest.MonkeyPatch, held_out: bool, split: str) -> None:
    asked: list[Any] = []
    stub: Any = ModuleType("datasets")
    stub.__spec__ = ModuleSpec("datasets", None)
    stub.load_dataset = lambda *names, **how: (asked.append((names, how)), {"sentence": ["a", "b"]})[1]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert load_documents("ptb", held_out=held_out) == ["a b"]
    files = {split: f"penn_treebank/{split}/*.parquet"}
    how = {"split": split, "data_files": files, "revision": "refs/convert/parquet"}
    assert asked == [(("ptb-text-only/ptb_text_only",), how)]


@pytest.mark.real
def test_token_count_of_the_joined_wikitext_test_split() -> None:
    folder = os.environ.get("FISTAPRUNER_DATA")
    if not folder or not (Path(folder) / "wikitext2" / "test_joined.txt").is_file():
        pytest.skip("FISTAPRUNER_DATA names no folder with wikitext2/test_joined.txt")
    from fistapruner.models.source import load_tokenizer, resolve_model

    try:
        tokenizer = load_tokenizer(resolve_model("smollm2"))
    except FistaPrunerError as error:
        pytest.skip(f"the small real model is not here: {error}")
    text, _, _ = read_text(str(Path(folder) / "wikitext2" / "test_joined.txt"))
    assert len(tokenizer(text, verbose=False)["input_ids"]) == 304_978  # every digit is a token
    gpt2 = os.environ.get("FISTAPRUNER_GPT2_TOKENIZER")
    if gpt2:
        assert len(load_tokenizer(Path(gpt2))(text, verbose=False)["input_ids"]) == 287_644


@pytest.mark.parametrize("verb", [fp.evaluate, fp.prune, fp.recover])
def test_a_file_that_is_no_text_is_refused_before_the_model_is_looked_for(verb: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    given = {"data": file} if verb is fp.evaluate else {"out": tmp_path / "out", "evaluate": file}
    with pytest.raises(FistaPrunerError, match=r"model\.gguf' is neither a \.txt"):
        verb(tmp_path / "no model", **given)

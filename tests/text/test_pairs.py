"""Preference pairs: the three forms of TRL, every line that is refused, tokens as TRL makes them, the split."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import TOOLS, chat_tokenizer, write
from test_windows import letters_tokenizer, text_of
from tokenizers.processors import TemplateProcessing

import tiny
from fistapruner import FistaPrunerError
from fistapruner.settings.align import PairData
from fistapruner.text.examples import Pair, read_pairs
from fistapruner.text.training import SIDES, Pairs, pair_order, tokenise_pairs


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


GOOD: dict[str, Any] = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CHAT: dict[str, Any] = {"prompt": user("ab"), "chosen": says("cd"), "rejected": says("ef")}


def many(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{number}", "chosen": "a", "rejected": "b", "unknown": number} for number in range(count)]


def tokenised(records: list[Any], folder: Path, tokenizer: Any = None, length: int = 64) -> tuple[Pairs, list[str]]:
    path, said = write(folder / "pairs.jsonl", records), []
    found = tokenise_pairs(read_pairs(path), PairData(pairs=path), tokenizer or tiny.tokenizer(), length, said.append)
    return found, said


@pytest.mark.parametrize("pair", [GOOD, CHAT])
def test_forms(tmp_path: Path, pair: dict[str, Any]) -> None:
    """With a prompt and without one, as texts and as messages."""
    joined = {name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")}
    for record in (pair, joined):
        [found] = read_pairs(write(tmp_path / "a.jsonl", [record]))
        read = [text if isinstance(text, str) else [*text] for text in (found.prompt, found.chosen, found.rejected)]
        assert read == [pair[name] for name in ("prompt", "chosen", "rejected")]


BAD = [
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
    ({**GOOD, "chosen": 3}, "no field 'chosen'"),
    ({**GOOD, "prompt": None}, "no field 'prompt'"),
    ({**GOOD, "chosen": " green."}, "two different answers"),
    ({**GOOD, "rejected": " \n"}, "neither of them empty"),
    ({"chosen": "ab", "rejected": "abc"}, "neither of them empty"),
    ({"chosen": "Yes", "rejected": "No"}, "to the field prompt or to what both begin with"),
    ({"chosen": " Yes", "rejected": " No"}, "to the field prompt or to what both begin with"),
    ({"chosen": says("a"), "rejected": says("b")}, "to the field prompt or to what both begin with"),
    ({"chosen": user("a"), "rejected": user("a") + says("b")}, "neither of them empty"),
    ({**CHAT, "prompt": "text"}, "no field 'prompt' with a list"),
    ({**CHAT, "chosen": "text"}, "no field 'rejected' with a string"),
    ({**CHAT, "chosen": []}, "answers of the assistant"),
    ({**CHAT, "chosen": says(" ")}, "neither of them empty"),
    ({**CHAT, "chosen": user("x")}, "answers of the assistant"),
    ("a list", "no field 'chosen'"),
    ({**GOOD, "rejected": "\ud83d"}, "is not JSON in UTF-8"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_bad_lines_are_named(tmp_path: Path, record: Any, why: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD, record])
    with pytest.raises(FistaPrunerError, match="line 3") as error:
        read_pairs(path)
    assert why in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=r"not a \.jsonl file that exists"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(FistaPrunerError, match="pairs of 0 different prompts"):
        tokenised([], tmp_path)
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": ')
    with pytest.raises(FistaPrunerError, match="line 2 is not JSON"):
        read_pairs(tmp_path / "torn.jsonl")


TRL = [
    ("The sky is", " blue.", " green."),
    ("Two and two make", " four, as everybody knows.", " five."),
    ("To open a jar,", " turn the lid.", " paint the lid with a brush."),
    ("Ice is", " cold", " hot"),
]
"""Pairs whose tokens and losses TRL 1.16.0 computed: see also ``tests/tuning/test_pair_objective.py``."""


def test_tokens_are_those_of_trl() -> None:
    """By ``DPOTrainer`` of TRL 1.16.0 with this tokenizer."""
    prompt, chosen, rejected = Pair(*TRL[0], "here").encode(tiny.tokenizer())
    assert prompt == [55, 75, 72, 98, 86, 78, 92, 98, 76, 86]
    assert chosen[len(prompt) :] == [98, 69, 79, 88, 72, 17, 2]
    assert rejected[len(prompt) :] == [98, 74, 85, 72, 72, 81, 17, 2]
    assert Pair("Ice is", " cold</s>", " hot", "here").encode(tiny.tokenizer())[1][-2:] == [71, 2]


def test_an_end_that_the_tokenizer_appends_is_no_part_of_prompts_and_stands_once() -> None:
    appending, plain = tiny.tokenizer(), tiny.tokenizer()
    for tokenizer, end in ((appending, " </s>"), (plain, "")):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"<s> $A{end}", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    for prompt in ("Ice is", ""):
        for chosen in (" cold", " cold</s>"):
            pair = Pair(prompt, chosen, " hot", "here")
            assert pair.encode(appending) == pair.encode(plain)


@pytest.mark.parametrize("bos", [False, True])
def test_texts_that_begin_with_bos_get_no_second_one(bos: bool) -> None:
    tokenizer, plain = letters_tokenizer(bos), letters_tokenizer()
    for prompt, chosen in (("<s>ab", "c"), ("<s>", "c"), ("", "<s>c")):
        pair = Pair(prompt, chosen, chosen + "d", "here")
        _, *answers = pair.encode(tokenizer)
        assert answers == list(pair.encode(plain)[1:])
    assert Pair("<s>ab", "c", "d", "here").encode(tokenizer) == Pair("<s>ab", "c", "d", "here").encode(plain)


@pytest.mark.parametrize("bos", [False, True])
def test_answers_carry_loss_and_prompts_do_not(tmp_path: Path, bos: bool) -> None:
    tokenizer = letters_tokenizer(bos)
    records = [{"prompt": f"{letter}b", "chosen": "xyz", "rejected": "w"} for letter in "acdef"]
    pairs, _ = tokenised(records, tmp_path, tokenizer)
    assert pairs.tokens.shape == (10, 6 + bos)
    assert text_of(tokenizer, pairs.tokens[0][pairs.marks[0]]) == "xyz</s>"
    assert text_of(tokenizer, pairs.tokens[1][pairs.marks[1]]) == "w</s>"
    assert pairs.lengths.tolist()[:2] == [6 + bos, 4 + bos]


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    records = [{**CHAT, "prompt": user(letter)} for letter in "abcde"]
    pairs, _ = tokenised(records, tmp_path, tokenizer)
    assert text_of(tokenizer, pairs.tokens[0]) == "u\na</s>\na\ncd</s>\n"
    assert text_of(tokenizer, pairs.tokens[0][pairs.marks[0]]) == "cd</s>\n"
    with pytest.raises(FistaPrunerError, match="line 1 has messages that the tokenizer's chat template cannot write"):
        tokenised(records, tmp_path, chat_tokenizer(None))


def test_answers_may_differ_in_their_tool_calls_alone(tmp_path: Path) -> None:
    answers = {name: [{"role": "assistant", "tool_calls": [{"name": name[0]}]}] for name in ("chosen", "rejected")}
    record = {"prompt": user("ab"), **answers, "chat_template_kwargs": {"mood": "m"}}
    [pair] = read_pairs(write(tmp_path / "a.jsonl", [record]))
    tokenizer = chat_tokenizer(TOOLS)
    texts = [text_of(tokenizer, torch.tensor(ids)) for ids in pair.encode(tokenizer)]
    assert texts == ["u\nmab</s>\na\n", "u\nmab</s>\na\nmc</s>\n", "u\nmab</s>\na\nmr</s>\n"]


def test_long_prompts_are_left_out_and_long_answers_cut(tmp_path: Path) -> None:
    records = [*many(6), {"prompt": "long" * 4, "chosen": "a", "rejected": "b"}]
    records.append({"prompt": "short", "chosen": "a" * 20, "rejected": "b"})
    pairs, said = tokenised(records, tmp_path, length=12)
    assert len(pairs.tokens) == 14
    assert said[:2] == [
        "1 of 8 pairs are left out: their prompts have 12 tokens or more",
        "1 of 8 pairs have answers that are cut at 12 tokens",
    ]
    assert pairs.tokens.shape[1] == 12
    assert pairs.facts["tasks"]["pairs"]["too_long"] == 1
    with pytest.raises(
        FistaPrunerError, match=r"pairs of 0 different prompts that fit: .* 3 pairs .* larger max_length"
    ):
        tokenised(records[:3], tmp_path, length=2)


class Swallowing:
    """Letters are tokens, and a space without width is none."""

    eos_token, eos_token_id, bos_token_id, pad_token_id = "", None, None, 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text if letter != "\u200b"]}


def test_answers_without_tokens_of_their_own_are_left_out(tmp_path: Path) -> None:
    records = [*many(6), {"prompt": "short", "chosen": "\u200b", "rejected": "b"}]
    records.append({"prompt": "\u200b", "chosen": "aa", "rejected": "b"})  # nothing comes before the b
    records.append({"prompt": "short", "chosen": "a" * 20, "rejected": "a" * 20 + "b"})  # they differ behind the cut
    pairs, said = tokenised(records, tmp_path, Swallowing(), length=12)
    assert len(pairs.tokens) == 12
    assert bool(pairs.marks.any(1).all())
    assert said == ["3 of 9 pairs are left out: their answers add no tokens, or the same ones, in the first 12"]
    assert pairs.facts["tasks"]["pairs"]["too_long"] == 3


def test_equal_prompts_are_on_one_side(tmp_path: Path) -> None:
    """The hash of the prompt alone decides, whatever else is in the file."""
    records = many(300)
    twice = [*records, *({**record, "chosen": "c"} for record in records)]
    pairs, _ = tokenised(twice, tmp_path)
    sides = {name: pairs.windows(name) for name in ("trained", "held_out", "test")}
    assert sorted(number for side in sides.values() for number in side) == list(range(1200))
    prompts = {name: {number // 2 % 300 for number in side} for name, side in sides.items()}
    assert not prompts["trained"] & (prompts["held_out"] | prompts["test"])
    assert not prompts["held_out"] & prompts["test"]
    assert 0.05 < len(prompts["test"]) / 300 < 0.17
    fewer, _ = tokenised(records[:200], tmp_path)
    assert {number // 2 for number in fewer.windows("test")} == {number for number in prompts["test"] if number < 200}


def test_few_prompts_are_held_out_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are trained on, and the test is the same."""
    whole = {name: set(tokenised(many(200), tmp_path)[0].windows(name)) for name in SIDES}
    monkeypatch.setattr("fistapruner.text.training.MAX_HELD_OUT_PROMPTS", 5)
    few = {name: set(tokenised(many(200), tmp_path)[0].windows(name)) for name in SIDES}
    assert few["test"] == whole["test"]
    assert len(few["held_out"]) == 2 * 5 < len(whole["held_out"])
    assert few["held_out"] < whole["held_out"]
    assert few["trained"] == whole["trained"] | whole["held_out"] - few["held_out"]


def test_three_prompts_are_enough_and_two_are_not(tmp_path: Path) -> None:
    pairs, _ = tokenised(many(3), tmp_path)
    assert [len(pairs.windows(name)) for name in ("trained", "held_out", "test")] == [2, 2, 2]
    assert pairs.counts.tolist() == [1, 0] * 3
    assert json.dumps(pairs.facts)
    with pytest.raises(FistaPrunerError, match="at least 3"):
        tokenised(many(2), tmp_path)


def test_order_takes_all_pairs_before_one_comes_again(tmp_path: Path) -> None:
    pairs, _ = tokenised(many(40), tmp_path)
    trained = pairs.windows("trained")
    drawn = pair_order(pairs, 2 * len(trained) // 2, 2, 0)
    assert drawn.shape == (len(trained), 4)
    assert torch.equal(drawn[:, ::2] + 1, drawn[:, 1::2])
    assert sorted(drawn.flatten()[: len(trained)].tolist()) == sorted(trained)
    assert not torch.equal(drawn, pair_order(pairs, len(trained), 2, 1))

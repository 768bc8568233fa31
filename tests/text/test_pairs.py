"""Preference pairs: the three forms of TRL, every line that is refused, tokens as TRL makes them, the split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import TOOLS, chat_tokenizer, write
from test_windows import letters_tokenizer, text_of
from tokenizers.processors import TemplateProcessing

import tiny
from fistapruner import FistaPrunerError
from fistapruner.settings.align_settings import PairData
from fistapruner.text.examples import Message
from fistapruner.text.pairs import SIDES, Pair, Pairs, pair_order, read_pairs, tokenise_pairs


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
    pairs, sentences = read_pairs(path)
    said += sentences
    found = tokenise_pairs(pairs, PairData(pairs=path), tokenizer or tiny.tokenizer(), length, said.append)
    return found, said


def test_forms(tmp_path: Path) -> None:
    """With a prompt and without one, as texts and as messages."""
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", [GOOD]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")
    [pair], _ = read_pairs(write(tmp_path / "b.jsonl", [CHAT]))
    assert (pair.prompt, pair.chosen) == ((Message("user", "ab"),), (Message("assistant", "cd"),))
    joined = {name: GOOD["prompt"] + GOOD[name] for name in ("chosen", "rejected")}
    [pair], said = read_pairs(write(tmp_path / "c.jsonl", [joined]))
    assert (pair.prompt, pair.chosen, pair.rejected, said) == ("The sky is", " blue.", " green.", [])
    talk = {name: CHAT["prompt"] + CHAT[name] for name in ("chosen", "rejected")}
    [pair], _ = read_pairs(write(tmp_path / "d.jsonl", [talk]))
    assert (pair.prompt, pair.rejected) == ((Message("user", "ab"),), (Message("assistant", "ef"),))


def test_prompts_that_end_inside_a_word_are_told(tmp_path: Path) -> None:
    record = {"chosen": "H: Why?\n\nAssistant: It is", "rejected": "H: Why?\n\nAssistant: In fact"}
    path = write(tmp_path / "a.jsonl", [record])
    [pair], said = read_pairs(path)
    assert pair.prompt == "H: Why?\n\nAssistant: I"
    assert "1 of 1 prompts" in said[0]
    [pair], said = read_pairs(path, "\n\nAssistant:")
    assert (pair.prompt, pair.chosen, said) == ("H: Why?\n\nAssistant:", " It is", [])
    with pytest.raises(FistaPrunerError, match="line 1: what chosen and rejected share does not have 'Bot:'"):
        read_pairs(path, "Bot:")
    longer = {"chosen": "H: Why?\n\nAssistant: It is", "rejected": "H: Why?\n\nAssistant: It is so"}
    [pair], _ = read_pairs(write(tmp_path / "longer.jsonl", [longer]), "\n\nAssistant:")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("H: Why?\n\nAssistant:", " It is", " It is so")
    with pytest.raises(FistaPrunerError, match="prompt_ends"):
        read_pairs(write(tmp_path / "b.jsonl", [GOOD]), "is")


BAD = [
    ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
    ({**GOOD, "chosen": 3}, "no field 'chosen'"),
    ({**GOOD, "prompt": None}, "no field 'prompt'"),
    ({**GOOD, "chosen": " green."}, "chosen and rejected are equal"),
    ({**GOOD, "rejected": " \n"}, "the answer rejected is empty"),
    ({"chosen": "ab", "rejected": "abc"}, "has chosen and rejected as texts, and the lines before it have prompt"),
    ({**CHAT, "prompt": "text"}, "has prompt as text and chosen and rejected as messages"),
    (CHAT, "has prompt, chosen and rejected as messages, and the lines before it have prompt, chosen and rejected as"),
    ({**CHAT, "chosen": []}, "'chosen' is not a list of messages"),
    ({**CHAT, "chosen": says(" ")}, "message 1 is an empty answer"),
    ({**CHAT, "chosen": [{"role": "user"}]}, "message 1 has no field 'content'"),
    ("a list", "no field 'chosen'"),
    ({**GOOD, "rejected": "\ud83d"}, r"'rejected' has half a character (\ud83d)"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_bad_lines_are_named(tmp_path: Path, record: Any, why: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD, record])
    with pytest.raises(FistaPrunerError, match="line 3") as error:
        read_pairs(path)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"chosen": "ab", "rejected": "abc"}, "chosen is what rejected begins with, .* its answer: --prompt-ends TEXT"),
        ({"chosen": "a b", "rejected": "a "}, "line 1: rejected is what chosen begins with, so that nothing is left"),
        ({"chosen": "", "rejected": "a"}, "line 1: chosen and rejected share no beginning, which is the prompt"),
        ({**CHAT, "chosen": [{**says("cd")[0], "weight": 0}]}, "chosen has a message of weight 0"),
        ({**CHAT, "chosen": user("x")}, "line 1: the first message of chosen behind the prompt has the role 'user'"),
        ({"chosen": user("a"), "rejected": user("a") + says("b")}, "chosen is what rejected begins .* its answer$"),
        ({"chosen": says("a"), "rejected": says("b")}, "line 1: chosen and rejected have different first messages"),
        ({"chosen": "Yes", "rejected": "No"}, "line 1: chosen and rejected share no beginning, which is the prompt"),
        ({"chosen": " Yes", "rejected": " No"}, "line 1: chosen and rejected share no beginning, which is the prompt"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, record: Any, why: str) -> None:
    with pytest.raises(FistaPrunerError, match=why):
        read_pairs(write(tmp_path / "pairs.jsonl", [record]))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FistaPrunerError, match=r"not a \.jsonl file that exists"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(FistaPrunerError, match="is empty"):
        read_pairs(write(tmp_path / "empty.jsonl", []))
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
    for prompt in ("Ice is", "Ice is</s>", ""):
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
    with pytest.raises(FistaPrunerError, match="line 1 has messages, and the tokenizer has no chat template"):
        tokenised(records, tmp_path, chat_tokenizer(None))


def test_prompts_are_equal_whatever_numbers_an_export_gave_their_messages(tmp_path: Path) -> None:
    def numbered(start: int) -> list[dict[str, Any]]:
        messages = [*user("ab"), {"role": "assistant", "content": "cd" if start else "ef"}]
        return [{**message, "id": number} for number, message in enumerate(messages, start)]

    record = {"chosen": numbered(0), "rejected": numbered(5)}
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", [record]))
    [plain], _ = read_pairs(write(tmp_path / "b.jsonl", [{**CHAT, "prompt": user("ab")}]))
    assert pair.key == plain.key
    with pytest.raises(FistaPrunerError, match="chosen and rejected are equal"):
        read_pairs(write(tmp_path / "c.jsonl", [{"chosen": numbered(5), "rejected": numbered(8)}]))


def test_answers_may_differ_in_their_tool_calls_alone(tmp_path: Path) -> None:
    answers = {name: [{"role": "assistant", "tool_calls": [{"name": name[0]}]}] for name in ("chosen", "rejected")}
    record = {"prompt": user("ab"), **answers, "chat_template_kwargs": {"mood": "m"}}
    [pair], _ = read_pairs(write(tmp_path / "a.jsonl", [record]))
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
        "answers of 1 of 8 pairs are cut at 12 tokens",
    ]
    assert pairs.tokens.shape[1] == 12
    assert pairs.facts["tasks"]["pairs"]["too_long"] == 1
    with pytest.raises(
        FistaPrunerError, match=r"pairs of 0 different prompts that fit: .* 3 pairs .* larger --max-len"
    ):
        tokenised(records[:3], tmp_path, length=2)


def test_answers_that_differ_only_behind_the_cut_are_left_out(tmp_path: Path) -> None:
    records = [*many(6), {"prompt": "short", "chosen": "a" * 20, "rejected": "a" * 20 + "b"}]
    pairs, said = tokenised(records, tmp_path, length=12)
    assert len(pairs.tokens) == 12
    assert said == ["1 of 7 pairs are left out: their answers are the same in the first 12 tokens"]
    assert pairs.facts["tasks"]["pairs"]["too_long"] == 1


class Swallowing:
    """Letters are tokens, and a space without width is none."""

    eos_token, eos_token_id, bos_token_id, pad_token_id = "", None, None, 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text if letter != "\u200b"]}


def test_answers_without_tokens_are_left_out_for_that_reason(tmp_path: Path) -> None:
    records = [*many(6), {"prompt": "short", "chosen": "\u200b", "rejected": "b"}]
    records.append({"prompt": "short", "chosen": "a" * 20, "rejected": "b"})
    records.append({"prompt": "\u200b", "chosen": "aa", "rejected": "b"})  # nothing comes before the b
    pairs, said = tokenised(records, tmp_path, Swallowing(), length=12)
    assert len(pairs.tokens) == 14
    assert bool(pairs.marks.any(1).all())
    assert said == [
        "2 of 9 pairs are left out: an answer adds no token that has one before it",
        "answers of 1 of 9 pairs are cut at 12 tokens",
    ]
    assert pairs.facts["tasks"]["pairs"]["too_long"] == 2


class Merging:
    """Words are tokens, and a space at the end of a text is lost: prompts that end with one are no prefix."""

    eos_token, eos_token_id, bos_token_id, pad_token_id = "", None, None, 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + sum(word.encode()) % 100 for word in (text + "|").split(" ")]}


def test_prompts_that_end_inside_a_token_are_counted(tmp_path: Path) -> None:
    records = [{"prompt": f"q{number} ", "chosen": "a b", "rejected": "c d"} for number in range(5)]
    _, said = tokenised(records, tmp_path, Merging())
    assert said == [
        "the prompts of 5 of 5 pairs end inside a token of the answer; better move the space from the prompt's end to "
        "the answers"
    ]


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
    whole, few = ({name: set(pairs.windows(name)) for name in SIDES} for pairs in capped(tmp_path, monkeypatch))
    assert few["test"] == whole["test"]
    assert len(few["held_out"]) == 2 * 5 < len(whole["held_out"])
    assert few["held_out"] < whole["held_out"]
    assert few["trained"] == whole["trained"] | whole["held_out"] - few["held_out"]


def capped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pairs]:
    for most in (512, 5):
        monkeypatch.setattr("fistapruner.text.pairs.MAX_HELD_OUT_PROMPTS", most)
        yield tokenised(many(200), folder)[0]


def test_three_prompts_are_enough_and_two_are_not(tmp_path: Path) -> None:
    pairs, _ = tokenised(many(3), tmp_path)
    assert [len(pairs.windows(name)) for name in ("trained", "held_out", "test")] == [2, 2, 2]
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


def test_counts_are_one_a_pair(tmp_path: Path) -> None:
    pairs, _ = tokenised(many(3), tmp_path)
    assert pairs.counts.tolist() == [1, 0] * 3
    assert json.dumps(pairs.facts)

"""Examples with answers: which tokens carry loss, packing without splitting, every line that is refused."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import LETTERS, letters_tokenizer, text_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tiny
from fistapruner import FistaPrunerError
from fistapruner.settings.train import TrainingData
from fistapruner.text.examples import Example, read_training_file
from fistapruner.text.training import pack_examples, training_text

CHAT = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ message.role[0] }}\n{{ message.content }}</s>\n{% endfor %}{% if add_generation_prompt %}a\n{% endif %}"
)
TOOLS = (
    "{% if tools %}t\n{{ tools[0].name }}</s>\n{% endif %}{% for message in messages %}"
    "{{ message.role[0] }}\n{{ mood }}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.name }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}a\n{% endif %}"
)
FORGETFUL = "{{ messages[-1].role[0] }}\n{{ messages[-1].content }}</s>"


def chat_tokenizer(template: str | None = CHAT, bos: bool = False) -> Any:
    tokenizer = letters_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pieces(tokenizer: Any, ids: list[int], marks: list[bool], carries: bool) -> str:
    """The text of the tokens that carry loss, or of the others."""
    return text_of(tokenizer, torch.tensor([i for i, mark in zip(ids, marks, strict=True) if mark == carries]))


@pytest.mark.parametrize("bos", [False, True])
def test_completions_carry_loss_and_prompts_do_not(bos: bool) -> None:
    """The tokens that begin and end a text stand once, whether the line has them or not."""
    tokenizer, start = letters_tokenizer(bos), [1] if bos else []
    for prompt, completion in (("abc", "xyz"), ("abc", "xyz</s>"), ("<s>abc", "xyz")):
        ids, marks = Example("prompt", (prompt, completion), "here").encode(tokenizer, start)
        assert pieces(tokenizer, ids, marks, True) == "xyz</s>"
        assert pieces(tokenizer, ids, marks, False) == "<s>" * (bos or "<" in prompt) + "abc"
    for completion in ("xyz", "<s>xyz"):
        ids, marks = Example("prompt", ("", completion), "here").encode(tokenizer, start)
        begins = bos or "<" in completion
        assert text_of(tokenizer, torch.tensor(ids)) == "<s>" * begins + "xyz</s>"
        assert marks == [False, True, True, True] + [True] * begins  # nothing comes before the first token


@pytest.mark.parametrize("second", ["", "two"])
def test_lines_of_alpaca_are_written_in_its_template_and_carry_loss(tmp_path: Path, second: str) -> None:
    line = {"instruction": "Add.", "input": second, "output": "four"}
    (example,) = read_training_file(write(tmp_path / "alpaca.jsonl", [line]))
    assert isinstance(example, Example)
    ids, marks = example.encode(tiny.tokenizer())
    text = tiny.tokenizer().decode(ids)
    assert ("### Input:\ntwo\n\n" in text) == bool(second)
    assert "### Instruction:\nAdd.\n\n" in text
    assert text.endswith("### Response:\nfour" + tiny.tokenizer().eos_token)
    assert marks == [False] + [True] * (len(ids) - 1)


def test_turns_of_the_assistant_carry_loss() -> None:
    tokenizer = chat_tokenizer()
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    said = zip(roles, ("pp", "qq", "xx", "rr", "yy", "z"), strict=True)
    content = tuple({"role": role, "content": text} for role, text in said)
    ids, marks = Example("messages", content, "here").encode(tokenizer)
    assert pieces(tokenizer, ids, marks, True) == "xx</s>yy</s>"
    assert pieces(tokenizer, ids, marks, False) == "s\npp</s>\nu\nqq</s>\na\n\nu\nrr</s>\na\n"
    whole = tokenizer.apply_chat_template(content[:5], tokenize=False)
    assert ids == tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]


def test_all_that_a_template_reads_is_written(tmp_path: Path) -> None:
    """Tool calls, tools and arguments of the template; a turn of weight 0 carries no loss."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    talk = [ASK, call, {"role": "tool", "content": "c"}, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "content": "d"}]
    record = {"messages": talk, "tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "m"}}
    [example] = read_training_file(write(tmp_path / "a.jsonl", [record]))
    assert isinstance(example, Example)
    tokenizer = chat_tokenizer(TOOLS)
    ids, marks = example.encode(tokenizer)
    assert pieces(tokenizer, ids, marks, True) == "mlook</s>md</s>"
    assert pieces(tokenizer, ids, marks, False) == "t\nlook</s>\nu\nma</s>\na\n\nt\nmc</s>\na\nmb</s>\nu\nma</s>\na\n"
    plain = [ASK, {**ANSWER, "name": None, "tool_calls": []}]
    [same] = read_training_file(write(tmp_path / "c.jsonl", [{"messages": plain, "tools": "null"}]))
    assert same.text == json.dumps(["messages", [["user", "a"], ["assistant", "b"]]])  # decides the side


def test_turns_of_a_completion_carry_loss_and_those_of_its_prompt_do_not(tmp_path: Path) -> None:
    talk = {"prompt": [ASK, ANSWER, ASK], "completion": [{**ANSWER, "content": "xx"}]}
    [example] = read_training_file(write(tmp_path / "a.jsonl", [talk]))
    assert isinstance(example, Example)
    tokenizer = chat_tokenizer()
    ids, marks = example.encode(tokenizer)
    assert pieces(tokenizer, ids, marks, True) == "xx</s>"
    assert pieces(tokenizer, ids, marks, False) == "u\na</s>\na\nb</s>\nu\na</s>\na\n"


ANSWERS = st.tuples(st.text(LETTERS, max_size=12), st.text(LETTERS, min_size=1, max_size=12))


@settings(max_examples=60, deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=60), st.integers(8, 40), st.integers(1, 24), st.booleans())
def test_examples_are_packed_whole(answers: list[tuple[str, str]], seqlen: int, windows: int, bos: bool) -> None:
    tokenizer = letters_tokenizer(bos)
    examples = [Example("prompt", answer, "here") for answer in answers]
    packed = pack_examples(examples, tokenizer, seqlen, windows)
    start = [1] if bos else []
    assert len(packed.windows) <= windows
    whole = [example.encode(tokenizer, start) for example in examples[: packed.documents]]
    fitting = [example for example in whole if len(example[0]) <= seqlen]
    assert packed.too_long == len(whole) - len(fitting)
    assert packed.filled == sum(len(ids) for ids, _ in fitting)
    found: list[list[tuple[list[int], list[bool]]]] = []
    for ids, marks in zip(packed.windows.tolist(), packed.marks.tolist(), strict=True):
        assert len(ids) == len(marks) == seqlen
        rest = list(zip(ids, marks, strict=True))
        found.append([])
        while rest:  # the window is read back as examples, each up to its EOS, and padding
            end = next(place for place, (token, _) in enumerate(rest) if token == 2) + 1
            if end == 1:  # padding is EOS, as the tokenizer has no padding token
                assert set(rest) == {(2, False)}
                break
            found[-1].append(([token for token, _ in rest[:end]], [mark for _, mark in rest[:end]]))
            rest = rest[end:]
    expected: list[list[tuple[list[int], list[bool]]]] = []
    for example in fitting:  # each in the first window that has room
        used = [sum(len(ids) for ids, _ in window) for window in expected]
        place = next((place for place, length in enumerate(used) if length + len(example[0]) <= seqlen), len(expected))
        expected.extend([[]] if place == len(expected) else [])
        expected[place].append(example)
    assert found == expected
    if packed.documents < len(examples):
        ids, _ = examples[packed.documents].encode(tokenizer, start)
        assert len(packed.windows) == windows
        used = [
            max((place for place, mark in enumerate(marks) if mark), default=-1) + 1 for marks in packed.marks.tolist()
        ]
        assert all(seqlen - length < len(ids) for length in used)


def test_examples_become_training_windows(tmp_path: Path) -> None:
    records = [{"prompt": a + b, "completion": b * 3} for a in LETTERS for b in LETTERS]
    records += [{"prompt": "a", "completion": "x" * 40}] * 2
    said: list[str] = []
    data = TrainingData(source=write(tmp_path / "a.jsonl", records), tokens="1k", held_out=0.1)
    text = training_text(data, letters_tokenizer(), 32, say=said.append)
    assert int((~text.held_out).sum()) == 32
    sides = []
    for rows in (text.held_out, ~text.held_out):
        words = "".join(text_of(letters_tokenizer(), window) for window in text.tokens[rows]).split("</s>")
        sides.append({word for word in words if word})
    assert not sides[0] & sides[1]
    assert all(word[1:] == word[-1] * 4 for side in sides for word in side)
    assert not bool(text.marks[:, :2].any())
    facts = text.facts["tasks"][data.source]
    assert facts["documents"] == len(records)
    assert facts["trained"]["loss_tokens"] * 6 == facts["trained"]["tokens"] * 4  # bbb</s> of abbbb</s>
    whole = training_text(data.model_copy(update={"tokens": 10**6}), letters_tokenizer(), 32, say=said.append)
    assert whole.facts["tasks"][data.source]["too_long"] == 1
    assert said[-1].endswith(f"examples of {data.source} have more than 32 tokens and were left out")


GOOD = {"prompt": "a", "completion": "b"}
ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "completion": " \n"}, "an answer to learn is expected"),
        ({"prompt": "a"}, "one of the fields: messages, instruction and output, prompt and completion, text"),
        ({"prompt": None, "completion": "b"}, "no field 'prompt' with a string"),
        ({"prompt": [ASK], "completion": [ASK]}, "an answer to learn is expected"),
        ([1], "one of the fields"),
        ({"text": "a"}, "the same fields as the line before it: prompt and completion"),
        ({"text": None}, "no field 'text' with a string"),
        ({"messages": []}, "an answer to learn is expected"),
        ({"messages": "a"}, "no field 'messages' with a list"),
        ({"messages": [ASK, "b"]}, "message 2 of 'messages' has no field 'content'"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "it is missing or empty"),
        ({"messages": [ASK, {**ANSWER, "content": "\ude00"}]}, "is not JSON in UTF-8"),
        ({"messages": [ASK]}, "messages of the role 'assistant'"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "an answer to learn is expected"),
        ({"messages": [ASK, ANSWER], "tools": "a"}, "'tools' is no list"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' no mapping"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, record: Any, words: str) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, record] if "same fields" in words else [record])
    with pytest.raises(FistaPrunerError, match=words) as caught:
        read_training_file(path)
    assert f"{path}, line {2 if 'same fields' in words else 1}" in str(caught.value)


def test_chats_that_the_template_cannot_write_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER]}, {"messages": [ASK, ANSWER, ASK, ANSWER]}])
    tools = write(tmp_path / "b.jsonl", [{"messages": [{"role": "tool", "content": "a"}, ANSWER]}])
    for path, template, words in (
        (source, None, r"line \d has messages that the .* chat template cannot write .*chat_template is not set"),
        (tools, CHAT, r"line 1 has messages that the tokenizer's chat template cannot write \(no tools\): give texts"),
        (source, FORGETFUL, r"line \d: the tokenizer's chat template changes earlier messages at message [24]"),
    ):
        with pytest.raises(FistaPrunerError, match=words):
            training_text(TrainingData(source=path), chat_tokenizer(template), 16)


def test_examples_without_tokens_are_left_out(tmp_path: Path) -> None:
    """By a tokenizer that drops characters it does not know; the marks of the others stay where they belong."""
    inner = Tokenizer(models.BPE({letter: place for place, letter in enumerate(LETTERS)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="z")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    unread = {"messages": [{**ASK, "content": "1"}, {**ANSWER, "content": "2"}]}
    records = [unread, *({"messages": [{**ASK, "content": "a"}, {**ANSWER, "content": b}]} for b in ("bc", "de"))]
    source = write(tmp_path / "a.jsonl", [records[0], records[1], records[0], records[2]])
    examples = [item for item in read_training_file(source) if isinstance(item, Example)]
    packed = pack_examples(examples, tokenizer, 8, 4)
    assert [text_of(tokenizer, window) for window in packed.windows] == ["abcadezz"]
    assert packed.marks.tolist() == [[False, True, True] * 2 + [False] * 2]
    assert (packed.documents, packed.filled, packed.too_long) == (4, 6, 0)
    source = write(tmp_path / "b.jsonl", [unread, unread])
    with pytest.raises(FistaPrunerError, match=r"b\.jsonl' is too short"):
        training_text(TrainingData(source=source), tokenizer, 16)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "prompt", "completion", "messages", "tools"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON, max_size=4))
def test_any_line_is_read_or_refused_with_its_number(records: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", records)
        try:
            found = read_training_file(path)
        except FistaPrunerError as error:
            assert f"{path}, line " in str(error)  # noqa: PT017
            return
    assert len(found) == len(records)
    for item in found:
        if isinstance(item, Example) and item.kind == "prompt":
            ids, marks = item.encode(letters_tokenizer())
            assert len(ids) == len(marks) > 0


def test_text_that_no_tokenizer_reads_is_named(tmp_path: Path) -> None:
    class Broken:
        bos_token_id, eos_token_id = None, 0

        def __call__(self, text: str, **_: Any) -> Any:
            raise ValueError("no such letter")

    for record in (GOOD, {"text": "b" * 20}):
        source = write(tmp_path / "a.jsonl", [record, {**record, next(iter(record)): "b"}])
        with pytest.raises(FistaPrunerError, match=r"the tokenizer cannot read the .*no such letter"):
            training_text(TrainingData(source=source), Broken(), 16)

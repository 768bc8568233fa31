"""Read examples with an answer: ``.jsonl`` lines with a prompt, with messages, or of Alpaca.

Only answers carry loss: completions with the end-of-text token behind them, or the turns of the assistant as the
tokenizer's chat template writes them. Of Alpaca's lines all tokens do, in its published template, as in the program of
SPP (``train_on_inputs``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, one_line
from .text import read_lines, text_of, whole_text

KINDS = {
    "text": "text",
    "prompt": "prompt and completion",
    "messages": "messages",
    "alpaca": "instruction and output",
}
"""Kinds of lines, and how they are called in messages."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
)
"""Alpaca's templates, without and with an input."""

READ = (
    "tool_calls",
    "tool_call_id",
    "tool_name",
    "tool_plan",
    "name",
    "recipient",
    "channel",
    "reasoning_content",
    "reasoning",
    "thinking",
    "weight",
)
"""Other keys of a message that chat templates read, by which messages differ."""


@dataclass(frozen=True)
class Message:
    """A message of a chat.

    Args:
        role, content: no content is that of a message that only calls tools.
        others: what else the chat template may read.
    """

    role: str
    content: str | None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> list[Any]:
        """Values that equal messages share: not the numbers and times that an export gave them."""
        read = {name: self.others[name] for name in READ if name in self.others}
        return [self.role, self.content, *([read] if read else [])]

    @property
    def carries_loss(self) -> bool:
        """Whether it is an answer to learn: one of the assistant, of another weight than 0."""
        return self.role == "assistant" and self.others.get("weight") != 0

    @property
    def mapping(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        return {"role": self.role, "content": self.content, **self.others}


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Args:
        kind: ``prompt``, ``messages`` or ``alpaca``.
        content: (prompt, completion), or the messages.
        where: file and line, for messages.
        options: what the chat template is given besides the messages.
    """

    kind: str
    content: tuple[Any, ...]
    where: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The content as one string: equal examples have equal strings."""
        content = [part.key if isinstance(part, Message) else part for part in self.content]
        return json.dumps([self.kind, content, *([self.options] if self.options else [])])

    def encode(self, tokenizer: Any, bos: Sequence[int] = ()) -> tuple[list[int], list[bool]]:
        """Tokenise the example; return token ids and which of them carry loss.

        Args:
            tokenizer: a ``transformers`` tokenizer.
            bos: what begins a prompt that does not begin with it; a chat template writes its own.

        Raises:
            FistaPrunerError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if self.kind != "messages":
            prompt, completion = self.content
            pieces = [(prompt + completion, True)] if self.kind == "alpaca" else [(prompt, False), (completion, True)]
            ids, marks = _encode(pieces, tokenizer, self.where)
            if ids[:1] != [*bos]:
                ids, marks = [*bos, *ids], [False] * len(bos) + marks
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids, marks = [*ids, tokenizer.eos_token_id], [*marks, True]
        else:
            turns = _turns(self.content, tokenizer, self.where, self.options)
            ids, marks = _encode(turns, tokenizer, self.where)
        # The first token has nothing before it in its own example.
        return ids, [False, *marks[1:]] if ids else []


def read_training_file(path: str | Path) -> list[str | Example]:
    """Read a ``.jsonl`` file: documents where its lines have ``text``, else examples.

    Raises:
        FistaPrunerError: a broken line, a missing or empty field, lines of several kinds; file and line are named.
    """
    found: list[str | Example] = []
    first = None
    for where, record in read_lines(path):
        kind = _kind(record)
        if first is not None and kind != first:
            raise FistaPrunerError(
                f"{where} has {KINDS[kind]}, and the lines before it have {KINDS[first]}: one kind a file"
            )
        first = kind
        found.append(_READERS[kind](record, where))
    return found


def _kind(record: dict[str, Any]) -> str:
    if "messages" in record:
        return "messages"
    if "instruction" in record and "output" in record:
        return "alpaca"
    return "prompt" if "completion" in record or ("prompt" in record and "text" not in record) else "text"


def _completion(record: dict[str, Any], where: str) -> Example:
    if isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list):
        given, learnt = (read_messages(record[name], name, where) for name in ("prompt", "completion"))
        unlearnt = [replace(message, others={**message.others, "weight": 0}) for message in given]
        return _chat((*unlearnt, *learnt), record, where)
    prompt, completion = (_string(record, name, where) for name in ("prompt", "completion"))
    if not completion.strip():
        raise FistaPrunerError(f"{where}: the completion is empty, so that there is nothing to learn")
    return Example("prompt", (prompt, completion), where)


def _alpaca(record: dict[str, Any], where: str) -> Example:
    fields = {name: _string(record, name, where) for name in ("instruction", "output")}
    fields["input"] = _string({"input": "", **record}, "input", where)
    template = ALPACA[bool(fields["input"])]
    return Example("alpaca", (template.format_map(fields), fields["output"]), where)


def _string(record: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(record.get(name), str):
        raise FistaPrunerError(f"{where} has no field {name!r} with a string in it")
    return whole_text(record[name], name, where)


def _messages(record: dict[str, Any], where: str) -> Example:
    return _chat(read_messages(record["messages"], "messages", where), record, where)


def _chat(messages: tuple[Message, ...], record: dict[str, Any], where: str) -> Example:
    if not any(message.carries_loss for message in messages):
        raise FistaPrunerError(
            f"{where} has no message of the role 'assistant' that carries loss, so that there is nothing to learn"
        )
    return Example("messages", messages, where, template_options(record, where))


def read_messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Read a list of messages.

    Args:
        value: the list, of mappings with role and content; messages with ``tool_calls`` need no content.
        field: that holds it; ``where``: file and line, for messages.

    Raises:
        FistaPrunerError: not such a list, an empty answer of the assistant, half a character, or a weight that is
            neither 0 nor 1.
    """
    if not isinstance(value, list) or not value:
        raise FistaPrunerError(f"{where}: {field!r} is not a list of messages with role and content")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        others = {} if not isinstance(message, dict) else message.copy()
        role, content = others.pop("role", None), others.pop("content", None)
        others = {key: given for key, given in others.items() if given not in (None, "", [], {})}
        calls = "tool_calls" in others
        for key, text in (("role", role), ("content", "" if content is None and calls else content)):
            if not isinstance(text, str):
                raise FistaPrunerError(f"{where}: message {number} has no field {key!r} with a string in it")
            whole_text(text, key, f"{where}: message {number}")
        if role == "assistant" and not (content or "").strip() and not calls:
            raise FistaPrunerError(f"{where}: message {number} is an empty answer of the assistant")
        if others.get("weight", 1) not in (0, 1):
            raise FistaPrunerError(
                f"{where}: message {number} has the weight {others['weight']!r:.100}: 0 or 1 is expected"
            )
        messages.append(Message(str(role), content, others))
    return tuple(messages)


def template_options(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Read what a line gives the chat template besides messages: ``tools`` and ``chat_template_kwargs``.

    Args:
        record: of the line; ``tools`` may be a list that is written as JSON, as TRL reads it.
        where: file and line, for messages.

    Raises:
        FistaPrunerError: ``tools`` is no list, or ``chat_template_kwargs`` no mapping.
    """
    tools, options = record.get("tools") or [], record.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or []
        except ValueError:
            raise FistaPrunerError(f"{where}: 'tools' is {tools!r:.100}, and a list is expected") from None
    for name, value, kind, expected in (
        ("tools", tools, list, "a list"),
        ("chat_template_kwargs", options, dict, "a mapping"),
    ):
        if not isinstance(value, kind):
            raise FistaPrunerError(f"{where}: {name!r} is {value!r:.100}, and {expected} is expected")
    return {"tools": tools, **options} if tools else options


_READERS: dict[str, Callable[[dict[str, Any], str], str | Example]] = {
    "text": partial(text_of, others=" (nor prompt and completion, nor messages, nor instruction and output)"),
    "prompt": _completion,
    "messages": _messages,
    "alpaca": _alpaca,
}


def write_chat(
    content: Sequence[Message], tokenizer: Any, where: str, options: Mapping[str, Any], *, prompt: bool = False
) -> str:
    """Write messages by the tokenizer's chat template.

    Args:
        content: the messages.
        tokenizer: a ``transformers`` tokenizer.
        where: file and line, for messages.
        options: what the template is given besides the messages.
        prompt: begin an answer of the assistant behind them.

    Raises:
        FistaPrunerError: there is no template, it refuses the messages, or it does not write their tool calls.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FistaPrunerError(
            f"{where} has messages, and the tokenizer has no chat template: write prompt and completion instead"
        )

    def written(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options))

    messages = [message.mapping for message in content]
    try:
        text = written(messages)
    except Exception as error:  # templates raise errors of their own
        reason = one_line(error)
        raise FistaPrunerError(f"{where}: the tokenizer's chat template refuses the messages: {reason}") from None
    without = [{key: given for key, given in message.items() if key != "tool_calls"} for message in messages]
    if without != messages:
        try:
            lost = written(without) == text
        except Exception:  # no content either
            lost = False
        if lost:
            raise FistaPrunerError(
                f"{where} has 'tool_calls', which the tokenizer's chat template does not write: write prompt and "
                "completion instead"
            )
    return text


def _turns(
    content: Sequence[Message], tokenizer: Any, where: str, options: Mapping[str, Any]
) -> list[tuple[str, bool]]:
    """Write messages by the chat template, as pieces of text that are the assistant's to learn or not.

    What follows the last of its turns that carries loss is left out.
    """

    def written(count: int, prompt: bool = False) -> str:
        if count == 0:  # templates refuse an empty list: take what two different answers begin with
            one, other = (write_chat([Message("assistant", said)], tokenizer, where, options) for said in "ab")
            return one[: next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)]
        return write_chat(content[:count], tokenizer, where, options, prompt=prompt)

    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(content):
        if not message.carries_loss:
            continue
        whole = written(number + 1)
        before = next((text for prompt in (True, False) if whole.startswith(text := written(number, prompt))), None)
        if before is None or not before.startswith(done):
            raise FistaPrunerError(
                f"{where}: the tokenizer's chat template changes earlier messages at message {number + 1}, so that it "
                "cannot be told what the assistant says: write prompt and completion instead"
            )
        answer = whole[len(before) :]
        # What a template writes behind the end of a turn, such as a line break, is not said by the assistant.
        said, end, rest = answer.rpartition(tokenizer.eos_token or "\0")
        if end and not rest.strip():
            answer = said + end
        pieces += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    return pieces


def _encode(pieces: Sequence[tuple[str, bool]], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Tokenise pieces of one text, so that no token reaches from one piece into the next.

    Args:
        pieces: text, and whether it carries loss.
        tokenizer: a ``transformers`` tokenizer.
        where: file and line, for messages.
    """
    text = ""
    ids: list[int] = []
    marks: list[bool] = []
    for piece, carries in pieces:
        text += piece
        whole = token_ids(text, tokenizer, where)
        added = whole[len(ids) :] if whole[: len(ids)] == ids else token_ids(piece, tokenizer, where)
        ids += added
        marks += [carries] * len(added)
    return ids, marks


def token_ids(text: str, tokenizer: Any, where: str, *, special: bool = False) -> list[int]:
    """Tokenise a text.

    Args:
        text: what is read.
        tokenizer: a ``transformers`` tokenizer.
        where: file and line, for messages.
        special: add the tokenizer's own special tokens.

    Raises:
        FistaPrunerError: the tokenizer cannot read the text.
    """
    try:
        return list(
            tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
        )
    except Exception as error:  # tokenizers have their own exceptions
        reason = one_line(error)
        raise FistaPrunerError(f"{where}: the tokenizer cannot read the text: {reason}") from None

"""Read examples with an answer: ``.jsonl`` lines with prompt and completion, or with messages.

Only answers carry loss: completions with the end-of-text token behind them, or the turns of the assistant as the
tokenizer's chat template writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, one_line
from .text import read_lines, text_of, whole_text

KINDS = {"text": "text", "prompt": "prompt and completion", "messages": "messages"}
"""Kinds of lines, and how they are called in messages."""


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Args:
        kind: ``prompt`` or ``messages``.
        content: (prompt, completion), or (role, content) of every message.
        where: file and line, for messages.
    """

    kind: str
    content: tuple[Any, ...]
    where: str

    @property
    def text(self) -> str:
        """The content as one string: equal examples have equal strings."""
        return json.dumps([self.kind, self.content])

    def encode(self, tokenizer: Any, bos: Sequence[int] = ()) -> tuple[list[int], list[bool]]:
        """Tokenise the example; return token ids and which of them carry loss.

        Args:
            tokenizer: a ``transformers`` tokenizer.
            bos: what begins a prompt; a chat template writes its own.

        Raises:
            FistaPrunerError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if self.kind == "prompt":
            prompt, completion = self.content
            ids, marks = _encode(((prompt, False), (completion, True)), tokenizer, bos, self.where)
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids, marks = [*ids, tokenizer.eos_token_id], [*marks, True]
        else:
            ids, marks = _encode(_turns(self.content, tokenizer, self.where), tokenizer, (), self.where)
        # The first token has nothing before it in its own example.
        return ids, [False, *marks[1:]]


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
    return "prompt" if "completion" in record or ("prompt" in record and "text" not in record) else "text"


def _completion(record: dict[str, Any], where: str) -> Example:
    for field in ("prompt", "completion"):
        if not isinstance(record.get(field), str):
            raise FistaPrunerError(f"{where} has no field {field!r} with a string in it")
        whole_text(record[field], field, where)
    if not record["completion"].strip():
        raise FistaPrunerError(f"{where}: the completion is empty, so that there is nothing to learn")
    return Example("prompt", (record["prompt"], record["completion"]), where)


def _messages(record: dict[str, Any], where: str) -> Example:
    messages = read_messages(record["messages"], "messages", where)
    if not any(role == "assistant" for role, _ in messages):
        raise FistaPrunerError(f"{where} has no message of the role 'assistant', so that there is nothing to learn")
    return Example("messages", messages, where)


def read_messages(value: Any, field: str, where: str) -> tuple[tuple[str, str], ...]:
    """Read a list of messages as (role, content).

    Args:
        value: the list, of mappings with role and content.
        field: that holds it; ``where``: file and line, for messages.

    Raises:
        FistaPrunerError: not such a list, an empty answer of the assistant, or half a character.
    """
    if not isinstance(value, list) or not value:
        raise FistaPrunerError(f"{where}: {field!r} is not a list of messages with role and content")
    for number, message in enumerate(value, 1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise FistaPrunerError(f"{where}: message {number} has no field {key!r} with a string in it")
            whole_text(message[key], key, f"{where}: message {number}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise FistaPrunerError(f"{where}: message {number} is an empty answer of the assistant")
    return tuple((message["role"], message["content"]) for message in value)


_READERS: dict[str, Callable[[dict[str, Any], str], str | Example]] = {
    "text": partial(text_of, others=" (nor prompt and completion, nor messages)"),
    "prompt": _completion,
    "messages": _messages,
}


def write_chat(content: Sequence[tuple[str, str]], tokenizer: Any, where: str, *, prompt: bool = False) -> str:
    """Write messages by the tokenizer's chat template.

    Args:
        content: (role, content) of every message.
        tokenizer: a ``transformers`` tokenizer.
        where: file and line, for messages.
        prompt: begin an answer of the assistant behind them.

    Raises:
        FistaPrunerError: there is no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FistaPrunerError(
            f"{where} has messages, and the tokenizer has no chat template: write prompt and completion instead"
        )
    messages = [{"role": role, "content": text} for role, text in content]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise errors of their own
        reason = one_line(error)
        raise FistaPrunerError(f"{where}: the tokenizer's chat template refuses the messages: {reason}") from None


def _turns(content: Sequence[tuple[str, str]], tokenizer: Any, where: str) -> list[tuple[str, bool]]:
    """Write messages by the chat template, as pieces of text that are the assistant's or not.

    What follows the last turn of the assistant is left out.
    """

    def written(count: int, prompt: bool = False) -> str:
        if count == 0:  # templates refuse an empty list: take what two different answers begin with
            one, other = (write_chat([("assistant", said)], tokenizer, where) for said in "ab")
            return one[: next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)]
        return write_chat(content[:count], tokenizer, where, prompt=prompt)

    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, (role, _) in enumerate(content):
        if role != "assistant":
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


def _encode(
    pieces: Sequence[tuple[str, bool]], tokenizer: Any, start: Sequence[int], where: str
) -> tuple[list[int], list[bool]]:
    """Tokenise pieces of one text, so that no token reaches from one piece into the next.

    Args:
        pieces: text, and whether it carries loss.
        tokenizer: a ``transformers`` tokenizer.
        start: token ids before the text.
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
    return [*start, *ids], [False] * len(start) + marks


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

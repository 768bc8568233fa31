"""Read examples with an answer: ``.jsonl`` lines with a prompt, with messages, or of Alpaca.

Only answers carry loss: completions with the end-of-text token behind them, or the turns of the assistant as the
tokenizer's chat template writes them. Of Alpaca's lines all tokens do, in its published template, as in the program of
SPP (``train_on_inputs``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError
from .chat import carries_loss, key_of, read_messages, template_options, write_turns
from .sources import read_lines, string_of
from .tokens import token_ids

KINDS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
"""Kinds of lines, and the fields that they are known by."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
)
"""Alpaca's templates, without and with an input."""


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
        content = key_of(self.content) if self.kind == "messages" else self.content
        return json.dumps([self.kind, content, *([self.options] if self.options else [])])

    def encode(self, tokenizer: Any, bos: Sequence[int] = ()) -> tuple[list[int], list[bool]]:
        """Tokenise the example, so that no token reaches from a prompt into its answer.

        Args:
            tokenizer: a ``transformers`` tokenizer.
            bos: what begins a prompt that does not begin with it; a chat template writes its own.

        Returns:
            Token ids, and which of them carry loss.

        Raises:
            FistaPrunerError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if self.kind == "messages":
            pieces = write_turns(self.content, tokenizer, self.where, self.options)
        else:
            prompt, completion = self.content
            pieces = [(prompt + completion, True)] if self.kind == "alpaca" else [(prompt, False), (completion, True)]
        text = ""
        ids: list[int] = []
        marks: list[bool] = []
        for piece, carries in pieces:
            text += piece
            whole = token_ids(text, tokenizer, self.where)
            added = whole[len(ids) :] if whole[: len(ids)] == ids else token_ids(piece, tokenizer, self.where)
            ids += added
            marks += [carries] * len(added)
        if self.kind != "messages":
            if ids[:1] != [*bos]:
                ids, marks = [*bos, *ids], [False] * len(bos) + marks
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids, marks = [*ids, tokenizer.eos_token_id], [*marks, True]
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
        kind = next((kind for kind, fields in KINDS.items() if all(name in record for name in fields)), None)
        if kind is None:
            known = ", ".join(" and ".join(fields) for fields in KINDS.values())
            raise FistaPrunerError(f"{where} has none of the fields {known}")
        if first not in (None, kind):
            raise FistaPrunerError(f"{where} has {kind}, and the lines before it have {first}: one kind a file")
        first = kind
        found.append(string_of(record, "text", where) if kind == "text" else _example(kind, record, where))
    return found


def _example(kind: str, record: dict[str, Any], where: str) -> Example:
    """Read the example of a line."""
    if kind == "messages" or isinstance(record.get("completion"), list):
        if kind == "messages":
            messages = read_messages(record["messages"], "messages", where)
        else:  # only the completion is learnt
            given, learnt = (read_messages(record[name], name, where) for name in ("prompt", "completion"))
            messages = (*({**message, "weight": 0} for message in given), *learnt)
        if not any(map(carries_loss, messages)):
            raise FistaPrunerError(
                f"{where} has no message of the role 'assistant' that carries loss, so that there is nothing to learn"
            )
        return Example("messages", messages, where, template_options(record, where))
    names = KINDS[kind]
    prompt, answer = (string_of(record, name, where) for name in names)
    if not answer.strip() and kind == "prompt":
        raise FistaPrunerError(f"{where}: the completion is empty, so that there is nothing to learn")
    if kind == "alpaca":
        more = string_of({"input": "", **record}, "input", where)
        prompt = ALPACA[bool(more)].format(instruction=prompt, input=more)
    return Example(kind, (prompt, answer), where)

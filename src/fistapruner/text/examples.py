"""Read examples with an answer and preference pairs; write messages by the chat template.

An example is a ``.jsonl`` line with a prompt, with messages, or of Alpaca. Only answers carry loss: completions with
the end-of-text token behind them, or the turns of the assistant as the chat template writes them. Of Alpaca's lines
all tokens do, in its published template, as in the program of SPP (``train_on_inputs``). Pairs are those of TRL's
preference type: ``chosen``, ``rejected`` and perhaps ``prompt``, each a text or a list of messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FistaPrunerError, one_line
from .sources import bos_of, field_of, read_lines, token_ids

Message = dict[str, Any]
"""A message as chat templates read it: ``role``, ``content``, and perhaps ``tool_calls`` and others."""

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
        kind: ``prompt``, ``messages`` or ``alpaca``; ``content``: (prompt, completion), or the messages.
        where: file and line, for errors; ``options``: what the chat template is given besides the messages.
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

        A prompt begins with ``bos``, once; a chat template writes its own.

        Returns:
            Token ids, and which of them carry loss.
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
    """Read a ``.jsonl`` file: documents where its lines have ``text``, else examples."""
    found: list[str | Example] = []
    first = None
    for where, record in read_lines(path):
        kind = next((kind for kind, fields in KINDS.items() if all(name in record for name in fields)), None)
        if kind is None or first not in (None, kind):
            known = ", ".join(" and ".join(fields) for fields in ([KINDS[first]] if first else KINDS.values()))
            what = "the same fields as the line before it" if first else "one of the fields"
            raise FistaPrunerError(f"{where} does not have {what}: {known}")
        first = kind
        found.append(field_of(record, "text", where) if kind == "text" else _example(kind, record, where))
    return found


def _example(kind: str, record: dict[str, Any], where: str) -> Example:
    """Read the example of a line."""
    content: tuple[Any, ...]
    if kind == "messages" or isinstance(record.get("completion"), list):
        if kind == "messages":
            content = read_messages(record, "messages", where)
        else:  # only the completion is learnt
            content = tuple({**message, "weight": 0} for message in read_messages(record, "prompt", where))
            content += read_messages(record, "completion", where)
        learnt = [message for message in content if carries_loss(message)]
        example = Example("messages", content, where, template_options(record, where))
        answers = all(map(says_something, learnt)) and bool(learnt)
    else:
        prompt, answer = (field_of(record, name, where) for name in KINDS[kind])
        if kind == "alpaca":
            more = field_of({"input": "", **record}, "input", where)
            prompt = ALPACA[bool(more)].format(instruction=prompt, input=more)
        example, answers = Example(kind, (prompt, answer), where), kind == "alpaca" or bool(answer.strip())
    if not answers:
        raise FistaPrunerError(
            f"{where}: an answer to learn is expected (a completion, or messages of the role 'assistant' that have "
            "content or tool_calls), and it is missing or empty"
        )
    return example


def read_messages(record: dict[str, Any], field: str, where: str) -> tuple[Message, ...]:
    """Read a list of messages; those with ``tool_calls`` need no content, and empty extras are left out."""
    messages = []
    for number, found in enumerate(field_of(record, field, where, list), 1):
        message, place = found if isinstance(found, dict) else {}, f"{where}: message {number} of {field!r}"
        calls_only = message.get("content") is None and message.get("tool_calls")
        content = None if calls_only else field_of(message, "content", place)
        others = {key: given for key, given in message.items() if given not in (None, "", [], {})}
        messages.append({**others, "role": field_of(message, "role", place), "content": content})
    return tuple(messages)


def key_of(messages: Sequence[Message]) -> list[Any]:
    """Return what is compared of messages: role, content, and the rest where there is any."""
    keys = []
    for message in messages:
        extra = {key: given for key, given in message.items() if key not in ("role", "content")}
        keys.append([message["role"], message["content"], *([extra] if extra else [])])
    return keys


def carries_loss(message: Message) -> bool:
    """Check whether a message is an answer to learn: of the assistant, and of another ``weight`` than 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def says_something(message: Message) -> bool:
    """Check whether a message has content or calls tools."""
    return bool((message["content"] or "").strip() or message.get("tool_calls"))


def template_options(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read ``tools``, a list or JSON of one as TRL reads it, and ``chat_template_kwargs`` of a line."""
    tools = record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return {**({"tools": [*tools]} if tools else {}), **(record.get("chat_template_kwargs") or {})}
    except (ValueError, TypeError):
        raise FistaPrunerError(
            f"{where}: 'tools' is no list, or 'chat_template_kwargs' no mapping: {tools!r:.100}"
        ) from None


def write_chat(
    messages: Sequence[Message], tokenizer: Any, where: str, options: Mapping[str, Any], *, prompt: bool = False
) -> str:
    """Write messages by the tokenizer's chat template; ``prompt`` begins an answer behind them."""
    if not messages:  # which templates refuse
        return ""
    try:
        return str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=prompt, **options))
    except Exception as error:  # templates raise errors of their own
        raise FistaPrunerError(
            f"{where} has messages that the tokenizer's chat template cannot write ({one_line(error)}): give texts "
            "instead, with prompt and completion"
        ) from None


def write_turns(
    messages: Sequence[Message], tokenizer: Any, where: str, options: Mapping[str, Any]
) -> list[tuple[str, bool]]:
    """Write messages by the chat template, as pieces of text that are the assistant's to learn or not.

    What follows the last of its turns that carries loss is left out.
    """
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if not carries_loss(message):
            continue
        whole = write_chat(messages[: number + 1], tokenizer, where, options)
        starts = (write_chat(messages[:number], tokenizer, where, options, prompt=prompt) for prompt in (True, False))
        before = next((start for start in starts if whole.startswith(start)), None)
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


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as texts or messages; ``where`` and ``options`` as of :class:`.Example`."""

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    where: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The prompt as one string: its hash decides the side of the split."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(key_of(self.prompt))

    def encode(self, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        """Tokenise the prompt, the prompt with the chosen and with the rejected answer, as TRL does.

        Texts begin with BOS where the tokenizer begins texts with it, and get the end-of-text token behind the answers,
        neither of them twice; of messages the chat template writes both.
        """
        bos: list[int] = []
        texts: list[str] = []
        for answer in (None, self.chosen, self.rejected):
            if isinstance(self.prompt, str):
                bos, end, text = bos_of(tokenizer), tokenizer.eos_token or "", str(answer or "")
                texts.append(self.prompt + text + ("" if answer is None or text.endswith(end) else end))
            else:
                messages: Any = (*self.prompt, *(answer or ()))
                texts.append(write_chat(messages, tokenizer, self.where, self.options, prompt=answer is None))
        prompt, chosen, rejected = (token_ids(text, tokenizer, self.where) for text in texts)
        if bos and chosen[:1] != bos:
            prompt, chosen, rejected = bos + prompt, bos + chosen, bos + rejected
        return prompt, chosen, rejected


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of preference pairs; without a prompt it is what both answers begin with."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        raise FistaPrunerError(f"pairs {str(path)!r} is not a .jsonl file that exists")
    return [_pair(record, where) for where, record in read_lines(path)]


def _pair(record: dict[str, Any], where: str) -> Pair:
    """Read the pair of a line."""
    chat = isinstance(record.get("chosen"), list)
    read: Any = read_messages if chat else field_of
    chosen, rejected = (read(record, name, where) for name in ("chosen", "rejected"))
    compared = [key_of(answer) if chat else answer for answer in (chosen, rejected)]
    if "prompt" in record:
        prompt, found = read(record, "prompt", where), True
    else:  # as TRL does
        both = enumerate(zip(*compared, strict=False))
        same = next((place for place, (a, b) in both if a != b), min(map(len, compared)))
        same -= not chat and chosen[same - 1 : same] == " "
        prompt, chosen, rejected, found = chosen[:same], chosen[same:], rejected[same:], same > 0
    if chat:
        found &= all(a and a[0]["role"] == "assistant" and says_something(a[0]) for a in (chosen, rejected))
    elif not (chosen.strip() and rejected.strip()):
        found = False
    if not found or compared[0] == compared[1]:
        raise FistaPrunerError(
            f"{where}: chosen and rejected have to be two different answers of the assistant, neither of them empty, "
            f"to the field prompt or to what both begin with: chosen {chosen!r:.60}, rejected {rejected!r:.60}"
        )
    return Pair(prompt, chosen, rejected, where, template_options(record, where) if chat else {})

"""Read messages, and write them by the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FistaPrunerError, one_line

Message = dict[str, Any]
"""A message as chat templates read it: ``role``, ``content``, and perhaps ``tool_calls`` and others."""


def read_messages(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Read a list of messages; those with ``tool_calls`` need no content, and empty extras are left out.

    Args:
        value: the list.
        field: that holds it; ``where``: file and line, for messages.

    Raises:
        FistaPrunerError: not such a list, or an empty answer of the assistant.
    """
    if not isinstance(value, list) or not value:
        raise FistaPrunerError(f"{where}: {field!r} is not a list of messages with role and content")
    messages = []
    for number, found in enumerate(value, 1):
        message = found if isinstance(found, dict) else {}
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        for key, text in (("role", role), ("content", "" if content is None and calls else content)):
            if not isinstance(text, str):
                raise FistaPrunerError(f"{where}: message {number} has no field {key!r} with a string in it")
        if role == "assistant" and not (content or "").strip() and not calls:
            raise FistaPrunerError(f"{where}: message {number} is an empty answer of the assistant")
        others = {key: given for key, given in message.items() if given not in (None, "", [], {})}
        messages.append({**others, "role": role, "content": content})
    return tuple(messages)


def key_of(messages: Sequence[Message]) -> list[Any]:
    """Return what is compared of messages: role, content, and the rest where there is any."""
    extras = [{key: given for key, given in each.items() if key not in ("role", "content")} for each in messages]
    return [
        [message["role"], message["content"], *([extra] if extra else [])]
        for message, extra in zip(messages, extras, strict=True)
    ]


def carries_loss(message: Message) -> bool:
    """Check whether a message is an answer to learn: of the assistant, and of another ``weight`` than 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def template_options(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read what a line gives the chat template besides messages: ``tools`` and ``chat_template_kwargs``.

    Raises:
        FistaPrunerError: they are no list (which may be written as JSON, as TRL reads it) and no mapping.
    """
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
    """Write messages by the tokenizer's chat template.

    Args:
        messages: none are no text, as templates refuse them.
        tokenizer: a ``transformers`` tokenizer.
        where: file and line, for messages.
        options: what the template is given besides the messages.
        prompt: begin an answer of the assistant behind them.

    Raises:
        FistaPrunerError: there is no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FistaPrunerError(
            f"{where} has messages, and the tokenizer has no chat template: write prompt and completion instead"
        )
    if not messages:
        return ""
    try:
        written = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=prompt, **options)
    except Exception as error:  # templates raise errors of their own
        reason = one_line(error)
        raise FistaPrunerError(f"{where}: the tokenizer's chat template refuses the messages: {reason}") from None
    return str(written)


def write_turns(
    messages: Sequence[Message], tokenizer: Any, where: str, options: Mapping[str, Any]
) -> list[tuple[str, bool]]:
    """Write messages by the chat template, as pieces of text that are the assistant's to learn or not.

    What follows the last of its turns that carries loss is left out.

    Raises:
        FistaPrunerError: as :func:`write_chat`, or the template writes earlier messages anew.
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

"""Read preference pairs, tokenise them, and split them into training, held-out and test pairs.

Files are those of TRL's preference type: ``.jsonl`` lines with ``chosen``, ``rejected`` and perhaps ``prompt``, each a
text or a list of messages. A pair becomes two windows, chosen and rejected, padded at their end to the longest of all:
with a causal model what stands to the right of a token never changes its prediction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.tokenizer import padding_id
from ..papers.mamf import shuffled
from ..settings.align_settings import PairData
from .examples import Message, read_messages, template_options, token_ids, write_chat
from .text import adds_bos, read_lines, whole_text
from .training_text import TrainingText, document_hash
from .windows import tokens_sha256

TASK = "pairs"
"""Name of the one text of an alignment."""

KINDS = {
    (True, False): "prompt, chosen and rejected as texts",
    (True, True): "prompt, chosen and rejected as messages",
    (False, False): "chosen and rejected as texts",
    (False, True): "chosen and rejected as messages",
}
"""Kinds of lines, by whether they have a prompt and whether they are messages, and how they are called in errors."""

MANY = 0.05
"""Share of pairs whose prompt ends inside a token above which a remedy is named."""

MAX_HELD_OUT_PROMPTS = 512
"""Prompts that are held out: more would take time at every check and hardly change the choice of the step."""

SIDES = ("trained", "held_out", "test")

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Args:
        prompt, chosen, rejected: texts, or messages.
        where: file and line, for messages.
        options: what the chat template is given besides the messages.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    where: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The prompt as one string: its hash decides the side of the split."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(_parts(self.prompt))

    def encode(self, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        """Tokenise the prompt, the prompt with the chosen and with the rejected answer, as TRL does.

        Texts get the end-of-text token behind the answers and the tokenizer's own special tokens, neither of them
        twice; of messages the chat template writes all of them.

        Raises:
            FistaPrunerError: the tokenizer has no chat template, or refuses the text.
        """
        if isinstance(self.prompt, str):
            end = tokenizer.eos_token or ""
            answers = (str(answer) for answer in (self.chosen, self.rejected))
            texts = [self.prompt, *(self.prompt + text + ("" if text.endswith(end) else end) for text in answers)]
        else:
            texts = [write_chat(self.prompt, tokenizer, self.where, self.options, prompt=True)]
            texts += [
                write_chat((*self.prompt, *answer), tokenizer, self.where, self.options)
                for answer in (self.chosen, self.rejected)
                if not isinstance(answer, str)
            ]
        special = isinstance(self.prompt, str)
        prompt, chosen, rejected = (token_ids(text, tokenizer, self.where, special=special) for text in texts)
        end_id = [tokenizer.eos_token_id]
        if special and prompt[-1:] == end_id == token_ids("a", tokenizer, self.where, special=True)[-1:]:
            # The tokenizer appends the end to every text: a prompt has none, and the answers have their own.
            prompt, chosen, rejected = prompt[:-1], chosen[:-1], rejected[:-1]
        twice = [tokenizer.bos_token_id] * 2
        if special and twice in (chosen[:2], rejected[:2]) and adds_bos(tokenizer):
            prompt, chosen, rejected = (ids[1:] if ids[:2] == twice else ids for ids in (prompt, chosen, rejected))
        return prompt, chosen, rejected


@dataclass(frozen=True)
class Pairs(TrainingText):
    """Tokenised pairs: windows 2 i and 2 i + 1 are the chosen and the rejected answer of pair i.

    Args:
        test: (windows,) bool: windows of the test pairs.
    """

    test: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @cached_property
    def counts(self) -> Tensor:
        """See :class:`TrainingText`: the loss of a pair stands at its chosen answer."""
        return torch.tensor([1, 0]).repeat(len(self.tokens) // 2)

    def amount(self, held_out: Sequence[int]) -> str:
        return f"{len(held_out) // 2} held-out pairs"

    @property
    def lengths(self) -> Tensor:
        """(windows,) tokens up to the last of the answer."""
        places = torch.arange(1, self.tokens.shape[1] + 1)
        return (self.marks * places).amax(1)

    def windows(self, side: str) -> list[int]:
        where = {"held_out": self.held_out, "test": self.test, "trained": ~(self.held_out | self.test)}[side]
        return [int(number) for number in where.nonzero().flatten()]


def read_pairs(path: str | Path, prompt_ends: str | None = None) -> tuple[list[Pair], list[str]]:
    """Read a file of preference pairs.

    Args:
        path: a ``.jsonl`` file, all lines of one kind.
        prompt_ends: where lines have no prompt: it ends with the last such text that both answers share.

    Returns:
        The pairs, and sentences on what a user should know of them.

    Raises:
        FistaPrunerError: no such file, a broken line, a missing or empty field, lines of several kinds, equal answers;
            file and line are named.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        raise FistaPrunerError(f"pairs {str(path)!r} is not a .jsonl file that exists")
    pairs: list[Pair] = []
    first: tuple[bool, bool] | None = None
    inside = 0
    for where, record in read_lines(path):
        values = {name: _answer(record, name, where) for name in ("chosen", "rejected")}
        prompt = _answer(record, "prompt", where) if "prompt" in record else None
        listed = {name: not isinstance(value, str) for name, value in values.items()}
        if prompt is not None:
            listed["prompt"] = not isinstance(prompt, str)
        if len(set(listed.values())) > 1:
            texts = " and ".join(name for name, each in listed.items() if not each)
            lists = " and ".join(name for name, each in listed.items() if each)
            raise FistaPrunerError(f"{where} has {texts} as text and {lists} as messages: one kind a file")
        kind = (prompt is not None, listed["chosen"])
        if first is not None and kind != first:
            raise FistaPrunerError(f"{where} has {KINDS[kind]}, and the lines before it have {KINDS[first]}")
        first = kind
        if _parts(values["chosen"]) == _parts(values["rejected"]):
            raise FistaPrunerError(f"{where}: chosen and rejected are equal, so that there is nothing to prefer")
        if prompt is None:
            pair, split = _with_prompt(values["chosen"], values["rejected"], prompt_ends, where)
            inside += split
        else:
            pair = Pair(prompt, values["chosen"], values["rejected"], where)
        if listed["chosen"]:
            pair = replace(pair, options=template_options(record, where))
        _check_answers(pair)
        pairs.append(pair)
    if not pairs:
        raise FistaPrunerError(f"pairs {str(path)!r} is empty")
    if prompt_ends is not None and first != (False, False):
        raise FistaPrunerError(f"data.prompt_ends {prompt_ends!r}: {path} has {KINDS[first or (True, False)]}")
    sentences = []
    if inside:
        sentences.append(
            f"{inside} of {len(pairs)} prompts, taken as what both answers begin with, end inside a word: "
            "--prompt-ends TEXT names how prompts end"
        )
    return pairs, sentences


def _answer(record: dict[str, Any], name: str, where: str) -> str | Messages:
    """Read a field that is a text or a list of messages."""
    value = record.get(name)
    if isinstance(value, str):
        return whole_text(value, name, where)
    if not isinstance(value, list):
        raise FistaPrunerError(f"{where} has no field {name!r} with a string or a list of messages in it")
    return read_messages(value, name, where)


def _parts(text: str | Messages) -> Sequence[Any]:
    """Return what is compared of a prompt or an answer: characters of a text, keys of messages."""
    return text if isinstance(text, str) else [message.key for message in text]


def _with_prompt(
    chosen: str | Messages, rejected: str | Messages, prompt_ends: str | None, where: str
) -> tuple[Pair, bool]:
    """Take as prompt what both answers begin with; return also whether it ends inside a word.

    Raises:
        FistaPrunerError: they share no beginning, one is what the other begins with, or they do not share what ends a
            prompt.
    """
    shorter, pairs = min(len(chosen), len(rejected)), zip(_parts(chosen), _parts(rejected), strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)
    if 0 < same == shorter and prompt_ends is None:
        name, other = ("chosen", "rejected") if len(chosen) == same else ("rejected", "chosen")
        remedy = ": --prompt-ends TEXT names how prompts end" if isinstance(chosen, str) else ""
        raise FistaPrunerError(
            f"{where}: {name} is what {other} begins with, so that nothing is left of its answer{remedy}"
        )
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        if same == 0:
            raise FistaPrunerError(
                f"{where}: chosen and rejected have different first messages, and must begin with the same ones, which "
                "are the prompt"
            )
        return Pair(chosen[:same], chosen[same:], rejected[same:], where), False
    if prompt_ends is not None:
        place = chosen.rfind(prompt_ends, 0, same)
        if place < 0:
            raise FistaPrunerError(f"{where}: what chosen and rejected share does not have {prompt_ends!r} in it")
        same = place + len(prompt_ends)
    elif chosen[same - 1 : same] == " ":
        same -= 1
    if same == 0:
        raise FistaPrunerError(f"{where}: chosen and rejected share no beginning, which is the prompt")
    inside = chosen[same - 1 : same].isalnum() and (
        chosen[same : same + 1].isalnum() or rejected[same : same + 1].isalnum()
    )
    return Pair(chosen[:same], chosen[same:], rejected[same:], where), inside and prompt_ends is None


def _check_answers(pair: Pair) -> None:
    """Refuse empty answers, and messages that are no answer of the assistant."""
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(answer, str):
            empty = not answer.strip()
        else:
            empty = not answer
            if answer and answer[0].role != "assistant":
                raise FistaPrunerError(
                    f"{pair.where}: the first message of {name} behind the prompt has the role {answer[0].role!r}, and "
                    "an answer of the assistant is expected"
                )
            if any(message.role == "assistant" and not message.carries_loss for message in answer):
                raise FistaPrunerError(f"{pair.where}: {name} has a message of weight 0, and all of it carries loss")
        if empty:
            raise FistaPrunerError(f"{pair.where}: the answer {name} is empty")


def tokenise_pairs(
    pairs: Sequence[Pair], data: PairData, tokenizer: Any, max_length: int, say: Callable[[str], None]
) -> Pairs:
    """Tokenise pairs and split them by the SHA-256 of their prompt: equal prompts are on one side.

    Pairs whose prompt fills ``max_length``, or with an answer that adds no token to it (to an empty one: no second
    token), are left out; longer answers are cut at their end, and pairs whose answers are equal then are left out too.

    Args:
        pairs: as read.
        data: shares of the sides, and the file's name.
        tokenizer: a ``transformers`` tokenizer.
        max_length: tokens of a window, at most.
        say: receives how many pairs are left out or cut.

    Raises:
        FistaPrunerError: the tokenizer refuses a text, or too few prompts are left for three sides.
    """
    kept: list[tuple[Pair, int, list[int], list[int]]] = []
    too_long = no_answer = equal = cut = broken = 0
    for pair in pairs:
        prompt, *answers = pair.encode(tokenizer)
        broken += any(answer[: len(prompt)] != prompt for answer in answers)
        if len(prompt) >= max_length:
            too_long += 1
        elif min(map(len, answers)) <= max(1, len(prompt)):  # nothing comes before the first token
            no_answer += 1
        else:
            chosen, rejected = (answer[:max_length] for answer in answers)
            if chosen == rejected:
                equal += 1
                continue
            cut += any(len(answer) > max_length for answer in answers)
            kept.append((pair, len(prompt), chosen, rejected))
    if too_long:
        say(f"{too_long} of {len(pairs)} pairs are left out: their prompts have {max_length} tokens or more")
    if no_answer:
        say(f"{no_answer} of {len(pairs)} pairs are left out: an answer adds no token that has one before it")
    if equal:
        say(f"{equal} of {len(pairs)} pairs are left out: their answers are the same in the first {max_length} tokens")
    if cut:
        say(f"answers of {cut} of {len(pairs)} pairs are cut at {max_length} tokens")
    if broken:
        remedy = "; better move the space from the prompt's end to the answers" if broken > MANY * len(pairs) else ""
        say(f"the prompts of {broken} of {len(pairs)} pairs end inside a token of the answer{remedy}")
    sides = _sides([pair.key for pair, *_ in kept], data, too_long + equal)
    longest = max(len(answer) for *_, chosen, rejected in kept for answer in (chosen, rejected))
    tokens = torch.full((2 * len(kept), longest), padding_id(tokenizer), dtype=torch.int64)
    marks = torch.zeros(2 * len(kept), longest, dtype=torch.bool)
    for number, (_, start, *both) in enumerate(kept):
        for place, answer in enumerate(both, 2 * number):
            tokens[place, : len(answer)] = torch.tensor(answer)
            marks[place, start : len(answer)] = True
    marks[:, 0] = False  # nothing comes before the first token
    side = torch.tensor(sides).repeat_interleave(2)
    facts = {
        "source": str(data.pairs),
        "how": "preference pairs, split by the hash of the prompt",
        "documents": len(pairs),
        "duplicates": 0,
        "too_long": too_long + no_answer + equal,
        "samples": len(tokens),
    }
    for number, name in enumerate(SIDES):
        where = side == number
        facts[name] = {
            "documents": int(where.sum()) // 2,
            "windows": int(where.sum()),
            "tokens": int((marks[where] * torch.arange(1, longest + 1)).amax(1).sum()),
            "loss_tokens": int(marks[where].sum()),
        }
    return Pairs(
        tokens=tokens,
        marks=marks,
        held_out=side == SIDES.index("held_out"),
        task=torch.zeros(len(tokens), dtype=torch.int64),
        tasks=(TASK,),
        facts={
            "how": facts["how"],
            "documents": len(pairs),
            "seed": data.seed,
            "sha256": tokens_sha256(tokens),
            "tasks": {TASK: facts},
        },
        test=side == SIDES.index("test"),
    )


def _sides(prompts: Sequence[str], data: PairData, too_long: int) -> list[int]:
    """Return the side of every pair, an index into :data:`SIDES`; each has at least one prompt.

    Where the share to hold out has more than :data:`MAX_HELD_OUT_PROMPTS` prompts, the others are trained on.

    Raises:
        FistaPrunerError: fewer than three different prompts.
    """
    hashes = sorted({document_hash(prompt) for prompt in prompts})
    if len(hashes) < len(SIDES):
        longer = f"; {too_long} pairs are left out for their length: take a larger --max-length" if too_long else ""
        raise FistaPrunerError(
            f"{data.pairs} has pairs of {len(hashes)} different prompts that fit: at least 3 are needed, to train on, "
            f"to hold out, and to test{longer}"
        )
    share = [int(digest[:16], 16) / 2**64 for digest in hashes]
    held = max(1, sum(each < data.held_out for each in share))
    test = max(1, sum(each < data.held_out + data.test for each in share) - held)
    held, test = min(held, len(hashes) - 2), min(test, len(hashes) - held - 1)
    kept = min(held, MAX_HELD_OUT_PROMPTS)
    numbers = [1] * kept + [0] * (held - kept) + [2] * test + [0] * (len(hashes) - held - test)
    side = dict(zip(hashes, numbers, strict=True))
    return [side[document_hash(prompt)] for prompt in prompts]


def pair_order(pairs: Pairs, steps: int, pairs_per_step: int, seed: int) -> Tensor:
    """Draw the pairs of every step: all training pairs once, then all again in another order.

    Returns:
        (steps, 2 * pairs_per_step) int64 numbers of windows; the answers of a pair are neighbours.
    """
    chosen = torch.tensor(pairs.windows("trained")[::2])
    drawn = shuffled(chosen, steps * pairs_per_step, seed, TASK)
    return torch.stack([drawn, drawn + 1], -1).view(steps, 2 * pairs_per_step)

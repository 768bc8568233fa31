"""Read preference pairs, tokenise them, and split them into training, held-out and test pairs.

Files are those of TRL's preference type: ``.jsonl`` lines with ``chosen``, ``rejected`` and perhaps ``prompt``, each a
text or a list of messages. A pair becomes two windows, chosen and rejected, padded at their end to the longest of all:
with a causal model what stands to the right of a token never changes its prediction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import FistaPrunerError
from ..models.source import padding_id
from ..papers.mamf import shuffled
from ..settings.align import PairData
from .chat import Message, key_of, read_messages, says_something, template_options, write_chat
from .sources import bos_of, document_hash, field_of, read_lines, token_ids
from .training import TrainingText, side_facts
from .windows import text_facts

TASK = "pairs"
"""Name of the one text of an alignment."""

TEST = 0.1
"""Share of the prompts that the result is measured on, and nothing else; most are trained on."""

MAX_HELD_OUT_PROMPTS = 512
"""Prompts that are held out: more would take time at every check and hardly change the choice of the step."""

SIDES = ("trained", "held_out", "test")


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


@dataclass(frozen=True)
class Pairs(TrainingText):
    """Tokenised pairs: windows 2 i and 2 i + 1 are the chosen and the rejected answer of pair i."""

    @cached_property
    def counts(self) -> Tensor:
        """See :class:`TrainingText`: the loss of a pair stands at its chosen answer."""
        return torch.tensor([1, 0]).repeat(len(self.tokens) // 2)

    @property
    def lengths(self) -> Tensor:
        """(windows,) tokens up to the last of the answer."""
        return last_places(self.marks)


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of preference pairs; without a prompt it is what both answers begin with.

    Raises:
        FistaPrunerError: no such file, or a broken line, which is named.
    """
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


def tokenise_pairs(
    pairs: Sequence[Pair], data: PairData, tokenizer: Any, max_length: int, say: Callable[[str], None]
) -> Pairs:
    """Tokenise pairs and split them by the SHA-256 of their prompt: equal prompts are on one side.

    Pairs whose prompt fills ``max_length`` are left out, and so are those whose answers add nothing to it or are equal
    up to there; longer answers are cut at their end.

    ``say`` receives how many pairs are left out or cut.
    """
    kept: list[tuple[Pair, int, list[int], list[int]]] = []
    too_long = alike = cut = 0
    for pair in pairs:
        prompt, *answers = pair.encode(tokenizer)
        chosen, rejected = (answer[:max_length] for answer in answers)
        if len(prompt) >= max_length:
            too_long += 1
        elif min(map(len, answers)) <= max(1, len(prompt)) or chosen == rejected:  # nothing precedes the first token
            alike += 1
        else:
            cut += any(len(answer) > max_length for answer in answers)
            kept.append((pair, len(prompt), chosen, rejected))
    for count, sentence in (
        (too_long, f"are left out: their prompts have {max_length} tokens or more"),
        (alike, f"are left out: their answers add no tokens, or the same ones, in the first {max_length}"),
        (cut, f"have answers that are cut at {max_length} tokens"),
    ):
        if count:
            say(f"{count} of {len(pairs)} pairs {sentence}")
    side = torch.tensor(_sides([pair.key for pair, *_ in kept], data, too_long + alike)).repeat_interleave(2)
    written = [torch.tensor(answer) for _, _, *both in kept for answer in both]
    tokens = pad_sequence(written, batch_first=True, padding_value=padding_id(tokenizer))
    starts = torch.tensor([max(1, start) for _, start, *_ in kept]).repeat_interleave(2)  # nothing precedes the first
    places, ends = torch.arange(tokens.shape[1]), torch.tensor([len(answer) for answer in written])
    marks = (places >= starts[:, None]) & (places < ends[:, None])
    facts = {
        "source": str(data.pairs),
        "how": "preference pairs, split by the hash of the prompt",
        "documents": len(pairs),
        "too_long": too_long + alike,
        "samples": len(tokens),
    }
    for number, name in enumerate(SIDES):
        where = side == number
        facts[name] = side_facts(int(where.sum()) // 2, marks[where], int(last_places(marks[where]).sum()))
    return Pairs(
        tokens=tokens,
        marks=marks,
        held_out=side == SIDES.index("held_out"),
        task=torch.zeros(len(tokens), dtype=torch.int64),
        tasks=(TASK,),
        facts={**text_facts(False, {TASK: facts}, data.seed, tokens), "tasks": {TASK: facts}},
        test=side == SIDES.index("test"),
    )


def last_places(marks: Tensor) -> Tensor:
    """Return the (windows,) tokens up to the last one that is marked."""
    return (marks * torch.arange(1, marks.shape[1] + 1)).amax(1)


def _sides(prompts: Sequence[str], data: PairData, left_out: int) -> list[int]:
    """Return the side of every pair, an index into :data:`SIDES`; each has at least one prompt.

    Where the share to hold out has more than :data:`MAX_HELD_OUT_PROMPTS` prompts, the others are trained on.
    """
    hashes = sorted({document_hash(prompt) for prompt in prompts})
    if len(hashes) < len(SIDES):
        longer = f"; {left_out} pairs were left out: take a larger max_length" if left_out else ""
        raise FistaPrunerError(
            f"{data.pairs} has pairs of {len(hashes)} different prompts that fit: at least 3 are needed, to train on, "
            f"to hold out, and to test{longer}"
        )
    share = [int(digest[:16], 16) / 2**64 for digest in hashes]
    held = max(1, sum(each < data.held_out for each in share))
    test = max(1, sum(each < data.held_out + TEST for each in share) - held)
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

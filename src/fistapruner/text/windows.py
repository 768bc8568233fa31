"""Draw windows of calibration tokens.

As in the papers' loader, documents longer than a window are drawn at random, and one random window of each is taken.
Where too few documents are that long, windows are drawn from the concatenation of all, or of as many as suffice.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..papers.mamf import Mixture
from ..settings.prune import Calibration
from .generate import GENERATED, generate_tokens
from .sources import LARGE, SELF, bos_of, check_source, passages, source_documents, token_ids, tokens_sha256

JOINT = "\n\n"
CALIBRATION_SEQLEN, WRITTEN_SEQLEN = 2048, 1024
"""Longest windows by default: the papers' for OPT and LLaMA-1, and those that a CPU writes, which takes minutes."""

ENOUGH = 16
"""The concatenation of a large source stops at this multiple of the tokens needed."""

PASSAGE = 2**18
"""Longest passage of a large document, in characters."""


def window_length(
    asked: int | None, model: LayerwiseModel, default: int = CALIBRATION_SEQLEN, setting: str = "seqlen"
) -> int:
    """Decide the tokens in a window: as ``setting`` asks, or the default unless the model takes less."""
    longest = model.max_length
    seqlen = asked or min(longest or default, default)
    if longest is not None and seqlen > longest:
        raise FistaPrunerError(
            f"{setting} {seqlen} is more than the {longest} tokens {model.checkpoint.folder} was made for"
        )
    return seqlen


def calibration_length(settings: Calibration, model: LayerwiseModel) -> int:
    """Decide the tokens in a calibration window; fewer where a CPU has to write the text."""
    writes = SELF in settings.sources.values() and model.device.type == "cpu"
    return window_length(settings.seqlen, model, WRITTEN_SEQLEN if writes else CALIBRATION_SEQLEN)


def calibration_tokens(
    settings: Calibration,
    tokenizer: Any,
    seqlen: int,
    load_model: Callable[[], Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Tensor, dict[str, Any]]:
    """Draw the calibration windows.

    Where the tokenizer begins a text with BOS, every window begins with it. Tasks give the same number of windows each,
    to within one.

    Args:
        settings, tokenizer, seqlen: what is drawn, a ``transformers`` tokenizer, and tokens in a window.
        load_model: loads the model that generates text; needed for the source ``self`` only.
        say: receives the progress of text generation, as sentences.

    Returns:
        (samples, seqlen) int64 token ids, and the facts: ``source``, ``how`` (how windows were drawn), ``documents``
        (read; None for ``self``), ``seed``, ``sha256`` of the token ids, and for tasks ``tasks``: of each its source,
        how, documents and samples.
    """
    for source in settings.sources.values():
        check_source(source)
    drawn, seed = window_tasks(settings), settings.seed
    tokens = torch.empty(settings.samples, seqlen, dtype=torch.int64)
    tasks: dict[str, dict[str, Any]] = {}
    for number, (name, source) in enumerate(settings.sources.items()):
        samples, documents = int((drawn == number).sum()), None
        if source == SELF:
            assert load_model is not None
            how = GENERATED
            own = generate_tokens(load_model(), tokenizer, samples, seqlen, seed=seed, say=say)
        else:
            texts = source_documents(source)
            own, how = draw_from_documents(texts, tokenizer, samples, seqlen, seed=seed, source=source)
            documents = len(texts)
        tokens[drawn == number] = own
        tasks[name] = {"source": source, "how": how, "documents": documents, "samples": samples}
    facts = text_facts(settings.tasks, tasks, seed, tokens)
    return tokens, {"source": settings.name, **facts, **({"tasks": tasks} if settings.tasks else {})}


def window_tasks(settings: Calibration) -> Tensor:
    """Return the (samples,) number of each window's task, in the order of ``settings.sources``."""
    if len(settings.sources) == 1:
        return torch.zeros(settings.samples, dtype=torch.int64)
    mixture = Mixture(len(settings.sources), seed=settings.seed)
    return mixture.draw(settings.samples, f"at least {mixture.least} samples")


def text_facts(mixed: object, tasks: Mapping[str, Mapping[str, Any]], seed: int, tokens: Tensor) -> dict[str, Any]:
    """Return what reports say of all texts together; ``mixed``: tasks were named."""
    each = [
        f"{name}: {task['samples']} windows of {Path(task['source']).name}, {task['how']}"
        for name, task in tasks.items()
    ]
    return {
        "how": "; ".join(each) if mixed else next(iter(tasks.values()))["how"],
        "documents": sum(task["documents"] or 0 for task in tasks.values()) or None,
        "seed": seed,
        "sha256": tokens_sha256(tokens),
    }


def draw_from_documents(
    documents: list[str], tokenizer: Any, samples: int, seqlen: int, *, seed: int = 0, source: str = "text"
) -> tuple[Tensor, str]:
    """Draw ``samples`` windows of ``seqlen`` tokens; return them and a sentence on the method.

    A document of more than :data:`LARGE` characters is cut into passages, which are drawn like documents.
    """
    random, bos = Random(seed), bos_of(tokenizer)
    room = seqlen - len(bos)
    kind = "documents"
    if any(len(document) > LARGE for document in documents):
        kind = "documents and passages" if len(documents) > 1 else "passages"
        cut = (map(str.rstrip, passages(text, PASSAGE)) if len(text) > LARGE else [text] for text in documents)
        documents = [part for parts in cut for part in parts if part]
    documents = documents.copy()
    random.shuffle(documents)

    # A token stands for at least one byte, so shorter documents cannot fill a window.
    long = [text for text in documents if len(text) > room or len(text.encode("utf-8", "replace")) > room]
    windows: list[list[int]] = []
    for text in long if len(long) >= samples else ():
        if len(ids := token_ids(text, tokenizer, source)) > room:
            start = random.randrange(len(ids) - room + 1)
            windows.append(bos + ids[start : start + room])
            if len(windows) == samples:
                how = f"one random window of each of that many long {kind}"
                return torch.tensor(windows, dtype=torch.int64), how

    separator = token_ids(JOINT, tokenizer, source)
    stream = array("i")  # a list of integers has nine times the bytes
    read = 0
    for text in documents:
        read += 1
        stream.extend((separator if stream else []) + token_ids(text, tokenizer, source))
        if len(stream) >= ENOUGH * samples * seqlen:
            break
    places = len(stream) - room + 1
    if places < samples:
        raise FistaPrunerError(
            f"calibration text {source!r} is too short: its {len(stream)} tokens have {max(0, places)} different "
            f"windows of {seqlen}, and {samples} are asked; take a longer text, a smaller seqlen or fewer samples"
        )
    if len(stream) // room >= samples:
        starts = [room * index for index in random.sample(range(len(stream) // room), samples)]
        which = f"all {kind}" if read == len(documents) else f"{read} of {len(documents)} {kind}, drawn at random"
        how = f"windows that do not overlap, from the concatenation of {which} ({len(stream)} tokens)"
    else:
        starts = random.sample(range(places), samples)
        how = f"overlapping windows from the concatenation of all {kind} (only {len(stream)} tokens)"
    windows = [bos + stream[start : start + room].tolist() for start in starts]
    return torch.tensor(windows, dtype=torch.int64), how

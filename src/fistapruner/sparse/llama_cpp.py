"""Measure the speed of a GGUF file in llama.cpp, the way :mod:`.speed` measures a model in torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import FistaPrunerError, MissingExtraError, one_line
from ..models.files.gguf_header import check_gguf
from .speed import WARM_UP_TOKENS, Run

EMBEDDING = "token_embd.weight"
"""The tensor that has a row for every token, in the files of all architectures."""


def check_files(files: list[Path], batch: int) -> None:
    """Refuse files that llama.cpp cannot be timed on, before any of them is loaded.

    Raises:
        FistaPrunerError: a file that is missing or no GGUF file, two of one name, or more than one sequence at once.
        MissingExtraError: the extra ``bench`` is not installed.
    """
    if not files:
        return
    names = [file.stem for file in files]
    for file in files:
        if not file.is_file():
            reason = "is not a file" if file.exists() else "does not exist"
            raise FistaPrunerError(f"gguf {file} {reason}: a GGUF file is expected")
        if names.count(file.stem) > 1:
            raise FistaPrunerError(f"gguf {file}: another file has the name {file.stem}, too: rename one of them")
    if batch != 1:
        raise FistaPrunerError(f"batch {batch}: with GGUF files one sequence at once is timed: batch 1")
    if find_spec("xllamacpp") is None:
        raise MissingExtraError("xllamacpp", "bench", "timing a GGUF file")
    for file in files:
        if EMBEDDING not in check_gguf(file):
            raise FistaPrunerError(f"gguf {file} has no tensor {EMBEDDING!r}: a language model is expected")


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU.

    Args:
        file: the GGUF file.
        prompt: prompt tokens.
        tokens: most new tokens in a run.
        threads: CPU threads.

    Raises:
        FistaPrunerError: llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, prompt: int, tokens: int, threads: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = prompt + max(tokens, WARM_UP_TOKENS)
        settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 1, 0, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        vocabulary = check_gguf(file)[EMBEDDING].shape[0]
        self._prompt = torch.randint(0, vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
        try:
            self._server: Any = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise FistaPrunerError(f"llama.cpp cannot load {file}: {one_line(error)}") from None

    def time(self, tokens: int) -> Run:
        """Decode greedily and return llama.cpp's own times; the prompt is read anew.

        Raises:
            FistaPrunerError: llama.cpp refuses.
        """
        answer = self._server.handle_completions(
            {
                "prompt": self._prompt,
                "n_predict": tokens,
                "temperature": 0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        if "timings" not in answer:
            raise FistaPrunerError(f"llama.cpp has written nothing: {str(answer.get('error', answer))[:300]}")
        timings = answer["timings"]
        # Its clock for new tokens starts at the first of them.
        return Run(timings["prompt_ms"] / 1000, 1000 * (timings["predicted_n"] - 1) / timings["predicted_ms"])

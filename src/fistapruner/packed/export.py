"""Write the model of a run, or a checkpoint, as a file for another engine."""

from __future__ import annotations

from pathlib import Path

from ..errors import A_FOLDER, out_path, path_text
from ..models.export import GGUFValues, export_gguf
from ..models.record import refuse_low_rank
from ..runs.directory import checkpoint_of
from ..runtime.numerics import undisturbed
from ..runtime.show import Tick, silent
from .checkpoint import refuse_packed


@undisturbed()
def export(
    model: str | Path,
    out: str | Path,
    values: GGUFValues = "bf16",
    *,
    allow_pickle: bool = False,
    progress: Tick | None = None,
) -> Path:
    """Write a pruned or recovered model as a GGUF file, which llama.cpp runs.

    Args:
        model: run directory or checkpoint folder.
        out: the file to write, called ``.gguf``.
        values: how matrices are stored: ``bf16``, ``f16``, ``f32``, ``q8_0``.
        allow_pickle: read legacy ``.bin`` weights.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        The file.

    Raises:
        FistaPrunerError: ``out`` exists or is not called ``.gguf``, the model is of a family that is not exported,
            ``values`` cannot hold the weights, the disk is full, the model is packed, or the run is not finished.
        MissingExtraError: the ``gguf`` package is missing.
    """
    out, folder = out_path(out, "the path of a file"), checkpoint_of(path_text("model", model, A_FOLDER))
    refuse_packed(folder)
    refuse_low_rank(folder, "export")
    return export_gguf(folder, out, values, allow_pickle=allow_pickle, progress=progress or silent)

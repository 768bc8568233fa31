"""Write the model of a run, or a checkpoint, as a file for another engine."""

from __future__ import annotations

from pathlib import Path

from ..errors import A_FOLDER, FistaPrunerError, expand_home, out_path, path_text
from ..models.files.folder_files import gguf_files, which_gguf
from ..models.files.gguf_export import GGUFValues, export_gguf, open_exported
from ..models.files.low_rank import refuse_low_rank
from ..models.source import SMALL_MODEL, small_model
from ..packed.checkpoint import is_packed
from ..runs.arguments import checked_arguments
from ..runs.directory import checkpoint_of
from ..runs.lineage import lineage_of
from ..runtime.formatting import shell_line
from ..runtime.numerics import undisturbed
from ..runtime.progress import Tick, silent


@checked_arguments
@undisturbed()
def export(
    model: str | Path,
    out: str | Path,
    like: str | Path | None = None,
    values: GGUFValues = "bf16",
    *,
    allow_pickle: bool = False,
    progress: Tick | None = None,
) -> Path:
    """Write a pruned or recovered model as a GGUF file, which llama.cpp runs.

    Args:
        model: run directory or checkpoint folder.
        out: the file to write, called ``.gguf``.
        like: GGUF file of the dense model, a folder with no weights but that, or ``smollm2``; vocabulary and chat
            template are taken from it. None is the file that the model was made from.
        values: how matrices are stored: ``bf16``, ``f16``, ``f32``, ``q8_0``.
        allow_pickle: read legacy ``.bin`` weights.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        The file.

    Raises:
        FistaPrunerError: ``out`` exists or is not called ``.gguf``, the checkpoint is of a kind that is not exported,
            ``like`` is another model's file or has a layout that cannot be turned round, ``values`` cannot hold the
            weights, the disk is full, the model was not made from a GGUF file and ``like`` names none, it is packed,
            or the run is not finished.
        MissingExtraError: the ``gguf`` package is missing.
    """
    out, folder = out_path(out, "the path of a file"), checkpoint_of(path_text("model", model, A_FOLDER))
    if not (folder / "config.json").is_file():
        raise FistaPrunerError(
            f"{model} is neither a run directory nor a folder with a Hugging Face model, and only these are exported; "
            "'hf download NAME --local-dir DIR' makes a folder of a model on the hub"
        )
    if is_packed(folder):
        raise FistaPrunerError(f"{folder} is packed: '{shell_line('unpack', folder, 'DIR')}' makes a checkpoint of it")
    if like is not None:
        path_text("like", like, "a GGUF file")
    refuse_low_rank(folder, "export")
    open_exported(folder, allow_pickle)  # before it asks for a file in vain
    found = like is None
    if like is None:
        lineage, _ = lineage_of(folder)
        like = lineage.source.source if lineage else ""
    path = expand_home(str(like))
    source = small_model() if str(like) == SMALL_MODEL else _only_gguf(path) or path
    if found and (not like or source.suffix.lower() != ".gguf"):
        raise FistaPrunerError(
            f"{folder} was made from {like or 'an unknown model'}, which is no GGUF file, and the vocabulary of one is "
            "needed: give that of the dense model with --like, or convert the folder by its own tokenizer with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if source.exists() and not source.is_file():
        advice = which_gguf(source) or (
            ": convert the dense model with llama.cpp's convert_hf_to_gguf.py, and give that file"
        )
        raise FistaPrunerError(f"--like {source} is a folder, not a GGUF file{advice}")
    if not source.is_file():
        relative = found and not path.is_absolute()
        where = " here (the name is relative to the folder where its run began)" if relative else ""
        raise FistaPrunerError(
            f"{source}, the GGUF file of the dense model, does not exist{where}: give it with --like"
        )
    return export_gguf(folder, out, source, values, allow_pickle=allow_pickle, progress=progress or silent)


def _only_gguf(folder: Path) -> Path | None:
    """Find the GGUF file of a folder that holds one and no other weights."""
    found = gguf_files(folder)
    return found[0] if len(found) == 1 else None

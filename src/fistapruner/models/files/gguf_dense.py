"""Compare the GGUF file of a dense model with a checkpoint that was made of that model.

An export copies the file's keys, so everything in it that pruning does not change must be the checkpoint's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FistaPrunerError
from ..architecture import read_config, set_widths
from ..names import checkpoint_names
from .checkpoint import Checkpoint
from .gguf import architecture_of, name_map, open_gguf, processor_of
from .gguf_config import EPSILON_KEYS, epsilon, head_width, rotary_width, scaled_positions
from .widths import read_widths

ORDERED = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_qkv.weight")
"""Tensors of a file whose rows llama.cpp orders in its own way for some architectures."""

BY_LAYER = {"llama": "deci"}
"""By architecture, the one of llama.cpp that computes the same and has widths for every decoder layer."""

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEAD_COUNT, KEY_HEAD_COUNT = "feed_forward_length", "attention.head_count", "attention.head_count_kv"
HEAD_WIDTHS = ("attention.key_length", "attention.value_length")

ROWS = {WIDTH: "ffn_up", HEAD_COUNT: "attn_q", KEY_HEAD_COUNT: "attn_k"}
"""By count that a decoder layer may have of its own, the tensor that has as many rows, or the rows of as many heads."""

MAY_CHANGE = (
    WIDTH,
    HEAD_COUNT,
    KEY_HEAD_COUNT,
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)
"""Counts that pruning changes; any other count that differs shows that the file is another model's."""

SAME_EMBEDDING = 0.3
"""Relative distance of two embeddings above which they are not of one model; two bits a weight give about 0.25."""

SAME_LAYOUT = 0.1
"""Cosine of a projection in both models below which its rows are in another order; 95 % zeros leave about 0.4."""


class DenseFile:
    """The GGUF file of the dense model beside a checkpoint of it.

    Args:
        like: the file.
        checkpoint: what is written.

    Attributes:
        reader: of the file.
        architecture: its name in the file.
        written_as: name of the architecture in the new file: another one where decoder layers have widths of their own.
        counts: by key, without the architecture, the counts that are others in the checkpoint; one for every decoder
            layer where these have widths of their own.

    Raises:
        FistaPrunerError: the file is another model's, or of an architecture that ``transformers`` does not read, or
            that has no widths for every layer in llama.cpp where the checkpoint has them.
    """

    def __init__(self, like: Path, checkpoint: Checkpoint) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.integrations import GGUF_CONFIG_MAPPING

        self.like, self.checkpoint = like, checkpoint
        self.reader = open_gguf(like)
        self.architecture = architecture_of(like, self.reader, "use llama.cpp's own converter")
        config = read_config(checkpoint.folder)
        self.widths = read_widths(checkpoint.config, checkpoint.folder)
        if self.widths and self.architecture not in BY_LAYER:
            raise FistaPrunerError(
                f"{checkpoint.folder}: its decoder layers have different widths, which llama.cpp reads of the "
                f"architecture {', '.join(BY_LAYER)} only, and {like} has {self.architecture}"
            )
        self.written_as = BY_LAYER[self.architecture] if self.widths else self.architecture
        known = GGUF_CONFIG_MAPPING[self.architecture].items()
        # The width of the MLPs has many names in configs: it comes from the weights.
        self.counts: dict[str, int | list[int]] = dict(
            self._counts(config, {key: getattr(config, str(name), None) for key, name in known if key != WIDTH})
        )
        self._compare_settings(config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        set_widths(model, self.widths, checkpoint.shapes())
        self.stored = checkpoint_names(model, checkpoint)
        self.names = name_map(self.reader, model, config)
        self.processors = cache(lambda sizes: self._processor(config, dict(sizes)))
        if (down := self.stored.get(self.names.get("blk.0.ffn_down.weight", ""))) is not None:
            width = math.prod(checkpoint.entry(down).shape) // config.hidden_size
            self.counts |= self._counts(config, {WIDTH: width})
        if self.widths:
            self._count_by_layer(config, {key: str(name) for key, name in known})

    def _other(self, what: str) -> FistaPrunerError:
        return FistaPrunerError(f"{self.like} is not the GGUF file of the dense model: {what}")

    def _counts(self, config: Any, asked: Mapping[str, Any]) -> dict[str, int]:
        """Return the counts of the file that are others in the checkpoint.

        Args:
            config: of the checkpoint.
            asked: the checkpoint's values, by keys of the file.
        """
        changed: dict[str, int] = {}
        for key, count in asked.items():
            field = self.reader.fields.get(f"{self.architecture}.{key}")
            if field is None or type(count) is not int or field.contents() == count or key == "context_length":
                continue
            if isinstance(field.contents(), list):
                raise FistaPrunerError(f"{self.like} has a {key} for every layer, which is not exported")
            if key not in MAY_CHANGE:
                raise self._other(f"its {key} is {field.contents()}, that of {self.checkpoint.folder} {count}")
            changed[key] = count
        if HEAD_COUNT in changed:  # llama.cpp would divide the width by it
            size, scalar = head_width(config), getattr(config, "query_pre_attn_scalar", None)
            if scalar not in (None, size):
                heads = changed[HEAD_COUNT]
                raise FistaPrunerError(
                    f"{self.checkpoint.folder}: its query_pre_attn_scalar {scalar} is not the width of a head, {size}: "
                    f"llama.cpp divides by width / heads, which fewer heads ({heads}) would change"
                )
            changed |= dict.fromkeys(HEAD_WIDTHS, size)
        return changed

    def _count_by_layer(self, config: Any, entries: Mapping[str, str]) -> None:
        """Count what decoder layers have in place of the config's sizes.

        Args:
            config: of the checkpoint.
            entries: of the config, by keys of the file.
        """
        own = {name for sizes in self.widths.values() for name in sizes}
        if other := sorted(own - {entries[key] for key in ROWS}):
            raise FistaPrunerError(f"{self.checkpoint.folder}: {other[0]} of single decoder layers is not exported")
        for key, tensor in ROWS.items():
            name, unit = entries[key], 1 if key == WIDTH else head_width(config)
            layers = range(config.num_hidden_layers)
            counts = [self.widths.get(index, {}).get(name, getattr(config, name)) for index in layers]
            for index, count in enumerate(counts):
                source = self.stored.get(self.names.get(f"blk.{index}.{tensor}.weight", ""))
                if source is not None and (rows := self.checkpoint.entry(source).shape[0]) != count * unit:
                    raise FistaPrunerError(
                        f"{self.checkpoint.folder}: tensor {source!r} has {rows} rows, and {name} of its layer is "
                        f"{count}{f', of {unit} rows each' if unit > 1 else ''}"
                    )
            if name in own:
                self.counts[key] = counts
        if HEAD_COUNT in self.counts:
            self.counts |= dict.fromkeys(HEAD_WIDTHS, head_width(config))

    def _processor(self, config: Any, sizes: Mapping[str, int]) -> Any:
        """Return what ``transformers`` applies to the tensors of a decoder layer with ``sizes`` of its own."""
        own = copy.copy(config)
        for name, size in sizes.items():
            setattr(own, name, size)
        return processor_of(self.reader, own)

    def _compare_settings(self, config: Any) -> None:
        """Refuse a file whose rotary positions or norms are not the checkpoint's: its keys are copied."""
        rotary = getattr(config, "rope_parameters", None) or {}
        asked = {
            "rope.freq_base": rotary.get("full_attention", rotary).get("rope_theta"),
            "rope.dimension_count": rotary_width(config),
            **dict.fromkeys(EPSILON_KEYS, epsilon(config)),
        }
        for key, ours in asked.items():
            field = self.reader.fields.get(f"{self.architecture}.{key}")
            if field is not None and ours is not None and not math.isclose(field.contents(), ours, rel_tol=1e-5):
                raise self._other(f"its {key} is {field.contents():g}, that of {self.checkpoint.folder} {ours:g}")
        kinds = [part.get("rope_type") for part in ([rotary] if "rope_theta" in rotary else rotary.values())]
        # A GGUF file has no key for positions that are scaled by the length of the text.
        kind = next((kind for kind in kinds if kind not in (None, "default", "dynamic")), None)
        factors = [tensor for tensor in self.reader.tensors if "rope_f" in tensor.name]
        theirs = scaled_positions(self.reader) or next(
            (tensor.name for tensor in factors if bool((self._dequantised(tensor) != 1).any())), None
        )
        if (theirs is None) != (kind is None):
            raise self._other(
                f"its rotary positions are scaled by {theirs or 'nothing'}, those of {self.checkpoint.folder} by "
                f"{kind or 'nothing'}"
            )

    def tensors(self) -> dict[str, str | None]:
        """Map the tensors of the new file to the checkpoint's, or to None where the file's own is copied.

        Raises:
            FistaPrunerError: a tensor of the checkpoint has no place, or the embeddings are another model's.
        """
        found = {tensor.name: self.names.get(tensor.name) for tensor in self.reader.tensors}
        placed = {
            name: None if source is None else self.stored[source]
            for name, source in found.items()
            if source is None or source in self.stored
        }
        if lost := sorted(set(self.stored.values()) - {source for source in placed.values() if source}):
            raise self._other(f"it has no place for {lost[0]!r} of {self.checkpoint.folder}")
        self._compare(placed)
        return placed

    def _compare(self, placed: Mapping[str, str | None]) -> None:
        """Refuse a file with other embeddings, or with the rows of attention in another order."""
        for tensor in self.reader.tensors:
            source = placed.get(tensor.name)
            if source is None or tensor.name not in ("token_embd.weight", *ORDERED):
                continue
            if tensor.name in ORDERED and int(tensor.n_elements) != math.prod(self.checkpoint.entry(source).shape):
                continue  # it lost heads; transformers' reader would reshape the file's tensor to those that are left
            theirs = self.read(tensor.name, self._dequantised(tensor))
            ours = self.values(source)
            if tensor.name in ORDERED:
                if theirs.shape == ours.shape and float((theirs * ours).sum()) < SAME_LAYOUT * float(
                    np.linalg.norm(theirs) * np.linalg.norm(ours)
                ):
                    raise self._other(f"its {tensor.name} is not {source!r} of {self.checkpoint.folder}")
                continue
            if theirs.shape != ours.shape:
                raise self._other(f"its embeddings are {list(theirs.shape)}, not {list(ours.shape)}")
            distance = float(np.linalg.norm(theirs - ours) / max(float(np.linalg.norm(ours)), 1e-30))
            if not distance <= SAME_EMBEDDING:
                raise self._other(f"its embeddings differ from those of {self.checkpoint.folder} by {distance:.0%}")

    @staticmethod
    def _dequantised(tensor: Any) -> Array:
        from gguf import dequantize

        found: Array = dequantize(tensor.data, tensor.tensor_type)
        return found

    def values(self, name: str) -> Array:
        """Return a tensor of the checkpoint in fp32."""
        return self.checkpoint.read(name).float().numpy()

    def read(self, name: str, array: Array) -> Array:
        """Return what ``transformers`` reads where the tensor ``name`` of the file is ``array``."""
        aside: dict[str, Any] = {"tensors": {}}
        layer = re.match(r"blk\.(\d+)\.", name)
        processor = self.processors(tuple(self.widths.get(int(layer[1]), {}).items()) if layer else ())
        found = processor.process(weights=array, name=name, tensor_key_mapping=self.names, parsed_parameters=aside)
        return np.asarray(found.weights)

"""Let ``AutoModelForCausalLM.from_pretrained`` load packed folders.

transformers 5 has a registry of quantisation methods. Its interface is semi-private, so all code that uses it is in
this file. transformers loads the ordinary tensors; the plug-in reads the packed operators with this package's own
checked reader. The result is an ordinary dense model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FistaPrunerError
from ..models.checkpoint import QUANT_METHOD
from ..models.names import StoredNames, stored_names
from ..runtime.show import shell_line
from .checkpoint import PackedCheckpoint
from .format import damaged


def register() -> None:
    """Register the packed format with transformers."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """``quantization_config`` in config.json of a packed folder."""

        def __init__(self, version: int = 1, **kwargs: Any) -> None:
            self.quant_method = QUANT_METHOD
            self.version = version
            self.dequantize = True

    class PackedLoader(HfQuantizer):  # type: ignore[misc]
        """Loads packed operators and adds low-rank parts; transformers loads the rest."""

        requires_calibration = False
        source: PackedCheckpoint | None = None

        def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
            """Refuse a map of several devices: one that is given, or that transformers makes of "auto"."""
            places = set(device_map.values()) if isinstance(device_map, Mapping) else set()
            if self.source is not None and (len(places) > 1 or "disk" in places):
                devices = ", ".join(sorted(map(str, places)))
                raise FistaPrunerError(
                    f"{self.source.folder}: a packed model is loaded to one device, and device_map names {devices}: "
                    f"make it an ordinary one first with '{shell_line('unpack', self.source.folder, 'DIR')}'"
                )

        def update_attn_implementation(self, config: Any) -> Any:
            """Take the weights by their usual name; called with the config before they are looked for."""
            vars(config).pop("transformers_weights", None)
            return config

        update_tp_plan = update_attn_implementation  # what releases before 5.24 call

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
        ) -> None:
            _before_loading(self, model, checkpoint_files, device_map)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            if self.source is not None:
                _load_operators(self, model, self.source)
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    auto.register_quantization_config(QUANT_METHOD)(PackedConfig)
    auto.register_quantizer(QUANT_METHOD)(PackedLoader)


def _before_loading(loader: Any, model: Any, checkpoint_files: Any, device_map: Any) -> None:
    """Prepare a model and its loader, before transformers loads the ordinary tensors."""
    loader.source = source = PackedCheckpoint(Path(checkpoint_files[0]).parent)
    loader.validate_environment(device_map=device_map)
    loader.found = stored_names(model, source.names())
    loader.pending = _pending(model, source, loader.found)
    loader.wanted = {target: model.get_parameter(target) for target in loader.pending}
    for target, parts in loader.pending.items():
        parent, _, leaf = target.rpartition(".")
        module = model.get_submodule(parent)
        # No random initialisation; but for buffers, such as Gemma's scale, which that would fill.
        module._is_hf_initialized = not module._non_persistent_buffers_set
        if not isinstance(parts, str):  # so that none is loaded in part, where a few experts are not packed
            module._parameters[leaf] = None
    weights = set(loader.pending)
    ties = model.all_tied_weights_keys  # transformers would join tied weights before the packed ones are there
    loader.tied = {one: other for one, other in ties.items() if not weights.isdisjoint({one, other})}
    for one, other in loader.tied.items():
        del ties[one]
        weights |= {one, other}
        for name in {one, other} - set(loader.found.whole):
            module = model.get_submodule(name.rpartition(".")[0])
            module._is_hf_initialized = not module._non_persistent_buffers_set
    names = weights | set(source.specs)  # transformers looks for a tensor by today's name and the stored one
    parts = [re.escape(f"{name}.") + "(values|mask|scales)$" for name in names]
    # A list in some models' classes, and a set from here on: transformers takes its union with others.
    parts += [re.escape(target) + "$" for target, names in loader.pending.items() if not isinstance(names, str)]
    ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    model._keys_to_ignore_on_load_unexpected = ignored | set(parts)
    later = {re.escape(name) + "$" for name in weights}
    model._keys_to_ignore_on_load_missing = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()) | later


def _load_operators(loader: Any, model: Any, source: PackedCheckpoint) -> None:
    """Load the packed operators and low-rank parts, after transformers has loaded the rest."""
    device = next((item.device for item in model.parameters() if not item.is_meta), torch.device("cpu"))
    for target, parts in loader.pending.items():
        value = source.tensor(parts) if isinstance(parts, str) else source.experts(parts)
        parent, _, leaf = target.rpartition(".")
        module, wanted = model.get_submodule(parent), loader.wanted[target]
        if value.shape != wanted.shape:
            raise FistaPrunerError(
                f"{target} is {tuple(value.shape)} in the packed folder, the config asks for {tuple(wanted.shape)}"
            )
        held = module._parameters[leaf]  # its dtype is what transformers has made of it
        module._parameters[leaf] = nn.Parameter(value.to(device, (wanted if held is None else held).dtype))
    if source.low_rank is not None:
        source.low_rank.add_to(model)
    model.all_tied_weights_keys |= loader.tied
    model.tie_weights(missing_keys=set(model.state_dict()) - set(loader.found.whole), recompute_mapping=False)


def _pending(model: Any, source: PackedCheckpoint, stored: StoredNames) -> dict[str, str | list[list[str]]]:
    """Find packed parameters: by the model's name the stored operator, or the matrices of experts."""
    experts: dict[str, Any] = {
        target: lists
        for target, lists in stored.experts.items()
        if any(name in source.specs for names in lists for name in names)
    }
    found = {name: target for target, name in stored.whole.items()}
    inside = {name for lists in experts.values() for names in lists for name in names}
    # Such as the layers with which some models predict further tokens.
    unused = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in source.specs:
        if name in found and name not in inside:
            experts[found[name]] = name
        elif name not in inside and not any(re.search(pattern, name) for pattern in unused):
            raise damaged(source.folder, f"packed operator {name!r} is not part of {type(model).__name__}")
    return experts

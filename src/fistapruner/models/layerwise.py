"""A causal language model of which one decoder layer is in memory at a time.

The architecture is built on the meta device, so it costs nothing; decoder layers are read from the checkpoint when they
are needed and freed after. Two things make this work for architectures nobody listed: the model's own ``forward`` is
run with every decoder layer's ``forward`` replaced by a recorder, which gives the input of the first layer and the exact
arguments every layer would be called with; and with a recorder that returns given hidden states, which gives the model's
own final norm and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError
from ..runtime.numerics import pass_dtype
from .files.checkpoint import Checkpoint
from .names import stored_names

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer after its hidden states: positional ones, keyword ones."""

Tick = Callable[[str, int, int], None]
"""Told of a pass through all decoder layers: (what, steps done, steps in all)."""


@dataclass
class _Stop(Exception):
    """Ends a forward pass early."""


class LayerwiseModel:
    """A model whose decoder layers are loaded one by one.

    Args:
        checkpoint: where the weights are.
        device: where layers run.
        dtype: precision of the passes; None takes the checkpoint's own, or fp32 where the device has no matrix units for it
            (CPUs for fp16, most of them for bf16 too) and would compute several times slower.
        trust_remote_code: run the checkpoint's own Python code.

    Raises:
        FistaPrunerError: the architecture is not a plain decoder-only language model, or tensors are missing.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype or pass_dtype(checkpoint.dtype, device)
        self.model = _build(checkpoint, trust_remote_code).eval()
        self.config = self.model.config
        self.layers_name, self.layers = _find_layers(self.model)
        self._refuse_experts()
        self._returns_tuple = False
        self._sources = self._map_names()
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(device)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """Width of the hidden states between decoder layers."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def max_length(self) -> int:
        """The model's maximum sequence length in tokens."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 2048) or 2048)

    def source(self, parameter: str) -> str:
        """Name in the checkpoint of one of the model's parameters."""
        return self._sources[parameter]

    def layer_parameters(self, index: int) -> list[str]:
        """Names in the model of the parameters of decoder layer ``index``."""
        prefix = f"{self.layers_name}.{index}."
        return [name for name in self._sources if name.startswith(prefix)]

    @contextmanager
    def layer(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights in memory.

        Args:
            index: which layer.
            replaced: tensors to use instead of the checkpoint's, by checkpoint name (pruned weights).
        """
        names = self.layer_parameters(index)
        try:
            self._load(names, replaced or {})
            yield self.layers[index]
        finally:
            self._free(names)

    @contextmanager
    def embeddings_and_head(self, *, head: bool = True) -> Iterator[None]:
        """Everything outside the decoder layers in memory: embeddings, final norm, head.

        Args:
            head: False leaves the output head out, which :meth:`embed` does not need.
        """
        prefix = self.layers_name + "."
        names = [name for name in self._sources if not name.startswith(prefix)]
        if not head:
            output = self.model.get_output_embeddings()
            names = [name for name in names if output is None or self.model.get_parameter(name) is not output.weight]
        try:
            self._load(names, {})
            output, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
            if head and output is not None and output.weight.is_meta:
                output.weight = embedding.weight
            yield
        finally:
            self._free(names)
            output = self.model.get_output_embeddings()
            if output is not None and not output.weight.is_meta:
                output.weight = nn.Parameter(output.weight.to("meta"), requires_grad=False)

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Input of the first decoder layer, and how every decoder layer is called. Needs :meth:`embeddings_and_head`.

        Args:
            tokens: (batch, seqlen) token ids.

        Returns:
            (batch, seqlen, width) hidden states and one :data:`Call` for each layer.
        """
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, rest, named = _split_hidden(args, kwargs)
            if index == 0:
                first.append(hidden)
            calls.append((rest, named))
            if index == len(self.layers) - 1:
                raise _Stop
            return (hidden,) if self._returns_tuple else hidden

        self._forward(tokens, record)
        if len(calls) != len(self.layers):
            raise FistaPrunerError(f"{type(self.model).__name__}: {len(calls)} of {len(self.layers)} decoder layers run in a forward pass")
        return first[0], calls

    def check_calls(self) -> None:
        """Make sure that beside hidden states decoder layers are given nothing that depends on the token ids.

        Needs :meth:`embeddings_and_head`.

        Raises:
            FistaPrunerError: they are (Gemma 4's embeddings of every layer), or hand something on to each other (shared keys).
        """
        first, second = (self.embed(torch.full((1, 4), token))[1] for token in (0, 1))
        for index, (call, other) in enumerate(zip(first, second, strict=True)):
            for name, value, again in [
                *zip(range(len(call[0])), call[0], other[0], strict=True),
                *((k, call[1][k], other[1][k]) for k in call[1]),
            ]:
                if not _same(value, again):
                    raise FistaPrunerError(
                        f"{type(self.model).__name__}: decoder layer {index} is given {name!r}, which depends on the token ids or on other "
                        "layers: this architecture is not supported"
                    )

    def calls(self, batch: int, seqlen: int) -> list[Call]:
        """How every decoder layer is called for a batch of full windows; the token ids make no difference (:meth:`check_calls`).

        Needs :meth:`embeddings_and_head`.
        """
        return self.embed(torch.zeros(batch, seqlen, dtype=torch.long))[1]

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Output hidden states of loaded decoder layer ``index``; shapes (batch, seqlen, width)."""
        args, kwargs = call
        out = self.layers[index](hidden, *args, **kwargs)
        self._returns_tuple = isinstance(out, tuple)
        hidden_out: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden_out

    def logits(self, hidden: Tensor, tokens: Tensor, *, gradients: bool = False) -> Tensor:
        """(batch, seqlen, vocabulary) logits from the last decoder layer's output. Needs :meth:`embeddings_and_head`.

        Args:
            hidden: (batch, seqlen, width) output of the last decoder layer.
            tokens: (batch, seqlen) the token ids it came from.
            gradients: record operations, so that logits can be differentiated with respect to ``hidden``.
        """

        def give(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        out = self._forward(tokens, give, gradients=gradients)
        logits: Tensor = out.logits
        return logits

    def learn_return_type(self, tokens: Tensor) -> None:
        """Run layer 0 once on ``tokens`` to see whether its layers return tuples."""
        first: list[Call] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first.append((args, kwargs))
            raise _Stop

        with self.embeddings_and_head(head=False):
            self._forward(tokens, record)
        args, kwargs = first[0]
        with self.layer(0) as layer, torch.no_grad():
            self._returns_tuple = isinstance(layer(*args, **kwargs), tuple)

    def _forward(self, tokens: Tensor, instead: Callable[[int, tuple[Any, ...], dict[str, Any]], Any], *, gradients: bool = False) -> Any:
        """The model's own forward pass with every decoder layer's forward replaced."""

        def replacement(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: instead(index, args, kwargs)

        for index, layer in enumerate(self.layers):
            layer.forward = replacement(index)
        try:
            with torch.set_grad_enabled(gradients):
                return self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            return None
        finally:
            for layer in self.layers:
                del layer.forward

    def rounded(self, source: str, tensor: Tensor) -> Tensor:
        """``tensor`` as the checkpoint's tensor ``source`` will hold it, in the narrower of the stored dtype and the passes'."""
        stored = self.checkpoint.entry(source).dtype
        tensor = tensor.to(stored)
        return tensor if stored.itemsize <= self.dtype.itemsize else tensor.to(self.dtype)

    def result(self, source: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in main memory, :meth:`rounded`."""
        rounded = self.rounded(source, tensor).cpu()
        return rounded.clone() if rounded.data_ptr() == tensor.data_ptr() else rounded

    def _load(self, names: list[str], replaced: Mapping[str, Tensor]) -> None:
        for name in names:
            source = self._sources[name]
            tensor = replaced[source] if source in replaced else self.checkpoint.read(source)
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            self._assign(name, tensor.to(self.device))

    def _free(self, names: list[str]) -> None:
        for name in names:
            parent, _, key = name.rpartition(".")
            module = self.model.get_submodule(parent)
            held = module._parameters.get(key) if key in module._parameters else module._buffers.get(key)
            if held is not None:
                self._assign(name, held.to("meta"))

    def _assign(self, name: str, tensor: Tensor) -> None:
        parent, _, key = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[key] = tensor

    def _refuse_experts(self) -> None:
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if parameter.ndim > 2:
                    convolves = isinstance(layer.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
                    what = "a convolution" if convolves else "a fused mixture of experts"
                    raise FistaPrunerError(
                        f"{self.layers_name}.{index}.{name} is a {parameter.ndim}-dimensional weight {tuple(parameter.shape)} ({what} "
                        f"in {type(self.model).__name__}): this architecture is not supported"
                    )

    def _map_names(self) -> dict[str, str]:
        """Checkpoint name of every parameter and persistent buffer of the model, all of which must be there."""
        names = stored_names(self.model, self.checkpoint.names())
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        sources: dict[str, str] = {}
        missing: list[str] = []
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            found = names.get(name)
            is_head = head is not None and tensor is head.weight and embedding is not None and head.weight is not embedding.weight
            if is_head and tied:
                continue
            if found is None:
                missing.append(name)
                continue
            expected = tuple(tensor.shape)
            if self.checkpoint.entry(found).shape != expected:
                raise FistaPrunerError(
                    f"{self.checkpoint.folder}: tensor {found!r} is {self.checkpoint.entry(found).shape}, the config asks for {expected}"
                )
            sources[name] = found
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FistaPrunerError(f"{self.checkpoint.folder}: tensor {missing[0]!r}{more} of {type(self.model).__name__} is not in it")
        return sources


def _build(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder = checkpoint.folder
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # an untrusted config can make every check of every architecture fail in its own way
        raise FistaPrunerError(f"{folder}: config.json is not understood: {' '.join(str(error).split())[:300]}") from None
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(checkpoint.names()):
        raise FistaPrunerError(f"{folder}: config.json asks for {layers} decoder layers and there are {len(checkpoint.names())} tensors")
    if getattr(config, "is_encoder_decoder", False):
        raise FistaPrunerError(f"{folder}: {config.model_type} is an encoder-decoder; only decoder-only language models are pruned")
    if getattr(config, "quantization_config", None):
        if "fistapruner" in str(config.quantization_config):
            raise FistaPrunerError(f"{folder} is a packed checkpoint: make it an ordinary one first, with fistapruner unpack {folder} OUT")
        raise FistaPrunerError(f"{folder}: the checkpoint is quantised ({config.quantization_config}); prune the unquantised one")
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # again: sizes that are zero, negative or do not divide, names that are not known
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FistaPrunerError(f"{folder}: no {config.model_type} causal language model can be built from config.json: {reason}") from None


def _find_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder layers: the module list, of several modules of one class, that holds the most weights."""
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(item) for item in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = (size, name, list(module))
    if not best[2]:
        raise FistaPrunerError(f"{type(model).__name__}: no list of decoder layers found in this architecture")
    return best[1], best[2]


def _same(value: Any, again: Any) -> bool:
    """Whether two passes gave a layer the same; an empty dictionary, which layers are to fill, is never the same."""
    if isinstance(value, Tensor):
        return torch.equal(value, again)
    if isinstance(value, (tuple, list)):
        return len(value) == len(again) and all(map(_same, value, again))
    if isinstance(value, dict):
        return bool(value) and value.keys() == again.keys() and all(_same(value[key], again[key]) for key in value)
    return True


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A layer call without its hidden states, which come first or by name."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named

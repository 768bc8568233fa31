"""Run a causal language model with one decoder layer in memory at a time.

The architecture is built on the meta device; decoder layers are read from the checkpoint when they are needed and freed
afterwards. No architecture is listed by name: the model's own ``forward`` runs with every decoder layer's ``forward``
replaced by a recorder (:meth:`LayerwiseModel.embed`), or by what returns given hidden states
(:meth:`LayerwiseModel.logits`). Models of which this is not the forward pass are refused by
:meth:`LayerwiseModel.check` and :func:`fistapruner.passes.stream.check_model`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError, one_line
from ..runtime.numerics import pass_dtype
from .build import build_model, find_decoder_layers, loaded_dtype, max_length, refuse_experts, unsupported
from .checkpoint import Checkpoint
from .experts import separate_experts
from .low_rank import LowRankAdapter
from .names import checkpoint_names, stored_names

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a decoder layer, without its hidden states."""

UNSTATED_LENGTH = 2048
"""Tokens that the head takes at once where the config states no longest text."""


class _Stop(Exception):
    """End a forward pass early."""


class LayerwiseModel:
    """A model that runs with one decoder layer in memory; ``dtype`` is the precision of the passes.

    Attributes:
        low_rank: what is added to the weights of operators as they are loaded; None adds nothing.
        vocabulary: width of the logits; ``embedded_tokens``: tokens that have an embedding.
        max_length: most tokens of a text (:func:`~.build.max_length`).
        max_head_rows: most tokens that :meth:`head` takes at once.
    """

    _checked = False
    _container: tuple[type[tuple[Any, ...]] | type[list[Any]], int] | None = None
    """Type in which layers return hidden states, and the number of other things in it; None for a tensor alone."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype or pass_dtype(checkpoint.dtype, device)
        self.model = build_model(checkpoint, trust_remote_code=trust_remote_code).eval()
        self.config = self.model.config
        self.layers_name, self.layers = find_decoder_layers(self.model)
        found = stored_names(self.model, [entry.name for entry in checkpoint.stored])
        names = separate_experts(self.model, self.layers_name, self.layers, checkpoint, found)
        refuse_experts(self.model, self.layers_name, self.layers)
        self.vocabulary = int(self.config.get_text_config().vocab_size)
        self.embedded_tokens = int(self.model.get_input_embeddings().weight.shape[0])
        self.max_length = max_length(self.model)
        self.max_head_rows = self.max_length or UNSTATED_LENGTH
        self.low_rank: LowRankAdapter | None = None
        self._open: set[int] = set()  # numbers of loaded decoder layers
        self._sources = checkpoint_names(self.model, checkpoint, names, found.joined)
        self._names = {source: name for name, source in self._sources.items()}
        self._parameters = {name for name, _ in self.model.named_parameters()}
        buffers_to(self.model, device)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """Return the width of the hidden states between decoder layers."""
        return int(self.config.get_text_config().hidden_size)

    def source(self, parameter: str) -> str:
        """Return the name in the checkpoint of one of the model's parameters."""
        return self._sources[parameter]

    def full_name(self, index: int, inside: str) -> str:
        """Return the name in the model of what is called ``inside`` in decoder layer ``index``."""
        return f"{self.layers_name}.{index}.{inside}"

    def source_of(self, index: int, inside: str) -> str:
        """Return the name in the checkpoint of a parameter of decoder layer ``index``."""
        return self.source(self.full_name(index, inside))

    @property
    def parameters(self) -> Collection[str]:
        """Return the names in the model of all stored parameters and buffers."""
        return self._sources.keys()

    def sources(self) -> Collection[str]:
        """Return the names in the checkpoint of all of the model's parameters and stored buffers."""
        return self._names.keys()

    def parameter_count(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None, dropped: Collection[str] = ()
    ) -> int:
        """Count the parameters, with other ``shapes`` of some stored tensors, and without ``dropped``."""
        sizes = {entry.name: entry.shape for entry in self.checkpoint.stored} | dict(shapes or {})
        return sum(math.prod(sizes[name]) for name in self.stored_parameters().difference(dropped))

    def stored_parameters(self) -> set[str]:
        """List the stored tensors that hold parameters: no buffers, and each shared one once."""
        twins: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        found: set[str] = set()
        for name, _ in self.model.named_parameters():
            source, first = self._sources.get(name), self._sources.get(twins.get(name, name))
            if source is not None and (first in (None, source) or not self.checkpoint.same(source, first)):
                found.update(self.checkpoint.whole(source))
        return found

    def layer_parameters(self, index: int) -> list[str]:
        """Return the names in the model of the parameters of decoder layer ``index``."""
        prefix = f"{self.layers_name}.{index}."
        return [name for name in self._sources if name.startswith(prefix)]

    def layer_sources(self, index: int) -> set[str]:
        """Return the names in the checkpoint of the parameters of decoder layer ``index``."""
        return {self.source(name) for name in self.layer_parameters(index)}

    def pass_bytes(self, names: Iterable[str]) -> int:
        """Count the bytes of tensors, by their names in the checkpoint, in the precision of the passes."""
        return sum(math.prod(self.checkpoint.entry(name).shape) for name in names) * self.dtype.itemsize

    def rounded(self, source: str, tensor: Tensor) -> Tensor:
        """Round ``tensor`` to the narrower of the stored dtype of ``source`` and its dtype in the passes."""
        stored = self.checkpoint.entry(source).dtype
        tensor = tensor.to(stored)
        if stored.itemsize <= self.dtype.itemsize:  # no tensor has fewer bits in passes; training asks often
            return tensor
        loaded = loaded_dtype(self.model, self._names[source], self.dtype)
        return tensor if stored.itemsize <= loaded.itemsize else tensor.to(loaded)

    def result(self, source: str, tensor: Tensor) -> Tensor:
        """Copy ``tensor`` to main memory, :meth:`rounded`."""
        rounded = self.rounded(source, tensor).cpu()
        return rounded.clone() if rounded.data_ptr() == tensor.data_ptr() else rounded

    @contextmanager
    def layer(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Load decoder layer ``index`` for the block, and free its weights afterwards.

        Inside another block that holds the layer nothing is loaded or freed, and nothing may be ``replaced``: tensors
        that replace the checkpoint's, by name in the checkpoint (pruned weights).
        """
        if index in self._open:
            if replaced:
                raise ValueError(f"layer {index} is loaded with other weights")
            yield self.layers[index]
            return
        names = self.layer_parameters(index)
        try:
            self._load(names, replaced or {})
            self._open.add(index)
            yield self.layers[index]
        finally:
            self._open.discard(index)
            self._free(names)

    @contextmanager
    def embeddings_and_head(self, *, head: bool = True) -> Iterator[None]:
        """Load everything outside the decoder layers for the block: embeddings, final norm, and ``head``.

        What another block around this one holds is neither loaded nor freed.
        """
        prefix, tensors = self.layers_name + ".", self.model.state_dict(keep_vars=True)
        output, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        names = [name for name in self._sources if not name.startswith(prefix) and tensors[name].is_meta]
        if output is not None and not head:
            names = [name for name in names if tensors[name] is not output.weight]
        headless = output is not None and output.weight.is_meta
        try:
            self._load(names, {})
            if head and output is not None and output.weight.is_meta:
                output.weight = embedding.weight
            yield
        finally:
            self._free(names)
            if headless and not output.weight.is_meta:
                output.weight = nn.Parameter(output.weight.to("meta"), requires_grad=False)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Keep all weights loaded for the block; inside it nothing of them is loaded or freed again."""
        with ExitStack() as loaded:
            loaded.enter_context(self.embeddings_and_head())
            for index in range(len(self)):
                loaded.enter_context(self.layer(index))
            yield

    def _load(self, names: list[str], replaced: Mapping[str, Tensor]) -> None:
        """Load parameters and buffers to the device, in the dtypes of transformers (:func:`.loaded_dtype`)."""
        for name in names:
            source = self._sources[name]
            tensor = replaced[source] if source in replaced else self.checkpoint.read(source)
            if self.low_rank is not None:
                module = self.model.get_submodule(name.rpartition(".")[0])
                tensor = self.low_rank.added(name, tensor, transposed=isinstance(module, Conv1D))
            if tensor.is_floating_point():
                # Weights of operators are checked where they are pruned; here norms and biases, which are small.
                if tensor.ndim == 1 and name in self._parameters and not bool(tensor.isfinite().all()):
                    raise FistaPrunerError(f"{self.checkpoint.folder}: {source} contains NaN or infinite values")
                tensor = tensor.to(loaded_dtype(self.model, name, self.dtype))
            assign(self.model, name, tensor.to(self.device, non_blocking=True))

    def _free(self, names: list[str]) -> None:
        """Move parameters and buffers to the meta device, in the shapes of the checkpoint."""
        for name in names:
            parent, _, key = name.rpartition(".")
            held = getattr(self.model.get_submodule(parent), key)
            if not held.is_meta:
                shape = self.checkpoint.entry(self._sources[name]).shape
                assign(self.model, name, held.detach().new_empty(shape, device="meta"))

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse token ids outside the model's vocabulary."""
        size = self.embedded_tokens
        worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        if not 0 <= worst < size:
            beyond = f"token id {worst} is beyond the model's vocabulary of {size}"
            raise FistaPrunerError(f"{self.checkpoint.folder}: {beyond}: its tokenizer belongs to another model")

    def check(self) -> None:
        """Refuse a model that cannot be run layer by layer; loads embeddings, then the first layer, once."""
        if not self._checked:
            with self.failures_explained():
                self._learn_return_type(self.check_window(16))
            self._checked = True

    def check_window(self, length: int) -> Tensor:
        """Return (1, length) token ids for a check; fewer where the model takes fewer."""
        return torch.arange(3, 3 + min(length, self.max_length or length)).remainder(self.embedded_tokens)[None]

    def probe(self) -> tuple[Tensor, list[Call]]:
        """Do :meth:`embed` with a small window, to try decoder layers on."""
        with self.embeddings_and_head(head=False):
            return self.embed(self.check_window(16))

    def calls(self, batch: int, seqlen: int) -> list[Call]:
        """Record the arguments of every decoder layer for full windows. Needs :meth:`embeddings_and_head`."""
        return self.embed(torch.zeros(batch, seqlen, dtype=torch.long))[1]

    def run(self, index: int, hidden: Tensor, call: Call, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run loaded decoder layer ``index`` on (batch, seqlen, width) hidden states; return its output.

        ``values`` are used in place of parameters, by name inside the layer.
        """
        args, kwargs = call
        layer = self.layers[index]
        if not values:
            return hidden_of(layer(hidden, *args, **kwargs))
        return hidden_of(torch.func.functional_call(layer, dict(values), (hidden, *args), kwargs))

    def head(self, rows: Tensor, *, gradients: bool = False) -> Tensor:
        """Compute the logits (tokens, vocabulary) of single tokens, whatever their ids: final norm and head.

        ``rows`` (tokens, width) are outputs of the last decoder layer, at most :attr:`max_head_rows`.
        """
        ids = torch.zeros(1, len(rows), dtype=torch.int64, device=self.device)
        with torch.set_grad_enabled(gradients):
            return self.logits(rows[None], ids, gradients=gradients)[0]

    def logits(self, hidden: Tensor, tokens: Tensor, *, gradients: bool = False) -> Tensor:
        """Compute logits (batch, seqlen, vocabulary). Needs :meth:`embeddings_and_head`.

        ``hidden`` (batch, seqlen, width) is the last decoder layer's output, computed from ``tokens`` (batch, seqlen).
        """
        logits: Tensor = self._forward(tokens, lambda *_: self._returned(hidden), gradients=gradients).logits
        return logits

    def _returned(self, hidden: Tensor) -> Any:
        """Give hidden states in the type in which layers return them."""
        if self._container is None:
            return hidden
        kind, others = self._container
        return kind((hidden, *(None for _ in range(others))))

    def _learn_return_type(self, tokens: Tensor) -> None:
        """Run layer 0 once on ``tokens`` to find the type in which layers return hidden states."""
        first: list[Call] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            first.append((args, kwargs))
            raise _Stop

        with self.embeddings_and_head(head=False):
            self._forward(tokens, record)
        if not first:
            raise self.unsupported(f"{self.layers_name}.0 does not run in a forward pass")
        args, kwargs = first[0]
        with self.layer(0) as layer, torch.no_grad():
            out = layer(*args, **kwargs)
        if isinstance(out, (tuple, list)):
            self._container = (list if isinstance(out, list) else tuple), len(out) - 1
        elif not isinstance(out, Tensor):
            raise self.unsupported(f"{self.layers_name}.0 returns a {type(out).__name__}, not hidden states")

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Record the input of the first decoder layer and the arguments of every decoder layer.

        Needs :meth:`embeddings_and_head`, and :meth:`check` before it. Token ids are (batch, seqlen), the hidden states
        (batch, seqlen, width).
        """
        self.check_tokens(tokens)
        calls: list[Call] = []
        first: list[Tensor] = []
        given: list[tuple[Tensor, int]] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = dict(kwargs)
            hidden, *rest = args or (named.pop("hidden_states", None),)
            if not isinstance(hidden, Tensor):
                raise self.unsupported(f"{self.layers_name}.{index} is not given hidden states as its first argument")
            if index == 0:
                first.append(hidden)
            else:
                returned, version = given.pop()
                same = hidden is returned or (hidden.shape == returned.shape and torch.equal(hidden, returned))
                if returned._version != version or not same:  # overwritten hidden states cannot be compared
                    raise self.unsupported(
                        f"what enters {self.layers_name}.{index} is not what {self.layers_name}.{index - 1} returned"
                    )
            calls.append((tuple(rest), named))
            if index == len(self.layers) - 1:
                raise _Stop
            output = hidden.detach()
            given.append((output, output._version))
            return self._returned(output)

        self._forward(tokens, record)
        if len(calls) != len(self.layers):
            raise self.unsupported(
                f"{len(calls)} of the {len(self.layers)} modules in {self.layers_name} run in a forward pass"
            )
        if first[0].shape != (*tokens.shape, self.width):
            given_shape, expected = tuple(first[0].shape), (*tokens.shape, self.width)
            raise self.unsupported(f"{self.layers_name}.0 is given {given_shape} and not {expected} hidden states")
        return first[0], calls

    def own_logits(self, tokens: Tensor) -> Tensor:
        """Compute the model's own logits (batch, seqlen, vocabulary), one decoder layer in memory."""
        with ExitStack() as outside:  # embeddings before the first layer, norm and head after the last one

            def load_and_run(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if index == 0:
                    outside.close()
                with self.layer(index) as layer:
                    replaced = layer.__dict__.pop("forward")
                    out = layer(*args, **kwargs)
                    layer.forward = replaced
                if index == len(self) - 1:
                    outside.enter_context(self.embeddings_and_head())
                return out

            outside.enter_context(self.embeddings_and_head(head=False))
            logits: Tensor = self._forward(tokens, load_and_run).logits
        return logits

    def architecture(self) -> str:
        """Describe everything that layer-by-layer passes depend on: class, config, dtype, kind of device."""
        settings = json.dumps(self.config.to_dict() | {"_name_or_path": None}, sort_keys=True, default=str)
        return f"{type(self.model).__qualname__} {self.dtype} {self.device.type} {settings}"

    def unsupported(self, reason: str) -> FistaPrunerError:
        """Make the error that refuses this model's architecture."""
        return unsupported(self.model, reason)

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """Turn errors of the model's own code, run with replaced layers, into one sentence."""
        try:
            yield
        except (FistaPrunerError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # every architecture has its own code, which fails in its own way
            reason = f"{type(error).__name__}: {one_line(error, 150)}"
            raise self.unsupported(f"its forward pass cannot be taken apart into decoder layers ({reason})") from error

    def _forward(
        self, tokens: Tensor, instead: Callable[[int, tuple[Any, ...], dict[str, Any]], Any], *, gradients: bool = False
    ) -> Any:
        """Run the model's own forward with that of every decoder layer replaced; each runs once, in order."""
        done = count()

        def replacement(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if (number := next(done)) != index:
                    before = f"after {self.layers_name}.{number - 1}" if number else "first"
                    order = f"runs {before}: layers have to run once each, in order"
                    raise self.unsupported(f"{self.layers_name}.{index} {order}")
                return instead(index, args, kwargs)

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = replacement(index)
        try:
            with torch.set_grad_enabled(gradients):
                return self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            return None
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)


def hidden_of(out: Any) -> Tensor:
    """Return the hidden states of a decoder layer's output: alone, or first in a tuple or list."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return hidden


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of a module by its name; the tensor may have another shape."""
    parent, _, key = name.rpartition(".")
    module = module.get_submodule(parent)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor
    if isinstance(module, Conv1D):
        module.nf = module.weight.shape[1]  # its forward pass makes the output in this shape


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module and of all inside it to a device, but for those on the meta device."""
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[key] = buffer.to(device)

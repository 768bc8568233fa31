"""Run a causal language model with one decoder layer in memory at a time.

The architecture is built on the meta device, without weights; decoder layers are read from the checkpoint when they are
needed and freed afterwards. No architecture is listed by name. Instead, the model's own ``forward`` runs with every
decoder layer's ``forward`` replaced:

* by a recorder, which gives the input of the first layer and the exact arguments of every layer
  (:meth:`LayerwiseModel.embed`);
* by a function that returns given hidden states, which gives the model's own final norm and head
  (:meth:`LayerwiseModel.logits`).

This is right only where every decoder layer receives the output of the layer before it, and nothing else happens
between them. :meth:`LayerwiseModel.check` refuses models whose forward pass differs, and
:func:`fistapruner.activations.check.check_model` compares the logits of one short window with the model's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError, one_line
from ..runtime.numerics import pass_dtype
from ..runtime.transfers import sent
from .architecture import (
    build_model,
    checkpoint_names,
    find_decoder_layers,
    loaded_dtype,
    max_length,
    parameter_names,
    refuse_experts,
    unsupported,
)
from .experts import separate_experts
from .files.checkpoint import Checkpoint
from .files.low_rank import LowRankAdapter
from .read_ahead import ReadAhead

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a decoder layer, without its hidden states."""

UNSTATED_LENGTH = 2048
"""Tokens that the head takes at once where the config states no longest text."""

Tick = Callable[[str, int, int], None]
"""Receives the progress of a pass through all decoder layers: (what, steps done, steps in all)."""


class _Stop(Exception):
    """End a forward pass early."""


class LayerwiseModel:
    """A model whose decoder layers are loaded one by one.

    Args:
        checkpoint: the model's weights.
        device: device of the passes.
        dtype: precision of the passes; None is the checkpoint's own, or fp32 where the device has no matrix units for
            it (CPUs for fp16, most CPUs for bf16) and would be several times slower.
        trust_remote_code: run the checkpoint's own Python code.

    Attributes:
        low_rank: what is added to the weights of operators as they are loaded; None adds nothing.

    Raises:
        FistaPrunerError: the architecture is not a plain decoder-only language model, or a tensor is missing.
    """

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
        experts = separate_experts(self.model, self.layers_name, self.layers, checkpoint)
        refuse_experts(self.model, self.layers_name, self.layers)
        self._returned: Callable[[Tensor], Any] = lambda hidden: hidden  # hidden states as a layer returns them
        self.low_rank: LowRankAdapter | None = None
        self._checked = False
        self._open: set[int | str] = set()  # numbers of loaded decoder layers, and "embeddings and head"
        self._ahead: dict[int, ReadAhead] = {}  # decoder layers that are being read, by number
        self._sources = checkpoint_names(self.model, checkpoint, experts)
        self._names = {source: name for name, source in self._sources.items()}
        self._parameters = {name for name, _ in self.model.named_parameters()}
        buffers_to(self.model, device)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """Return the width of the hidden states between decoder layers."""
        return int(self.config.get_text_config().hidden_size)

    @cached_property
    def max_length(self) -> int | None:
        """Return the model's maximum sequence length in tokens; see :func:`~.architecture.max_length`."""
        return max_length(self.model)

    @property
    def max_head_rows(self) -> int:
        """Return the number of tokens that :meth:`head` takes at once, at most."""
        return self.max_length or UNSTATED_LENGTH

    @property
    def vocabulary(self) -> int:
        """Return the width of the logits."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def embedded_tokens(self) -> int:
        """Return the number of tokens that have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def source(self, parameter: str) -> str:
        """Return the name in the checkpoint of one of the model's parameters."""
        return self._sources[parameter]

    def sources(self) -> Collection[str]:
        """Return the names in the checkpoint of all of the model's parameters and stored buffers."""
        return self._names.keys()

    @cached_property
    def parameter_names(self) -> set[str]:
        """Name the stored tensors that hold parameters; see :func:`~.architecture.parameter_names`."""
        return parameter_names(self.model, self._sources, self.checkpoint, self.checkpoint.same)

    def parameter_count(
        self, shapes: Mapping[str, tuple[int, ...]] | None = None, dropped: Collection[str] = ()
    ) -> int:
        """Count the parameters of the model.

        Args:
            shapes: of stored tensors that have other shapes than the checkpoint's, by name.
            dropped: names of stored tensors that are left out.
        """
        names = self.parameter_names.difference(dropped)
        sizes = {entry.name: entry.shape for entry in self.checkpoint.stored} | dict(shapes or {})
        return sum(math.prod(sizes[name]) for name in names)

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

    @contextmanager
    def layer(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Load decoder layer ``index`` for the block, and free its weights afterwards.

        Inside another block that holds the layer nothing is loaded or freed.

        Args:
            index: number of the layer.
            replaced: tensors that replace the checkpoint's, by name in the checkpoint (pruned weights).

        Raises:
            ValueError: ``replaced`` inside another block that holds the layer.
        """
        if index in self._open:
            if replaced:
                raise ValueError(f"layer {index} is loaded with other weights")
            yield self.layers[index]
            return
        names = self.layer_parameters(index)
        ahead = self._ahead.pop(index, None)
        try:
            self._load(names, {**(ahead.tensors() if ahead is not None else {}), **(replaced or {})})
            del ahead
            self._open.add(index)
            yield self.layers[index]
        except BaseException:
            self._ahead.clear()  # what comes next is not known
            raise
        finally:
            self._open.discard(index)
            self._free(names)

    def read_ahead(self, index: int) -> None:
        """Begin to read decoder layer ``index``, which will be loaded soon, while a GPU computes.

        Its bytes are in main memory until it is loaded, or an error ends the block of another layer. Nothing happens on
        a CPU, where the layer is loaded or being read, or where the model has no such layer.
        """
        known = index in self._open or index in self._ahead or not 0 <= index < len(self)
        if self.device.type == "cuda" and not known:
            self._ahead[index] = ReadAhead(self.checkpoint, map(self.source, self.layer_parameters(index)))

    @property
    def ahead_bytes(self) -> int:
        """Return the bytes of main memory that :meth:`read_ahead` of a decoder layer takes, at most.

        They are in the dtypes of the checkpoint, and PyTorch rounds page-locked buffers up to powers of two.
        """
        names = map(self.layer_sources, range(len(self)))
        return 2 * max(sum(self.checkpoint.entry(name).nbytes for name in layer) for layer in names)

    @contextmanager
    def embeddings_and_head(self, *, head: bool = True, like: LayerwiseModel | None = None) -> Iterator[None]:
        """Load everything outside the decoder layers for the block: embeddings, final norm, head.

        Inside another block that holds all of it nothing is loaded or freed.

        Args:
            head: False leaves out the output head, which :meth:`embed` does not need.
            like: another model; its loaded tensors of the same name and value are used too, and not loaded twice.
        """
        if "embeddings and head" in self._open:
            yield
            return
        prefix = self.layers_name + "."
        names = [name for name in self._sources if not name.startswith(prefix)]
        if not head:
            output = self.model.get_output_embeddings()
            tensors = self.model.state_dict(keep_vars=True)
            names = [name for name in names if output is None or tensors[name] is not output.weight]
        try:
            self._load(names, {}, like)
            output, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
            if head:
                if output is not None and output.weight.is_meta:
                    output.weight = embedding.weight
                self._open.add("embeddings and head")
            yield
        finally:
            if head:
                self._open.discard("embeddings and head")
            self._free(names)
            output = self.model.get_output_embeddings()
            if output is not None and not output.weight.is_meta:
                output.weight = nn.Parameter(output.weight.to("meta"), requires_grad=False)

    @contextmanager
    def resident(self, *, layers: bool = True, like: LayerwiseModel | None = None) -> Iterator[None]:
        """Keep weights loaded for the block; inside it nothing of them is loaded or freed again.

        Args:
            layers: keep the decoder layers too, and not only embeddings, final norm and head.
            like: see :meth:`embeddings_and_head`.
        """
        with ExitStack() as loaded:
            loaded.enter_context(self.embeddings_and_head(like=like))
            for index in range(len(self) if layers else 0):
                loaded.enter_context(self.layer(index))
            yield

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Record the input of the first decoder layer and the arguments of every decoder layer.

        Needs :meth:`embeddings_and_head`, and :meth:`check` before it.

        Args:
            tokens: (batch, seqlen) token ids.

        Returns:
            (batch, seqlen, width) hidden states and one :data:`Call` for each layer.

        Raises:
            FistaPrunerError: ids beyond the vocabulary; a layer does not receive the output of the layer before it.
        """
        return self._watch(tokens, torch.Tensor.detach)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse token ids outside the model's vocabulary.

        Raises:
            FistaPrunerError: names the id and the size of the vocabulary.
        """
        size = self.embedded_tokens
        worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        if not 0 <= worst < size:
            raise FistaPrunerError(
                f"{self.checkpoint.folder}: token id {worst} is beyond the model's vocabulary of {size}: "
                "its tokenizer belongs to another model"
            )

    def check(self) -> None:
        """Check that the model can be run layer by layer; done once.

        Loads the embeddings, then the first decoder layer.
        Every decoder layer must run once, in order. It must receive the output of the layer before it, and no other
        argument that depends on the token ids.

        Raises:
            FistaPrunerError: the architecture is not supported; gives the reason.
        """
        if not self._checked:
            with self.failures_explained():
                self._learn_return_type(self.check_window(16))
                with self.embeddings_and_head(head=False):
                    self._check_calls()
            self._checked = True

    def check_window(self, length: int) -> Tensor:
        """Return (1, length) token ids for a check; fewer where the model takes fewer."""
        return torch.arange(3, 3 + min(length, self.max_length or length)).remainder(self.embedded_tokens)[None]

    def probe(self) -> tuple[Tensor, list[Call]]:
        """Do :meth:`embed` with a small window, to try decoder layers on."""
        with self.embeddings_and_head(head=False):
            return self.embed(self.check_window(16))

    def calls(self, batch: int, seqlen: int) -> list[Call]:
        """Record the arguments of every decoder layer for a batch of full windows (of any ids: :meth:`check`).

        Needs :meth:`embeddings_and_head`.
        """
        return self.embed(torch.zeros(batch, seqlen, dtype=torch.long))[1]

    def run(self, index: int, hidden: Tensor, call: Call, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run loaded decoder layer ``index``.

        Args:
            index: number of the layer.
            hidden: (batch, seqlen, width) hidden states that enter it.
            call: its other arguments.
            values: tensors to use in place of parameters, by name inside the layer.

        Returns:
            (batch, seqlen, width) output.
        """
        args, kwargs = call
        layer = self.layers[index]
        if not values:
            return hidden_of(layer(hidden, *args, **kwargs))
        return hidden_of(torch.func.functional_call(layer, dict(values), (hidden, *args), kwargs))

    def head(self, rows: Tensor, *, gradients: bool = False) -> Tensor:
        """Compute the logits (tokens, vocabulary) of single tokens, whatever their ids: final norm and head.

        Needs :meth:`embeddings_and_head`.

        Args:
            rows: (tokens, width) output of the last decoder layer, at most :attr:`max_head_rows` tokens.
            gradients: as for :meth:`logits`.
        """
        ids = torch.zeros(1, len(rows), dtype=torch.int64, device=self.device)
        with torch.set_grad_enabled(gradients):
            return self.logits(rows[None], ids, gradients=gradients)[0]

    def logits(self, hidden: Tensor, tokens: Tensor, *, gradients: bool = False) -> Tensor:
        """Compute logits from the last decoder layer's output. Needs :meth:`embeddings_and_head`.

        Args:
            hidden: (batch, seqlen, width) output of the last decoder layer.
            tokens: (batch, seqlen) token ids that ``hidden`` was computed from.
            gradients: record operations, so that logits can be differentiated with respect to ``hidden``.

        Returns:
            (batch, seqlen, vocabulary).
        """
        ran: list[int] = []

        def give(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._in_order(index, len(ran))
            ran.append(index)
            return self._returned(hidden)

        out = self._forward(tokens, give, gradients=gradients)
        logits: Tensor = out.logits
        return logits

    def _learn_return_type(self, tokens: Tensor) -> None:
        """Run layer 0 once on ``tokens`` to find the type in which layers return hidden states."""
        first: list[Call] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._in_order(index, 0)
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
            kind, others = (list if isinstance(out, list) else tuple), len(out) - 1
            self._returned = lambda hidden: kind((hidden, *(None for _ in range(others))))
        elif not isinstance(out, Tensor):
            raise self.unsupported(f"{self.layers_name}.0 returns a {type(out).__name__}, not hidden states")

    def _check_calls(self) -> None:
        """Check that layers receive the output of the layer before them, and no argument of the token ids.

        Needs :meth:`embeddings_and_head`.
        """
        first, second = (self._watch(torch.full((1, 4), token), torch.randn_like)[1] for token in (0, 1))
        for index, (call, other) in enumerate(zip(first, second, strict=True)):
            for name, value, again in [
                *zip(range(len(call[0])), call[0], other[0], strict=True),
                *((k, call[1][k], other[1][k]) for k in call[1]),
            ]:
                if not _same(value, again):
                    what = f"argument {name + 2}" if isinstance(name, int) else repr(name)
                    raise self.unsupported(
                        f"decoder layer {index} is given {what}, which depends on the token ids or on other layers"
                    )

    def _watch(self, tokens: Tensor, stand_in: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Call]]:
        """Record what :meth:`embed` returns.

        Args:
            tokens: (batch, seqlen) token ids.
            stand_in: makes a stand-in for a layer's output from its input.
        """
        self.check_tokens(tokens)
        calls: list[Call] = []
        first: list[Tensor] = []
        given: list[tuple[Tensor, int]] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._in_order(index, len(calls))
            hidden, rest, named = self._split_hidden(index, args, kwargs)
            if index == 0:
                first.append(hidden)
            else:
                returned, version = given.pop()
                changed = returned._version != version  # in place: overwritten hidden states cannot be compared
                if changed or not (
                    hidden is returned or (hidden.shape == returned.shape and torch.equal(hidden, returned))
                ):
                    raise self.unsupported(
                        f"what enters {self.layers_name}.{index} is not what {self.layers_name}.{index - 1} returned"
                    )
            calls.append((rest, named))
            if index == len(self.layers) - 1:
                raise _Stop
            output = stand_in(hidden)
            given.append((output, output._version))
            return self._returned(output)

        self._forward(tokens, record)
        if len(calls) != len(self.layers):
            raise self.unsupported(
                f"{len(calls)} of the {len(self.layers)} modules in {self.layers_name} run in a forward pass"
            )
        if first[0].shape != (*tokens.shape, self.width):
            expected = (*tokens.shape, self.width)
            raise self.unsupported(
                f"{self.layers_name}.0 is given {tuple(first[0].shape)} and not {expected} hidden states"
            )
        return first[0], calls

    def own_logits(self, tokens: Tensor) -> Tensor:
        """Compute the logits of the model's own forward pass, with one decoder layer in memory at a time.

        Args:
            tokens: (batch, seqlen) token ids.

        Returns:
            (batch, seqlen, vocabulary).
        """
        ran: list[int] = []
        with ExitStack() as outside:  # embeddings before the first layer, norm and head after the last one

            def load_and_run(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                self._in_order(index, len(ran))
                ran.append(index)
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

    def _in_order(self, index: int, done: int) -> None:
        """Check that layer ``index`` is the next one to run after ``done`` layers."""
        if index != done:
            before = f"after {self.layers_name}.{done - 1}" if done else "first"
            raise self.unsupported(f"{self.layers_name}.{index} runs {before}: layers have to run once each, in order")

    def architecture(self) -> str:
        """Describe everything that layer-by-layer passes depend on: class, config, dtype, kind of device."""
        config = {key: value for key, value in self.config.to_dict().items() if key != "_name_or_path"}
        settings = json.dumps(config, sort_keys=True, default=str)
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

    def _split_hidden(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Separate the hidden states, which come first or by name, from the other arguments of a layer."""
        named = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (named.pop("hidden_states", None), ())
        if not isinstance(hidden, Tensor):
            raise self.unsupported(f"{self.layers_name}.{index} is not given hidden states as its first argument")
        return hidden, rest, named

    def _forward(
        self, tokens: Tensor, instead: Callable[[int, tuple[Any, ...], dict[str, Any]], Any], *, gradients: bool = False
    ) -> Any:
        """Run the model's own forward pass with every decoder layer's forward replaced."""

        def replacement(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: instead(index, args, kwargs)

        for index, layer in enumerate(self.layers):
            layer.forward = replacement(index)
        try:
            with torch.set_grad_enabled(gradients):
                return self.model(input_ids=sent(tokens, self.device), use_cache=False)
        except _Stop:
            return None
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

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

    def _load(self, names: list[str], replaced: Mapping[str, Tensor], like: LayerwiseModel | None = None) -> None:
        """Load parameters and buffers to the device, in the dtypes of transformers (:func:`.loaded_dtype`).

        See :meth:`embeddings_and_head` for ``like``.
        """
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
            tensor = tensor.to(self.device, non_blocking=True)
            twin = None if like is None else like._held(name)
            same = twin is not None and twin.dtype == tensor.dtype and twin.device == tensor.device
            assign(self.model, name, twin if twin is not None and same and torch.equal(twin, tensor) else tensor)

    def _held(self, name: str) -> Tensor | None:
        """Return a loaded parameter or buffer; None where it is not there or not loaded."""
        parent, _, key = name.rpartition(".")
        try:
            module = self.model.get_submodule(parent)
        except AttributeError:
            return None
        held = module._parameters.get(key) if key in module._parameters else module._buffers.get(key)
        return None if held is None or held.is_meta else held.detach()

    def _free(self, names: list[str]) -> None:
        """Move parameters and buffers to the meta device, in the shapes of the checkpoint."""
        for name in names:
            if (held := self._held(name)) is not None:
                shape = self.checkpoint.entry(self._sources[name]).shape
                assign(self.model, name, held.new_empty(shape, device="meta"))


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


def _same(value: Any, again: Any) -> bool:
    """Compare one argument in two passes; an empty dictionary, which layers would fill, is never the same."""
    if isinstance(value, Tensor):
        return torch.equal(value, again)
    if isinstance(value, (tuple, list)):
        return len(value) == len(again) and all(map(_same, value, again))
    if isinstance(value, dict):
        return bool(value) and value.keys() == again.keys() and all(_same(value[key], again[key]) for key in value)
    return True


def hidden_of(out: Any) -> Tensor:
    """Return the hidden states of a decoder layer's output: alone, or first in a tuple or list."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return hidden

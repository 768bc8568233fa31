"""A causal language model of which one decoder layer is in memory at a time.

The architecture is built on the meta device, so it costs nothing; decoder layers are read from the checkpoint when they
are needed and freed after. Two things make this work for architectures nobody listed: the model's own ``forward`` is
run with every decoder layer's ``forward`` replaced by a recorder, which gives the input of the first layer and the exact
arguments every layer would be called with; and with a recorder that returns given hidden states, which gives the model's
own final norm and head.

That is right only where a decoder layer is given what the one before it returned, and nothing else happens between them.
:meth:`LayerwiseModel.check` refuses models whose forward pass shows otherwise, and
:func:`fistapruner.activations.stream.check_model` compares the logits of one short window with the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FistaPrunerError, needs_code
from ..runtime.numerics import dtype_name, pass_dtype
from .files.checkpoint import Checkpoint
from .names import stored_names

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer after its hidden states: positional ones, keyword ones."""

Tick = Callable[[str, int, int], None]
"""Told of a pass through all decoder layers: (what, steps done, steps in all)."""


WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""How weights may be stored."""


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
        self._refuse_tensors()
        self._returned: Callable[[Tensor], Any] = lambda hidden: hidden  # what a layer returns that answers these hidden states
        self._checked = False
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
            tensors = self.model.state_dict(keep_vars=True)
            names = [name for name in names if output is None or tensors[name] is not output.weight]
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
        """Input of the first decoder layer, and how every decoder layer is called.

        Needs :meth:`embeddings_and_head`, and :meth:`check` before it.

        Args:
            tokens: (batch, seqlen) token ids.

        Returns:
            (batch, seqlen, width) hidden states and one :data:`Call` for each layer.

        Raises:
            FistaPrunerError: ids beyond the vocabulary; a layer is not given what the one before it returned.
        """
        return self._watch(tokens, torch.Tensor.detach)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse token ids that the model's vocabulary does not have.

        Raises:
            FistaPrunerError: names the id and the size of the vocabulary.
        """
        size = int(self.model.get_input_embeddings().weight.shape[0])
        worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        if not 0 <= worst < size:
            raise FistaPrunerError(
                f"{self.checkpoint.folder}: token id {worst} is beyond the model's vocabulary of {size}: "
                "its tokenizer belongs to another model"
            )

    def check(self) -> None:
        """Make sure that the model can be run layer by layer. Loads the embeddings, then the first decoder layer.

        Decoder layers must run once each, in order; each must be given what the one before it returned, and beside it
        nothing that depends on the token ids. What was checked is not checked again.

        Raises:
            FistaPrunerError: the architecture is not supported; says why.
        """
        if not self._checked:
            with self.failures_explained():
                self._learn_return_type(self.check_window(16))
                with self.embeddings_and_head(head=False):
                    self._check_calls()
            self._checked = True

    def check_window(self, length: int) -> Tensor:
        """Return (1, length) token ids for a check; fewer where the model takes fewer."""
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        return torch.arange(3, 3 + min(length, self.max_length)).remainder(vocabulary)[None]

    def calls(self, batch: int, seqlen: int) -> list[Call]:
        """How every decoder layer is called for a batch of full windows; the token ids make no difference (:meth:`check`).

        Needs :meth:`embeddings_and_head`.
        """
        return self.embed(torch.zeros(batch, seqlen, dtype=torch.long))[1]

    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Output hidden states of loaded decoder layer ``index``; shapes (batch, seqlen, width)."""
        args, kwargs = call
        return hidden_of(self.layers[index](hidden, *args, **kwargs))

    def logits(self, hidden: Tensor, tokens: Tensor, *, gradients: bool = False) -> Tensor:
        """(batch, seqlen, vocabulary) logits from the last decoder layer's output. Needs :meth:`embeddings_and_head`.

        Args:
            hidden: (batch, seqlen, width) output of the last decoder layer.
            tokens: (batch, seqlen) the token ids it came from.
            gradients: record operations, so that logits can be differentiated with respect to ``hidden``.
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
        """Run layer 0 once on ``tokens`` to see in what its layers return hidden states."""
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
        """Make sure that every layer is given what the one before it returned, and beside it nothing that depends on the token ids.

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
                    raise self.unsupported(f"decoder layer {index} is given {what}, which depends on the token ids or on other layers")

    def _watch(self, tokens: Tensor, stand_in: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Call]]:
        """What :meth:`embed` returns.

        Args:
            tokens: (batch, seqlen) token ids.
            stand_in: makes what stands for a layer's output of its input.
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
                changed = returned._version != version  # in place: what was written over cannot be compared
                if changed or not (hidden is returned or (hidden.shape == returned.shape and torch.equal(hidden, returned))):
                    raise self.unsupported(f"what enters {self.layers_name}.{index} is not what {self.layers_name}.{index - 1} returned")
            calls.append((rest, named))
            if index == len(self.layers) - 1:
                raise _Stop
            output = stand_in(hidden)
            given.append((output, output._version))
            return self._returned(output)

        self._forward(tokens, record)
        if len(calls) != len(self.layers):
            raise self.unsupported(f"{len(calls)} of the {len(self.layers)} modules in {self.layers_name} run in a forward pass")
        if first[0].shape != (*tokens.shape, self.width):
            expected = (*tokens.shape, self.width)
            raise self.unsupported(f"{self.layers_name}.0 is given {tuple(first[0].shape)} and not {expected} hidden states")
        return first[0], calls

    def own_logits(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seqlen, vocabulary) of the model's own forward pass, with one decoder layer in memory at a time."""
        ran: list[int] = []
        with ExitStack() as outside:  # what is outside the layers: needed before the first and after the last of them

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
        """Make sure that layer ``index`` is the next one to run after ``done`` layers."""
        if index != done:
            before = f"after {self.layers_name}.{done - 1}" if done else "first"
            raise self.unsupported(f"{self.layers_name}.{index} runs {before}: layers have to run once each, in order")

    def architecture(self) -> str:
        """Return what decides whether running the model layer by layer is right: class, config, dtype, kind of device."""
        config = {key: value for key, value in self.config.to_dict().items() if key != "_name_or_path"}
        return f"{type(self.model).__qualname__} {self.dtype} {self.device.type} {json.dumps(config, sort_keys=True, default=str)}"

    def unsupported(self, reason: str) -> FistaPrunerError:
        return FistaPrunerError(f"{type(self.model).__name__}: {reason}: this architecture is not supported")

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """Say in one sentence what goes wrong in the model's own code when its layers are replaced."""
        try:
            yield
        except (FistaPrunerError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # every architecture has its own code, which fails in its own way
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            raise self.unsupported(f"its forward pass cannot be taken apart into decoder layers ({reason})") from error

    def _split_hidden(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """A layer call without its hidden states, which come first or by name."""
        named = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (named.pop("hidden_states", None), ())
        if not isinstance(hidden, Tensor):
            raise self.unsupported(f"{self.layers_name}.{index} is not given hidden states as its first argument")
        return hidden, rest, named

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
                layer.__dict__.pop("forward", None)

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

    def _refuse_tensors(self) -> None:
        """Refuse decoder layers with weights that are neither matrices nor vectors."""
        for index, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if sum(size > 1 for size in parameter.shape) > 2:
                    what = "a weight"
                    if isinstance(layer.get_submodule(name.rpartition(".")[0]), (nn.Conv1d, nn.Conv2d)):
                        what = "a convolution"
                    elif "expert" in name:
                        what = "a fused mixture of experts"
                    raise self.unsupported(
                        f"{self.layers_name}.{index}.{name} is {what} with {parameter.ndim} dimensions {tuple(parameter.shape)}"
                    )

    def _map_names(self) -> dict[str, str]:
        """Checkpoint name of every parameter and persistent buffer of the model, all of which must be there."""
        names = stored_names(self.model, self.checkpoint.names())
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        sources: dict[str, str] = {}
        missing: list[str] = []
        twins: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}  # of tied tensors one is stored
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            found = names.get(name) or names.get(twins.get(name, name))
            is_head = head is not None and tensor is head.weight and embedding is not None and head.weight is not embedding.weight
            if is_head and tied:
                continue
            if found is None:
                missing.append(name)
                continue
            entry, expected = self.checkpoint.entry(found), tuple(tensor.shape)
            if entry.shape != expected:
                raise FistaPrunerError(f"{self.checkpoint.folder}: tensor {found!r} is {entry.shape}, the config asks for {expected}")
            if tensor.is_floating_point() and entry.dtype not in WEIGHT_DTYPES:
                raise FistaPrunerError(
                    f"{self.checkpoint.folder}: tensor {found!r} is stored as {dtype_name(entry.dtype)}, no dtype of dense weights "
                    "(float32, bfloat16, float16, float64): the checkpoint is quantised or damaged; prune the unquantised one"
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
        fault = FistaPrunerError(f"{folder}: config.json is not understood: {' '.join(str(error).split())[:300]}")
        raise needs_code(folder, error) or fault from None
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
        fault = FistaPrunerError(f"{folder}: no {config.model_type} causal language model can be built from config.json: {reason}")
        raise needs_code(folder, error) or fault from None


def _find_layers(model: Any) -> tuple[str, list[nn.Module]]:
    """The decoder layers: the module list that has as many modules as the config has layers, or else several of one class, and that
    holds the most weights.

    Lists of the text model go before those of its parts that read images or sound, which have other configs.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    best: tuple[tuple[bool, bool, int], str, list[nn.Module]] = ((False, False, 0), "", [])
    reads_text = {"": True}  # by the name of a module
    for name, module in model.named_modules():
        part = getattr(module, "config", None)
        own = part is not None and hasattr(part, "model_type")
        reads_text[name] = isinstance(part, (type(config), type(model.config))) if own else reads_text[name.rpartition(".")[0]]
        if isinstance(module, nn.ModuleList) and len(module):
            size = (reads_text[name], len(module) == count, sum(parameter.numel() for parameter in module.parameters()))
            if size > best[0] and (size[1] or len({type(item) for item in module}) == 1):
                best = (size, name, list(module))
    if not best[2]:
        raise FistaPrunerError(f"{type(model).__name__}: no list of decoder layers found: this architecture is not supported")
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


def hidden_of(out: Any) -> Tensor:
    """Hidden states in what a decoder layer returned: alone, or first in a tuple or list."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return hidden

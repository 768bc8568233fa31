"""Run a causal language model with one decoder layer in memory at a time.

No architecture is listed by name. Instead, the model's own ``forward`` runs with every decoder layer's ``forward``
replaced:

* by a recorder, which gives the input of the first layer and the exact arguments of every layer
  (:meth:`LayerwiseModel.embed`);
* by a function that returns given hidden states, which gives the model's own final norm and head
  (:meth:`LayerwiseModel.logits`).

This is right only where every decoder layer receives the output of the layer before it, and nothing else happens
between them. :meth:`LayerwiseModel.check` refuses models whose forward pass differs, and
:func:`fistapruner.passes.check.check_model` compares the logits of one short window with the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import FistaPrunerError, one_line
from .architecture import max_length, unsupported
from .layerwise_weights import LayerwiseWeights

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a decoder layer, without its hidden states."""

UNSTATED_LENGTH = 2048
"""Tokens that the head takes at once where the config states no longest text."""


class _Stop(Exception):
    """End a forward pass early."""


class LayerwiseModel(LayerwiseWeights):
    """A model that runs with one decoder layer in memory. Arguments as for :class:`.LayerwiseWeights`."""

    _checked = False
    _container: tuple[type[tuple[Any, ...]] | type[list[Any]], int] | None = None
    """Type in which layers return hidden states, and the number of other things in it; None for a tensor alone."""

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
            self._container = (list if isinstance(out, list) else tuple), len(out) - 1
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
                return self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            return None
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)


def _same(value: Any, again: Any) -> bool:
    """Compare one argument in two passes; an empty dictionary, which layers would fill, is never the same."""
    if type(value) is not type(again):
        return False
    if isinstance(value, Tensor):
        return torch.equal(value, again)
    if isinstance(value, (tuple, list)):
        return len(value) == len(again) and all(map(_same, value, again))
    if isinstance(value, dict):
        return bool(value) and value.keys() == again.keys() and all(_same(value[key], again[key]) for key in value)
    return not isinstance(value, (int, float, str)) or bool(value == again)


def hidden_of(out: Any) -> Tensor:
    """Return the hidden states of a decoder layer's output: alone, or first in a tuple or list."""
    hidden: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return hidden

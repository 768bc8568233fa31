"""The way of the hidden states through a model: embed, then every decoder layer over every batch.

1. :func:`embed` makes of token ids (windows, seqlen) the hidden states that enter decoder layer 0, a
   :class:`~.store.HiddenStates` (windows, seqlen, width) in memory or in a file. It also records the other arguments of
   every decoder layer (:class:`Calls`: masks, positions), which are the same for all batches of one size.
2. :func:`run_layer` runs every batch through one loaded decoder layer: hidden states in, hidden states out. On the way
   inputs and outputs of operators can be watched (:class:`Watched`).
3. What leaves one layer enters the next one. Only one decoder layer is in memory at a time.
4. After the last layer, ``LayerwiseModel.logits`` applies the model's own final norm and head.

:func:`forward` is 1 to 3 in a row, and :func:`backward` takes a gradient the same way back. Pruning changes the weights
on the way, so it does 2 several times for each layer (:mod:`fistapruner.pruning.layer`). Before any work,
:func:`check_model` makes sure that this way gives the model's own predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.experts import Experts
from ..models.layers import Call, LayerwiseModel
from ..models.operators import Group, Operator
from ..runtime.numerics import ordered_attention
from ..runtime.show import Clock
from .store import HiddenStates, Store, scratch_factory

Receive = Callable[[int, int, Tensor], None]
"""Receives (group number, first window of the batch, values (batch, seqlen, n)); of an expert (1, its tokens, n)."""

Around = Callable[[Callable[[], tuple[int, int]]], AbstractContextManager[None]]
"""Entered around a pass, with a function that returns the windows (start, stop) of the batch at work."""

Progress = Callable[[int, int], None]
"""Receives (decoder layers done, decoder layers in all)."""


def _ignore(*_: Any) -> None: ...


class _Reached(Exception):
    """The last watched operator was reached; the rest of the layer is not needed."""


@dataclass(frozen=True)
class Watched:
    """Operators that are watched while batches run through their decoder layer.

    Args:
        groups: (number, operators) of the groups whose inputs are watched, in execution order; ``inputs`` receives
            them, once for each group and batch.
        operators: (group number, operator) of the operators whose outputs are watched, which ``outputs`` receives. A
            pass that stops at the last watched group does not reach those that run later.
        mixtures: names of the watched modules of experts (:class:`~fistapruner.models.experts.Experts`); ``routed``
            receives (name, first window of the batch, (tokens, n) inputs, (tokens, k) chosen experts, their weights).
    """

    groups: Sequence[tuple[int, Group]] = ()
    inputs: Receive = _ignore
    operators: Sequence[tuple[int, Operator]] = ()
    outputs: Receive = _ignore
    mixtures: Sequence[str] = ()
    routed: Callable[[str, int, Tensor, Tensor, Tensor], None] = _ignore

    def attach(self, layer: nn.Module, windows: Callable[[], tuple[int, int]], *, stops: bool) -> list[RemovableHandle]:
        """Hook a loaded decoder layer, so that its passes hand over what is watched.

        ``windows`` returns the windows (start, stop) of the batch at work. If it ``stops``, a pass raises
        :class:`_Reached` at the last watched group.
        """

        def by_window(values: Tensor) -> Tensor:
            """Some architectures (OPT) flatten batch and sequence inside the layer."""
            start, stop = windows()
            return values.reshape(stop - start, -1, values.shape[-1])

        def receive_inputs(number: int, routed: bool, last: bool) -> Callable[..., None]:
            def pre_forward(_: object, args: tuple[Tensor, ...]) -> None:
                self.inputs(number, windows()[0], args[0][None] if routed else by_window(args[0]))
                if last and stops:
                    raise _Reached

            return pre_forward

        def receive_outputs(number: int) -> Callable[..., None]:
            return lambda _, __, out: self.outputs(number, windows()[0], by_window(out))

        def receive_routed(name: str, last: bool) -> Callable[..., None]:
            def pre_forward(module: Experts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.routed(name, windows()[0], *module.routed(*args, **kwargs))
                if last and stops:
                    raise _Reached

            return pre_forward

        handles = []
        for number, group in self.groups:
            last = number == self.groups[-1][0] and not self.mixtures
            hook = receive_inputs(number, bool(group[0].experts), last)
            handles.append(layer.get_submodule(group[0].name).register_forward_pre_hook(hook))
        for number, operator in self.operators:
            handles.append(layer.get_submodule(operator.name).register_forward_hook(receive_outputs(number)))
        for name in self.mixtures:
            hook = receive_routed(name, not self.groups and name == self.mixtures[-1])
            handles.append(layer.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        return handles


Visit = Callable[[int, nn.Module], AbstractContextManager[Watched]]
"""Called with (index, loaded decoder layer) before its batches; left after them, when the layer is freed."""

VisitBack = Callable[[int, nn.Module], AbstractContextManager[Callable[[Tensor], None]]]
"""As :data:`Visit`; receives of each batch the gradient (batch, seqlen, width) at the layer's output."""

Values = Callable[[int, nn.Module], Mapping[str, Tensor]]
"""Gives for (index, loaded decoder layer) the tensors to use in place of parameters, by name inside the layer."""

Variants = Callable[[int, nn.Module], Iterable[Mapping[str, Tensor]]]
"""Gives several :data:`Values` of a layer, one after the other; each is used before the next one is asked for."""


@dataclass(frozen=True)
class Calls:
    """Arguments of every decoder layer beside hidden states, for each batch size that occurs."""

    batch_size: int
    by_size: dict[int, list[Call]]

    @classmethod
    def of(cls, model: LayerwiseModel, samples: int, seqlen: int, batch_size: int) -> Calls:
        """Record the calls for batches of ``samples`` windows, and for one window; the embeddings are loaded."""
        calls = cls(min(batch_size, samples), {})
        calls.record(model, samples, seqlen)
        calls.record(model, 1, seqlen)
        return calls

    def record(self, model: LayerwiseModel, samples: int, seqlen: int) -> None:
        """Record what the batches of ``samples`` windows need beyond what is there; as :meth:`of`."""
        for size in {min(self.batch_size, samples), samples % self.batch_size} - {0, *self.by_size}:
            self.by_size[size] = model.calls(size, seqlen)

    def batches(self, samples: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of every batch."""
        for start in range(0, samples, self.batch_size):
            yield start, min(start + self.batch_size, samples)


def embed(
    model: LayerwiseModel, tokens: Tensor, batch_size: int, output: HiddenStates, calls: Calls | None = None
) -> Calls:
    """Embed (windows, seqlen) tokens: write the hidden states that enter decoder layer 0.

    ``calls`` are those of other windows with this seqlen and batch size; what is missing is recorded into them, and
    they are returned.
    """
    windows, seqlen = tokens.shape
    with model.embeddings_and_head(head=False):
        if calls is None:
            calls = Calls.of(model, windows, seqlen, batch_size)
        calls.record(model, windows, seqlen)
        for start, stop in calls.batches(windows):
            output.write(start, model.embed(tokens[start:stop])[0])
    return calls


def run_layer(
    model: LayerwiseModel,
    index: int,
    inputs: HiddenStates,
    calls: Calls,
    *,
    output: HiddenStates | Receive | None = None,
    values: Mapping[str, Tensor] | None = None,
    watched: Watched = Watched(),
    around: Sequence[Around] = (),
    clock: Clock | None = None,
) -> None:
    """Run every window through the loaded decoder layer ``index``.

    Args:
        model: the model, layer ``index`` loaded.
        inputs: hidden states that enter the layer; ``calls``: how it is called.
        output: receives the layer's output, as group -1 if it is a function; may be ``inputs``, which is then
            overwritten. None: not needed, and every pass stops at the last watched group.
        values: tensors to use in place of parameters, by name inside the layer.
        watched: the operators to watch.
        around: entered before the first batch and left after the last.
        clock: counts the time as ``io`` and ``capture``; what receives something counts its own.
    """
    phase = (lambda _: nullcontext()) if clock is None else clock.phase
    start = stop = 0

    def windows() -> tuple[int, int]:
        return start, stop

    with ExitStack() as stack:
        for handle in watched.attach(model.layers[index], windows, stops=output is None):
            stack.enter_context(handle)
        for enter in around:
            stack.enter_context(enter(windows))
        for start, stop in calls.batches(inputs.samples):
            with phase("io"):
                hidden = inputs.read(start, stop, model.device)
            with phase("capture"), torch.no_grad():
                try:
                    out = model.run(index, hidden, calls.by_size[stop - start][index], values)
                except _Reached:
                    continue
            if isinstance(output, HiddenStates):
                with phase("io"):
                    output.write(start, out)
            elif output is not None:
                output(-1, start, out)


def forward(
    model: LayerwiseModel,
    tokens: Tensor,
    batch_size: int,
    store: Store,
    *,
    visit: Visit | None = None,
    keep: bool = False,
    values: Values | None = None,
    calls: Calls | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[list[HiddenStates], Calls]:
    """Run every window through the whole model, one decoder layer in memory at a time.

    Args:
        model: the model; ``tokens``: (windows, seqlen) token ids; ``batch_size``: windows in one pass.
        store: makes the stores of hidden states.
        visit: called for every decoder layer; says what to watch in it.
        keep: keep the hidden states between all layers, for :func:`backward`.
        values: gives the tensors to use in place of a layer's parameters.
        calls: as for :func:`embed`.
        progress: receives the number of layers done.

    Returns:
        With ``keep`` the hidden states that enter each layer and those that leave the last one; without, these alone.
        The caller closes them. And how decoder layers are called for these windows.
    """
    shape = (*tokens.shape, model.width)
    states = [store("hidden-0", shape)]
    calls = embed(model, tokens, batch_size, states[0], calls)
    for index in range(len(model)):
        entering = states[-1]
        if keep:
            states.append(store(f"hidden-{index + 1}", shape))
        with ExitStack() as visits, model.layer(index) as layer:
            watched = Watched() if visit is None else visits.enter_context(visit(index, layer))
            used = None if values is None else values(index, layer)
            run_layer(model, index, entering, calls, output=states[-1], values=used, watched=watched)
        progress(index + 1, len(model))
    return states, calls


def forward_variants(
    model: LayerwiseModel,
    tokens: Tensor,
    batch_size: int,
    store: Store,
    variants: Variants,
    *,
    calls: Calls | None = None,
) -> tuple[list[HiddenStates], Calls]:
    """Run every window through several variants of the model; each layer is loaded once for all.

    ``variants`` gives for every layer the tensors of the same number of variants; other arguments as for
    :func:`forward`.

    Returns:
        The hidden states that leave the last layer of each variant; the caller closes them. And the calls.
    """
    shape = (*tokens.shape, model.width)
    embedded = store("hidden-0", shape)
    calls = embed(model, tokens, batch_size, embedded, calls)
    states: list[HiddenStates] = []
    for index in range(len(model)):
        with model.layer(index) as layer:
            number = 0
            for number, values in enumerate(variants(index, layer), 1):
                if index == 0:
                    states.append(store(f"hidden-{number}", shape))
                entering, leaving = states[number - 1] if index else embedded, states[number - 1]
                run_layer(model, index, entering, calls, output=leaving, values=values)
            if number != len(states):
                raise ValueError(f"{number} variants of layer {index}, {len(states)} of the layers before it")
        if index == 0:
            embedded.close()
    return states, calls


def backward(
    model: LayerwiseModel,
    states: list[HiddenStates],
    calls: Calls,
    gradient: HiddenStates,
    visit: VisitBack | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Take a gradient back through the whole model: each decoder layer, from the last one on, runs again.

    Args:
        model: the model.
        states: hidden states that enter each layer (:func:`forward` with ``keep``, less the last ones), which are
            closed; ``calls``: how decoder layers are called.
        gradient: with respect to the output of the last layer; overwritten by that with respect to the input of the
            first.
        visit: called for every decoder layer; its hooks may watch the gradients inside.
        progress: receives the number of layers done.
    """
    for index in reversed(range(len(model))):
        entering = states.pop()
        with ExitStack() as visits:
            with model.layer(index) as layer:
                receive = None if visit is None else visits.enter_context(visit(index, layer))
                visits.enter_context(ordered_attention(model.device))
                for start, stop in calls.batches(entering.samples):
                    hidden = entering.read(start, stop, model.device)
                    above = gradient.read(start, stop, model.device)
                    if receive is not None:
                        receive(above)
                    wanted = hidden.requires_grad_()
                    with torch.enable_grad():
                        out = model.run(index, hidden, calls.by_size[stop - start][index])
                    gradient.write(start, torch.autograd.grad(out, wanted, above)[0])
                    del out
            entering.close()
        progress(len(model) - index, len(model))


CHECK_TOKENS = 16
"""Tokens in the window on which :func:`check_model` compares logits."""

_COMPARED: set[str] = set()
"""Architectures whose logits were compared in this process."""


def check_model(model: LayerwiseModel) -> None:
    """Compare the logits of one short window, run layer by layer, with the model's own.

    In each process once for all models with this config. Other hidden states go through every layer before those that
    are compared: so what a layer keeps from pass to pass shows, and what it leaves for later layers. In no layer may
    the output of the first token depend on later tokens.
    """
    model.check()
    architecture = model.architecture()
    if architecture in _COMPARED:
        return
    tokens = model.check_window(CHECK_TOKENS)
    tolerance = max(1e-5, 4 * torch.finfo(model.dtype).eps)
    with model.failures_explained():
        own = model.own_logits(tokens)
        states = scratch_factory(None, model.dtype, model.device)("hidden", (2, tokens.shape[1], model.width))
        calls = embed(model, torch.cat([tokens.flip(1), tokens]), 1, states)
        largest = 0.0
        for index in range(len(model)):
            with model.layer(index):
                entering = states.read(1, 2, model.device)
                run_layer(model, index, states, calls, output=states)
                largest = max(largest, _change_with_later(model, index, entering, calls.by_size[1][index]))
        with model.embeddings_and_head():
            ours = model.logits(states.read(1, 2, model.device), torch.zeros_like(tokens))
        # Damaged weights are found later.
        own, ours = (logits.float().nan_to_num(0.0, 0.0, 0.0) for logits in (own, ours))
        difference, size = float((own - ours).norm()), float(own.norm())
        if not difference <= tolerance * size:
            raise model.unsupported(
                "run layer by layer it predicts otherwise than in one forward pass "
                f"(its logits differ by {difference / size:.2g} of their size)"
            )
        if largest > tolerance:
            raise model.unsupported("its predictions of a token depend on later tokens (bidirectional attention)")
    _COMPARED.add(architecture)


def _change_with_later(model: LayerwiseModel, index: int, hidden: Tensor, call: Call) -> float:
    """Measure how a decoder layer's output of the first token changes with the sign of later ones.

    What enters of the first token is made small, so that it does not hide in its rounding what the layer adds to it.
    """
    first = hidden.clone()
    first[:, 0] /= 64
    other = -first
    other[:, 0] = first[:, 0]
    with torch.no_grad():
        ours, others = (
            model.run(index, states, call)[0, 0].float().nan_to_num(0.0, 0.0, 0.0) for states in (first, other)
        )
    return float((ours - others).norm()) / max(float(ours.norm()), torch.finfo(torch.float32).tiny)

"""How much the model's predictions feel an error in the output of each operator and of each decoder layer.

An error ``e_t`` in some output of the dense model at token ``t`` moves the predicted distributions by

    KL(dense || perturbed) = 1/2 sum_t E[(g_t . e_t)^2] + higher orders,

where ``g_t`` is the gradient of the log-likelihood of labels *drawn from the model itself* with respect to that output: its
second moment is the Fisher information. One forward and one backward pass over some calibration windows measure it, decoder
layer by decoder layer, so that one layer is in memory at a time. The second moment is kept as

* for each operator, ``E[g_i^2]`` of every output row ``i``: with it, a layer problem's row errors become a prediction of
  nats (:mod:`.error`);
* for each decoder layer, the matrix ``E[g g^T]`` of its output hidden states (if asked for): the metric of block matching
  (:mod:`fistapruner.tuning.block_matching`).

Gradient second moments as a metric for layer-wise errors go back to K-FAC (Martens & Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..activations.store import HiddenStates, Store
from ..errors import FistaPrunerError
from ..models.discovery import Layout
from ..models.layerwise import Call, LayerwiseModel, Tick
from ..runtime.numerics import add_gram, dtype_name, fast_products, mirror

HEAD_TOKENS = 512
"""Tokens whose logits are made at once."""

WIDE = 4096
"""Hidden size above which only the diagonal of a decoder layer's matrix is kept: the whole ones would fill memory and disk."""


class InputEnergy:
    """Mean squared input of operators that read the same tensor, gathered batch by batch: the diagonal of their Gram.

    Args:
        weight: (m, n) dense weights, stacked by rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.tokens = 0
        self._squares = torch.zeros(weight.shape[1], device=weight.device)

    def add(self, inputs: Tensor) -> None:
        """Add a batch of (tokens, n) inputs."""
        self._squares += inputs.float().square().sum(0)
        self.tokens += len(inputs)

    def mean(self) -> Tensor:
        """(n,) mean over tokens."""
        return self._squares / self.tokens


class Sums(Protocol):
    """What is gathered of an operator group's inputs."""

    def add(self, inputs: Tensor, /) -> None: ...


S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class Look(Generic[S]):
    """What to gather on a forward pass of the dense model.

    Args:
        sums: makes an operator group's sums from its (m, n) fp32 weights, stacked by rows.
        done: receives (layer, group, sums) when all windows have passed.
    """

    sums: Callable[[Tensor], S]
    done: Callable[[int, int, S], None]


@dataclass(frozen=True)
class Sensitivity:
    """What one forward and one backward pass of the dense model measured.

    Args:
        rows: (m,) mean squared gradient of every output row of each operator, by full name.
        outputs: (width, width) second moment of the gradient at each decoder layer's output, in order, or their (width,)
            diagonals where the model is wider than :data:`WIDE`. Empty if it was not asked for.
        tokens: tokens behind the means.
    """

    rows: dict[str, Tensor]
    outputs: list[Tensor]
    tokens: int


def measure_sensitivity(
    model: LayerwiseModel,
    layout: Layout,
    tokens: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 4,
    look: Look[Any] | None = None,
    outputs: bool = True,
    store: Store,
    tick: Tick = lambda what, done, total: None,
) -> Sensitivity:
    """Run the dense model forwards and backwards over some windows.

    Args:
        model: the dense model.
        layout: its operators.
        tokens: (windows, seqlen) token ids. Hidden states between all layers are stored for them, ``(layers + 1) * windows *
            seqlen * width`` values.
        seed: draws the labels.
        batch_size: windows in one pass.
        look: what else to gather on the way.
        outputs: whether to measure the decoder layers' outputs too.
        store: where hidden states are kept.
        tick: told of progress: (what, steps done, steps in all).

    Raises:
        FistaPrunerError: NaN or infinite gradients; names the operator.
    """
    batches = _batches(len(tokens), batch_size)
    states, calls = _forward(model, layout, tokens, batches, store, look, tick)
    last = states.pop()
    gradient = _loss_gradient(model, last.read(0, len(tokens)), seed)
    last.close()
    rows: dict[str, Tensor] = {}
    metrics: list[Tensor] = []
    width = model.width
    for index in reversed(range(len(model))):
        entering = states.pop()
        metric = torch.zeros(() if not outputs else (width, width) if width <= WIDE else (width,), device=model.device)
        operators = [operator for group in layout.layers[index] for operator in group]
        with model.layer(index) as module:
            sums = {operator.name: torch.zeros(operator.rows, device=model.device) for operator in operators}

            def add(name: str, grad: Tensor, sums: dict[str, Tensor] = sums) -> None:
                sums[name] += grad.reshape(-1, grad.shape[-1]).float().square().sum(0)

            def hook(name: str) -> Callable[..., None]:
                def after_forward(_: object, __: object, output: Tensor) -> None:
                    output.register_hook(lambda grad: add(name, grad))

                return after_forward

            handles = [module.get_submodule(operator.name).register_forward_hook(hook(operator.name)) for operator in operators]
            try:
                for start, stop in batches:
                    hidden = entering.read(start, stop, model.device).requires_grad_()
                    above = gradient[start:stop].to(model.device)
                    flat = above.reshape(-1, above.shape[-1]).float()
                    if outputs and metric.ndim == 1:
                        metric += flat.square().sum(0)
                    elif outputs:
                        with fast_products(above.dtype == torch.bfloat16):
                            add_gram(metric, flat)
                    with torch.enable_grad():
                        out = model.run(index, hidden, calls[stop - start][index])
                        (below,) = torch.autograd.grad(out, hidden, above)
                    gradient[start:stop] = below
            finally:
                for handle in handles:
                    handle.remove()
        entering.close()
        if outputs:
            metrics.append((metric if metric.ndim == 1 else mirror(metric)).cpu() / tokens.numel())
        rows |= {layout.full_name(index, operator): sums[operator.name].cpu() / tokens.numel() for operator in operators}
        tick("decoder layers, backwards", len(model) - index, len(model))
    for name, values in rows.items():  # from the last decoder layer to the first, as gradients come
        if not bool(values.isfinite().all()):
            raise FistaPrunerError(
                f"{name}: the gradients of the predictions are NaN or infinite in {dtype_name(model.dtype)} passes: take "
                "--dtype float32, or --allocation uniform and --weighting none, which need none"
            )
    return Sensitivity(rows, metrics[::-1], tokens.numel())


def row_importance(sensitivity: Tensor) -> Tensor:
    """Weights of an operator's rows in its layer problem, from their mean squared gradients (m,); their mean is 1.

    The root of the sensitivity, not the sensitivity itself: it was measured on few tokens, and an error that is spread
    unevenly leaves the range in which the second moment describes its effect.
    """
    largest = float(sensitivity.max())
    if largest == 0.0:  # no row reaches a prediction: none counts more than another
        return torch.ones_like(sensitivity)
    # Times a power of four, whose root is exact: no bit of the result depends on it, and nothing underflows.
    sensitivity = (sensitivity.double() * 4.0 ** (-math.frexp(largest)[1] // 2)).float()
    floor = 1e-8 * sensitivity.mean()  # rows that reach no prediction keep a weight
    root = sensitivity.clamp_min(floor).sqrt()
    return root / root.mean()


def look_at_inputs(
    model: LayerwiseModel,
    layout: Layout,
    tokens: Tensor,
    look: Look[Any],
    *,
    batch_size: int = 4,
    store: Store,
    tick: Tick = lambda what, done, total: None,
) -> None:
    """Run the dense model forwards over some windows; arguments as for :func:`measure_sensitivity`."""
    states, _ = _forward(model, layout, tokens, _batches(len(tokens), batch_size), store, look, tick, keep=False)
    states[-1].close()


def _batches(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _forward(
    model: LayerwiseModel,
    layout: Layout,
    tokens: Tensor,
    batches: list[tuple[int, int]],
    store: Store,
    look: Look[Any] | None,
    tick: Tick,
    *,
    keep: bool = True,
) -> tuple[list[HiddenStates], dict[int, list[Call]]]:
    """Hidden states into every decoder layer (closed unless ``keep``) and out of the last one, and how layers are called for
    each batch size."""
    calls: dict[int, list[Call]] = {}
    shape = (tokens.shape[0], tokens.shape[1], model.width)
    states = [store("sensitivity-0", shape)]
    with model.embeddings_and_head(head=False):
        for start, stop in batches:
            hidden, arguments = model.embed(tokens[start:stop])
            states[0].write(start, hidden)
            calls.setdefault(stop - start, arguments)
    for index in range(len(model)):
        states.append(store(f"sensitivity-{index + 1}", shape))
        with model.layer(index) as module, torch.no_grad():
            sums: list[Any] = []
            handles = []
            for group in layout.layers[index]:
                if look is None:
                    break
                stacked = torch.cat([operator.weight(module).float() for operator in group])
                sums.append(look.sums(stacked))

                def gather(_: object, args: tuple[Tensor, ...], own: Any = sums[-1]) -> None:
                    own.add(args[0].reshape(-1, args[0].shape[-1]))

                handles.append(module.get_submodule(group[0].name).register_forward_pre_hook(gather))
            try:
                for start, stop in batches:
                    hidden = states[index].read(start, stop, model.device)
                    states[-1].write(start, model.run(index, hidden, calls[stop - start][index]))
            finally:
                for handle in handles:
                    handle.remove()
        if not keep:
            states[index].close()
        for number, own in enumerate(sums):
            assert look is not None
            look.done(index, number, own)
        tick("decoder layers, forwards", index + 1, len(model))
    return states, calls


def _loss_gradient(model: LayerwiseModel, hidden: Tensor, seed: int) -> Tensor:
    """Gradient, at the last layer's output, of the summed log-likelihood of labels drawn from the model."""
    generator = torch.Generator(model.device).manual_seed(seed)
    gradient = torch.empty_like(hidden)
    with model.embeddings_and_head():
        for window in range(len(hidden)):
            for start in range(0, hidden.shape[1], HEAD_TOKENS):
                part = hidden[window : window + 1, start : start + HEAD_TOKENS].to(model.device).requires_grad_()
                ids = torch.zeros(part.shape[:2], dtype=torch.int64)
                with torch.enable_grad():
                    logits = model.logits(part, ids, gradients=True)
                # The log-likelihood's gradient: 1 at the drawn label, less every label's probability.
                above = torch.softmax(logits.detach()[0].float(), -1)
                drawn = _draw(above, generator)
                above.neg_().scatter_add_(1, drawn, torch.ones_like(above[:, :1]))
                (below,) = torch.autograd.grad(logits, part, above[None].to(logits.dtype))
                gradient[window : window + 1, start : start + HEAD_TOKENS] = below
    return gradient


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """(tokens, 1) a label for each token: where the running sum of its (tokens, vocabulary) probabilities passes a uniform number.

    ``torch.multinomial`` draws a number for every word instead, which takes as long as the head.
    """
    sums = probabilities.cumsum(-1)
    uniform = torch.rand(len(sums), 1, device=sums.device, generator=generator)
    return torch.searchsorted(sums, uniform * sums[:, -1:])

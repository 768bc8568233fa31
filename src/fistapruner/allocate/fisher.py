"""Measure the Fisher sensitivity of predictions to output errors of operators and layers.

An error ``e_t`` in some output of the dense model at token ``t`` changes the predicted distributions by

    KL(dense || perturbed) = 1/2 sum_t E[(g_t . e_t)^2] + higher orders,

where ``g_t`` is the gradient of the log-likelihood of labels *drawn from the model itself* with respect to that
output: its second moment is the Fisher information. One forward and one backward pass over some calibration windows
measure it, one decoder layer in memory at a time (:mod:`fistapruner.passes.stream`). The second moment is stored
as

* ``E[g_i^2]`` of every output row ``i`` of each operator: with it, a layer problem's row errors become a prediction in
  nats (:mod:`.curves`);
* the matrix ``E[g g^T]`` of each decoder layer's output hidden states (if asked for): the metric of block
  reconstruction (:mod:`fistapruner.training.reconstruct`).

Gradient second moments as a metric for layer-wise errors go back to K-FAC (Martens & Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..core.linalg import exact_in_fast_products, fast_products
from ..core.sums import ProblemSums, add_gram, mirror
from ..errors import FistaPrunerError
from ..models.layers import LayerwiseModel
from ..models.operators import Layout
from ..passes.store import HiddenStates, Store
from ..passes.stream import Visit, Watched, backward, forward
from ..runtime.numerics import dtype_name
from ..runtime.show import Tick, silent

HEAD_TOKENS = 512
"""Tokens whose logits are computed at once."""

WIDE = 4096
"""Hidden size above which only diagonals of the decoder layers' matrices are stored, to save memory."""


Gather = Callable[[int, int, ProblemSums], None]
"""Receives (layer, group, sums of the group's inputs) after all windows."""


@dataclass
class Sensitivity:
    """Second moments of gradients, from one forward and one backward pass of the dense model.

    Args:
        rows: by full name, (m,) mean squared gradients of the output rows of each operator.
        outputs: (width, width) second moment of the gradient at each decoder layer's output, in order, or their
            (width,) diagonals where the model is wider than :data:`WIDE`. Empty where not measured.
    """

    rows: dict[str, Tensor]
    outputs: list[Tensor]

    def add(self, other: Sensitivity, weight: float) -> None:
        """Add a weight's share of what was measured on another text; ``other`` is used up."""
        if not self.rows:
            self.rows = {name: weight * rows for name, rows in other.rows.items()}
            self.outputs = [metric.mul_(weight) for metric in other.outputs]
        else:
            for name, rows in other.rows.items():
                self.rows[name] += weight * rows
            for mean, metric in zip(self.outputs, other.outputs, strict=True):
                mean.add_(metric, alpha=weight)


@dataclass(frozen=True)
class DensePasses:
    """How the dense model is passed; ``store`` makes the stores of hidden states between layers."""

    store: Store
    batch_size: int = 4
    tick: Tick = silent


def measure_sensitivity(
    model: LayerwiseModel,
    layout: Layout,
    tokens: Tensor,
    passes: DensePasses,
    *,
    seed: int = 0,
    gather: Gather | None = None,
    gradients: bool = True,
    outputs: bool = True,
) -> Sensitivity:
    """Run the dense model forwards, and backwards where ``gradients`` are asked for, over some windows.

    Args:
        tokens: (windows, seqlen) token ids. Hidden states between all layers are stored for them, ``(layers + 1) *
            windows * seqlen * width`` values.
        seed: of the drawn labels.
        gather: receives the sums of operator inputs from the forward pass.
        outputs: whether to measure the decoder layers' outputs too.
    """
    progress = partial(passes.tick, "decoder layers, forwards")
    visit = None if gather is None else gathering(layout, gather)
    states, calls = forward(
        model, tokens, passes.batch_size, passes.store, visit=visit, keep=gradients, progress=progress
    )
    last = states.pop()
    if not gradients:
        last.close()
        return Sensitivity({}, [])
    gradient = HiddenStates((last.samples, last.seqlen, last.width), last.dtype)
    loss_gradient(model, last, gradient, seed)
    last.close()
    rows: dict[str, Tensor] = {}
    metrics: list[Tensor] = []

    @contextmanager
    def measure(index: int, layer: nn.Module) -> Iterator[Callable[[Tensor], None]]:
        operators = layout.in_layer(index)
        sums = {operator.name: torch.zeros(operator.rows, device=model.device) for operator in operators}
        metric = _OutputMetric(model.width, model.device) if outputs else None

        def add(name: str, grad: Tensor) -> None:
            sums[name] += grad.reshape(-1, grad.shape[-1]).float().square().sum(0)

        def hook(name: str) -> Callable[..., None]:
            def after_forward(_: object, __: object, output: Tensor) -> None:
                output.register_hook(partial(add, name))

            return after_forward

        with ExitStack() as hooks:
            for name in sums:
                hooks.enter_context(layer.get_submodule(name).register_forward_hook(hook(name)))
            yield (lambda above: None) if metric is None else metric.add
        if metric is not None:
            metrics.append(metric.mean(tokens.numel()))
        rows.update(
            (layout.full_name(index, operator), sums[operator.name].cpu() / tokens.numel()) for operator in operators
        )

    backward(model, states, calls, gradient, measure, partial(passes.tick, "decoder layers, backwards"))
    for name, values in rows.items():  # from the last decoder layer to the first, as gradients come
        if not bool(values.isfinite().all()):
            raise FistaPrunerError(
                f"{name}: the gradients of the predictions are NaN or infinite in {dtype_name(model.dtype)} passes: "
                "take dtype float32, or allocation uniform and weighting none, which need none"
            )
    return Sensitivity(rows, metrics[::-1])


def row_importance(sensitivity: Tensor) -> Tensor:
    """Compute weights of mean 1 for an operator's rows from their (m,) mean squared gradients.

    The square root of the sensitivity, not the sensitivity itself: it is measured on few tokens, and where errors are
    spread unevenly, the second moment no longer describes their effect.
    """
    largest = float(sensitivity.max())
    if largest == 0.0:  # no row affects a prediction: all count alike
        return torch.ones_like(sensitivity)
    # Scale by a power of four, whose square root is exact: nothing underflows, and no bit of the result changes.
    sensitivity = (sensitivity.double() * 4.0 ** (-math.frexp(largest)[1] // 2)).float()
    floor = 1e-8 * sensitivity.mean()  # rows that affect no prediction keep a weight
    root = sensitivity.clamp_min(floor).sqrt()
    return root / root.mean()


def gathering(layout: Layout, gather: Gather) -> Visit:
    """Make the visitor of a forward pass that gathers sums of operator inputs."""

    @contextmanager
    def visit(index: int, layer: nn.Module) -> Iterator[Watched]:
        groups = list(enumerate(layout.layers[index]))
        sums = [ProblemSums(torch.cat([operator.weight(layer).float() for operator in group])) for _, group in groups]
        yield Watched(groups, lambda number, _, inputs: sums[number].add(inputs.reshape(-1, inputs.shape[-1])))
        for number, each in enumerate(sums):
            gather(index, number, each)

    return visit


class _OutputMetric:
    """Second moment of the gradient at a decoder layer's output; its diagonal above :data:`WIDE`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros((width, width) if width <= WIDE else (width,), device=device)

    def add(self, above: Tensor) -> None:
        """Add the gradients of a batch, (batch, seqlen, width)."""
        flat = above.reshape(-1, above.shape[-1]).float()
        if self._sum.ndim == 1:
            self._sum += flat.square().sum(0)
        else:
            with fast_products(exact_in_fast_products(above.dtype, above.device)):
                add_gram(self._sum, flat)

    def mean(self, tokens: int) -> Tensor:
        """Return the mean over tokens, on the CPU."""
        return (self._sum if self._sum.ndim == 1 else mirror(self._sum)).cpu() / tokens


def loss_gradient(model: LayerwiseModel, hidden: HiddenStates, gradient: HiddenStates, seed: int) -> None:
    """Write the gradient of drawn labels' summed log-likelihood with respect to the last layer's output.

    Args:
        model: the model; its final norm and head are loaded and freed here.
        hidden: output of the last decoder layer.
        gradient: receives the gradient, of the same shape.
        seed: of the labels, which are drawn from the model's predictions.
    """
    generator = torch.Generator().manual_seed(seed)
    with model.embeddings_and_head():
        for window in range(hidden.samples):
            states = hidden.read(window, window + 1, model.device)
            below = torch.empty_like(states)
            for start in range(0, hidden.seqlen, HEAD_TOKENS):
                tokens = slice(start, start + HEAD_TOKENS)
                part = states[:, tokens].requires_grad_()
                ids = torch.zeros(part.shape[:2], dtype=torch.int64, device=model.device)
                with torch.enable_grad():
                    logits = model.logits(part, ids, gradients=True)
                # Gradient of the log-likelihood: 1 at the drawn label, minus every label's probability.
                above = torch.softmax(logits.detach()[0].float(), -1)
                if not bool(above.sum(-1).isfinite().all()):  # a NaN reaches its token's sum
                    raise FistaPrunerError(
                        f"{model.checkpoint.folder}: the predictions are NaN or infinite in {dtype_name(model.dtype)} "
                        "passes: take dtype float32, or check the weights"
                    )
                drawn = draw_labels(above, generator)
                above.neg_().scatter_(1, drawn, 1 + above.gather(1, drawn))
                (below[:, tokens],) = torch.autograd.grad(logits, part, above[None].to(logits.dtype))
            gradient.write(window, below)


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (tokens, 1) labels from (tokens, vocabulary) probabilities by inverting the distribution.

    ``torch.multinomial`` draws a number for every vocabulary entry instead, which takes as long as the head.

    Args:
        probabilities: (tokens, vocabulary), on any device.
        generator: of the CPU, so that labels do not depend on the device but for rounding.
    """
    sums = probabilities.cumsum(-1)
    uniform = torch.rand(len(sums), 1, generator=generator).to(sums.device)
    return torch.searchsorted(sums, uniform * sums[:, -1:])

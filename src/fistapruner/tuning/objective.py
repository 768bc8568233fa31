"""Compute the training loss of windows, and its gradient, walking through the decoder layers.

A gradient takes three walks: forwards, keeping the hidden states between layers; through the head, in slices; and
backwards, where each layer runs again with gradients. So one layer's activations are in memory at a time, and as soon
as all windows have come back through a layer its gradient is complete: it is handed over and dropped.

Where memory holds the activations of all layers for one batch and the gradients of all layers, no layer needs to run
twice (``keep_graphs``), which saves a quarter of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..activations.check import check_model
from ..activations.gradients import Done, Take, backward, forward_backward
from ..activations.store import Store
from ..activations.stream import Calls, Values, Variants, forward, forward_variants
from ..calibration.training_text import TrainingText
from ..errors import FistaPrunerError
from ..models.layerwise import LayerwiseModel
from ..runtime.memory import release_memory
from ..runtime.numerics import BUDGETS, Budgets, ordered_attention, slices
from ..runtime.transfers import sent
from .losses import TokenLoss
from .teacher import Teacher

Above = Callable[[int, Tensor], Tensor]
"""Receives (first window of a batch, output of the last layer); returns the gradient with respect to it."""

Gradients = dict[str, Tensor]

Update = Callable[[int, nn.Module, Gradients], None]
"""Receives (index, loaded decoder layer, fp32 gradients summed over all windows)."""

Chain = Callable[[int, nn.Module, Mapping[str, Tensor]], Gradients]
"""Turns the gradients of a batch with respect to a loaded layer's values into those that are summed."""


class Objective:
    """The loss of windows of a text under a model with some of its tensors replaced.

    Args:
        model: the pruned model. Its embeddings, final norm and head are used as they are.
        text: the windows, and which of their tokens carry loss.
        loss: what is computed of each token.
        teacher: the dense model's predictions; needed where the loss has a divergence.
        batch_size: windows in one pass through a layer.
        store: makes the stores of hidden states between layers.
        keep_graphs: keep the activations of all layers for one batch, see
            :func:`~fistapruner.activations.gradients.forward_backward`; the bits of the result are the same.
        budgets: bytes of logits at once.

    Raises:
        FistaPrunerError: the architecture is not supported; the dense model has another vocabulary.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        text: TrainingText,
        loss: TokenLoss,
        teacher: Teacher | None,
        batch_size: int,
        store: Store,
        *,
        keep_graphs: bool = False,
        budgets: Budgets = BUDGETS,
    ) -> None:
        if loss.share > 0 and teacher is None:
            raise ValueError("a divergence needs the dense model")
        if teacher is not None and teacher.dense.vocabulary != model.vocabulary:
            raise FistaPrunerError(
                f"{model.checkpoint.folder} has {model.vocabulary} tokens and the dense model "
                f"{teacher.dense.checkpoint.folder} has {teacher.dense.vocabulary}: the loss kl compares predictions "
                "of the same tokens"
            )
        check_model(model)
        self.model, self.text, self.loss, self.store, self.budgets = model, text, loss, store, budgets
        self.teacher = teacher if loss.share > 0 else None
        self.keep_graphs, self.batch_size = keep_graphs, batch_size
        self._calls: dict[int, Calls] = {}  # by the tokens of a window

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Keep weights loaded for the block: the ends of both models, and the model's decoder layers."""
        with ExitStack() as loaded:
            loaded.enter_context(self.model.resident())
            if self.teacher is not None and self.teacher.ends is not None:
                loaded.enter_context(self.teacher.ends.resident(layers=False, like=self.model))
            yield

    def counts(self, numbers: Sequence[int]) -> Tensor:
        """Count the (windows,) numbers that each window's loss is a sum over: tokens that carry loss."""
        return self.text.counts[list(numbers)]

    def begin_step(self, number: int) -> None:
        """Say which step comes next, counted from 1, for the dense model's predictions of its windows."""
        if self.teacher is not None:
            self.teacher.step = number

    def losses(self, numbers: Sequence[int], variants: Variants) -> Tensor:
        """Compute the loss of windows under several variants of the model.

        Args:
            numbers: window numbers.
            variants: gives the tensors of each variant of a layer; a variant without tensors is the model itself.

        Returns:
            (variants, windows) fp64 sums over the tokens that carry loss (:meth:`counts`).
        """
        self._require(numbers)
        seqlen = self.seqlen(numbers)
        numbers = list(numbers)
        tokens, calls = self.text.tokens[numbers, :seqlen], self._calls_of(seqlen)
        states, _ = forward_variants(self.model, tokens, calls.batch_size, self.store, variants, calls=calls)
        sums = torch.zeros(len(states), len(numbers), dtype=torch.float64)
        with self._ends():
            for start, stop in calls.batches(len(numbers)):
                hidden = [state.read(start, stop, self.model.device) for state in states]
                sums[:, start:stop], _ = self._reduce(hidden, numbers[start:stop])
        for state in states:
            state.close()
        return sums

    def seqlen(self, numbers: Sequence[int]) -> int:
        """Return the tokens of each window that are passed."""
        return self.text.tokens.shape[1]

    def batch(self, seqlen: int) -> int:
        """Return the windows of so many tokens in one pass."""
        return self.batch_size

    def gradient(
        self,
        numbers: Sequence[int],
        values: Values,
        update: Update,
        chain: Chain = lambda index, layer, gradients: dict(gradients),
    ) -> float:
        """Compute the mean loss over all tokens of some windows that carry loss, and its gradient.

        Args:
            numbers: window numbers.
            values: gives a layer's tensors; called on the way forwards and again on the way back.
            update: receives the gradient with respect to them, from the last layer to the first.
            chain: turns the gradients of a pass into others, which are summed instead.

        Returns:
            The loss. Where it is not finite, there is no gradient and ``update`` is not called.
        """
        self._require(numbers)
        numbers = list(numbers)
        seqlen, count = self.seqlen(numbers), max(1, int(self.counts(numbers).sum()))
        # A power of two, which changes no bit where nothing underflows; in fp16 gradients of a mean would.
        scale = 2.0 ** math.ceil(math.log2(count)) if self.model.dtype == torch.float16 else 1.0
        sums = torch.zeros(1, len(numbers), dtype=torch.float64)
        totals: dict[int, Gradients] = {}

        def above(start: int, hidden: Tensor) -> Tensor:
            stop = start + len(hidden)
            sums[:, start:stop], gradient = self._reduce([hidden], numbers[start:stop], scale / count)
            assert gradient is not None
            return gradient

        def take(index: int, layer: nn.Module, gradients: Gradients) -> None:
            total = totals.setdefault(index, {})
            for name, gradient in chain(index, layer, gradients).items():
                # Not in place: autograd may give one tensor for two names.
                total[name] = total[name] + gradient if name in total else gradient.float()

        def done(index: int, layer: nn.Module) -> None:
            found = totals.pop(index)
            if math.isfinite(float(sums.sum())):
                update(index, layer, {name: each / scale for name, each in found.items()} if scale > 1 else found)

        walk = self._walk_once if self.keep_graphs else self._walk_twice
        walk(self.text.tokens[numbers, :seqlen], above, values, take, done)
        return float(sums.sum()) / count

    def _calls_of(self, seqlen: int) -> Calls:
        """Return how decoder layers are called for windows of so many tokens, as far as it is recorded."""
        return self._calls.setdefault(seqlen, Calls(self.batch(seqlen), {}))

    def _walk_once(self, tokens: Tensor, above: Above, values: Values, take: Take, done: Done) -> None:
        """Run every layer once and keep its graph."""
        with self._ends():
            forward_backward(self.model, tokens, self._calls_of(tokens.shape[1]), above, values, take, done)

    def _walk_twice(self, tokens: Tensor, above: Above, values: Values, take: Take, done: Done) -> None:
        """Run every layer forwards, and again on the way back."""
        with ordered_attention(self.model.device):  # as on the way back, so that the loss is that of the gradient
            calls = self._calls_of(tokens.shape[1])
            states, _ = forward(self.model, tokens, calls.batch_size, self.store, keep=True, values=values, calls=calls)
        last = states.pop()
        gradient = self.store("gradient", (last.samples, last.seqlen, last.width))
        with self._ends():
            for start, stop in calls.batches(len(tokens)):
                gradient.write(start, above(start, last.read(start, stop, self.model.device)))
        last.close()
        backward(self.model, states, calls, gradient, values=values, take=take, done=done)
        gradient.close()

    def _require(self, numbers: Sequence[int]) -> None:
        """Let the dense model's predictions of some windows be there."""
        if self.teacher is not None:
            self.teacher.require(numbers)

    def _where(self, numbers: Sequence[int]) -> Tensor:
        """(windows, seqlen) positions whose next token carries loss."""
        marks = self.text.marks[list(numbers)]
        return torch.cat([marks[:, 1:], torch.zeros_like(marks[:, :1])], 1)

    @contextmanager
    def _ends(self) -> Iterator[None]:
        """Load what predictions need: the ends of both models."""
        release_memory()  # what the layers have freed
        with ExitStack() as loaded:
            loaded.enter_context(self.model.embeddings_and_head())
            if self.teacher is not None and self.teacher.ends is not None:
                loaded.enter_context(self.teacher.ends.embeddings_and_head(like=self.model))
            yield

    def _reduce(
        self, hidden: Sequence[Tensor], numbers: list[int], factor: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Pass the last layer's output for one batch of windows through the head.

        Args:
            hidden: (windows, seqlen, width) output of each variant.
            numbers: the windows.
            factor: of the gradient; None computes none.

        Returns:
            (variants, windows) fp64 sums of the losses, and the gradient of the first variant's with respect to its
            hidden states.
        """
        return self._token_sums(hidden, numbers, self.loss, factor)

    def _token_sums(
        self, hidden: Sequence[Tensor], numbers: list[int], token_loss: TokenLoss, factor: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sum a loss over the tokens of each window that carry it; as :meth:`_reduce`."""
        where = self._where(numbers)
        device = self.model.device
        windows, positions = where.nonzero(as_tuple=True)
        targets = sent(self.text.tokens[numbers][windows, positions + 1], device)
        predictions = None
        if self.teacher is not None and token_loss.share > 0:
            predictions = self.teacher.predictions(numbers, where)
        place = sent(windows, device), sent(positions, device)
        rows = [each[place] for each in hidden]
        below = None if factor is None else torch.zeros_like(rows[0])
        losses: list[list[Tensor]] = [[] for _ in hidden]
        for start, stop in slices(len(targets), 4 * self.model.vocabulary, self._budget()):
            reference = None if predictions is None else predictions.rows(start, stop)
            for variant, each in enumerate(rows):
                part = each[start:stop].requires_grad_(factor is not None)
                logits = self.model.head(part, gradients=factor is not None)
                found, above = token_loss.tokens(logits, targets[start:stop], reference, factor, self.budgets)
                losses[variant].append(found.double())
                if below is not None:
                    (below[start:stop],) = torch.autograd.grad(logits, part, above)
        sums = torch.zeros(len(hidden), len(numbers), dtype=torch.float64)
        for variant, parts in enumerate(losses):
            if parts:
                sums[variant].index_add_(0, windows, torch.cat(parts).cpu())
        if below is None:
            return sums, None
        gradient = torch.zeros_like(hidden[0])
        gradient[place] = below
        return sums, gradient

    def _budget(self) -> int:
        """Bytes of fp32 logits of one model at once; no more rows than the model takes in one window."""
        return min(self.budgets.head // 2, 4 * self.model.vocabulary * self.model.max_head_rows)

"""Hidden states streamed layer by layer, forwards and backwards, against the whole model in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.passes.store import scratch_factory
from fistapruner.passes.stream import Watched, backward, forward

WINDOWS, SEQLEN = 5, 12
ARCHITECTURES = ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "falcon"]


TOKENS = tiny.tokens(WINDOWS, SEQLEN, seed=3)


def opened(folder: Path) -> LayerwiseModel:
    model = tiny.opened(folder)
    model.check()
    return model


def whole_model_inputs(folder: Path, layers: str) -> tuple[list[Tensor], Tensor]:
    """What enters every decoder layer of the whole model, differentiable, and what leaves the last one."""
    model = tiny.loaded(folder)
    prefix = (
        layers if any(name == layers for name, _ in model.named_modules()) else f"{model.base_model_prefix}.{layers}"
    )
    seen: list[Tensor] = []

    def leave(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    modules = list(model.get_submodule(prefix))  # type: ignore[arg-type]
    for module in modules:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    modules[-1].register_forward_hook(leave)
    model(input_ids=TOKENS, use_cache=False)
    return seen[:-1], seen[-1]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_of_the_whole_model(tmp_path: Path, architecture: str, on_disk: bool) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    model = opened(folder)
    store = scratch_factory(tmp_path if on_disk else None, model.dtype)
    states, _ = forward(model, TOKENS, 2, store, keep=True)
    entering, leaving = whole_model_inputs(folder, model.layers_name)
    assert len(states) == len(model) + 1
    for state, expected in zip(states, [*entering, leaving], strict=True):
        torch.testing.assert_close(state.read(0, WINDOWS), expected.detach())
        state.close()
    (last,), _ = forward(model, TOKENS, 2, store)
    torch.testing.assert_close(last.read(0, WINDOWS), leaving.detach())
    last.close()
    assert not list(tmp_path.glob("hidden-*"))
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save(architecture, tmp_path / "model")
    model = opened(folder)
    states, calls = forward(model, TOKENS, 2, scratch_factory(None, model.dtype), keep=True)
    gradient = states.pop()
    above = torch.randn(WINDOWS, SEQLEN, model.width, generator=torch.Generator().manual_seed(4))
    gradient.write(0, above)
    received: dict[int, list[Tensor]] = {}

    @contextmanager
    def visit(index: int, _: nn.Module) -> Iterator[Callable[[Tensor], None]]:
        yield received.setdefault(index, []).append

    done: list[tuple[int, int]] = []
    backward(model, states, calls, gradient, visit, lambda *step: done.append(step))
    entering, leaving = whole_model_inputs(folder, model.layers_name)
    expected = torch.autograd.grad(leaving, entering, above)
    torch.testing.assert_close(gradient.read(0, WINDOWS), expected[0])
    for index, below in enumerate([*expected[1:], above]):
        torch.testing.assert_close(torch.cat(received[index]), below)
    assert not states
    assert done == [(index + 1, len(model)) for index in range(len(model))]


def test_operators_are_watched_in_every_layer(tmp_path: Path) -> None:
    model = opened(tiny.save("llama", tmp_path / "model"))
    layout = discover(model)
    seen: list[tuple[int, int, int, tuple[int, ...]]] = []
    left: list[int] = []

    @contextmanager
    def visit(index: int, layer: nn.Module) -> Iterator[Watched]:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        groups = list(enumerate(layout.layers[index]))
        yield Watched(groups, lambda number, start, inputs: seen.append((index, number, start, tuple(inputs.shape))))
        assert all(parameter.is_meta for parameter in layer.parameters())
        left.append(index)

    forward(model, TOKENS, 2, scratch_factory(None, model.dtype), visit=visit)
    assert left == list(range(len(model)))
    assert seen == [
        (index, number, start, (min(2, WINDOWS - start), SEQLEN, group[0].columns))
        for index in range(len(model))
        for start in (0, 2, 4)
        for number, group in enumerate(layout.layers[index])
    ]

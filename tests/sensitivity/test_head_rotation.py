"""Rotations of the channels of attention heads: against explicit matrices, and whole models."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from fistapruner.sensitivity import decision
from fistapruner.sensitivity import head_rotation as searching
from fistapruner.sensitivity.channel_order import channel_order, kept_share
from fistapruner.sensitivity.head_rotation import head_rotation, rotated_energy
from fistapruner.sensitivity.permutation import Permutations, reordered_rows
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.core import NM, Constraint, Unstructured
from fistapruner.evaluation.inspection import inspect_checkpoint
from fistapruner.models.coupling import Link, _watch
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import ROTATED, Checkpoint, reorder
from fistapruner.models.layerwise import LayerwiseModel
from fistapruner.models.layout import Operator
from fistapruner.runs.prune_directory import PruneDirectory

SMALL = {"samples": 4, "seqlen": 16, "source": "python"}


def rotations(blocks: int, channels: int) -> Tensor:
    return torch.linalg.qr(torch.randn(blocks, channels, channels)).Q


def whole(rotation: Tensor, repeats: int) -> Tensor:
    """Return the matrix that rotates all channels, each block ``repeats`` times in a row."""
    return torch.block_diag(*rotation.repeat_interleave(repeats, 0)).double()


def reads(columns: int) -> Operator:
    return Operator.of("o_proj", nn.Linear(columns, 24, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_rotated_tensor_is_its_product_with_one_matrix(repeats: int, dtype: torch.dtype) -> None:
    rotation, columns = rotations(2, 4), 8 * repeats
    matrix = whole(rotation, repeats)
    weight = torch.randn(ROTATED + 5, columns).to(dtype)
    assert torch.equal(reorder(weight, 1, rotation), (weight.double() @ matrix).to(dtype))
    assert torch.equal(reorder(weight.T.contiguous(), 0, rotation), (matrix.T @ weight.T.double()).to(dtype))
    assert torch.equal(reorder(weight[0], 0, rotation), (weight[0].double() @ matrix).to(dtype))
    many = rotations(2 * ROTATED // 4, 4)
    bias = torch.randn(2 * ROTATED * repeats).to(dtype)
    blocks = bias.double().view(len(many), repeats, 4) @ many.double()
    assert torch.equal(reorder(bias, 0, many), blocks.flatten().to(dtype))


def test_the_energy_of_rotated_inputs() -> None:
    link, inputs = Link(("v_proj",), reads(24), 2, 3, rotates=True), torch.randn(50, 24)
    rotation = rotations(2, 4)
    energy = rotated_energy(link, inputs.T @ inputs, rotation)
    torch.testing.assert_close(energy, (inputs.double() @ whole(rotation, 3)).square().sum(0).float())


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_pattern_keeps_more_of_rotated_channels_than_of_reordered_ones(repeats: int) -> None:
    """Inputs of a head are correlated, as those of attention are."""
    pattern, blocks, channels = NM(2, 4), 2, 8
    link = Link(("v_proj",), reads(blocks * repeats * channels), blocks, repeats, rotates=True)
    for seed in range(5):
        torch.manual_seed(seed)
        mixing = torch.randn(channels, channels) * torch.logspace(0, -1, channels)
        inputs = (torch.randn(400, blocks * repeats, channels) @ mixing.T).flatten(1)
        reader, gram = torch.randn(24, inputs.shape[1]), inputs.T @ inputs
        writer, energy = torch.randn(blocks * channels, 32), torch.rand(32)
        rotation = head_rotation(link, reader, gram, pattern, writer, energy)
        exact = rotation.double()
        torch.testing.assert_close(
            exact.mT @ exact, torch.eye(channels).double().expand(blocks, -1, -1), atol=1e-6, rtol=0
        )
        assert torch.equal(rotation, head_rotation(link, reader, gram, pattern, writer, energy))
        scores = reader.square() * gram.diagonal()
        order = torch.stack([channel_order(block, pattern) for block in link.by_block(scores)])
        reordered = kept_share(scores[:, link.places(order)[1]], pattern)
        after = reorder(reader, 1, rotation).square() * rotated_energy(link, gram, rotation)
        assert kept_share(after, pattern) > max(reordered, kept_share(scores, pattern))
        made = reorder(writer, 0, rotation).square() * energy
        assert kept_share(made, pattern) > kept_share(writer.square() * energy, pattern)
    energy[16:] = 0.0  # what no input reaches decides nothing
    moved = torch.cat([writer[:, :16], 10 * torch.randn(blocks * channels, 16)], 1)
    rotation, same = (head_rotation(link, reader, gram, pattern, each, energy) for each in (writer, moved))
    assert torch.equal(rotation, same)
    dead = head_rotation(link, reader, torch.zeros_like(gram), pattern, writer, energy)
    torch.testing.assert_close(dead.mT @ dead, torch.eye(channels).expand(blocks, -1, -1))


@pytest.mark.parametrize(("steps", "turned"), [(1, 1.0), (4, 1.0 + 0.75 + 0.5 + 0.25)])
def test_steps_of_the_search_turn_by_a_rate_that_falls(
    steps: int, turned: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first few steps go one way, so that their angles add up."""
    monkeypatch.setattr(searching, "STEPS", steps)
    torch.manual_seed(0)
    inputs = torch.randn(400, 16)
    link = Link(("v_proj",), reads(16), 2, 1, rotates=True)
    rotation = head_rotation(
        link, torch.randn(24, 16), inputs.T @ inputs, NM(2, 4), torch.randn(16, 32), torch.rand(32)
    )
    for block in rotation:
        order = block.abs().argmax(0)  # the channels are put in order afterwards
        angle = (block[:, order.argsort()] - torch.eye(8)).square().mean().sqrt()
        assert float(angle) == pytest.approx(searching.RATE * turned, rel=0.02 if steps == 1 else 0.1)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_first_step_goes_down_the_slope_of_the_lost_shares(repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences of the logarithms of both shares, of whole matrices in fp64."""
    monkeypatch.setattr(searching, "STEPS", 1)
    torch.manual_seed(0)
    pattern, blocks, channels = NM(2, 4), 2, 4
    columns = blocks * repeats * channels
    inputs = torch.randn(60, columns) @ torch.randn(columns, columns)
    reader, gram, writer, energy = torch.randn(6, columns), inputs.T @ inputs, torch.randn(8, 12), torch.rand(12)
    link = Link(("v_proj",), reads(columns), blocks, repeats, rotates=True)

    def lost(rotation: Tensor) -> float:
        wide, narrow = whole(rotation, repeats), whole(rotation, 1)
        read = (reader.double() @ wide).square() * (wide.T @ gram.double() @ wide).diagonal()
        made = (narrow.T @ writer.double()).square() * energy
        return sum(math.log(1 - kept_share(each, pattern)) for each in (read, made))

    slope = torch.zeros(blocks, channels, channels, dtype=torch.float64)
    for block, i, j in product(range(blocks), range(channels), range(channels)):
        angle = torch.zeros_like(slope)
        angle[block, i, j], angle[block, j, i] = (1e-5, -1e-5) if i != j else (0, 0)
        slope[block, i, j] = lost(torch.linalg.matrix_exp(angle)) - lost(torch.linalg.matrix_exp(-angle))
    size = slope.square().mean((1, 2), keepdim=True).sqrt()
    rotation = head_rotation(link, reader, gram, pattern, writer, energy)
    expected = torch.linalg.matrix_exp(-searching.RATE * slope / size)
    torch.testing.assert_close(rotation.double(), expected, rtol=0, atol=1e-5)


def test_a_search_that_turns_nothing_gives_an_order_and_scales_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pattern, link = NM(2, 4), Link(("v_proj",), reads(32), 2, 2, rotates=True)
    inputs = torch.randn(60, 32)
    reader, gram, writer, energy = torch.randn(6, 32), inputs.T @ inputs, torch.randn(16, 12), torch.rand(12)
    monkeypatch.setattr(searching, "STEPS", 3)
    small = head_rotation(link, reader / 2**15, gram / 2**10, pattern, writer / 2**15, energy / 2**10)
    assert torch.equal(small, head_rotation(link, reader, gram, pattern, writer, energy))
    monkeypatch.setattr(searching, "RATE", 0.0)
    scores = link.by_block(reader.square() * gram.diagonal())
    orders = [channel_order(block, pattern) for block in scores]
    assert all(order.tolist() != list(range(8)) for order in orders)
    expected = torch.stack([torch.eye(8)[:, order] for order in orders])
    torch.testing.assert_close(head_rotation(link, reader, gram, pattern, writer, energy), expected)


class Heads(nn.Module):
    """Two heads of four channels, each with a weight that depends on the input, as attention's do."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.v_proj, self.o_proj, self.gate, self.between = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), between

    def forward(self, hidden: Tensor) -> Tensor:
        values = self.between(self.v_proj(hidden).unflatten(-1, (2, 4)))
        return self.o_proj((values * self.gate(hidden).softmax(-1)[..., None]).flatten(-2))


@pytest.mark.parametrize(
    ("between", "rotates"),
    [
        (lambda values: values, True),
        (lambda values: values / values.square().mean(-1, keepdim=True).sqrt(), True),
        (torch.tanh, False),
        (lambda values: values.clamp(-8, 8), False),  # which no value of the short window reaches
    ],
    ids=["nothing", "norm", "tanh", "clipped"],
)
def test_what_a_nonlinearity_reads_is_not_rotated(between: Callable[[Tensor], Tensor], rotates: bool) -> None:
    layer, hidden = Heads(between), torch.randn(3, 16, 8)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        (link,) = _watch(layer, {4}, lambda values: functional_call(layer, values, (hidden,)))
    assert (link.producers, link.blocks, link.rotates) == (("v_proj",), 2, rotates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_weights_of_rotated_rows_are_those_of_independent_gradients() -> None:
    rotation, importance = rotations(2, 4), torch.rand(8)
    expected = (whole(rotation, 1).T.square() @ importance.double().square()).sqrt().float()
    torch.testing.assert_close(reordered_rows(importance, rotation), expected)
    order = torch.randperm(8)
    assert torch.equal(reordered_rows(importance, order), importance[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2"])
def test_a_run_rotates_what_belongs_together(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    """With all of the rotated weights put back, the pruned model answers as the dense one does."""
    folder = tiny.save(architecture, tmp_path / "model", dtype=dtype)
    consumer = "self_attn.out_proj" if architecture == "opt" else "self_attn.o_proj"
    settings = {"sparsity": "2:4", "method": "magnitude", "permutation": "channels", "calibration": SMALL}
    report = fp.prune(folder, tmp_path / "run", targets=[consumer, "v_proj"], **settings)
    assert len(report.permuted) == 3
    assert all(name.endswith(consumer) and after > before for name, (before, after) in report.permuted.items())
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, tmp_path / "run" / "model")
    )
    orders = PruneDirectory(tmp_path / "run").orders()
    assert len(orders) == 3 * (2 if architecture == "llama" else 3)  # with the bias of what makes the channels
    state, found = dense.state_dict(), pruned.state_dict()
    for stored, (dim, order) in orders.items():
        name = next(key for key in found if key.endswith(stored))
        rotated, kept = reorder(state[name].to(dtype), dim, order).float(), found[name] != 0
        assert torch.equal(found[name], rotated * kept)
        assert kept.all() == name.endswith("bias")
        found[name].copy_(rotated)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    difference = pruned(tokens).logits - dense(tokens).logits  # rotated weights are rounded once more
    assert difference.norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * dense(tokens).logits.norm()


def test_rows_that_keep_their_zeros_are_not_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their order changes, where another run pruned them, or where they get no zeros."""
    settings = {"sparsity": "2:4", "method": "magnitude", "permutation": "channels", "calibration": SMALL}
    folder = tiny.save("llama", tmp_path / "model")
    fp.prune(folder, tmp_path / "first", targets=["v_proj"], **settings)
    fp.prune(tmp_path / "first" / "model", tmp_path / "second", targets=["o_proj"], **settings)
    orders = PruneDirectory(tmp_path / "second").orders()
    assert len(orders) == 6
    assert all(order.ndim == 1 for _, order in orders.values())
    assert not inspect_checkpoint(tmp_path / "second" / "model").violations
    rule = {"self_attn.v_proj": "0%"}
    fp.prune(folder, tmp_path / "dense", targets=["v_proj", "o_proj"], allocation=rule, **settings)
    assert all(order.ndim == 1 for _, order in PruneDirectory(tmp_path / "dense").orders().values())


def test_channels_are_reordered_where_an_allocation_leaves_what_makes_them_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(curves: dict[str, Tensor], *_: object) -> dict[str, Constraint]:
        return {name: Unstructured(0.0) if "layers.1.self_attn.v_proj" in name else NM(2, 4) for name in curves}

    monkeypatch.setattr("fistapruner.sensitivity.decision.choose_patterns", chosen)
    settings = {"sparsity": "2:4", "method": "magnitude", "permutation": "channels", "calibration": SMALL}
    fp.prune(tiny.save("llama", tmp_path / "model"), tmp_path / "run", allocation="error", **settings)
    orders = PruneDirectory(tmp_path / "run").orders()
    heads = {name: order.ndim for name, (_, order) in orders.items() if "self_attn" in name}
    assert len(heads) == 6
    assert all(ndim == (1 if "layers.1." in name else 3) for name, ndim in heads.items())


def test_shares_are_those_of_squared_weights_times_mean_squared_inputs(tmp_path: Path) -> None:
    """Against whole matrices in fp64, and with weights and Grams whose memory is used again after each group."""
    model = LayerwiseModel(Checkpoint.open(tiny.save("llama", tmp_path / "model")), torch.device("cpu"))
    layout = discover(model)
    sparsity: dict[str, Constraint] = {name: NM(2, 4) for name, _ in layout.operators()}
    torch.manual_seed(0)
    measured = []
    for group in layout.layers[0]:
        inputs = torch.randn(100, group[0].columns) * torch.randn(group[0].columns).mul(1.5).exp()
        measured.append((torch.randn(sum(operator.rows for operator in group), group[0].columns), inputs.T @ inputs))
    found = []
    for again in (False, True):
        channels = Permutations(model, layout, sparsity, [])
        for number, (weight, gram) in enumerate(measured):
            given = weight.clone(), gram.clone()
            channels.add(0, number, *given)
            if again:
                for tensor in given:
                    tensor.zero_()
        channels.take({})
        found.append(channels)
    assert found[0].permuted == found[1].permuted
    assert all(torch.equal(order, found[1].orders[name][1]) for name, (_, order) in found[0].orders.items())
    layer = "model.layers.0."
    assert {*found[0].permuted} == {f"{layer}self_attn.o_proj", f"{layer}mlp.down_proj"}
    for name, makes in (("self_attn.o_proj", "self_attn.v_proj"), ("mlp.down_proj", "mlp.up_proj")):
        number = next(n for n, group in enumerate(layout.layers[0]) if group[0].name == name)
        weight, gram = (tensor.double() for tensor in measured[number])
        order = found[0].orders[f"{layer}{makes}.weight"][1]
        turn = whole(order, 2) if order.ndim == 3 else torch.eye(len(order)).double()[:, order]
        shares = []
        for w, h in ((weight, gram), (weight @ turn, turn.T @ gram @ turn)):
            scores = w.square() * h.diagonal()
            shares.append(float(scores.view(-1, 4).topk(2).values.sum() / scores.sum()))
        assert found[0].permuted[layer + name] == pytest.approx(shares, rel=1e-5)


def test_what_makes_channels_is_kept_until_they_are_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what reads them gets no n:m pattern, nothing is kept."""
    made = []
    monkeypatch.setattr(decision, "Permutations", lambda *arguments: made.append(Permutations(*arguments)) or made[-1])
    settings = {"sparsity": "2:4", "method": "magnitude", "permutation": "channels", "calibration": SMALL}
    folder = tiny.save("llama", tmp_path / "model")
    for number, rule in enumerate(({}, {"o_proj": "50%"}, {"o_proj": "1:4"})):
        fp.prune(folder, tmp_path / f"{number}", **({"allocation": rule} if rule else {}), **settings)
    assert len(made) == 3
    assert all(channels._written == {} for channels in made)

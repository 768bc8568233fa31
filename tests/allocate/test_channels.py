"""Orders of channels and rotations of heads: against brute force and whole matrices, and runs that use them."""

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.allocate import channels as searching
from fistapruner.allocate.channels import (
    Permutations,
    channel_order,
    head_rotation,
    kept_share,
    reordered_rows,
    rotated_energy,
)
from fistapruner.core import NM, Constraint
from fistapruner.measure.inspection import inspect_checkpoint
from fistapruner.models.checkpoint import reorder
from fistapruner.models.links import Link
from fistapruner.models.operators import Operator, discover
from fistapruner.runs.directory import PruneDirectory

SMALL = {"source": "python", "samples": 4, "seqlen": 16}
RUN = {"sparsity": "2:4", "method": "magnitude", "permutation": "channels", "calibration": SMALL}


def scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(columns, generator=generator).mul(1.5).exp()
    return torch.randn(rows, columns, generator=generator).square() * channels


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(3, 4)], ids=str)
def test_an_order_is_a_permutation_that_keeps_more(pattern: NM) -> None:
    values = scores(24, 64)
    order = channel_order(values, pattern)
    assert sorted(order.tolist()) == list(range(64))
    dealt_out_at_random = [kept_share(values[:, torch.randperm(64)], pattern) for _ in range(50)]
    assert kept_share(values[:, order], pattern) > max(dealt_out_at_random)
    assert torch.equal(order, channel_order(values, pattern))


def test_close_to_the_best_of_all_orders() -> None:
    """Of what the best of all orders gains over a random one, at least half on average; never more."""
    shares = []
    for seed in range(10):
        values = scores(5, 8, seed)
        halves = [(0, *rest) for rest in combinations(range(1, 8), 3)]  # what an order is but for that within groups
        orders = [[*half, *sorted(set(range(8)).difference(half))] for half in halves]
        everything = [kept_share(values[:, order], NM(2, 4)) for order in orders]
        best, mean = max(everything), sum(everything) / len(everything)
        found = kept_share(values[:, channel_order(values, NM(2, 4))], NM(2, 4))
        assert found <= best + 1e-9
        shares.append((found - mean) / (best - mean))
    assert sum(shares) / len(shares) >= 0.5, shares


def test_the_old_order_where_none_is_better() -> None:
    assert channel_order(torch.ones(4, 16), NM(2, 4)).tolist() == list(range(16))
    assert channel_order(scores(4, 4), NM(2, 4)).tolist() == list(range(4))
    assert channel_order(torch.zeros(4, 16), NM(2, 4)).tolist() == list(range(16))


def rotations(blocks: int, channels: int) -> Tensor:
    return torch.linalg.qr(torch.randn(blocks, channels, channels)).Q


def whole(rotation: Tensor, repeats: int) -> Tensor:
    """Return the matrix that rotates all channels, each block ``repeats`` times in a row."""
    return torch.block_diag(*rotation.repeat_interleave(repeats, 0)).double()


def reads(columns: int) -> Operator:
    return Operator.of("o_proj", nn.Linear(columns, 24, bias=False))


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_pattern_keeps_more_of_rotated_channels_than_of_reordered_ones(repeats: int) -> None:
    """Inputs of a head are correlated, as those of attention are."""
    pattern, blocks, channels = NM(2, 4), 2, 8
    link = Link(("v_proj",), reads(blocks * repeats * channels), blocks, repeats, rotates=True)
    torch.manual_seed(0)
    mixing = torch.randn(channels, channels) * torch.logspace(0, -1, channels)
    inputs = (torch.randn(400, blocks * repeats, channels) @ mixing.T).flatten(1)
    reader, gram = torch.randn(24, inputs.shape[1]), inputs.T @ inputs
    writer, energy = torch.randn(blocks * channels, 32), torch.rand(32)
    rotation = head_rotation(link, reader, gram, pattern, writer, energy)
    exact = rotation.double()
    torch.testing.assert_close(exact.mT @ exact, torch.eye(channels).double().expand(blocks, -1, -1), atol=1e-6, rtol=0)
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


def test_weights_of_rotated_rows_are_those_of_independent_gradients() -> None:
    rotation, importance = rotations(2, 4), torch.rand(8)
    expected = (whole(rotation, 1).T.square() @ importance.double().square()).sqrt().float()
    torch.testing.assert_close(reordered_rows(importance, rotation), expected)
    order = torch.randperm(8)
    assert torch.equal(reordered_rows(importance, order), importance[order])


def test_shares_are_those_of_squared_weights_times_mean_squared_inputs(tmp_path: Path) -> None:
    """Against whole matrices in fp64, and with weights and Grams whose memory is used again after each group."""
    model = tiny.opened(tiny.save("llama", tmp_path / "model"))
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


@pytest.mark.parametrize(
    ("architecture", "dtype", "consumer", "tensors"),
    [
        ("llama", torch.float32, "self_attn.o_proj", 2),
        ("opt", torch.bfloat16, "self_attn.out_proj", 3),  # with the bias of what makes the channels
        ("qwen2", torch.bfloat16, "self_attn.o_proj", 3),
        ("llama", torch.float32, "mlp.down_proj", 3),
        ("opt", torch.float32, "fc2", 3),
        ("gpt2", torch.float32, "mlp.c_proj", 3),
    ],
    ids=str,
)
def test_a_run_rotates_or_reorders_what_belongs_together(
    tmp_path: Path, architecture: str, dtype: torch.dtype, consumer: str, tensors: int
) -> None:
    """With all of the weights put back in their new order, the pruned model answers as the dense one does."""
    pruned_operators = (consumer, "v_proj") if "attn" in consumer else (consumer,)
    report = tiny.prune(tmp_path, architecture, {"dtype": dtype}, targets=pruned_operators, **RUN)
    assert len(report.permuted) == 3
    assert all(name.endswith(consumer) and after > before for name, (before, after) in report.permuted.items())
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tmp_path / "model", tmp_path / "run" / "model")
    )
    orders = PruneDirectory(tmp_path / "run").orders()
    assert len(orders) == 3 * tensors
    state, found = dense.state_dict(), pruned.state_dict()
    for stored, (dim, order) in orders.items():
        assert (order.ndim == 3) == ("attn" in consumer)  # heads are rotated
        name = next(key for key in found if key.endswith(stored))
        changed, kept = reorder(state[name].to(dtype), dim, order).float(), found[name] != 0
        assert torch.equal(found[name], changed * kept)
        assert kept.all() != name.removesuffix(".weight").endswith(pruned_operators)
        assert not torch.equal(changed, state[name])
        found[name].copy_(changed)
    tokens = tiny.tokens(2, 12)
    difference = pruned(tokens).logits - dense(tokens).logits  # rotated weights are rounded once more
    assert difference.norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * dense(tokens).logits.norm()


def test_rows_that_keep_their_zeros_are_not_rotated(tmp_path: Path) -> None:
    """Only their order changes, where another run pruned them, or where they get no zeros."""
    folder = tiny.save("llama", tmp_path / "model")
    fp.prune(folder, tmp_path / "first", targets=["v_proj"], **RUN)
    fp.prune(tmp_path / "first" / "model", tmp_path / "second", targets=["o_proj"], **RUN)
    orders = PruneDirectory(tmp_path / "second").orders()
    assert len(orders) == 6
    assert all(order.ndim == 1 for _, order in orders.values())
    assert not inspect_checkpoint(tmp_path / "second" / "model").violations
    rule = {"self_attn.v_proj": "0%"}
    fp.prune(folder, tmp_path / "dense", targets=["v_proj", "o_proj"], allocation=rule, **RUN)
    assert all(order.ndim == 1 for _, order in PruneDirectory(tmp_path / "dense").orders().values())


def test_the_default_method_reorders_for_groups_only(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    for number, (settings, reorders) in enumerate(
        [({}, True), ({"method": "wanda"}, False), ({"permutation": "none"}, False), ({"sparsity": "50%"}, False)]
    ):
        run = tmp_path / f"run-{number}"
        report = fp.prune(folder, run, **{"sparsity": "2:4", "calibration": tiny.SMALL, **settings})
        assert {name.rpartition(".")[2] for name in report.permuted} == ({"o_proj", "down_proj"} if reorders else set())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-0" / "model")
    assert all(NM(2, 4).satisfies(layer.mlp.down_proj.weight) for layer in model.model.layers)

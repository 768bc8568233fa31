"""Channel permutation: orders against brute force, links of every architecture, runs that use them."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
import transformers
from fistapruner.sensitivity.channel_order import (
    _assign,
    _gains,
    channel_order,
    kept_share,
    sample_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.core import NM, Constraint, Unstructured
from fistapruner.models.coupling import find_links, reordered
from fistapruner.models.discovery import discover
from fistapruner.models.files.checkpoint import Checkpoint, reorder
from fistapruner.models.layerwise import LayerwiseModel

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
MLP = {
    "opt": (("fc1",), "fc2"),
    "phi": (("mlp.fc1",), "mlp.fc2"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    **dict.fromkeys(["gpt_neox", "falcon", "bloom"], (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
    "phi3": None,  # gate and up are one operator with twice the rows
}
HEADS = {
    "opt": (("self_attn.v_proj",), "self_attn.out_proj"),
    "phi": (("self_attn.v_proj",), "self_attn.dense"),
    **dict.fromkeys(["gpt2", "gpt_neox", "falcon", "bloom", "phi3"]),  # query, key and value are one operator
}


def scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(columns, generator=generator).mul(1.5).exp()
    return torch.randn(rows, columns, generator=generator).square() * channels


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4)], ids=str)
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


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4)], ids=str)
def test_every_exchange_is_the_best_of_all_exchanges(pattern: NM) -> None:
    for seed in range(4):
        values, members = scores(6, 16, seed), torch.arange(16).view(4, 4)
        for place in range(4):
            kept = {}
            for exchange in permutations(range(4)):
                groups = members.clone()
                groups[:, place] = members[list(exchange), place]
                kept[exchange] = kept_share(values[:, groups.reshape(-1)], pattern)
            found = _assign(_gains(values, members, place, pattern))
            assert kept[tuple(found.tolist())] == pytest.approx(max(kept.values()))


def test_an_order_that_is_better_for_the_sampled_rows_only_is_not_taken() -> None:
    kept = []
    for seed in range(20):
        values = scores(24, 16, seed)
        values = values[:, channel_order(values, NM(2, 4))]
        shares = [kept_share(each, NM(2, 4)) for each in (values, values[:, channel_order(values, NM(2, 4), rows=1)])]
        assert shares[1] >= shares[0]
        kept.append(shares[1] == shares[0])
    assert any(kept)


def test_chunks_of_groups_and_samples_of_rows_are_orders_too() -> None:
    values = scores(40, 96)
    order = channel_order(values, NM(2, 4), rows=13, groups=5)
    assert sorted(order.tolist()) == list(range(96))
    assert kept_share(values[:, order], NM(2, 4)) > kept_share(values, NM(2, 4))


def test_every_chunk_of_groups_has_channels_of_every_rank() -> None:
    """Two rows of 64 channels each, of which the first half of the channels of a rank is one's, the rest the other's.

    Groups with two channels of either lose nothing; groups that exchange among those of one row lose half.
    """
    channel = torch.arange(64)
    values = torch.zeros(2, 64)
    values[(channel % 16 >= 8).long(), channel] = torch.linspace(2, 1, 64)
    order = channel_order(values, NM(2, 4), groups=8)
    assert kept_share(values[:, order], NM(2, 4)) == pytest.approx(1)


def test_a_sample_of_rows_has_every_head_of_a_group() -> None:
    """Rows of the query heads that share a value channel take turns; an order for one of them is not one for all."""
    heads = [scores(64, 48, seed=seed) for seed in range(4)]
    values = torch.stack(heads, 1).flatten(0, 1)
    order = channel_order(values, NM(2, 4), rows=64)
    whole, first = (channel_order(each, NM(2, 4)) for each in (values, heads[0]))
    kept = [kept_share(values[:, each], NM(2, 4)) for each in (first, order, whole)]
    assert kept[0] < kept[1] <= kept[2] + 0.01


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 400))
def test_a_sample_has_no_more_rows_than_asked(rows: int, heads: int, asked: int) -> None:
    """And of rows that take turns, as many of each as fit; all of them where they are not more than asked."""
    found = sample_rows(torch.arange(rows * heads)[:, None], asked).flatten().tolist()
    assert 1 <= len(found) <= asked
    assert found == sorted(set(found))
    assert len({row % heads for row in found}) == min(heads, len(found))
    if rows * heads <= asked:
        assert len(found) == rows * heads


def test_the_old_order_where_none_is_better() -> None:
    assert channel_order(torch.ones(4, 16), NM(2, 4)).tolist() == list(range(16))
    assert channel_order(scores(4, 4), NM(2, 4)).tolist() == list(range(4))
    assert channel_order(torch.zeros(4, 16), NM(2, 4)).tolist() == list(range(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_links_are_found_and_reordering_changes_nothing(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=dtype)
    skeleton = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    links = find_links(skeleton, discover(skeleton))
    heads = HEADS.get(architecture, (("self_attn.v_proj",), "self_attn.o_proj"))
    mlp = MLP.get(architecture, (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"))
    for found in links:
        assert {(link.producers, link.consumer.name) for link in found} == {heads, mlp} - {None}
        assert all(
            (link.blocks > 1) == link.rotates == ((link.producers, link.consumer.name) == heads) for link in found
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    before = model(tokens).logits
    state = model.state_dict()
    prefix = "" if any(name in state for name in skeleton.checkpoint.names()) else model.base_model_prefix + "."
    for index, found in enumerate(links):
        for link in found:
            order = torch.stack([torch.randperm(link.channels) for _ in range(link.blocks)])
            turn = torch.linalg.qr(torch.randn(link.blocks, link.channels, link.channels)).Q
            for way in (order, turn) if link.rotates else (order,):
                for name, change in reordered(skeleton, index, link, way).items():
                    state[prefix + name].copy_(reorder(state[prefix + name], *change))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "operator"), [("doge", "v_proj"), ("deepseek_v3", "q_a_proj")])
def test_channels_that_something_else_reads_in_order_are_not_linked(
    tmp_path: Path, architecture: str, operator: str
) -> None:
    """Doge makes its attention mask from the values; DeepSeek has a norm with weights near one between operators."""
    folder = tmp_path / "model"
    if architecture == "doge":
        config = transformers.DogeConfig(**tiny.SIZES, **tiny.GQA)
        torch.manual_seed(0)
        tiny.spread(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    else:
        tiny.save(architecture, folder)
    skeleton = LayerwiseModel(Checkpoint.open(folder), torch.device("cpu"))
    links = find_links(skeleton, discover(skeleton))
    assert all(links)
    assert not any(name.endswith(operator) for found in links for link in found for name in link.producers)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    before = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    tensors = load_file(folder / "model.safetensors")
    for index, found in enumerate(links):
        for link in found:
            order = torch.stack([torch.randperm(link.channels) for _ in range(link.blocks)])
            for name, change in reordered(skeleton, index, link, order).items():
                tensors[name] = reorder(tensors[name], *change)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    after = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_layers_that_differ_in_an_attribute_only_are_tried_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes of layers with and without a sliding window are the same; those that differ in their number are one."""
    tried: list[int] = []
    run = LayerwiseModel.run
    monkeypatch.setattr(
        LayerwiseModel, "run", lambda self, index, *rest: [tried.append(index), run(self, index, *rest)][1]
    )
    for architecture, expected in (("llama", {0}), ("gemma2", {0, 1})):
        skeleton = LayerwiseModel(
            Checkpoint.open(tiny.save(architecture, tmp_path / architecture)), torch.device("cpu")
        )
        layout = discover(skeleton)
        tried.clear()
        find_links(skeleton, layout)
        assert set(tried) == expected


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_run_reorders_everything_that_belongs_together(tmp_path: Path, architecture: str) -> None:
    """With the weights that pruning removed put back, the model must answer as the dense one does."""
    folder = tiny.save(architecture, tmp_path / "model")
    _, consumer = MLP.get(architecture) or ((), "mlp.down_proj")
    settings = {
        "sparsity": "2:4",
        "method": "magnitude",
        "permutation": "channels",
        "targets": [consumer],
        "calibration": SMALL,
    }
    report = fp.prune(str(folder), tmp_path / "run", **settings)
    assert len(report.permuted) == 3
    assert all(after > before for before, after in report.permuted.values())
    source = AutoModelForCausalLM.from_pretrained(folder).eval()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    changed = [
        name for name, tensor in source.state_dict().items() if not torch.equal(tensor, pruned.state_dict()[name])
    ]
    assert any("bias" in name for name in changed) == (architecture != "llama")
    for name, module in source.named_modules():
        if name.endswith("." + consumer):
            put_back(module, pruned.get_submodule(name))
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    torch.testing.assert_close(pruned(tokens).logits, source(tokens).logits, rtol=1e-4, atol=1e-4)


def put_back(dense: torch.nn.Module, pruned: torch.nn.Module) -> None:
    """Give a pruned operator its dense weights in its own order of columns, which the weights that are left tell."""
    transposed = type(dense).__name__ == "Conv1D"
    before, after = (module.weight.data.T if transposed else module.weight.data for module in (dense, pruned))
    kept = after != 0
    differences = [((after[:, [new]] - before).abs() * kept[:, [new]]).sum(0).argmin() for new in range(after.shape[1])]
    order = torch.stack(differences)
    assert sorted(order.tolist()) == list(range(after.shape[1]))
    assert torch.equal(after, before[:, order] * kept)
    after.copy_(before[:, order])


def test_the_default_method_reorders_for_groups_only(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    for number, (settings, reorders) in enumerate(
        [({}, True), ({"method": "wanda"}, False), ({"permutation": "none"}, False), ({"sparsity": "50%"}, False)]
    ):
        report = fp.prune(
            str(folder), tmp_path / f"run-{number}", **{"sparsity": "2:4", "calibration": SMALL, **settings}
        )
        assert {name.rpartition(".")[2] for name in report.permuted} == ({"o_proj", "down_proj"} if reorders else set())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-0" / "model")
    assert all(NM(2, 4).satisfies(layer.mlp.down_proj.weight) for layer in model.model.layers)


def test_figures_are_of_the_patterns_that_operators_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that allocation leaves dense keeps its order; one with another n:m pattern is scored for that one."""
    chosen: dict[str, Constraint] = {}

    def by_name(curves: dict[str, Tensor], *arguments: object) -> dict[str, Constraint]:
        chosen.update(dict.fromkeys(curves, NM(2, 4)))
        chosen.update({name: Unstructured(0.0) for name in curves if "layers.0.mlp.down_proj" in name})
        chosen.update({name: NM(3, 4) for name in curves if "layers.1.mlp.down_proj" in name})
        return chosen

    folder = tiny.save("llama", tmp_path / "model")
    settings = {"sparsity": "2:4", "method": "magnitude", "permutation": "channels", "calibration": SMALL}
    as_asked = fp.prune(str(folder), tmp_path / "asked", **settings).permuted
    monkeypatch.setattr("fistapruner.sensitivity.decision.choose_patterns", by_name)
    permuted = fp.prune(str(folder), tmp_path / "run", allocation="error", **settings).permuted
    dense, other = sorted(name for name in as_asked if name.endswith("down_proj"))[:2]
    assert set(permuted) == set(as_asked) - {dense}
    assert 1 > permuted[other][1] > permuted[other][0] > as_asked[other][1]  # three of four, not two
    assert permuted[other.replace("mlp.down", "self_attn.o")] == pytest.approx(
        as_asked[other.replace("mlp.down", "self_attn.o")]
    )
    source, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "run" / "model"))
    before, after = (model.get_submodule(dense).weight for model in (source, pruned))
    assert torch.equal(before, after)


def test_every_executor_reorders_alike(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    runs = []
    for executor in ("serial", "process"):
        execution = {"executor": executor, "workers": 2, "threads": 1} if executor == "process" else {"threads": 1}
        fp.prune(
            str(folder),
            tmp_path / executor,
            sparsity="2:4",
            propagate="dense",
            calibration=SMALL,
            reconstruct=2,
            execution=execution,
        )
        runs.append(tiny.weights(tmp_path / executor))
    assert runs[0] == runs[1]

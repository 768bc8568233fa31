"""Channel permutation: orders against brute force, links of every architecture, runs that use them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fistapruner as fp
import tiny
from fistapruner.allocation import permutation
from fistapruner.allocation.permutation import channel_order, kept_share
from fistapruner.models.channels import find_links, reordered
from fistapruner.models.checkpoint import Checkpoint
from fistapruner.models.layout import discover
from fistapruner.models.skeleton import Skeleton
from fistapruner.sparsity import NM, holds

SMALL = {"source": "python", "samples": 4, "seqlen": 32}
HIDDEN = {
    "opt": (("fc1",), "fc2"),
    "phi": (("mlp.fc1",), "mlp.fc2"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    **dict.fromkeys(["gpt_neox", "falcon", "bloom"], (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
    "phi3": None,  # gate and up are one operator with twice the rows
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
        everything = [kept_share(values[:, [0, *rest]], NM(2, 4)) for rest in permutations(range(1, 8))]
        best, mean = max(everything), sum(everything) / len(everything)
        found = kept_share(values[:, channel_order(values, NM(2, 4))], NM(2, 4))
        assert found <= best + 1e-9
        shares.append((found - mean) / (best - mean))
    assert sum(shares) / len(shares) >= 0.5, shares


def test_chunks_of_groups_and_samples_of_rows_are_orders_too(monkeypatch: pytest.MonkeyPatch) -> None:
    values = scores(40, 96)
    monkeypatch.setattr(permutation, "GROUPS", 5)
    monkeypatch.setattr(permutation, "ROWS", 13)
    order = channel_order(values, NM(2, 4))
    assert sorted(order.tolist()) == list(range(96))
    assert kept_share(values[:, order], NM(2, 4)) > kept_share(values, NM(2, 4))


def test_the_old_order_where_none_is_better() -> None:
    assert channel_order(torch.ones(4, 16), NM(2, 4)).tolist() == list(range(16))
    assert channel_order(scores(4, 4), NM(2, 4)).tolist() == list(range(4))
    assert channel_order(torch.zeros(4, 16), NM(2, 4)).tolist() == list(range(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_links_are_found_and_reordering_changes_nothing(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder = tiny.save(architecture, tmp_path / "model", dtype=dtype)
    skeleton = Skeleton(Checkpoint.open(folder), torch.device("cpu"))
    links = find_links(skeleton, discover(skeleton))
    expected = HIDDEN.get(architecture, (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"))
    for found in links:
        assert [(link.producers, link.consumer.name) for link in found] == ([] if expected is None else [expected])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    before = model(tokens).logits
    state = model.state_dict()
    prefix = "" if any(name in state for name in skeleton.checkpoint.names()) else model.base_model_prefix + "."
    for index, found in enumerate(links):
        for link in found:
            order = torch.randperm(link.consumer.columns)
            for name, (dim, places) in reordered(skeleton, index, link, order).items():
                state[prefix + name].copy_(state[prefix + name].index_select(dim, places))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_run_reorders_everything_that_belongs_together(tmp_path: Path, architecture: str) -> None:
    """With the weights that pruning removed put back, the model must answer as the dense one does."""
    folder = tiny.save(architecture, tmp_path / "model")
    consumer = HIDDEN.get(architecture, (("",), "mlp.down_proj"))
    assert consumer is not None
    report = fp.prune(
        str(folder), tmp_path / "half", sparsity="2:4", method="magnitude", permutation="channels", targets=[consumer[1]], calibration=SMALL
    )
    assert len(report.permuted) == 3
    assert all(after > before for before, after in report.permuted.values())
    source = AutoModelForCausalLM.from_pretrained(folder).eval()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "model").eval()
    changed = [name for name, tensor in source.state_dict().items() if not torch.equal(tensor, pruned.state_dict()[name])]
    assert any("bias" in name for name in changed) == (architecture != "llama")
    fill(source, pruned, consumer)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, 12))
    torch.testing.assert_close(pruned(tokens).logits, source(tokens).logits, rtol=1e-4, atol=1e-4)


def fill(source: torch.nn.Module, pruned: torch.nn.Module, link: tuple[tuple[str, ...], str]) -> None:
    """Dense weights of the consumer in the pruned model's order, which a producer's rows tell."""
    producers = link[0] if link[0] != ("",) else ("mlp.gate_proj",)
    for name, module in source.named_modules():
        if name.endswith("." + link[1]):
            other = pruned.get_submodule(name)
            producer = name.removesuffix(link[1]) + producers[0]
            transposed = type(module).__name__ == "Conv1D"
            rows, new = (m.get_submodule(producer).weight.detach() for m in (source, pruned))
            if transposed:
                rows, new = rows.T, new.T
            order = torch.cdist(new, rows).argmin(1)
            assert sorted(order.tolist()) == list(range(len(rows)))
            dense = module.weight.detach().index_select(0 if transposed else 1, order)
            assert torch.equal(other.weight, dense * (other.weight != 0))
            other.weight.data.copy_(dense)


def test_the_default_method_reorders_for_groups_only(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    for number, (settings, reorders) in enumerate(
        [({}, True), ({"method": "wanda"}, False), ({"permutation": "none"}, False), ({"sparsity": "50%"}, False)]
    ):
        report = fp.prune(str(folder), tmp_path / f"run-{number}", **{"sparsity": "2:4", "calibration": SMALL, **settings})
        assert bool(report.permuted) == reorders
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-0" / "model")
    assert all(holds(layer.mlp.down_proj.weight, NM(2, 4)) for layer in model.model.layers)


def test_every_executor_reorders_alike(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    runs = []
    for executor in ("serial", "process"):
        execution = {"executor": executor, "workers": 2, "threads": 1} if executor == "process" else {"threads": 1}
        fp.prune(str(folder), tmp_path / executor, sparsity="2:4", calibration=SMALL, match=2, execution=execution)
        runs.append((tmp_path / executor / "model" / "model.safetensors").read_bytes())
    assert runs[0] == runs[1]

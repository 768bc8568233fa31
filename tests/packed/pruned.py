"""Pruned checkpoints for the tests of this folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from fistapruner.core import parse_sparsity
from tiny import build, store

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))
"""Tokens that no model takes for those of images."""


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def prune_linears(model, sparsity: str) -> None:
    """Magnitude-prune the linear operators outside embeddings and head, in place."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data *= parse_sparsity(sparsity).project(module.weight.data.abs().float())
        elif type(module).__name__ == "Conv1D":
            module.weight.data *= parse_sparsity(sparsity).project(module.weight.data.abs().float().T).T
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:  # all experts of a mixture
                matrices = parameter.data.flatten(0, 1)
                matrices *= parse_sparsity(sparsity).project(matrices.abs().float())


def save_pruned(
    folder: Path,
    architecture: str = "llama",
    *,
    sparsity: str = "50%",
    dtype=torch.bfloat16,
    shard: str = "50GB",
    **changes,
) -> Path:
    """A tiny pruned model with its tokenizer; some of its zeros are negative."""
    model = build(architecture, **changes).to(dtype)
    prune_linears(model, sparsity)
    for parameter in model.parameters():
        parameter.data = torch.where((parameter == 0) & (torch.rand(parameter.shape) < 0.5), -0.0, parameter.data).to(
            dtype
        )
    return store(model, folder, max_shard_size=shard)


def pickle_weights(folder: Path) -> Path:
    """Turn the weight files of a folder into legacy ``.bin`` files."""
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text())
        places["weight_map"] = {name: f"pytorch_{Path(to).stem}.bin" for name, to in places["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(places))
        index.unlink()
    return folder

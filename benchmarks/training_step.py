"""How much longer is a step of ``recover`` than a bare loop of the same forward, backward and AdamW?

    python benchmarks/training_step.py PRUNED --out benchmarks/results/training_step.json

PRUNED is a pruned Hugging Face folder. The bare loop is transformers' own forward of one window of 512 random tokens
with cross-entropy, autograd and fused AdamW, bf16 under autocast: ``full`` on fp32 weights of all decoder layers,
``lora`` with the masked product ``W + 2 (B A) * (W != 0)`` of rank 16 in every linear operator, ``peft`` with peft's
own LoRA of rank 16, which has no mask. Both loops take steps in turn on one thread; ratios are those of the medians of
their CPU times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fistapruner as fp
from fistapruner.models.layers import LayerwiseModel
from fistapruner.models.operators import discover
from fistapruner.models.source import Permissions
from fistapruner.settings.train import RecoverRecipe
from fistapruner.text.training import TrainingText
from fistapruner.training.loss import Objective
from fistapruner.training.masked import Trained

SEQLEN, RANK, STEPS, WARM = 512, 16, 10, 2


class MaskedLinear(nn.Module):
    """A linear operator with a masked low-rank change."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.mask, n = linear.weight, (linear.weight != 0).to(linear.weight.dtype), linear.in_features
        self.a = nn.Parameter(torch.empty(RANK, n).uniform_(-(n**-0.5), n**-0.5))
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        change = self.b.to(self.mask.dtype) @ self.a.to(self.mask.dtype)
        return nn.functional.linear(x, self.weight + 2.0 * change * self.mask)


def bare_model(folder: Path, form: str) -> tuple[Any, list[nn.Parameter]]:
    """Load a model for the bare loop; return it and what is trained."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    if form == "full":
        trained = [each for name, each in model.float().named_parameters() if ".layers." in name]
        return model, [each.requires_grad_() for each in trained]
    if form == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    else:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in name:
                model.set_submodule(name, MaskedLinear(module))
    for name, each in model.named_parameters():
        if each.requires_grad or "norm" in name:
            each.requires_grad_().data = each.data.float()
    return model, [each for each in model.parameters() if each.requires_grad]


def measure(folder: Path, form: str, tokens: Tensor) -> dict[str, Any]:
    """Take steps of both loops in turn; return the medians of their CPU seconds, and the ratio."""
    marks, windows = torch.ones_like(tokens, dtype=torch.bool), len(tokens)
    none, first = torch.zeros(windows, dtype=torch.bool), torch.zeros(windows, dtype=torch.int64)
    text = TrainingText(tokens, marks, none, first, ("text",), {})
    model = LayerwiseModel(Permissions().find(folder).checkpoint(), torch.device("cpu"), torch.bfloat16)
    model.check()
    bare, parameters = bare_model(folder, form)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def bare_step(window: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = bare(input_ids=window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {"bare": [], "recover": []}
    with model.resident():
        recipe = RecoverRecipe.build({"parameters": "full" if form == "full" else "lora", "rank": RANK})
        trained = Trained(model, discover(model), recipe)
        objective = Objective(model, trained.run, text, 0.0, None, 1)
        for step in range(STEPS):
            number = step % windows
            begin = time.process_time()
            bare_step(tokens[number : number + 1])
            middle = time.process_time()
            objective.backward([number])
            trained.step(0.01)
            if step >= WARM:
                seconds["bare"].append(middle - begin)
                seconds["recover"].append(time.process_time() - middle)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {**found, "ratio": found["recover"] / found["bare"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokens = torch.randint(10, 40_000, (4, SEQLEN))
    rows = {form: measure(arguments.pruned, form, tokens) for form in ("full", "lora", "peft")}
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    result = {"what": (__doc__ or "").splitlines()[0], "cpu": cpu, "torch": torch.__version__, "rows": rows}
    text = json.dumps({**result, "fistapruner": fp.__version__, "steps": STEPS - WARM}, indent=1) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()

"""Does leaving out the zeros, or whole channels, make decoding faster, and prefill no slower?

    python benchmarks/decode.py model smollm2            # a real model, magnitude-pruned
    python benchmarks/decode.py model llama-1b           # Llama shapes of 1.1B parameters, random weights, layers alike
    python benchmarks/decode.py model smollm2 --smaller RUN/model --sparsity= --prompt 400  # fewer channels
    python benchmarks/decode.py operator --plot cost.png # one operator against size and density
    python benchmarks/decode.py prefill                  # many tokens

Everything that is compared runs in one process, in interleaved rounds; the ratios are of medians. The head and the
embeddings are dense in every variant. Dense int8 is torch's, in its two forms: weight-only (``_weight_int8pack_mm``)
and dynamic quantisation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fistapruner.core import parse_sparsity
from fistapruner.measure.speed import WARM_UP_TOKENS, prompts, time_generation
from fistapruner.models.source import resolve_model
from fistapruner.packed import kernel
from fistapruner.packed.format import pack_operator
from fistapruner.packed.linear import SparseLinear
from fistapruner.packed.load import use_kernels
from fistapruner.runtime.files import write_json_atomic

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
"""TinyLlama-1.1B's shapes."""


class WeightOnlyInt8(nn.Module):
    """torch's own int8 weights with bf16 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.detach().float().abs().amax(1) / 127
        self.weight = (linear.weight.detach().float() / scales[:, None]).round().to(torch.int8)
        self.scales = scales.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scales)
        return out.view(*x.shape[:-1], -1)


def prune(weight: Tensor, sparsity: str) -> Tensor:
    return weight * parse_sparsity(sparsity).project(weight.abs().float())


def dense_model(name: str) -> Any:
    """A dense bf16 model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name == "llama-1b":
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        first = model.model.layers[0]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".layers." in key and ".layers.0." not in key:
                    parameter.copy_(first.get_parameter(key.split(".layers.")[1].partition(".")[2]))
                elif parameter.ndim == 2:
                    parameter.normal_(0, 0.02, generator=generator)
                else:
                    parameter.fill_(1)
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.bfloat16).eval()


def derive(model: Any, change: Callable[[Any], nn.Module], alike: bool) -> Any:
    """The same model with the linear operators of its decoder layers changed; all other tensors are shared.

    ``alike`` says that all layers hold the same numbers: then only the first is worked on, and the others get copies.
    """
    shared = {id(item): item for item in [*model.parameters(), *model.buffers()]}
    shared |= {id(item): item for item in model.modules() if isinstance(item, SparseLinear)}
    other = copy.deepcopy(model, shared)
    done: dict[str, nn.Module] = {}
    for name, module in list(other.named_modules()):
        if isinstance(module, nn.Linear | SparseLinear) and ".layers." in name:
            within = name.split(".layers.")[1].partition(".")[2]
            if not alike or within not in done:
                done[within] = change(module)
                other.set_submodule(name, done[within])
            else:
                other.set_submodule(name, copy.deepcopy(done[within]))
    return other


def model_variants(
    name: str, sparsities: list[str], openvino: bool = False, smaller: str | None = None
) -> dict[str, Any]:
    base, alike = dense_model(name), name == "llama-1b"
    variants = {"dense bfloat16": base}
    if smaller:
        variants["smaller bfloat16"] = dense_model(smaller)
        variants["smaller float32"] = copy.deepcopy(variants["smaller bfloat16"]).float()
    for sparsity in sparsities:
        packed = derive(base, lambda linear, s=sparsity: SparseLinear(pack_operator(prune(linear.weight, s))), alike)
        variants[f"packed {sparsity}"] = packed
        variants[f"packed int8 {sparsity}"] = derive(
            packed, lambda layer: SparseLinear(pack_operator(layer.operator.to_dense(), int8=True)), alike
        )
        head = SparseLinear(pack_operator(base.lm_head.weight, int8=True, dense=True))
        variants[f"packed int8 {sparsity}"].set_submodule("lm_head", head)
    for label, model in variants.items():
        if label.startswith("packed"):
            use_kernels(model)  # as fistapruner.load does
    if openvino:
        from openvino_model import OpenVinoLlama

        variants |= {f"dense int{bits}, OpenVINO": OpenVinoLlama(base, bits=bits) for bits in (8, 4)}
        if smaller:
            variants["smaller int8, OpenVINO"] = OpenVinoLlama(variants["smaller bfloat16"], bits=8)
    variants["dense int8, weight-only"] = derive(base, WeightOnlyInt8, alike)
    single = copy.deepcopy(base).float()
    variants["dense float32"] = single
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        layers = {key for key, module in single.named_modules() if isinstance(module, nn.Linear) and ".layers." in key}
        try:
            dynamic = copy.deepcopy(single)
            from torch.ao.quantization import default_dynamic_qconfig

            variants["dense int8, dynamic"] = quantize_dynamic(dynamic, dict.fromkeys(layers, default_dynamic_qconfig))
        except (RuntimeError, NotImplementedError) as error:
            print(f"dynamic int8 is not available: {error}")
    return variants


def keep(results: Any, path: Path | None) -> None:
    """Write what is measured so far, where ``--json`` asks for it."""
    if path is not None:
        write_json_atomic(path, results)


def run_models(arguments: argparse.Namespace) -> None:
    sparsities = [sparsity for sparsity in arguments.sparsity.split(",") if sparsity]
    variants = model_variants(arguments.model, sparsities, arguments.openvino, arguments.smaller)
    ids = prompts(variants["dense bfloat16"], arguments.batch, arguments.prompt, 0)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    firsts: dict[str, list[float]] = {name: [] for name in variants}
    for model in variants.values():
        time_generation(model, ids, WARM_UP_TOKENS)
    for number in range(arguments.runs):
        for name, model in variants.items():
            run = time_generation(model, ids, arguments.tokens)
            rates[name].append(run.tokens_per_second)
            firsts[name].append(run.first_token)
        middle = {name: statistics.median(values) for name, values in rates.items()}
        dense = max(
            (name for name in middle if name.startswith("dense") and " int" not in name), key=middle.__getitem__
        )
        dense8 = max((name for name in middle if name.startswith("dense int8")), key=middle.__getitem__)
        line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
        print(f"round {number + 1} of {arguments.runs}, tokens/s: {line}", flush=True)
        keep(
            {
                "model": arguments.model,
                "rates": rates,
                "first_token": firsts,
                "fastest_dense": dense,
                "fastest_dense_int8": dense8,
            },
            arguments.json,
        )
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.prompt} prompt and {arguments.tokens} new tokens, "
        f"{arguments.runs} rounds"
    )
    print(f"{'':<26}{'tokens/s':>26}{'first token, ms':>18}{'x ' + dense:>20}{'x ' + dense8:>28}")
    for name, values in rates.items():
        spread = f"{middle[name]:.1f} ({min(values):.1f} - {max(values):.1f})"
        first = 1000 * statistics.median(firsts[name])
        print(
            f"{name:<26}{spread:>26}{first:>18.0f}"
            f"{middle[name] / middle[dense]:>20.2f}{middle[name] / middle[dense8]:>28.2f}"
        )


def rounds(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each call, in interleaved rounds for about ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def run_operators(arguments: argparse.Namespace) -> None:
    """One operator, a different copy at each call so that weights come from memory, against size and density."""
    results: list[dict[str, Any]] = []
    for rows, columns in ((576, 576), (1536, 576), (2048, 2048), (5632, 2048), (8192, 4096)):
        copies = max(2, min(64, int(2e8 / (rows * columns * 2))))
        weights = [torch.randn(rows, columns).bfloat16() for _ in range(copies)]
        wide = [weight.float() for weight in weights]
        x, turn = torch.randn(1, columns).bfloat16(), [0]

        def pick(choices: list[Any], turn: list[int] = turn) -> Any:
            turn[0] += 1
            return choices[turn[0] % len(choices)]

        for zeros in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
            layers = [
                SparseLinear(pack_operator(prune(weight, str(zeros)))) for weight in weights[: max(2, copies // 2)]
            ]
            int8 = [SparseLinear(pack_operator(layer.operator.to_dense(), int8=True)) for layer in layers]
            calls = {
                "bfloat16": lambda x=x, w=weights, p=pick: functional.linear(x, p(w)),
                "float32": lambda x=x, w=wide, p=pick: functional.linear(x.float(), p(w)),
                "packed": lambda x=x, w=layers, p=pick: p(w)(x),
                "packed int8": lambda x=x, w=int8, p=pick: p(w)(x),
            }
            with torch.inference_mode():
                found = rounds(calls, arguments.seconds)
            best = min(found["bfloat16"], found["float32"])
            results.append({"rows": rows, "columns": columns, "zeros": zeros, **found})
            ratios = f"packed x{best / found['packed']:.2f}, int8 x{best / found['packed int8']:.2f}"
            print(f"{rows}x{columns} {zeros:.0%} zeros: dense {1e6 * best:.0f} us, {ratios}", flush=True)
            keep(results, arguments.json)
    if arguments.plot:
        plot(results, arguments.plot)


def plot(results: list[dict[str, Any]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, name in zip(axes, ("packed", "packed int8"), strict=True):
        for shape in dict.fromkeys((item["rows"], item["columns"]) for item in results):
            mine = [item for item in results if (item["rows"], item["columns"]) == shape]
            ratios = [min(item["bfloat16"], item["float32"]) / item[name] for item in mine]
            axis.plot([100 * item["zeros"] for item in mine], ratios, marker="o", label=f"{shape[0]} x {shape[1]}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel("zeros, %")
        axis.set_title(f"{name}, one vector")
    axes[0].set_ylabel("times faster than the fastest dense product")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_prefill(arguments: argparse.Namespace) -> None:
    results: list[dict[str, Any]] = []
    for rows, columns in ((576, 576), (1536, 576), (2048, 2048), (5632, 2048), (2048, 5632)):
        weight = torch.randn(rows, columns).bfloat16()
        layer = SparseLinear(pack_operator(prune(weight, "50%")))
        for tokens in (2, 4, 8, 16, 32, 128, 512):
            x = torch.randn(tokens, columns).bfloat16()
            with torch.inference_mode():
                found = rounds(
                    {
                        "dense": lambda x=x, weight=weight: functional.linear(x, weight),
                        "packed": lambda x=x, layer=layer: layer(x),
                    },
                    arguments.seconds,
                )
            results.append({"rows": rows, "columns": columns, "tokens": tokens, **found})
            ratio = found["dense"] / found["packed"]
            print(
                f"{rows}x{columns}, {tokens} tokens: dense {1e6 * found['dense']:.0f} us, packed x{ratio:.2f}",
                flush=True,
            )
            keep(results, arguments.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["model", "operator", "prefill"])
    parser.add_argument("model", nargs="?", default="smollm2", help="llama-1b, smollm2 or a folder")
    parser.add_argument("--sparsity", default="50%,70%")
    parser.add_argument("--smaller", help="folder of the model with fewer channels, measured beside it")
    parser.add_argument(
        "--openvino",
        action="store_true",
        help="an OpenVINO engine with int8 and int4 weights beside them (pip install openvino)",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each operator and density")
    parser.add_argument("--plot", help="file for the plot of 'operator'")
    parser.add_argument("--json", type=Path, help="file for the raw times, written after each round or operator")
    arguments = parser.parse_args()
    if arguments.openvino and find_spec("openvino") is None:
        parser.error("--openvino: the package openvino is not installed: pip install openvino")
    print(
        f"{torch.get_num_threads()} threads, kernel {(*kernel.LEVELS, 'none')[kernel.best_level()]}, torch "
        f"{torch.__version__}"
    )
    {"model": run_models, "operator": run_operators, "prefill": run_prefill}[arguments.question](arguments)


if __name__ == "__main__":
    main()

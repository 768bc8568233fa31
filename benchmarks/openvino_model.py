"""A Llama model as an OpenVINO graph with int8 or int4 weights, for ``decode.py`` and ``beside_quantisation.py``; needs
``pip install openvino``.

Built operator by operator the way optimum-intel exports one: a stateful key-value cache that the CPU plug-in fuses with
attention. Weights are int8 constants with a scale for each output, or int4 ones with a scale and a zero point for each
group of inputs; embedding and head are int8 in both, which is that exporter's default. Everything else about the engine
is its own choice.

Run as a program, it times what the CPU plug-in's setting for zeros, ``CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE``, gains.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.op.util import VariableInfo
from torch import Tensor, nn

GROUP = 64
"""Inputs that share a scale in int4: 128, the exporter's default, does not divide SmolLM2's 576 inputs."""


@dataclass(frozen=True)
class Quantised:
    """A weight (outputs, inputs) as whole numbers.

    Args:
        levels: int8 (outputs, inputs), or unsigned 4-bit numbers (outputs, groups, GROUP).
        scales: (outputs, 1), or (outputs, groups, 1) in half precision.
        zeros: the level of zero, int4 only (outputs, groups, 1).
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> Quantised:
        """Round a weight to the nearest levels."""
        weight = weight.detach().float()
        if bits == 8:
            scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            return cls((weight / scales).round().to(torch.int8), scales)
        grouped = weight.unflatten(1, (-1, GROUP))
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        scales = ((high - low) / 15).clamp(min=1e-7).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        levels = (grouped / scales.float() + zeros).round().clamp(0, 15)
        return cls(levels.to(torch.uint8), scales, zeros.to(torch.uint8))

    def weight(self) -> Tensor:
        """Return the rounded weight (outputs, inputs) in fp32."""
        if self.zeros is None:
            return self.levels.float() * self.scales
        return ((self.levels.float() - self.zeros.float()) * self.scales.float()).flatten(1)

    def node(self) -> Any:
        """Return the constant of an OpenVINO graph."""
        if self.zeros is None:
            return ops.multiply(
                ops.convert(ops.constant(self.levels.numpy()), "f32"), ops.constant(self.scales.numpy())
            )
        whole = ops.subtract(ops.convert(_four_bits(self.levels), "f16"), ops.convert(_four_bits(self.zeros), "f16"))
        grouped = ops.multiply(whole, ops.constant(self.scales.numpy()))
        outputs, groups, size = self.levels.shape
        return ops.convert(ops.reshape(grouped, np.array([outputs, groups * size]), False), "f32")

    @property
    def bytes(self) -> int:
        """Bytes of the constants."""
        if self.zeros is None:
            return self.levels.nbytes + self.scales.nbytes
        return (self.levels.numel() + self.zeros.numel()) // 2 + self.scales.nbytes


def _four_bits(levels: Tensor) -> Any:
    """Pack numbers below 16 by two into a byte, the first in the low half."""
    pairs = levels.flatten().view(-1, 2)
    tensor = ov.Tensor(ov.Type.u4, list(levels.shape))  # owns its memory
    tensor.data[:] = (pairs[:, 0] | pairs[:, 1] << 4).numpy()
    return ov.op.Constant(tensor)


def quantise(model: Any, bits: int) -> int:
    """Replace all weights of a transformers Llama by those that the graph computes with; return the graph's bytes."""
    total = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                ends = parameter is model.lm_head.weight or parameter is model.model.embed_tokens.weight
                found = Quantised.of(parameter, 8 if ends else bits)
                parameter.copy_(found.weight())
                total += found.bytes
            else:
                total += 4 * parameter.numel()
    return total


class OpenVinoLlama(nn.Module):
    """Called as a transformers model is: ``input_ids`` and ``past_key_values`` in, ``logits`` of the last token out.

    Args:
        model: dense transformers Llama without biases.
        bits: of the weights of decoder layers, 8 or 4; embedding and head have 8.
    """

    def __init__(self, model: Any, *, bits: int = 8, threads: int | None = None) -> None:
        super().__init__()
        self.config = model.config
        self._bits = bits
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        settings["INFERENCE_NUM_THREADS"] = threads or torch.get_num_threads()
        graph = self._graph(model)
        self._request = ov.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def forward(
        self, input_ids: Tensor, past_key_values: int | None = None, use_cache: bool = True, logits_to_keep: int = 1
    ) -> Any:
        seen, length = past_key_values or 0, input_ids.shape[1]
        if not seen:
            self._request.reset_state()
        positions = np.arange(seen, seen + length)
        mask = np.where(positions[:, None] >= np.arange(seen + length)[None], 0.0, -1e9).astype(np.float32)
        feed = {
            "ids": input_ids.numpy(),
            "positions": positions[None],
            "mask": mask[None, None],
            "beam": np.zeros(1, np.int32),
        }
        out = self._request.infer(feed, share_inputs=True)[0]
        return SimpleNamespace(logits=torch.from_numpy(np.array(out)), past_key_values=seen + length)

    def _linear(self, x: Any, linear: nn.Linear) -> Any:
        return ops.matmul(x, Quantised.of(linear.weight, self._bits).node(), False, True)

    def _norm(self, x: Any, norm: Any) -> Any:
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), True)
        scaled = ops.multiply(x, ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(norm.variance_epsilon)))))
        return ops.multiply(scaled, ops.constant(norm.weight.detach().float().numpy().reshape(1, 1, -1)))

    def _graph(self, model: Any) -> Any:
        config, body = model.config, model.model
        heads, kept = config.num_attention_heads, config.num_key_value_heads
        size = body.layers[0].self_attn.head_dim
        ids = ops.parameter([1, -1], np.int64, name="ids")
        positions = ops.parameter([1, -1], np.int64, name="positions")
        mask = ops.parameter([1, 1, -1, -1], np.float32, name="mask")
        beam = ops.parameter([-1], np.int32, name="beam")
        for node in (ids, positions, mask, beam):
            node.output(0).set_names({node.get_friendly_name()})
        table = Quantised.of(body.embed_tokens.weight, 8).node()
        x = ops.gather(table, ids, np.int32(0))
        frequency = body.rotary_emb.inv_freq.float().numpy().reshape(1, -1, 1)
        angle = ops.transpose(
            ops.matmul(
                ops.constant(frequency), ops.convert(ops.unsqueeze(positions, np.int32(1)), "f32"), False, False
            ),
            np.array([0, 2, 1]),
        )
        angle = ops.unsqueeze(ops.concat([angle, angle], -1), np.int32(1))
        cosine, sine = ops.cos(angle), ops.sin(angle)
        assigned = []

        def split(y: Any, count: int) -> Any:
            return ops.transpose(ops.reshape(y, np.array([0, 0, count, size]), True), np.array([0, 2, 1, 3]))

        def rotate(y: Any) -> Any:
            first, second = ops.split(y, np.int64(-1), 2).outputs()
            turned = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
            return ops.add(ops.multiply(y, cosine), ops.multiply(turned, sine))

        def cached(y: Any, name: str) -> Any:
            info = VariableInfo()
            info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, kept, -1, size]), ov.Type.f32, name
            variable = ov.op.util.Variable(info)
            start = ops.broadcast(
                np.float32(0), ops.concat([ops.shape_of(beam, "i64"), ops.constant(np.array([kept, 0, size]))], 0)
            )
            past = ops.gather(ops.read_value(start, variable), beam, np.int32(0))
            whole = ops.concat([past, y], 2)
            assigned.append(ops.assign(whole, variable))
            if heads == kept:
                return whole
            wide = ops.unsqueeze(whole, np.int32(2))
            wide = ops.broadcast(
                wide, ops.constant(np.array([1, 1, heads // kept, 1, 1])), broadcast_spec="BIDIRECTIONAL"
            )
            return ops.reshape(wide, np.array([0, heads, -1, size]), True)

        for index, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            hidden = self._norm(x, layer.input_layernorm)
            query = rotate(split(self._linear(hidden, attention.q_proj), heads))
            key = cached(rotate(split(self._linear(hidden, attention.k_proj), kept)), f"key.{index}")
            value = cached(split(self._linear(hidden, attention.v_proj), kept), f"value.{index}")
            mixed = ops.scaled_dot_product_attention(query, key, value, mask)
            mixed = ops.reshape(ops.transpose(mixed, np.array([0, 2, 1, 3])), np.array([0, 0, heads * size]), True)
            x = ops.add(x, self._linear(mixed, attention.o_proj))
            hidden = self._norm(x, layer.post_attention_layernorm)
            gate = ops.swish(self._linear(hidden, mlp.gate_proj))
            x = ops.add(x, self._linear(ops.multiply(gate, self._linear(hidden, mlp.up_proj)), mlp.down_proj))
        last = ops.gather(self._norm(x, body.norm), ops.constant(np.array([-1])), np.int32(1))
        tied = model.lm_head.weight is body.embed_tokens.weight
        head = table if tied else Quantised.of(model.lm_head.weight, 8).node()
        logits = ops.matmul(last, head, False, True)
        return ov.Model([ops.result(logits)], assigned, [ids, positions, mask, beam])


def time_zeros(size: int = 4096, count: int = 12, rounds: int = 40) -> None:
    """Time one vector through square matrices with zeros, with and without the setting, in interleaved rounds."""
    x = np.random.default_rng(1).standard_normal((1, size)).astype(np.float32)
    for activations in ("fp32", "int8"):
        for zeros in (0.5, 0.8, 0.9):
            rng = np.random.default_rng(0)
            given = ops.parameter([-1, size], np.float32, name="x")
            y = given
            for _ in range(count):
                levels = rng.integers(1, 128, (size, size)) * (rng.random((size, size)) >= zeros)
                weight = Quantised(torch.from_numpy(levels.astype(np.int8)), torch.full((size, 1), 0.02 / size**0.5))
                if activations == "int8":
                    low, high = np.float32(-4), np.float32(4 * 127 / 128)
                    y = ops.fake_quantize(y, low, high, low, high, 256)
                y = ops.matmul(y, weight.node(), False, True)
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            sparse = {**settings, "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.4}
            graph = ov.Model([ops.result(y)], [given])
            requests = [
                ov.Core().compile_model(graph, "CPU", each).create_infer_request() for each in (settings, sparse)
            ]
            times: list[list[float]] = [[], []]
            for _ in range(rounds):
                for request, found in zip(requests, times, strict=True):
                    begin = time.perf_counter()
                    request.infer({"x": x})
                    found.append(time.perf_counter() - begin)
            plain, fast = (1000 * median(found[1:]) for found in times)
            ratio = plain / fast
            print(
                f"{zeros:.0%} zeros, {activations} activations: {plain:.1f} -> {fast:.1f} ms, {ratio:.2f} times as fast"
            )


if __name__ == "__main__":
    time_zeros()

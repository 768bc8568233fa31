"""A Llama model as an OpenVINO graph with int8 weights, for ``decode.py model ... --openvino``; needs ``pip install
openvino``.

Built operator by operator the way optimum-intel exports one: a stateful key-value cache that the CPU plug-in fuses with
attention, and weights as int8 constants with a scale for each output (``int8`` also for embedding and head, which is
that exporter's default). Everything else about the engine is its own choice.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.op.util import VariableInfo
from torch import Tensor, nn


def _levels(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    weight = weight.detach().float()
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scales).round().to(torch.int8).numpy(), scales.numpy()


class OpenVinoLlama(nn.Module):
    """Called as a transformers model is: ``input_ids`` and ``past_key_values`` in, ``logits`` of the last token out.

    Args:
        model: dense transformers Llama without biases.
        int8: weights as int8, else as bf16.
        head: whether embedding and head are int8 too.
    """

    def __init__(self, model: Any, *, int8: bool = True, head: bool = True, threads: int | None = None) -> None:
        super().__init__()
        self.config = model.config
        self._int8 = int8
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        settings["INFERENCE_NUM_THREADS"] = threads or torch.get_num_threads()
        graph = self._graph(model, head and int8)
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

    def _weight(self, weight: Tensor, int8: bool) -> Any:
        if int8:
            levels, scales = _levels(weight)
            return ops.multiply(ops.convert(ops.constant(levels), "f32"), ops.constant(scales))
        half = ov.op.Constant(
            ov.Tensor(weight.detach().bfloat16().view(torch.uint16).numpy().copy(), weight.shape, ov.Type.bf16)
        )
        return ops.convert(half, "f32")

    def _linear(self, x: Any, linear: nn.Linear) -> Any:
        return ops.matmul(x, self._weight(linear.weight, self._int8), False, True)

    def _norm(self, x: Any, norm: Any) -> Any:
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), True)
        scaled = ops.multiply(x, ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(norm.variance_epsilon)))))
        return ops.multiply(scaled, ops.constant(norm.weight.detach().float().numpy().reshape(1, 1, -1)))

    def _graph(self, model: Any, int8_ends: bool) -> Any:
        config, body = model.config, model.model
        heads, kept = config.num_attention_heads, config.num_key_value_heads
        size = body.layers[0].self_attn.head_dim
        ids = ops.parameter([1, -1], np.int64, name="ids")
        positions = ops.parameter([1, -1], np.int64, name="positions")
        mask = ops.parameter([1, 1, -1, -1], np.float32, name="mask")
        beam = ops.parameter([-1], np.int32, name="beam")
        for node in (ids, positions, mask, beam):
            node.output(0).set_names({node.get_friendly_name()})
        table = self._weight(body.embed_tokens.weight, int8_ends)
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
        head = (
            table if model.lm_head.weight is body.embed_tokens.weight else self._weight(model.lm_head.weight, int8_ends)
        )
        logits = ops.matmul(last, head, False, True)
        return ov.Model([ops.result(logits)], assigned, [ids, positions, mask, beam])

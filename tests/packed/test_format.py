"""Round trips of single operators through memory and through the format's tensors."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fistapruner import FistaPrunerError, parse_sparsity
from fistapruner.packed.format import OperatorSpec, PackedOperator, decode, encode, operator_fault, pack_operator

FAULT = operator_fault("test", "w")


def through_tensors(operator: PackedOperator) -> PackedOperator:
    tensors = encode("w", operator)
    spec = OperatorSpec(operator.shape, operator.dtype, operator.scales is not None, operator.mask is None)
    for entry in spec.entries("w", operator.stored):
        assert (tensors[entry.name].dtype, tuple(tensors[entry.name].shape)) == (entry.dtype, entry.shape)
    assert OperatorSpec.from_json(spec.to_json(), FAULT) == spec
    return decode("w", spec, tensors.__getitem__, FAULT)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 140),
    columns=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.98, 1.0]),
)
@example(seed=4812, rows=1, columns=1, density=0.5)  # a single NaN with a payload
def test_bf16_is_lossless(seed, rows, columns, density) -> None:
    torch.manual_seed(seed)
    # Any bit pattern: subnormals, infinities, NaNs with payloads, both zeros.
    bits = torch.randint(-(2**15), 2**15, (rows, columns)).short()
    zeros = torch.where(torch.rand(rows, columns) < 0.5, 0, -(2**15)).short()
    weight = torch.where(torch.rand(rows, columns) < density, bits, zeros).view(torch.bfloat16)
    weight[torch.rand(rows) < 0.1] = 0
    expected = torch.where(weight == 0, 0.0, weight)
    again = through_tensors(pack_operator(weight))
    assert torch.equal(again.to_dense().view(torch.int16), expected.view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    dense=st.booleans(),
)
def test_int8_is_within_half_a_step(seed, rows, columns, density, dtype, dense) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(rows, columns) * (torch.rand(rows, columns) < density)).to(dtype)
    operator = pack_operator(weight, int8=True, dense=dense)
    again = through_tensors(operator)
    assert torch.equal(again.to_dense(), operator.to_dense())
    assert torch.equal(again.sums, operator.sums)
    rounding = torch.finfo(dtype).eps * weight.float().abs()  # of the dense weight
    error = (operator.to_dense().float() - weight.float()).abs()
    assert bool((error <= 0.5001 * operator.scales[:, None] + rounding).all())


@pytest.mark.parametrize(("sparsity", "limit"), [("50%", 0.5625), ("2:4", 0.5625), ("70%", 0.3626)])
@pytest.mark.parametrize("columns", [576, 2048])
def test_sizes(sparsity, limit, columns) -> None:
    weight = torch.randn(1536, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight *= parse_sparsity(sparsity).project(weight.float().abs())
    assert sum(tensor.nbytes for tensor in encode("w", pack_operator(weight)).values()) <= limit * weight.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["w.mask"].bitwise_or_(128), "beyond its last column"),
        (lambda t: t["w.mask"][0].bitwise_xor_(1), "its mask asks for"),
        (lambda t: t.update({"w.values": t["w.values"][:-1]}), "its mask asks for"),
    ],
)
def test_contradictions_are_refused(change, message) -> None:
    operator = pack_operator((torch.eye(70, 71) + torch.ones(70, 71)).bfloat16())
    tensors = {name: tensor.clone() for name, tensor in encode("w", operator).items()}
    change(tensors)
    with pytest.raises(FistaPrunerError, match=message):
        decode("w", OperatorSpec(operator.shape, operator.dtype), tensors.__getitem__, FAULT)


def test_wrong_requests_are_refused() -> None:
    for weight, said in ((torch.zeros(3).bfloat16(), r"shape \[3\]"), (torch.ones(4, 8), "a float32 tensor")):
        with pytest.raises(FistaPrunerError, match=rf"{said}.* is not packed: expected is a bf16 matrix"):
            pack_operator(weight)
    with pytest.raises(FistaPrunerError, match="not finite"):
        pack_operator(torch.full((2, 2), float("inf")), int8=True)

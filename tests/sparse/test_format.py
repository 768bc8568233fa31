"""Round trips of single operators through memory and through the format's tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fistapruner import NM, FistaPrunerError, SparseLinear
from fistapruner.sparse.format import OperatorSpec, decode, encode, index_bits, operator_fault
from fistapruner.sparse.pack_plan import choose_layout
from fistapruner.sparse.packed import pack_operator

FAULT = operator_fault("test", "w")
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def through_tensors(operator):
    tensors, spec = encode("w", operator), OperatorSpec.of(operator)
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
    dtype=st.sampled_from(list(BITS)),
)
@example(seed=4812, rows=1, columns=1, density=0.5, dtype=torch.float16)  # a single NaN with a payload
def test_bit_mask_is_lossless(seed, rows, columns, density, dtype):
    torch.manual_seed(seed)
    # Any bit pattern: subnormals, infinities, NaNs with payloads, both zeros.
    width = 2**15 if dtype.itemsize == 2 else 2**31
    bits = torch.randint(-width, width, (rows, columns)).to(BITS[dtype])
    bits = torch.where(
        torch.rand(rows, columns) < density,
        bits,
        torch.where(torch.rand(rows, columns) < 0.5, 0, -width).to(BITS[dtype]),
    )
    bits[torch.rand(rows) < 0.1] = 0
    weight = bits.view(dtype)
    expected = torch.where(weight == 0, torch.zeros((), dtype=dtype), weight)
    again = through_tensors(pack_operator(weight))
    assert torch.equal(again.to_dense().view(BITS[dtype]), expected.view(BITS[dtype]))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 70),
    groups=st.integers(1, 20),
    nm=st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (8, 16), (1, 16), (5, 7)]),
    thinned=st.booleans(),
)
def test_n_of_m_is_lossless(seed, rows, groups, nm, thinned):
    torch.manual_seed(seed)
    pattern = NM(*nm)
    weight = torch.randn(rows, groups * pattern.m).bfloat16()
    weight *= pattern.project(weight.float().abs())
    if thinned:  # groups that keep fewer than n, down to none
        weight *= torch.rand_like(weight) < 0.4
    again = through_tensors(pack_operator(weight, pattern))
    assert again.pattern == pattern
    assert again.stored == rows * groups * pattern.n
    dense = again.to_dense()
    assert torch.equal(dense, weight)
    assert not bool((torch.signbit(dense) & (dense == 0)).any())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    group=st.sampled_from([0, 64, 128]),
)
def test_int8_is_within_half_a_step(seed, rows, columns, density, group):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
    operator = pack_operator(weight).quantised(group)
    again = through_tensors(operator)
    assert torch.equal(again.to_dense(), operator.to_dense())
    assert torch.equal(again.sums, operator.sums)
    step = operator.scales.repeat_interleave(group or columns, 1)[:, :columns]
    assert bool(((operator.to_dense() - weight).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize(("sparsity", "limit"), [("50%", 0.565), ("2:4", 0.57), ("70%", 0.37), ("4:8", 0.565)])
@pytest.mark.parametrize("columns", [576, 2048])
def test_sizes(sparsity, limit, columns):
    from fistapruner import parse_sparsity

    weight = torch.randn(1536, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight *= parse_sparsity(sparsity).project(weight.float().abs())
    operator = pack_operator(weight, choose_layout(weight))
    size = sum(tensor.nbytes for tensor in encode("w", operator).values())
    assert size <= limit * weight.nbytes


def test_layout_is_the_smallest():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    assert choose_layout(weight * NM(2, 4).project(weight.abs())) == NM(2, 4)
    for pattern in (NM(1, 2), NM(3, 4), NM(1, 8), NM(2, 8), NM(6, 8), NM(2, 16)):
        assert choose_layout(weight * pattern.project(weight.abs())) == pattern
    assert choose_layout(weight * (torch.rand(64, 64) < 0.5)) is None
    assert (
        choose_layout(weight * (torch.rand(64, 64) < 0.05)) is None
    )  # a mask is smaller than groups filled with zeros
    # Values that are stored as zeros are cheaper in int8.
    weight = weight.bfloat16() * NM(2, 4).project(weight.abs()) * (torch.rand(64, 64) > 0.05)
    assert choose_layout(weight) is None
    assert choose_layout(weight, int8=True) == NM(2, 4)
    assert choose_layout(torch.eye(64)[:1, :16]) == NM(1, 16)  # one row of a mask needs two offsets
    assert [index_bits(NM(*nm)) for nm in ((1, 2), (2, 4), (4, 8), (8, 16))] == [1, 3, 7, 14]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["w.mask"].bitwise_or_(128), "beyond its last column"),
        (lambda t: t["w.mask"][0].bitwise_xor_(1), "do not fit its mask"),
        (lambda t: t["w.offsets"].add_(1), "do not fit its mask"),
        (lambda t: t.update({"w.values": t["w.values"][:-1]}), "its mask asks for"),
    ],
)
def test_contradictions_are_refused(change, message):
    operator = pack_operator(torch.eye(70, 71) + torch.ones(70, 71))
    tensors = {name: tensor.clone() for name, tensor in encode("w", operator).items()}
    change(tensors)
    with pytest.raises(FistaPrunerError, match=message):
        decode("w", OperatorSpec.of(operator), tensors.__getitem__, FAULT)


def test_the_bytes_of_an_index_are_those_of_the_format():
    """The six ways to keep two of four in lexicographic order: 0 to 5, three bits each, the lowest bit first."""
    row = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1]]).float()
    expected = sum(way << 3 * way for way in range(6)).to_bytes(3, "little")
    assert bytes(encode("w", pack_operator(row, NM(2, 4)))["w.index"][0].tolist()) == expected


def test_index_bits_beyond_the_last_group_are_refused():
    operator = pack_operator(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), NM(2, 4))
    tensors = {name: tensor.clone() for name, tensor in encode("w", operator).items()}
    tensors["w.index"] |= 0x80
    with pytest.raises(FistaPrunerError, match="index bits beyond its last group"):
        decode("w", OperatorSpec.of(operator), tensors.__getitem__, FAULT)


def test_wrong_requests_are_refused():
    with pytest.raises(FistaPrunerError, match="no operator"):
        pack_operator(torch.zeros(3))
    with pytest.raises(FistaPrunerError, match="keeps more than 2"):
        pack_operator(torch.ones(4, 8), NM(2, 4))
    with pytest.raises(FistaPrunerError, match="multiple of 64"):
        pack_operator(torch.ones(4, 8)).quantised(32)
    with pytest.raises(FistaPrunerError, match="not finite"):
        pack_operator(torch.full((2, 2), float("inf"))).quantised()


def test_memory_is_bounded_by_the_matrix_whatever_the_group():
    weight = torch.randn(4, 96)
    whole, wide = pack_operator(weight).quantised(), pack_operator(weight).quantised(2**31 - 64)
    again = through_tensors(wide)
    assert torch.equal(again.to_dense(), whole.to_dense())
    assert torch.equal(again.sums, whole.sums)
    assert torch.equal(SparseLinear(again)(torch.ones(1, 96)), SparseLinear(whole)(torch.ones(1, 96)))

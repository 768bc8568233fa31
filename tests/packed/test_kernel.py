"""Every kernel level against an fp64 product, and against the others."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fistapruner import SparseLinear
from fistapruner.packed import kernel
from fistapruner.packed.format import PackedOperator, pack_operator
from fistapruner.packed.linear import DenseLinear
from fistapruner.packed.load import use_kernels

LEVELS = ("torch", *kernel.available_levels())
KINDS = ("bf16", "int8", "dense int8")


def make(seed: int, rows: int, columns: int, density: float, kind: str) -> PackedOperator:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < density
    return pack_operator(weight.bfloat16(), int8="int8" in kind, dense="dense" in kind)


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_weight(operator: PackedOperator) -> torch.Tensor:
    """The stored weight in fp64; the rounding of the dense weight to bf16 is not the kernel's."""
    if operator.scales is None:
        return operator.to_dense().double()
    weight = torch.zeros(operator.shape, dtype=torch.float64)
    weight[operator.kept()] = operator.values[: operator.stored].double()
    return weight * operator.scales.double()[:, None]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_c_compiler_has_built_the_kernels() -> None:
    assert kernel.available_levels()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    batch=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 32, 33, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_product_is_right(level, kind, seed, rows, columns, density, batch, dtype, bias_dtype) -> None:
    operator = make(seed, rows, columns, density, kind)
    x = vectors(seed + 1, batch, columns).to(dtype)
    bias = None if bias_dtype is None else vectors(seed, rows).to(bias_dtype)
    out = SparseLinear(operator, bias, level=level)(x)
    assert (out.dtype, out.shape) == (dtype, (batch, rows))
    weight = exact_weight(operator)
    exact, magnitudes = functional.linear(x.double(), weight, bias if bias is None else bias.double()), weight.abs()
    size = x.double().abs() @ magnitudes.T + (0 if bias is None else bias.double().abs())
    # fp32 sums; int8 rounds activations to 16 bits. Where torch multiplies, weight and bias are rounded to x's dtype.
    by_torch = level == "torch" or batch > kernel.MAX_BATCH
    bound = (2**-7 if by_torch and (dtype is torch.bfloat16 or "int8" in kind) else 2**-18) * size
    if "int8" in kind:
        bound = bound + 2**-16 * x.double().abs().amax(1, keepdim=True) * magnitudes.sum(1)
    bound = bound + (2**-8 if dtype is torch.bfloat16 else 2**-22) * exact.abs() + 1e-30
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("level", kernel.available_levels())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "dtype"), [(7, torch.float32), (250, torch.bfloat16)])
def test_threads_and_company_change_no_bit(level, kind, batch, dtype) -> None:
    layer, x = SparseLinear(make(3, 333, 700, 0.5, kind), level=level), vectors(4, batch, 700).to(dtype)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)
    if batch <= kernel.MAX_BATCH:
        assert torch.equal(outs[0], torch.cat([layer(row[None]) for row in x]))
    elif level == "amx":
        assert torch.equal(outs[0][:37], layer(x[:37]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 400), kind=st.sampled_from(KINDS[1:]))
def test_int8_is_the_same_in_every_level(seed, columns, kind) -> None:
    operator, x = make(seed, 70, columns, 0.5, kind), vectors(seed, 3, columns)
    outs = [SparseLinear(operator, level=level)(x) for level in kernel.available_levels()]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 300), part=st.data())
def test_rows_are_unpacked_to_the_same_bits_by_every_level(kind, dtype, seed, rows, columns, part) -> None:
    """And nothing is written beside them."""
    operator = make(seed, rows, columns, 0.5, kind)
    first = part.draw(st.integers(0, rows - 1))
    last = part.draw(st.integers(first + 1, rows))
    for level in range(len(kernel.available_levels())):
        memory = torch.full((rows + 2, columns), 7, dtype=dtype)
        kernel.unpack(operator, first, last, memory[1 : 1 + last - first], level)
        assert bool((memory[0] == 7).all())
        assert bool((memory[1 + last - first :] == 7).all())
        wide = exact_weight(operator).float() if "int8" in kind else operator.to_dense()
        assert torch.equal(memory[1 : 1 + last - first], wide[first:last].to(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens_equal_the_dense_product(level, dtype, monkeypatch) -> None:
    operator, bias, x = make(5, 300, 130, 0.5, "bf16"), vectors(8, 300).to(dtype), vectors(6, 2, 40, 130).to(dtype)
    expected = functional.linear(x, operator.to_dense().to(dtype), bias)
    for tile in (2**26, 1):  # whole, and 64 rows at a time
        monkeypatch.setattr("fistapruner.packed.linear.TILE_BYTES", tile)
        torch.testing.assert_close(SparseLinear(operator, bias, level=level)(x), expected)


@pytest.mark.parametrize("level", kernel.available_levels())
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_tokens_are_multiplied_by_the_kernel_as_fp32(level, kind) -> None:
    layer = SparseLinear(make(0, 70, 130, 0.5, kind), torch.ones(70).half(), level=level)
    for rows in (3, 300):
        x = vectors(rows, rows, 130).half()
        assert torch.equal(layer(x), layer(x.float()).half())


@pytest.mark.parametrize("level", kernel.available_levels())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_activations_stay_visible(level, bad) -> None:
    x = torch.ones(2, 64)
    x[0, 5] = bad
    for kind in KINDS:
        out = SparseLinear(make(1, 20, 64, 1.0, kind), level=level)(x)
        assert not bool(torch.isfinite(out[0]).any())
        assert bool(torch.isfinite(out[1]).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_to_few_and_many_tokens(level, cast) -> None:
    operator = make(2, 20, 130, 0.5, "bf16")
    dense = DenseLinear(130, 20, bias=False, dtype=torch.bfloat16)
    dense.weight.data = operator.to_dense()
    for rows in (1, 10, 40):
        for layer in (SparseLinear(operator, level=level), dense):
            with torch.no_grad(), torch.autocast("cpu", dtype=cast):
                found, expected = layer(x := vectors(rows, rows, 130)), functional.linear(x, dense.weight)
            assert found.dtype == cast
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_compiled_packed_linear_is_one_graph(kind, rows) -> None:
    layer, x = SparseLinear(make(2, 20, 130, 0.5, kind), torch.ones(20)), vectors(1, rows, 130)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    parts = layer.operator
    tensors = (parts.mask, parts.start, parts.values, parts.scales, parts.sums)
    arguments = (x, layer.bias, *tensors, *parts.shape, parts.dtype, layer.level)
    torch.library.opcheck(torch.ops.fistapruner.linear.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_the_input(kind) -> None:
    operator, x = make(2, 20, 30, 0.5, kind), vectors(0, 2, 30).requires_grad_()
    SparseLinear(operator)(x).sum().backward()
    torch.testing.assert_close(x.grad, operator.to_dense().float().sum(0).expand(2, 30))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    batch=st.integers(1, kernel.TILE),
    biased=st.booleans(),
)
def test_dense_bf16_operators_beside_packed_ones(seed, rows, columns, batch, biased) -> None:
    linear = torch.nn.Linear(columns, rows, bias=biased).bfloat16()
    linear.weight.data = vectors(seed, rows, columns).bfloat16()
    layer, x = linear, vectors(seed, batch, columns).bfloat16()
    use_kernels(torch.nn.ModuleDict({"head": linear}))
    assert type(layer) is DenseLinear
    with torch.no_grad():
        for sign in (1, -1):
            linear.weight.data = sign * linear.weight.data  # the parameter is shared: new memory is seen
            exact = functional.linear(x.double(), linear.weight.double(), linear.bias.double() if biased else None)
            size = x.double().abs() @ linear.weight.double().abs().T
            assert bool(((layer(x).double() - exact).abs() <= 2**-18 * size + 2**-8 * exact.abs() + 1e-30).all())
    assert layer(x).requires_grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(200,), (2, 65)])
def test_inputs_of_another_width_are_refused(level, shape) -> None:
    """As by ``nn.Linear``."""
    layer = SparseLinear(make(4, 20, 130, 0.5, "bf16"), level=level)
    for refusing in (layer, DenseLinear(130, 20).bfloat16()):
        with torch.no_grad(), pytest.raises(RuntimeError):
            refusing(torch.ones(shape).bfloat16())


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bias_changed_in_any_way_is_used(kind, dtype) -> None:
    if kind == "dense" and dtype == torch.float32 and kernel.best_level() < kernel.DENSE_LEVEL:
        pytest.skip("torch's own product takes no bias in fp32 beside bf16 weights")
    weight, bias = vectors(0, 40, 64).bfloat16(), vectors(1, 40).to(dtype)
    layer: torch.nn.Module = SparseLinear(pack_operator(weight), bias.clone())
    if kind == "dense":
        layer = DenseLinear(64, 40).bfloat16()
        layer.weight.data, layer.bias.data = weight, bias.clone()
    x = vectors(2, 1, 64).bfloat16()
    with torch.inference_mode():
        before = layer(x)
        layer.load_state_dict({**layer.state_dict(), "bias": bias + 100})
        assert float((layer(x) - before - 100).abs().max()) < 2
        layer.bias.data -= 100  # of which torch counts no changes
        assert float((layer(x) - before).abs().max()) < 2
        layer.bias = None
        assert float((layer(x) + bias - before).abs().max()) < 2


@pytest.mark.parametrize("rows", [1, 40])
def test_a_bias_that_is_not_on_the_cpu_is_refused(rows) -> None:
    for level in kernel.available_levels()[:1]:
        layer = SparseLinear(make(1, 20, 130, 0.5, "bf16"), torch.ones(20, device="meta"), level)
        with pytest.raises(NotImplementedError, match="meta tensor"):
            layer(torch.ones(rows, 130))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [2, 40])
def test_defaults_of_torch_change_no_bit(level, rows) -> None:
    operator, bias, x = make(0, 70, 130, 0.5, "bf16"), vectors(0, 70), vectors(1, rows, 130)
    want, dense = SparseLinear(operator, bias, level)(x), operator.to_dense()
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "meta")):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                layer = SparseLinear(operator, bias, level)
                assert torch.equal(layer(x), want)
                assert torch.equal(layer.weight, dense)
                layer.load_state_dict({"weight": 2 * dense, "bias": bias})
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(layer.weight, 2 * dense)

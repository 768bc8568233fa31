"""Every kernel level against an fp64 product, and against the others."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fistapruner import FistaPrunerError
from fistapruner.packed import kernel, linear
from fistapruner.packed.format import PackedOperator, pack_operator
from fistapruner.packed.linear import DenseLinear, SparseLinear
from fistapruner.packed.load import use_kernels

LEVELS = ("torch", *kernel.available_levels())
VALUES = (torch.bfloat16, torch.int8)


def make(seed: int, rows: int, columns: int, density: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < density
    return pack_operator(weight.bfloat16(), int8=dtype is torch.int8)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_c_compiler_has_built_the_kernels():
    assert kernel.available_levels()


def reference(operator, x, bias=None):
    """fp64 product with the exact stored weight, and the sum of magnitudes that rounding errors scale with."""
    weight = operator.to_dense().double()
    if operator.scales is not None:  # the rounding of the dense weight to bf16 is not the kernel's
        weight = torch.zeros(operator.shape, dtype=torch.float64)
        weight[operator.kept()] = operator.values[: operator.stored].double()
        weight *= operator.scales.double()[:, None]
    exact = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    return (exact if bias is None else exact + bias.double()), size


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("values", VALUES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    batch=st.sampled_from([1, 2, 3, 4, 5, 16, 17, 32, 33, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
)
def test_product_is_right(level, values, seed, rows, columns, density, batch, dtype, biased):
    operator = make(seed, rows, columns, density, values)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    out = SparseLinear(operator, bias, level=level)(x)
    assert out.dtype == dtype
    assert out.shape == (batch, rows)
    exact, size = reference(operator, x, bias)
    # fp32 sums; int8 rounds activations to 16 bits. The dense product, which many vectors take at every level, rounds
    # the unpacked weight to x's dtype.
    dense = level == "torch" or batch > kernel.MAX_BATCH
    inner = 2**-8 if dense and (dtype is torch.bfloat16 or values is torch.int8) else 2**-18
    if values is torch.int8:
        size = (
            size
            + 2**-15 * 2**18 * x.double().abs().amax(1, keepdim=True) * operator.to_dense().double().abs().sum(1) / 2
        )
    bound = inner * size + (2**-8 if dtype is torch.bfloat16 else 2**-22) * exact.abs() + 1e-30
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("level", kernel.available_levels())
@pytest.mark.parametrize("values", VALUES)
def test_threads_and_company_change_no_bit(level, values):
    operator = make(3, 333, 700, 0.5, values)
    layer = SparseLinear(operator, level=level)
    x = torch.randn(7, 700, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = layer(x)
        alone = torch.cat([layer(row[None]) for row in x])
        torch.set_num_threads(2)
        two = layer(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    assert torch.equal(one, alone)


@pytest.mark.skipif("amx" not in kernel.available_levels(), reason="needs a processor with AMX")
@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
def test_matrix_units_change_no_bit_with_threads_or_company(values):
    layer = SparseLinear(make(9, 333, 700, 0.5, values), level="amx")
    x = torch.randn(250, 700, generator=torch.Generator().manual_seed(4)).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = layer(x)
        torch.set_num_threads(2)
        two = layer(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    assert torch.equal(one[:37], layer(x[:37]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 400))
def test_int8_is_the_same_in_every_level(seed, columns):
    operator = make(seed, 70, columns, 0.5, torch.int8)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    outs = [SparseLinear(operator, level=level)(x) for level in kernel.available_levels()]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", VALUES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 300), part=st.data())
def test_rows_are_unpacked_to_the_same_bits_by_every_level(values, dtype, seed, rows, columns, part):
    """And nothing is written beside them."""
    operator = make(seed, rows, columns, 0.5, values)
    first = part.draw(st.integers(0, rows - 1))
    last = part.draw(st.integers(first + 1, rows))
    outs = []
    for level in range(len(kernel.available_levels())):
        memory = torch.full((rows + 2, columns), 7, dtype=dtype)
        kernel.Handle(operator).unpack(first, last, memory[1 : 1 + last - first], level)
        assert bool((memory[0] == 7).all())
        assert bool((memory[1 + last - first :] == 7).all())
        outs.append(memory)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    if values is not torch.int8:
        assert torch.equal(outs[0][1 : 1 + last - first], operator.to_dense()[first:last].to(dtype))


@pytest.mark.parametrize("tile", [linear.TILE_BYTES, 1], ids=["whole", "64 rows at a time"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens_equal_the_dense_product(level, dtype, tile, monkeypatch):
    monkeypatch.setattr(linear, "TILE_BYTES", tile)
    operator = make(5, 300, 130, 0.5, torch.bfloat16)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(8)).to(dtype)
    x = torch.randn(2, 40, 130, generator=torch.Generator().manual_seed(6)).to(dtype)
    out = SparseLinear(operator, bias, level=level)(x)
    expected = torch.nn.functional.linear(x, operator.to_dense().to(dtype), bias)
    assert out.shape == (2, 40, 300)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("level", kernel.available_levels())
@pytest.mark.parametrize("values", VALUES)
def test_fp16_tokens_are_multiplied_by_the_kernel_as_fp32(level, values, monkeypatch):
    """Few and many of them."""
    layer = SparseLinear(make(0, 70, 130, 0.5, values), torch.ones(70).half(), level=level)
    monkeypatch.setattr(PackedOperator, "to_dense", None)  # unpacking the whole operator is slow
    for rows in (3, 300):
        x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(rows)).half()
        assert torch.equal(layer(x), layer(x.float()).half())


@pytest.mark.parametrize("level", kernel.available_levels())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_activations_stay_visible(level, bad):
    x = torch.ones(2, 64)
    x[0, 5] = bad
    for values in (torch.bfloat16, torch.int8):
        out = SparseLinear(make(1, 20, 64, 1.0, values), level=level)(x)
        assert not bool(torch.isfinite(out[0]).any())
        assert bool(torch.isfinite(out[1]).all())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_to_few_and_many_tokens(level, cast, dtype):
    operator = make(2, 20, 130, 0.5, torch.bfloat16)
    dense = DenseLinear(130, 20, bias=False, dtype=torch.bfloat16)
    dense.weight.data = operator.to_dense()
    for rows in (1, 10, 40):
        x = torch.randn(rows, 130, generator=torch.Generator().manual_seed(rows)).to(dtype)
        for layer in (SparseLinear(operator, level=level), dense):
            with torch.no_grad(), torch.autocast("cpu", dtype=cast):
                found, expected = layer(x), torch.nn.functional.linear(x, dense.weight)
            assert found.dtype == cast
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.05)


def test_gradients_flow_to_the_input():
    operator = make(2, 20, 30, 0.5, torch.bfloat16)
    x = torch.randn(2, 30, requires_grad=True)
    SparseLinear(operator)(x).sum().backward()
    torch.testing.assert_close(x.grad, operator.to_dense().float().sum(0).expand(2, 30))


def test_the_openmp_runtime_of_torch_comes_first():
    own = f"{Path(torch.__file__).parent}.libs/libgomp-98df.so.1"
    others = ["/usr/lib/libgomp.so.1", "/a/scikit_learn.libs/libgomp-4a.so.1", "/usr/lib/libcompress.so"]
    lines = [f"7f00-7f01 r-xp 00000000 08:01 77    {path}" for path in [*others, own, own]]
    assert kernel._openmp_libraries(lines) == [own, others[1], others[0]]


def test_the_openmp_runtime_is_found_beside_files_with_any_name(tmp_path):
    found = kernel._parallel_runtime()
    folder = os.fsencode(tmp_path) + b"/jos\xe9"
    os.mkdir(folder)
    name = folder + b"/libomp.so"
    Path(os.fsdecode(name)).write_bytes(bytes(4096))
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert kernel._parallel_runtime() == found


def test_unknown_level_is_an_error():
    with pytest.raises(FistaPrunerError, match="avx1024"):
        kernel.level_index("avx1024")


@pytest.mark.skipif(
    kernel.best_level() < kernel.DENSE_LEVEL, reason="the kernel has dense products from AVX-512 BF16 on"
)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    batch=st.integers(1, kernel.TILE),
    biased=st.booleans(),
)
def test_dense_operators_beside_packed_ones(seed, rows, columns, batch, biased):
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(columns, rows, bias=biased).bfloat16()
    linear.weight.data = torch.randn(rows, columns, generator=generator).bfloat16()
    layer = DenseLinear.like(linear)
    x = torch.randn(batch, columns, generator=generator).bfloat16()
    with torch.no_grad():
        out = layer(x)
        assert layer._handle is not None
        exact = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if biased else None)
        size = x.double().abs() @ linear.weight.double().abs().T
        assert bool(((out.double() - exact).abs() <= 2**-18 * size + 2**-8 * exact.abs() + 1e-30).all())
        linear.weight.data = -linear.weight.data  # the parameter is shared: new memory is seen
        torch.testing.assert_close(layer(x), linear(x))
    assert layer(x).requires_grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 65), (1, 1, 131)])
def test_inputs_of_another_width_are_refused(level, shape):
    """As by ``nn.Linear``."""
    layer = SparseLinear(make(4, 20, 130, 0.5, torch.bfloat16), level=level)
    dense = DenseLinear.like(torch.nn.Linear(130, 20).bfloat16())
    for refusing in (layer, dense):
        with torch.no_grad(), pytest.raises(RuntimeError):
            refusing(torch.ones(shape).bfloat16())


@pytest.mark.parametrize("level", kernel.available_levels()[:1])
def test_an_input_that_changes_between_two_projections_is_read_anew(level):
    """In inference mode, too, where torch counts no changes."""
    query, key = (SparseLinear(make(seed, 64, 130, 0.5, torch.bfloat16), level=level) for seed in range(2))
    joined = torch.nn.ModuleDict({"q_proj": query, "k_proj": key})
    use_kernels(joined)
    x = torch.randn(1, 130, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = key(3 * x)
        query(x)
        x.mul_(3)
        torch.testing.assert_close(key(x), expected)


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_a_bias_changed_in_place_is_used(kind):
    weight, bias = torch.randn(40, 64).bfloat16(), torch.randn(40).bfloat16()
    layer = SparseLinear(pack_operator(weight), bias.clone())
    if kind == "dense":
        linear = torch.nn.Linear(64, 40).bfloat16()
        linear.weight.data, linear.bias.data = weight, bias.clone()
        layer = DenseLinear.like(linear)
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer.load_state_dict({**layer.state_dict(), "bias": bias + 100})
        assert float((layer(x) - before - 100).abs().max()) < 2
        layer.bias -= 100
        assert float((layer(x) - before).abs().max()) < 2
        layer.bias.data += 100  # of this and of what follows torch counts no changes
        assert float((layer(x) - before - 100).abs().max()) < 2
        layer.bias.data = bias.clone()
        assert float((layer(x) - before).abs().max()) < 2
    with torch.inference_mode():
        layer.bias = torch.nn.Parameter(bias + 100) if kind == "dense" else bias + 100
        assert float((layer(x) - before - 100).abs().max()) < 2
        layer.bias -= 100
        assert float((layer(x) - before).abs().max()) < 2
        layer.bias += 100
    with torch.no_grad():
        assert float((layer(x) - before - 100).abs().max()) < 2
        layer.bias = None
        assert float((layer(x) + bias - before).abs().max()) < 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [2, 40])
def test_defaults_of_torch_change_no_bit(level, rows):
    operator = make(0, 70, 130, 0.5, torch.bfloat16)
    bias, x = torch.randn(70), torch.randn(rows, 130)
    want, dense = SparseLinear(operator, bias, level)(x), operator.to_dense()
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "meta")):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                layer = SparseLinear(operator, bias, level)
                assert torch.equal(layer(x), want)
                assert torch.equal(layer(x.clone().requires_grad_()), layer(x.clone().requires_grad_()))
                assert torch.equal(layer.weight, dense)
                layer.load_state_dict({"weight": 2 * dense, "bias": bias})
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(layer.weight, 2 * dense)


@pytest.mark.parametrize("level", kernel.available_levels()[:1])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_bias_that_is_not_on_the_cpu_is_refused(level, rows):
    layer = SparseLinear(make(1, 20, 130, 0.5, torch.bfloat16), torch.ones(20), level)
    layer(torch.ones(rows, 130))
    layer.bias = layer.bias.to("meta")
    with pytest.raises(FistaPrunerError, match="the bias is on meta"):
        layer(torch.ones(rows, 130))

"""What CUDA does with each operator of PyTorch: from its own table, and lists of names where the table is silent."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

COPYING = {"copy_", "_to_copy", "_foreach_copy_"}
"""Operators that take tensors of different devices."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operators whose index tensors may be on the CPU."""

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_linalg_check_errors"),
    *("_linalg_eigh", "_unique2", "unique_dim", "bincount", "repeat_interleave", "allclose"),
}
"""Operators after which the host waits for a value, an error flag or a size."""

UNORDERED = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "put_", "histc", "embedding_dense_backward"),
    *("scatter_reduce", "scatter_reduce_", "_cdist_backward", "grid_sampler_2d_backward"),
}
"""Operators that add floating-point numbers in no fixed order (``torch.use_deterministic_algorithms`` lists them)."""

SCANS = {"cumsum", "cumsum_"}
"""Operators whose order is not fixed where the scanned dimension is the whole tensor; else each row has its kernel."""

RESHAPING = {"resize_", "resize_as_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_"}
"""Operators that change the shape of an argument, which a stand-in tensor cannot."""


@dataclass(frozen=True)
class Facts:
    """What CUDA does with an operator.

    Args:
        name: without overload; ``key``: with it.
        kernel: whether it has a CUDA kernel, or needs none of its own.
        scalars: whether it takes 0-dim CPU tensors beside CUDA ones.
        view: whether its result shares memory with an argument.
        parts: whether it consists of other operators.
        plain: whether it has a kernel and is in none of the lists above but :data:`COPYING`.
    """

    name: str
    key: str
    kernel: bool
    scalars: bool
    view: bool
    parts: bool
    plain: bool


@cache
def facts(func: Any) -> Facts:
    """Look an operator up."""
    key = str(func).removeprefix("aten.").removesuffix(".default")
    aliases = [value.alias_info for value in func._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in aliases) or key in (
        "_unsafe_view",
        "detach",
        "lift_fresh",
    )
    kernel, scalars = _native_functions().get(key, (True, True))
    name = func.overloadpacket.__name__
    # PyTorch chooses attention's kernel by device: the CPU's has a name of its own.
    kernel = kernel or "_for_cpu" in name
    plain = kernel and name not in {*INDEXING, *WAITING, *UNORDERED, *SCANS, *RESHAPING}
    return Facts(name, key, kernel, scalars, view, func._can_decompose(), plain)


@cache
def _native_functions() -> dict[str, tuple[bool, bool]]:
    """Read (has a CUDA kernel, takes 0-dim CPU tensors beside CUDA ones) of every operator from PyTorch's table."""
    import torchgen

    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = re.finditer(r"^- func: ([\w.]+)\(.*?\n(?:[ ].*\n)+", table.read_text(), re.MULTILINE)
    blocks = {entry[1]: entry[0] for entry in entries}
    found = {}
    for name, block in blocks.items():
        delegate = re.search(r"structured_delegate: ([\w.]+)", block)
        rules = block + (blocks.get(delegate[1], "") if delegate else "")
        keys = {key for line in re.findall(r"^    ([\w, ]+): ", rules, re.MULTILINE) for key in re.split(r", *", line)}
        composite = any(key.startswith("Composite") for key in keys)
        kernel = "CPU" not in keys or "CUDA" in keys or "ufunc_inner_loop" in rules or composite
        found[name] = kernel, "device_check: NoCheck" in rules
    return found

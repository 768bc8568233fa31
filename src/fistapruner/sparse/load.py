"""Load a packed checkpoint as a transformers model; uses public classes of transformers only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import FistaPrunerError, one_line
from ..models.architecture import (
    auto_class,
    build_model,
    find_decoder_layers,
    loaded_dtype,
    read_config,
    refuse_own_code,
)
from ..models.experts import ExpertLinear, run_unaligned_experts, separate_experts
from ..models.files.folder_files import read_json_in
from ..models.files.widths import read_widths, widths_section
from ..models.names import expert_sources, joined_sources, stored_names
from ..runs.arguments import checked_arguments
from ..runtime.numerics import undisturbed
from . import kernel
from .experts import serve_experts
from .linear import DenseLinear, SparseLinear
from .packed import PackedOperator, pack_operator
from .packed_checkpoint import PackedCheckpoint, is_packed


@checked_arguments
@undisturbed()
def load(
    folder: str | Path,
    *,
    packed: bool = True,
    int8: bool = False,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
) -> Any:
    """Load a packed checkpoint.

    Args:
        folder: folder that ``fistapruner pack`` wrote; or a model whose decoder layers have different widths, which has
            nothing packed in it.
        packed: keep the operators packed (``SparseLinear``): less memory, and faster decoding on a CPU
            (x86-64 with AVX2); False unpacks them to an ordinary dense model.
        int8: with ``packed``, round float values to int8 while loading.
        dtype: precision of activations and dense tensors, of torch or its name (``"bfloat16"``); None and ``"auto"``
            take the checkpoint's.
        verify: compare the files with their checksums first.

    Returns:
        The causal language model, in evaluation mode; of a model with a low-rank part the sum of both parts. Its
        ``state_dict`` and what ``save_pretrained`` writes are dense.

    Raises:
        FistaPrunerError: the folder is damaged or of an unknown version, does not fit its architecture, has values that
            cannot become int8, or needs Python code of its own, which is never run here.
    """
    from transformers import GenerationConfig

    if not isinstance(packed, bool):  # unpack has an argument of this name, which is a folder
        raise FistaPrunerError(f"packed {packed!r}: True or False is expected")
    dtype = _dtype(dtype)
    plain = not is_packed(folder) and (Path(folder) / "config.json").is_file()
    if plain and read_widths(read_json_in(Path(folder), "config.json"), Path(folder)):
        config = read_config(Path(folder))
        settings = {"config": config, "dtype": dtype or "auto", "trust_remote_code": False}
        model = auto_class(config).from_pretrained(str(folder), **settings)
        run_unaligned_experts(model)
        return model.eval()
    source = PackedCheckpoint(folder, verify=verify)
    loads = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    refuse_own_code(source.folder, f"if you trust that code, load it with {loads} after import fistapruner")
    if "model_type" not in source.config():
        raise FistaPrunerError(f"{source.folder / 'config.json'} has no model_type")
    dtype = dtype or _main_dtype(source)
    if packed and kernel.best_level() <= 0:
        slow = f"{kernel.absence()}, so packed operators run slower than dense ones: load with packed=False"
        warnings.warn(slow, stacklevel=4)  # of the caller, past both decorators
    model = _build(source, dtype, packed, int8)
    if (source.folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(source.folder))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = one_line(error) or type(error).__name__
            raise FistaPrunerError(f"{source.folder / 'generation_config.json'} is not understood: {reason}") from None
    return model.eval()


def _build(source: PackedCheckpoint, dtype: torch.dtype, packed: bool, int8: bool) -> Any:
    """Build the model with its tensors.

    Raises:
        FistaPrunerError: the config describes no such model; a tensor does not fit it, or is missing; or values that
            are not finite cannot become int8.
    """
    model = build_model(source.checkpoint, shapes=source.shapes(), dtype=dtype)
    stored = source.names()
    experts = expert_sources(model, stored)
    mixed = any(name in source.specs for lists in experts.values() for names in lists for name in names)
    own = (
        separate_experts(model, *find_decoder_layers(model), source.checkpoint, names=stored)
        if mixed and packed
        else {}
    )
    names = {**stored_names(model, stored, skipped=own), **own}

    if source.low_rank is not None:
        source.low_rank.require_fit(model)

    def rounded(target: str, tensor: Tensor) -> Tensor:
        if source.low_rank is not None:
            module = model.get_submodule(target.rpartition(".")[0])
            tensor = source.low_rank.added(target, tensor, transposed=isinstance(module, Conv1D))
        return tensor.to(loaded_dtype(model, target, dtype)) if tensor.is_floating_point() else tensor

    def factors(target: str) -> tuple[Tensor, Tensor] | None:
        found = None if source.low_rank is None else source.low_rank.of(target)
        return None if found is None else (found[0].float(), found[1].float())

    def in_int8(name: str, operator: PackedOperator) -> PackedOperator:
        try:
            return pack_operator(operator.to_dense(), int8=True) if operator.scales is None else operator
        except FistaPrunerError as error:
            raise FistaPrunerError(f"{source.folder}: {name}: {error}") from None

    rest = _dense_tensors(source, model, names, experts, rounded)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}  # transformers compares and joins them
    for target, name in names.items():
        if name not in source.specs:
            continue
        operator = source.operator(name)
        parent, _, leaf = target.rpartition(".")
        module = model.get_submodule(parent) if packed and leaf == "weight" and target not in tied else None
        transposed = isinstance(module, Conv1D)  # GPT-2 stores (inputs, outputs)
        fits = isinstance(module, nn.Linear) and (module.out_features, module.in_features) == operator.shape
        if not fits and not transposed:
            rest[target] = rounded(target, operator.to_dense())
            continue
        operator = _turned(operator) if transposed else operator
        operator = in_int8(name, operator) if int8 else operator
        bias = rest.pop(f"{parent}.bias", None)
        replace(model, parent, SparseLinear(operator, bias, transposed=transposed, low_rank=factors(target)))
    if packed:
        use_kernels(model)
    try:
        model.load_state_dict(rest, strict=False, assign=True)
    except RuntimeError as error:
        raise FistaPrunerError(f"{source.folder} does not fit {type(model).__name__}: {one_line(error, 300)}") from None
    serve_experts(model)
    run_unaligned_experts(model)
    model.tie_weights(missing_keys=set(_missing(model)), recompute_mapping=False)
    if source.widths:
        model.config.quantization_config = widths_section(source.widths)
    if missing := _missing(model):
        raise FistaPrunerError(f"{source.folder}: tensor {missing[0]!r} of {type(model).__name__} is not in it")
    # Parameters keep requires_grad, as from_pretrained leaves them: torch is slow at multiplying a strided input by a
    # weight without gradient.
    return model


def _dense_tensors(
    source: PackedCheckpoint,
    model: Any,
    names: Mapping[str, str],
    experts: Mapping[str, list[list[str]]],
    rounded: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Read the tensors of a model that are not packed, or that are several tensors in the checkpoint.

    Args:
        source: the checkpoint.
        model: the model.
        names: names in the checkpoint of the model's tensors.
        experts: names in the checkpoint of the parts of tensors of all experts.
        rounded: adds the low-rank part to a tensor of the model, and gives it the precision that it has there.
    """
    found = {
        target: rounded(target, source.checkpoint.read(name))
        for target, name in names.items()
        if name not in source.specs
    }
    found |= {
        target: rounded(target, torch.cat([source.tensor(part) for part in parts]))
        for target, parts in joined_sources(model, source.names()).items()
        if target not in names
    }
    fused = model.state_dict(keep_vars=True).keys() & experts.keys()  # those that are not separate now
    return found | {target: rounded(target, source.experts(experts[target])) for target in sorted(fused)}


def _turned(operator: PackedOperator) -> PackedOperator:
    """Transpose an operator; scales run along the stored rows, so int8 values are rounded again."""
    return pack_operator(operator.to_dense().T.contiguous(), int8=operator.scales is not None)


def _missing(model: nn.Module) -> list[str]:
    """List the parameters and buffers that have no values; unlike a state dict this unpacks nothing."""
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in held if tensor.is_meta]


def use_kernels(model: nn.Module) -> None:
    """Run dense operators with the compiled kernel too."""
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, ExpertLinear):
            replace(model, name, DenseLinear.like(module))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of ``model`` at the dotted ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Read a precision as transformers takes it; None is the checkpoint's.

    Raises:
        FistaPrunerError: names what is no floating-point dtype.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise FistaPrunerError(
            f"dtype {dtype!r} is no floating-point dtype of torch, such as torch.bfloat16 or 'bfloat16'"
        )
    return found


def _main_dtype(source: PackedCheckpoint) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for entries in source.contents().values():
        for entry in entries:
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])

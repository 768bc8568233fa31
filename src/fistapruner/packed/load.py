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
from ..models.build import build_model, find_decoder_layers, loaded_dtype, refuse_own_code
from ..models.experts import ExpertLinear, Experts, run_unaligned_experts, separate_experts
from ..models.names import StoredNames, stored_names
from ..runtime.numerics import undisturbed
from . import kernel
from .checkpoint import PackedCheckpoint
from .format import PackedOperator, damaged, pack_operator
from .linear import DenseLinear, Int8Embedding, SparseLinear


@undisturbed()
def load(
    folder: str | Path, *, packed: bool = True, dtype: torch.dtype | str | None = None, verify: bool = True
) -> Any:
    """Load a packed checkpoint.

    Args:
        folder: folder that ``fistapruner pack`` wrote.
        packed: keep the operators packed (``SparseLinear``): less memory, and faster decoding on a CPU
            (x86-64 with AVX2); False unpacks them to an ordinary dense model.
        dtype: precision of activations and dense tensors, of torch or its name (``"bfloat16"``); None and ``"auto"``
            take the checkpoint's.
        verify: compare the files with their checksums first.

    Returns:
        The causal language model, in evaluation mode; of a model with a low-rank part the sum of both parts. Its
        ``state_dict`` and what ``save_pretrained`` writes are dense.

    Raises:
        FistaPrunerError: the folder is damaged or of an unknown version, does not fit its architecture, or needs Python
            code of its own, which is never run here.
    """
    from transformers import GenerationConfig

    found = getattr(torch, dtype, False) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found not in (None, "auto") and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise FistaPrunerError(
            f"dtype {dtype!r} is no floating-point dtype of torch, such as torch.bfloat16 or 'bfloat16'"
        )
    source = PackedCheckpoint(folder, verify=verify)
    loads = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    refuse_own_code(source.folder, f"if you trust that code, load it with {loads} after import fistapruner")
    if packed and kernel.best_level() <= 0:
        warnings.warn(kernel.SLOW, stacklevel=3)  # of the caller, past the decorator
    if not isinstance(found, torch.dtype):  # that of the dense model's largest tensor
        tensors = [entry for entries in source.contents().values() for entry in entries]
        found = max(tensors, key=lambda entry: entry.dtype.is_floating_point * entry.nbytes).dtype
    model = _build(source, found, packed)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source.folder))
    return model.eval()


def _build(source: PackedCheckpoint, dtype: torch.dtype, packed: bool) -> Any:
    """Build the model with its tensors."""
    model = build_model(source.checkpoint, packed=True, dtype=dtype)
    found = stored_names(model, source.names())
    names = found.whole
    if packed and any(name in source.specs for lists in found.experts.values() for each in lists for name in each):
        names = separate_experts(model, *find_decoder_layers(model), source.checkpoint, found)
    if source.low_rank is not None:
        source.low_rank.require_fit(model)

    def rounded(target: str, tensor: Tensor) -> Tensor:
        if source.low_rank is not None:
            module = model.get_submodule(target.rpartition(".")[0])
            tensor = source.low_rank.added(target, tensor, transposed=isinstance(module, Conv1D))
        return tensor.to(loaded_dtype(model, target, dtype)) if tensor.is_floating_point() else tensor

    rest = _dense_tensors(source, model, names, found, rounded)
    dense = {target: name for target, name in names.items() if name in source.specs and source.specs[name].dense}
    tables = {target: source.operator(name) for target, name in dense.items()}
    twins = _share_tied(model, tables, names) if packed else {}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}  # transformers compares and joins them
    for target in dict.fromkeys([*names, *tables]):
        if target not in tables and names[target] not in source.specs:
            continue
        operator = tables.get(target) or source.operator(names[target])
        parent, _, leaf = target.rpartition(".")
        replaceable = packed and leaf == "weight" and target not in tied
        module = model.get_submodule(parent) if replaceable else None
        transposed = isinstance(module, Conv1D)  # GPT-2 stores (inputs, outputs)
        if type(module) is nn.Embedding and operator.mask is None:
            model.set_submodule(parent, Int8Embedding(operator, dtype))
        elif transposed or (
            isinstance(module, nn.Linear) and (module.out_features, module.in_features) == operator.shape
        ):
            factors = None if source.low_rank is None else source.low_rank.of(target)
            low_rank = None if factors is None else (factors[0].float(), factors[1].float())
            held, bias = _turned(operator) if transposed else operator, rest.pop(f"{parent}.bias", None)
            twin = twins.get(target, "")
            linear = SparseLinear(held, bias, transposed=transposed, low_rank=low_rank, twin=twin)
            model.set_submodule(parent, linear)
        else:
            rest[target] = rounded(target, operator.to_dense())
    if packed:
        use_kernels(model)
    try:
        model.load_state_dict(rest, strict=False, assign=True)
    except RuntimeError as error:
        raise FistaPrunerError(f"{source.folder} does not fit {type(model).__name__}: {one_line(error, 300)}") from None
    _serve_experts(model)
    run_unaligned_experts(model)
    model.tie_weights(missing_keys=set(_missing(model)), recompute_mapping=False)
    if missing := _missing(model):
        raise damaged(source.folder, f"tensor {missing[0]!r} of {type(model).__name__} is not in it")
    # Parameters keep requires_grad, as from_pretrained leaves them: torch is slow at multiplying a strided input by a
    # weight without gradient.
    return model


def _share_tied(model: Any, tables: dict[str, PackedOperator], names: Mapping[str, str]) -> dict[str, str]:
    """Let a tied head share the embedding's int8 rows, in place; transformers ties parameters only.

    Returns:
        The embedding's name, by the head's.
    """
    twins: dict[str, str] = {}
    for head, embedding in list(model.all_tied_weights_keys.items()):
        for one, other in ((head, embedding), (embedding, head)):
            if other not in names and one in tables:
                tables[other] = tables[one]
        first, second = tables.get(head), tables.get(embedding)
        if first is None or second is None:
            continue
        del model.all_tied_weights_keys[head]
        if torch.equal(first.to_dense(), second.to_dense()):
            tables[head], twins[head] = second, embedding
    return twins


def _dense_tensors(
    source: PackedCheckpoint,
    model: Any,
    names: Mapping[str, str],
    stored: StoredNames,
    rounded: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Read the tensors of a model that are not packed, or that are several tensors in the checkpoint."""
    found = {
        target: rounded(target, source.checkpoint.read(name))
        for target, name in names.items()
        if name not in source.specs
    }
    found |= {
        target: rounded(target, torch.cat([source.tensor(part) for part in parts]))
        for target, parts in stored.joined.items()
        if target not in names
    }
    fused = model.state_dict(keep_vars=True).keys() & stored.experts.keys()  # those that are not separate now
    return found | {target: rounded(target, source.experts(stored.experts[target])) for target in sorted(fused)}


def _turned(operator: PackedOperator) -> PackedOperator:
    """Transpose an operator; scales run along the stored rows, so int8 values are rounded again."""
    return pack_operator(operator.to_dense().T.contiguous(), int8=operator.scales is not None)


def _missing(model: nn.Module) -> list[str]:
    """List the parameters and buffers that have no values; unlike a state dict this unpacks nothing."""
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [name for name, tensor in held if tensor.is_meta]


def use_kernels(model: nn.Module) -> None:
    """Run dense operators with the compiled kernel too."""
    for module in model.modules():
        if type(module) in (nn.Linear, ExpertLinear):
            module.__class__ = DenseLinear  # the same parameters, hooks and settings


def _serve_experts(model: nn.Module) -> None:
    """Skip experts without tokens, and keep the names of fused experts in the state dict; in place.

    :class:`~fistapruner.models.experts.Experts` gives every expert linear modules, so each is packed like any operator.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.skips = True
            module.register_state_dict_post_hook(_join)
            module.register_load_state_dict_pre_hook(_split)


def _join(experts: Experts, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Join the weights of single experts in a state dict."""
    for name, parts in experts.fused.items():
        state[prefix + name] = torch.stack(
            [
                torch.cat([state.pop(f"{prefix}{number}.{part}.weight") for part in parts])
                for number in range(experts.number)
            ]
        )


def _split(experts: Experts, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Split the tensors of all experts in a state dict that is loaded."""
    for name, parts in experts.fused.items():
        whole: Tensor | None = state.pop(prefix + name, None)
        for number, matrix in enumerate(() if whole is None else whole):
            for part, weight in zip(parts, matrix.chunk(len(parts)), strict=True):
                state[f"{prefix}{number}.{part}.weight"] = weight

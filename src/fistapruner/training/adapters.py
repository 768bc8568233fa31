"""Merge an adapter of the PEFT library into a pruned checkpoint, with every zero kept.

PEFT merges; then the zeros are put back. An adapter whose product is masked only now is another function than the one
that was trained: the report says how much the mask took from it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import A_FOLDER, FistaPrunerError, MissingExtraError, one_line, out_path, path_text
from ..models.build import load_whole
from ..models.record import read_pruning_record, refuse_low_rank
from ..models.source import Permissions
from ..models.write import require_new
from ..pruning.write import check_zeros, model_documents
from ..reporting.model_card import plain_card
from ..runs.directory import checkpoint_of
from ..runs.lineage import record_with_stage
from ..runs.records import Stage
from ..runtime.files import read_json, write_text_atomic
from ..runtime.machine import now
from ..runtime.numerics import undisturbed
from ..runtime.show import percent
from .hold_mask import held_weights


@dataclass(frozen=True)
class MergeReport:
    """What ``merge_adapter`` did; counts are over the pruned operators that the adapter changes.

    ``refilled`` counts zeros that the adapter would have filled, ``masked_share`` is the share of the squared norm of
    its change that the mask took, ``kind`` is PEFT's name of it.
    """

    model: Path
    adapter: Path
    out: Path
    kind: str
    operators: int
    weights: int
    zeros: int
    refilled: int
    masked_share: float

    def __str__(self) -> str:
        share = f"{self.zeros} of {self.weights} ({percent(self.zeros / max(1, self.weights))})"
        return (
            f"merged the {self.kind} adapter {self.adapter} into {self.model}: {self.out}\n"
            f"zeros of the {self.operators} pruned operators that it changes: {share}, all kept; without the mask it "
            f"fills {percent(self.refilled / max(1, self.zeros))} of them\n"
            f"the mask took {percent(self.masked_share)} of the squared norm of the change"
        )


@undisturbed()
def merge_adapter(
    folder: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    command: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge a PEFT adapter into a pruned checkpoint, with every zero kept.

    The merge is computed in fp32 and rounded once. A surviving weight that becomes 0 keeps its value.

    Args:
        folder: a pruned Hugging Face folder, or a finished run; ``adapter``: folder with ``adapter_config.json``.
        out: folder to make; it must not exist. Other arguments as of ``fistapruner.prune``.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "adapters", "merging an adapter") from None
    adapter, out = Path(path_text("adapter", adapter, A_FOLDER)), out_path(out)
    source = Permissions(allow_pickle, trust_remote_code).find(checkpoint_of(folder))
    refuse_low_rank(source.folder, "merge")
    require_new(out, source.folder)
    config, record = read_json(adapter / "adapter_config.json"), read_pruning_record(source.folder)
    base = Path(str(config.get("base_model_name_or_path") or ""))
    if (permuted := set(record.get("permuted", []))) and base.absolute() != source.folder.absolute():
        raise FistaPrunerError(
            f"the channels of {next(iter(permuted))} were reordered by pruning, so an adapter of {base} does not fit: "
            f"train it on {source.folder}"
        )
    checkpoint = source.checkpoint()
    whole = load_whole(source.folder, torch.device("cpu"), torch.float32, trust_remote_code=trust_remote_code)
    before = {name: whole.get_parameter(name).detach().clone() for name in held_weights(whole)}
    try:
        merged = peft.PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        raise FistaPrunerError(f"peft cannot merge {adapter}: {one_line(error)}") from None
    counts = _mask(merged, before, checkpoint.dtype)
    merged.to(checkpoint.dtype).save_pretrained(out)
    kind, name = str(config.get("peft_type")), adapter.resolve().name
    settings = {"adapter": name, "type": kind, "trained_on": str(base) if base.name else None}
    stage = Stage(kind="merge", command=command, finished=now(), settings=settings)
    said = f"merged the {kind} adapter {name} into {source.folder.resolve().name}, its zeros kept"
    card = plain_card(source.license(), "A pruned model with a merged adapter", said)
    for name in checkpoint.companions:
        if not (out / name).exists():
            shutil.copy(source.folder / name, out / name)
    for name, text in model_documents(card, record_with_stage(record, stage)).items():
        write_text_atomic(out / name, text)
    check_zeros(out, checkpoint, [name for name in before if name in set(checkpoint.names())])
    return MergeReport(source.folder, adapter, out, kind, **counts)


def _mask(merged: Any, before: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Put the zeros of the weights back; return the counts of a :class:`MergeReport`."""
    counts = Counter(operators=0, weights=0, zeros=0, refilled=0)
    change = masked = 0.0
    for name, start in before.items():
        weight = merged.get_parameter(name)
        after, zero = weight.data.to(dtype).float(), start == 0
        if not torch.equal(after, start.to(dtype).float()):
            difference = (weight.data - start).square()
            change, masked = change + float(difference.sum()), masked + float(difference[zero].sum())
            refilled = int((after[zero] != 0).sum())
            counts.update(operators=1, weights=start.numel(), zeros=int(zero.sum()), refilled=refilled)
        weight.data = torch.where(zero | (after == 0), start, weight.data)
    return {**counts, "masked_share": masked / change if change else 0.0}

"""Train in several processes of torchrun, by PyTorch's fully_shard and distributed checkpoints.

Every process holds a part of each decoder layer's weights, masters and moments (FSDP2) and all embeddings, and passes
its part of a step's windows. Process 0 prepares the run, writes states' records and the result; the run directory must
be on a disk that all processes see. A run may go on with another number of processes; its last bits then differ.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import FistaPrunerError
from ..runs.store import Snapshots
from ..runtime.files import read_sealed_json, write_sealed_json
from ..runtime.machine import launched
from .masked import TrainedLayer

WAIT = timedelta(hours=6)  # for process 0, which may cut text or compute the dense model's predictions

DONE, READY = "", "ready"  # process 0 says: nothing is left to train, or the run is settled; else why it cannot be


@dataclass
class World:
    """The processes of a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False  # shards rest in main memory
    told: bool = False  # process 0 has told the others something

    def announce(self, message: str) -> None:
        """Tell the other processes how process 0 goes on, once."""
        if not self.told:
            self.tell(message)

    def part(self, windows: Sequence[int], together: int = 1) -> list[int]:
        """Return this process's windows; those of one unit of ``together`` stay together.

        All processes have as many: where they do not come out even, the last windows are passed more than once.
        """
        units = [list(windows[start : start + together]) for start in range(0, len(windows), together)]
        each = -(-len(units) // self.size)
        own = units[self.rank * each : (self.rank + 1) * each]
        own += [units[-1]] * (each - len(own))
        return [window for unit in own for window in unit]

    def together(self, windows: Sequence[int], own: Sequence[int], values: Tensor) -> Tensor:
        """Collect the fp64 values of all ``windows`` from those of each process's own."""
        parts = self.gathered([*zip(own, values.tolist(), strict=True)])
        known = dict(pair for part in parts for pair in part)
        return torch.tensor([known[window] for window in windows], dtype=torch.float64)

    def tell(self, message: Any = None) -> Any:
        """Return what process 0 says; the others wait for it."""
        self.told = True
        return self.gathered(message)[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return what each process says, in their order; all wait for all."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def shard(self, layer: TrainedLayer, dtype: torch.dtype) -> None:
        """Divide a loaded layer and its masters among several processes; passes are in ``dtype``."""
        if self.size == 1:
            return
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offload)


@contextmanager
def joined(device: str, offload: bool) -> Iterator[World]:
    """Join the processes of torchrun for the block, each with its own GPU; alone where there is one."""
    if (size := launched()) == 1:
        yield World()
        return
    here, gpu = torch.device("cpu"), None
    if device != "cpu" and torch.cuda.is_available():
        here = gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=WAIT, device_id=gpu)
    try:
        yield World(dist.get_rank(), size, here, offload)
    except RuntimeError as error:
        if any(word in str(error) for word in ("Connection closed", "Connection reset", "NCCL", "Broken pipe", "gloo")):
            raise FistaPrunerError("another process of this run has ended: its own message says why") from error
        raise
    finally:
        dist.destroy_process_group()


class ShardedSnapshots(Snapshots):
    """Snapshots that all processes write together: folders of torch's distributed checkpoint.

    The record of a state is written last: a folder without one does not count.
    """

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder)
        self.world = world

    def write(self, fingerprint: str, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :class:`~fistapruner.runs.store.Snapshots`; called by all processes."""
        from torch.distributed.checkpoint.state_dict_saver import save

        path = self.folder / f"{step:08d}"
        save(dict(tensors), checkpoint_id=path)
        if self.world.rank == 0:
            content = {"fingerprint": fingerprint, "step": step, "values": dict(values)}
            write_sealed_json(path.with_suffix(".json"), content)
            self.tidy(step)
        self.world.tell()

    def tidy(self, step: int) -> None:
        """See :class:`~fistapruner.runs.store.Snapshots`; the tensors of a state are a folder."""
        super().tidy(step)
        for path in self.folder.glob("[0-9]" * 8):
            if not path.with_suffix(".json").exists():
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, fingerprint: str, last: int, trained: Any) -> dict[str, Any] | None:
        """Load the newest state of a run up to a step in all processes; return its plain values, or None."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        found = []
        for step in self.numbers() if self.world.rank == 0 else ():
            with suppress(OSError, ValueError, KeyError, FistaPrunerError):
                content = read_sealed_json(self.folder / f"{step:08d}.json")
                if step <= last and content["fingerprint"] == fingerprint:
                    found = [step, dict(content["values"])]
        if not (found := self.world.tell(found)):
            return None
        step, values = found
        reader = FileSystemReader(self.folder / f"{step:08d}")
        tensors: dict[str, Tensor] = {}
        for full in reader.read_metadata().state_dict_metadata:
            kind, _, name = full.partition("/")
            tensors[full] = torch.zeros(()) if kind == "step" else torch.empty_like(trained.parameters[name].detach())
        load(tensors, storage_reader=reader)
        trained.load(tensors)
        return dict(values)

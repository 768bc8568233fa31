"""Train in several processes of torchrun, by PyTorch's fully_shard and distributed checkpoints.

Every process holds a part of each decoder layer's weights, masters and moments (FSDP2) and all embeddings, and passes
its part of a step's windows. Process 0 prepares the run, writes states' records and the result; the run directory must
be on a disk that all processes see. A run may go on with another number of processes; its last bits then differ.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import FistaPrunerError
from ..runs.store import Snapshots
from ..runtime.files import disk_errors, read_sealed_json, sha256_file, write_sealed_json
from ..runtime.machine import launched
from .masked import Masters, TrainedLayer

WAIT = timedelta(hours=6)
"""How long a process waits for process 0, which may cut text or compute the dense model's predictions."""


CPU = torch.device("cpu")


@dataclass
class World:
    """The processes of a run.

    Args:
        rank: of this one; ``size``: how many there are.
        device: of this process.
        offload: keep what is sharded in main memory while it is not needed.

    Attributes:
        told: process 0 has told the others something.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    offload: bool = False
    told: bool = False

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
        if self.size == 1:
            return values
        found = torch.full((max(windows, default=0) + 1,), -torch.inf, dtype=torch.float64, device=self.device)
        found[list(own)] = values.to(self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found[list(windows)].cpu()

    def mean(self, value: float) -> float:
        """Return the mean over the processes."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return float(found) / self.size

    def tell(self, message: Any = None) -> Any:
        """Return what process 0 says; the others wait for it."""
        if self.size == 1:
            return message
        self.told, said = True, [message]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def shard(self, layer: TrainedLayer, dtype: torch.dtype) -> None:
        """Divide a loaded layer and its masters among the processes.

        Args:
            layer: the layer.
            dtype: of the passes.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, offload_policy=CPUOffloadPolicy() if self.offload else OffloadPolicy()
        )


@contextmanager
def joined(device: str, offload: bool) -> Iterator[World]:
    """Join the processes of torchrun for the block; alone where there is one.

    Args:
        device: as the recipe says it; with CUDA every process takes the GPU of its local rank.
        offload: see :class:`World`.

    Raises:
        FistaPrunerError: another process has ended.
    """
    if (size := launched()) == 1:
        yield World()
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    if "MASTER_ADDR" not in os.environ:
        raise FistaPrunerError(
            f"WORLD_SIZE is {size}, and no launcher is there: begin with torchrun, or unset WORLD_SIZE"
        )
    dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT, device_id=here if cuda else None)
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

    Args:
        folder: where they are.
        world: the processes.
    """

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder)
        self.world = world

    def write(self, fingerprint: str, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :class:`~fistapruner.runs.store.Snapshots`; called by all processes."""
        from torch.distributed.checkpoint.state_dict_saver import save

        folder, record = self.folder / f"{step:08d}", self.folder / f"{step:08d}.json"
        if self.world.rank == 0:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                record.unlink(missing_ok=True)
        self.world.tell()
        save(dict(tensors), checkpoint_id=folder)
        if self.world.rank == 0:
            files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
            write_sealed_json(
                record, {"fingerprint": fingerprint, "step": step, "values": dict(values), "files": files}
            )
            self.tidy(step)
        self.world.tell()

    def tidy(self, step: int) -> None:
        """See :class:`~fistapruner.runs.store.Snapshots`; the tensors of a state are a folder."""
        super().tidy(step)
        kept = {f"{other:08d}" for other in self.numbers()}
        for path in self.folder.glob("[0-9]" * 8):
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def whole(self, fingerprint: str, last: int) -> tuple[int, dict[str, Any]] | None:
        """Find the newest whole state up to a step: its step and plain values."""
        for step in reversed([step for step in self.numbers() if step <= last]):
            folder = self.folder / f"{step:08d}"
            try:
                content = read_sealed_json(folder.with_suffix(".json"))
                files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
                if content["fingerprint"] == fingerprint and content["files"] == files:
                    return step, dict(content["values"])
            except (OSError, ValueError, KeyError, FistaPrunerError):
                continue
        return None

    def restore(self, fingerprint: str, last: int, trained: Masters) -> dict[str, Any] | None:
        """Load the newest whole state up to a step into what is trained.

        Returns:
            Its plain values; None where there is no such state.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        found = self.world.tell(self.whole(fingerprint, last) if self.world.rank == 0 else None)
        if found is None:
            return None
        step, values = found
        reader = FileSystemReader(self.folder / f"{step:08d}")
        tensors: dict[str, Tensor] = {}
        for full in reader.read_metadata().state_dict_metadata:
            kind, _, name = full.partition("/")
            parameter = trained.parameters[name].detach()
            tensors[full] = torch.zeros(()) if kind == "step" else torch.empty_like(parameter)
        load(tensors, storage_reader=reader)
        trained.load(tensors)
        return dict(values)

"""Processes that ``torchrun`` or ``accelerate launch`` started for one run.

They are ranks of ``torch.distributed`` and share the passes of a step: pass p is done by rank ``p mod size``. Whatever
is added over passes is added in the order of the passes, so results do not depend on the number of ranks. Rank 0 alone
decides, and writes what all read. Objects go through the backend gloo, sums of tensors on GPUs through nccl.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import FistaPrunerError, OtherRankFailed, one_line
from .devices import choose_device, device_title
from .launcher import launched
from .machine import versions

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others.

Gloo notices at once that a rank has ended, whatever this is. Nccl does not: there ``torchrun``, or what else has
started the ranks, ends the others.
"""

MEETING = timedelta(minutes=15)
"""How long a process waits until all that were started are there."""

VISIBLE_SECONDS = 60.0
"""How long a file that another rank wrote may take to be seen; network file systems remember what was not there."""

INTERRUPTED = "interrupted"
"""The message of a rank that was interrupted."""

_runs = itertools.count()
"""Numbers the runs of this process: every rank takes part in the same runs."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run. Without arguments there are no others.

    Args:
        rank: number of this process.
        size: number of processes.
        local_size: number of them on this machine.
        group: the process group for objects and for tensors in main memory.
        number: of the run, in this process.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    group: Any = None
    number: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides and writes."""
        return self.rank == 0

    def passes(self, count: int) -> range:
        """Return the numbers of the passes of this rank, of ``count`` in all."""
        return range(self.rank, count, self.size)

    def mine(self, windows: Sequence[int], batch_size: int) -> list[int]:
        """Return the windows of this rank's passes, each of ``batch_size`` windows or, the last one, fewer."""
        starts = range(0, len(windows), batch_size)
        return [window for number in self.passes(len(starts)) for window in windows[starts[number] :][:batch_size]]

    def share(self, value: T | None = None, source: int = 0) -> T:
        """Return the value of one rank on all ranks; that of rank 0 unless ``source`` is given."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        values = [value]
        with self.peers_may_fail():
            torch.distributed.broadcast_object_list(values, src=source, group=self.group)
        return values[0]  # type: ignore[return-value]

    def send(self, tensors: Mapping[str, Tensor], source: int, device: torch.device) -> dict[str, Tensor]:
        """Send the fp32 tensors of one rank to all.

        Args:
            tensors: of rank ``source``; those of the others do not count.
            source: the rank that has them.
            device: of the tensors.

        Returns:
            The tensors of ``source``; elsewhere copies, each in memory of its own.
        """
        shapes = self.share({name: tensor.shape for name, tensor in tensors.items()}, source)
        if self.size == 1 or not shapes:
            return dict(tensors) if self.rank == source else {}
        if self.rank == source:
            numbers = torch.cat([tensor.flatten() for tensor in tensors.values()])
        else:
            count = sum(shape.numel() for shape in shapes.values())
            numbers = torch.empty(count, dtype=torch.float32, device=device)
        with self.peers_may_fail():
            torch.distributed.broadcast(numbers, src=source, group=self.group_of(numbers))
        if self.rank == source:
            return dict(tensors)
        parts = numbers.split([shape.numel() for shape in shapes.values()])
        # Copied: products of tensors that are not aligned in memory may round otherwise.
        return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.peers_may_fail():
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def wait_for_file(self, path: Path) -> None:
        """Wait until a file that another rank has written can be seen.

        Raises:
            FistaPrunerError: it cannot.
        """
        end = time.monotonic() + VISIBLE_SECONDS
        while not path.exists():
            if self.size == 1 or time.monotonic() > end:
                raise FistaPrunerError(
                    f"{path}, which another process has written, is not there: all machines must share the run's folder"
                )
            time.sleep(0.2)

    def group_of(self, tensor: Tensor) -> Any:
        """Return the process group for a tensor's device; None is the default one."""
        return self.group if tensor.device.type == "cpu" else None

    @contextmanager
    def peers_may_fail(self) -> Iterator[None]:
        """Turn the error of a connection that another rank has left into one with the message of that rank.

        Raises:
            OtherRankFailed: another rank has failed, and said why.
            KeyboardInterrupt: another rank was interrupted, and so are all.
            FistaPrunerError: the connection has failed, or another rank has ended without a word.
            torch.OutOfMemoryError: a GPU has no memory for an exchange.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "out of memory" in str(error).lower():  # nccl's errors have no type of their own
                raise torch.OutOfMemoryError(str(error)) from None
            with suppress(RuntimeError, ValueError):
                store, key = self._message()
                if store.check([key]):
                    message = store.get(key).decode()
                    raise (KeyboardInterrupt if message == INTERRUPTED else OtherRankFailed(message)) from None
            fault = one_line(error, 100)
            raise FistaPrunerError(
                f"another process of this run has ended, or cannot be reached ({fault}); give the same command again"
            ) from None

    def report_failure(self, message: str) -> None:
        """Leave a message for the others, unless one of them has left one."""
        with suppress(RuntimeError, ValueError):
            store, key = self._message()
            if not store.check([key]):
                store.set(key, message)

    def _message(self) -> tuple[Any, str]:
        """Return the store of the message of the first rank that fails, and its key."""
        return torch.distributed.distributed_c10d._get_default_store(), f"fistapruner/failed/{self.number}"

    def sums(self, count: int) -> OrderedSum:
        """Begin a sum of ``count`` contributions, one a pass."""
        return OrderedSum(self, count)

    def windows(self, sums: Tensor | None, windows: int, batch_size: int) -> Tensor:
        """Join what every rank has of its own windows (:meth:`mine`).

        Args:
            sums: (k, windows of this rank); None where it has none.
            windows: of all ranks.
            batch_size: windows in a pass.

        Returns:
            (k, windows), in order, on all ranks.

        Raises:
            FistaPrunerError: a rank has sent something else, so it does other work.
        """
        if self.size == 1:
            assert sums is not None
            return sums
        parts = self.gather(sums)
        known = next((part for part in parts if isinstance(part, Tensor)), torch.empty(0, 0))
        whole = known.new_zeros(len(known), windows)
        for rank, part in enumerate(parts):
            mine = Ranks(rank, self.size).mine(range(windows), batch_size)
            if part is None and not mine:
                continue
            if not isinstance(part, Tensor) or part.shape != (len(known), len(mine)):
                sent = f"{type(part).__name__} {list(part.shape) if isinstance(part, Tensor) else part}"
                raise FistaPrunerError(
                    f"rank {rank} has sent {sent[:60]} for figures of {len(mine)} windows: the processes do not do the "
                    "same work; start all with one command, on machines that see the same files"
                )
            whole[:, mine] = part
        return whole


ALONE = Ranks()
"""One process for the whole run."""


class OrderedSum:
    """An fp32 sum of tensors by name over passes, in the order of the passes, the same bits on all ranks.

    With several ranks a reduce-scatter and an all-gather: every rank adds one slice of the numbers, of all passes in
    order. So a rank sends and receives no more than for an ordinary all-reduce. All passes have the same names and
    shapes.

    Args:
        ranks: the processes. A rank that has no pass adds tensors all the same, which do not count.
        count: passes of all ranks.
    """

    def __init__(self, ranks: Ranks, count: int) -> None:
        self.ranks, self.count = ranks, count
        self._done = 0  # passes of this rank
        self._shapes: dict[str, torch.Size] = {}
        self._sums: dict[str, Tensor] = {}
        self._slice: Tensor | None = None  # of the sum

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a pass of this rank; its passes come in order."""
        if self.ranks.size == 1:
            for name, tensor in tensors.items():
                # Not in place: autograd may give one tensor for two names.
                self._sums[name] = self._sums[name] + tensor if name in self._sums else tensor.float()
            return
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        numbers = [tensor.flatten().float() for tensor in tensors.values()]
        length = sum(map(len, numbers))
        if length:
            padding = numbers[0].new_zeros(-length % self.ranks.size)
            self._exchange(torch.cat([*numbers, padding]))
        self._done += 1

    def _exchange(self, own: Tensor) -> None:
        """Send one slice of a pass to every rank, and add what comes to this rank's slice of the sum."""
        ranks, received = self.ranks, torch.empty_like(own)
        with ranks.peers_may_fail():
            torch.distributed.all_to_all_single(received, own, group=ranks.group_of(own))
        passes = min(ranks.size, self.count - self._done * ranks.size)
        for part in received.view(ranks.size, -1)[:passes]:
            self._slice = part.clone() if self._slice is None else self._slice.add_(part)

    def complete(self) -> None:
        """Take part in the exchange of the last pass where others have one more; after this rank's own passes."""
        if self._slice is not None and self._done * self.ranks.size < self.count:
            self._exchange(self._slice.new_zeros(len(self._slice) * self.ranks.size))
            self._done += 1

    def result(self) -> dict[str, Tensor]:
        """Return the sum, when :meth:`complete`."""
        if self.ranks.size == 1:
            return self._sums
        if self._slice is None:  # nothing but names
            return {}
        whole = self._slice.new_empty(len(self._slice) * self.ranks.size)
        with self.ranks.peers_may_fail():
            slices = list(whole.chunk(self.ranks.size))
            torch.distributed.all_gather(slices, self._slice, group=self.ranks.group_of(whole))
        found, start = {}, 0
        for name, shape in self._shapes.items():
            found[name] = whole[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return found


@contextmanager
def ranks_of_run(device: str) -> Iterator[Ranks]:
    """Join the other processes of a run for the block, where a launcher has started several.

    An error in the block ends the others, too: they raise :class:`OtherRankFailed`, or KeyboardInterrupt where it was
    one. A process group that is there already is used.

    Args:
        device: that the recipe names.

    Raises:
        FistaPrunerError: torch without ``torch.distributed``, the others cannot be reached or differ in device or
            libraries, or two have one GPU.
    """
    size = launched()
    own = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if own and size == 1:
        yield ALONE
        return
    number = next(_runs)
    nccl = _join(device, number) if own else False
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "") or size)
    ranks = Ranks(rank, size, local_size, group, number) if size > 1 else ALONE
    failed = True
    try:
        # One that leaves at once would break the connections of those that still make them.
        _check_alike(ranks, device)
        if nccl:
            _check_gpus(ranks)
        yield ranks
        failed = False
    except OtherRankFailed:
        raise
    except BaseException as error:
        if size > 1:
            said = f"rank {rank}: {str(error) or type(error).__name__}"
            ranks.report_failure(INTERRUPTED if isinstance(error, KeyboardInterrupt) else said)
        if rank and isinstance(error, FistaPrunerError):
            error.args = (f"rank {rank}: {error}",)
        raise
    finally:
        # To end nccl takes all processes, and others may wait for this one: the end of the process must do.
        if not (failed and nccl):
            with suppress(RuntimeError, ValueError):
                torch.distributed.destroy_process_group(None if own else group)


def _join(device: str, number: int) -> bool:
    """Make the process group that a launcher's environment variables describe; return whether it has nccl.

    Args:
        device: that the recipe names.
        number: of the run, in this process.
    """
    if not torch.distributed.is_available():
        raise FistaPrunerError("several processes were started, and this PyTorch has no torch.distributed")
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(choose_device(device))
    try:
        store, rank, size = _meet(number)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise FistaPrunerError(
            f"WORLD_SIZE is {launched()}, and the other processes cannot be reached: {' '.join(str(error).split())}"
        ) from None
    return gpu


def _check_alike(ranks: Ranks, device: str) -> None:
    """Refuse ranks with other devices or libraries.

    These round otherwise, and sums of one backend wait forever for those of another.
    """
    found = versions()
    own = {"device": device_title(choose_device(device))}
    own |= {package: found.get(package, "none") for package in ("fistapruner", "torch", "transformers")}
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, 1):
        for what, value in other.items():
            if value != first[what]:
                raise (FistaPrunerError if ranks.first else OtherRankFailed)(
                    f"rank {rank} has {what} {value}, and rank 0 has {first[what]}: all processes need the same"
                )


def _meet(number: int) -> tuple[Any, int, int]:
    """Wait until all processes are there; return their store, this one's rank, and their number.

    PyTorch lets no signal through while it waits, so a thread waits, and an interruption leaves it behind.
    """
    met: list[tuple[Any, int, int] | Exception] = []

    def meet() -> None:
        try:
            meeting = torch.distributed.rendezvous("env://", timeout=MEETING)  # type: ignore[attr-defined]
            store, rank, size = next(meeting)
            store.set(f"fistapruner/here/{number}/{rank}", "")
            store.wait([f"fistapruner/here/{number}/{other}" for other in range(size)], MEETING)
            store.set_timeout(PATIENCE)
            met.append((store, rank, size))
        except Exception as error:
            met.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join()
    if isinstance(met[0], Exception):
        raise met[0]
    return met[0]


def _check_gpus(ranks: Ranks) -> None:
    """Refuse two ranks on one GPU now: nccl does at its first sum, after the long work before it."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = ranks.gather((socket.gethostname(), str(gpu.uuid)))
    for rank, place in enumerate(found):
        if (other := found.index(place)) < rank:
            raise FistaPrunerError(
                f"ranks {other} and {rank} take the same GPU of {place[0]}: start one process for each GPU, with its "
                "number in LOCAL_RANK as torchrun does, and name device cuda without a number, or cpu"
            )

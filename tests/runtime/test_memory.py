"""What a process can still get, of the machine and of the control groups it is in."""

from __future__ import annotations

import resource
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner.measure import speed as variants
from fistapruner.measure.generations import generate_side_by_side
from fistapruner.measure.speed import Variant
from fistapruner.pruning.workers import default_threads
from fistapruner.runtime import devices
from fistapruner.settings.execution import Execution

V1, V2 = "4:memory:/{}\n3:cpu,cpuacct:/elsewhere\n0::/\n", "0::/{}\n"


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    """A control group's files as the kernel writes them; a third of the cache was read more than once."""
    folder.mkdir(parents=True, exist_ok=True)
    names = devices.MEMORY_FILES[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    once, more = cache - cache // 3, cache // 3
    held = {"anon": 5, "inactive_anon": 3, "inactive_file": once, "active_file": more}
    if version == 1:  # there the totals count, which have the groups below in them
        held |= {"inactive_file": 1, "active_file": 1, "total_inactive_file": once, "total_active_file": more}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in held.items()))


@pytest.mark.parametrize("version", [1, 2])
def test_every_group_above_the_process_limits_it(tmp_path: Path, version: int) -> None:
    unlimited = "9223372036854771712" if version == 1 else "max"
    top = tmp_path / "memory" if version == 1 else tmp_path
    own = tmp_path / "cgroup"
    own.write_text((V1 if version == 1 else V2).format("slurm/job_7/step_0"))
    group(top / "slurm", version, "4000", 1500, 100)  # of the whole node
    group(top / "slurm/job_7", version, "2000", 1200, 300)
    group(top / "slurm/job_7/step_0", version, unlimited, 1200, 300)
    left = list(devices.left_in_groups(own, tmp_path))
    assert sorted(left)[:2] == [1100, 2600]
    assert len(left) == (3 if version == 1 else 2)


@pytest.mark.parametrize("path", ["docker/abc", "", "../.."])
def test_inside_a_container_its_group_is_the_topmost_one(tmp_path: Path, path: str) -> None:
    own = tmp_path / "cgroup"
    own.write_text(V2.format(path))
    group(tmp_path / "mounted", 2, "1000", 900, 50)
    assert list(devices.left_in_groups(own, tmp_path / "mounted")) == [150]


def test_free_memory_is_the_least_of_the_machine_and_the_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    assert list(devices.left_in_groups(own, tmp_path)) == []
    assert 0 < devices.free_memory(own, tmp_path) <= psutil.virtual_memory().total
    own.write_text(V2.format("job"))
    group(tmp_path / "job", 2, str(4 * 2**20), 2**20, 0)
    assert devices.free_memory(own, tmp_path) == 3 * 2**20
    group(tmp_path / "job", 2, str(4 * 2**20), 4 * 2**20 + 1, 0)
    assert devices.free_memory(own, tmp_path) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="macOS ignores these limits")
@pytest.mark.parametrize(("name", "field"), [("RLIMIT_AS", "vms"), ("RLIMIT_DATA", "data")])
def test_free_memory_keeps_within_the_limits_of_the_process(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str
) -> None:
    used = getattr(psutil.Process().memory_info(), field)
    most = used + 64 * 2**20
    limits = {getattr(resource, name): (most, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, (resource.RLIM_INFINITY,) * 2))
    assert 32 * 2**20 < devices.free_memory() < 96 * 2**20  # what the process holds may change meanwhile


@pytest.mark.parametrize("version", [1, 2])
def test_cores_are_those_of_the_least_quota_above_the_process(tmp_path: Path, version: int) -> None:
    top = tmp_path / "cpu" if version == 1 else tmp_path
    own = tmp_path / "cgroup"
    own.write_text(("4:cpu,cpuacct:/{}\n3:memory:/elsewhere\n0::/\n" if version == 1 else V2).format("docker/abc"))
    for folder, quota in (("docker", 800_000), ("docker/abc", 150_000), ("", None)):
        (top / folder).mkdir(parents=True, exist_ok=True)
        if version == 1:
            (top / folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
            (top / folder / "cpu.cfs_period_us").write_text("100000\n")
        else:
            (top / folder / "cpu.max").write_text(f"{'max' if quota is None else quota} 100000\n")
    assert list(devices.quotas(own, tmp_path)) == [2, 8]


def test_a_quota_is_the_number_of_cores_and_of_a_serial_runs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "quotas", lambda: [1])
    assert devices.available_cores() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert default_threads(Execution()) == 1


def test_the_peak_holds_what_was_held() -> None:
    devices.reset_peak_memory(torch.device("cpu"))
    before = devices.resident_memory()
    block = torch.ones(2**24)  # 64 MiB
    del block
    assert devices.peak_memory() >= before + 2**25


def test_evaluation_and_speed_keep_within_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        """Stands for the process that measures."""

    counts: list[int] = []

    def start(load: object, variant: Variant, *, threads: int, **_: int) -> None:
        counts.append(threads)
        raise Started

    monkeypatch.setattr(devices, "quotas", lambda: [1])
    monkeypatch.setattr(variants, "ProcessPoolExecutor", lambda *_: nullcontext(SimpleNamespace(submit=start)))
    folder = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    with devices.cpu_threads(2):
        settings = {"seqlen": 16, "windows": 1}
        fp.evaluate(folder, "python", tick=lambda *_: counts.append(torch.get_num_threads()), **settings)
        models = {"dense": folder}
        generate_side_by_side(models, torch.device("cpu"), tick=lambda *_: counts.append(torch.get_num_threads()))
        with pytest.raises(Started):
            variants.compare([Variant("dense", folder)])
        assert torch.get_num_threads() == 2
    assert len(counts) > 2
    assert set(counts) == {1}

"""What a process can still get, of the machine and of the control groups it is in."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import fistapruner as fp
import tiny
from fistapruner.measure import speed as variants
from fistapruner.measure.run import generate_side_by_side
from fistapruner.measure.speed import Variant
from fistapruner.pruning.workers import default_threads
from fistapruner.runtime import devices
from fistapruner.settings.base import Execution

GROUP = "4:memory:/elsewhere\n0::/{}\n"


def group(folder: Path, limit: str, used: int, cache: int) -> None:
    """A control group's files as the kernel writes them; a third of the cache was read more than once."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    held = {"anon": 5, "inactive_anon": 3, "inactive_file": cache - cache // 3, "active_file": cache // 3}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in held.items()))


def test_every_group_above_the_process_limits_it(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text(GROUP.format("slurm/job_7/step_0"))
    group(tmp_path / "slurm", "4000", 1500, 100)  # of the whole node
    group(tmp_path / "slurm/job_7", "2000", 1200, 300)
    group(tmp_path / "slurm/job_7/step_0", "max", 1200, 300)
    assert list(devices.left_in_groups(own, tmp_path)) == [1100, 2600]


@pytest.mark.parametrize("path", ["docker/abc", "", "../.."])
def test_inside_a_container_its_group_is_the_topmost_one(tmp_path: Path, path: str) -> None:
    own = tmp_path / "cgroup"
    own.write_text(GROUP.format(path))
    group(tmp_path / "mounted", "1000", 900, 50)
    assert list(devices.left_in_groups(own, tmp_path / "mounted")) == [150]


def test_free_memory_is_the_least_of_the_machine_and_the_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    assert list(devices.left_in_groups(own, tmp_path)) == []
    assert 0 < devices.free_memory(own, tmp_path) <= psutil.virtual_memory().total
    own.write_text(GROUP.format("job"))
    group(tmp_path / "job", str(4 * 2**20), 2**20, 0)
    assert devices.free_memory(own, tmp_path) == 3 * 2**20
    group(tmp_path / "job", str(4 * 2**20), 4 * 2**20 + 1, 0)
    assert devices.free_memory(own, tmp_path) == 0


def test_cores_are_those_of_the_least_quota_above_the_process(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text(GROUP.format("docker/abc"))
    for folder, quota in (("docker", "800000"), ("docker/abc", "150000"), ("", "max")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{quota} 100000\n")
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

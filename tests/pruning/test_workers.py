"""Who works on which layer changes no bit: serial, several processes, Ray, parts on several machines, dying workers."""

import multiprocessing
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny
from fistapruner.errors import FistaPrunerError
from fistapruner.pruning.run import prune, resume
from fistapruner.pruning.workers import room_for_workers
from fistapruner.runs.log import Listener
from forked import FORKS

SETTINGS: dict[str, Any] = {
    "method": "sparsegpt",
    "propagate": "dense",
    "dense_target": "dense",
    "residual": "correct",
    "calibration": {"source": "python", "samples": 6, "seqlen": 24},
}
LAYERS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("executors") / "model", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, bytes]:
    """The checkpoint of a serial run on one thread."""
    out = model.with_name("serial")
    prune(str(model), out, **SETTINGS, execution={"threads": 1})
    return tiny.weights(out)


PROCESSES: dict[str, Any] = {"executor": "process", "workers": 2, "threads": 1}


def test_workers_end_with_the_run(model: Path, tmp_path: Path) -> None:
    """Also where it is killed and can end nothing."""
    run = FORKS.Process(target=prune, args=(str(model), tmp_path / "run"), kwargs={**SETTINGS, "execution": PROCESSES})
    run.start()
    children: list[psutil.Process] = []
    while len(children) < 2:
        assert run.is_alive()
        found = psutil.Process(run.pid).children()
        with suppress(psutil.Error):  # one that has just ended
            children = [child for child in found if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.01)
    run.kill()
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive


def test_two_processes(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They import nothing from the current folder."""
    seen: list[int] = []
    (tmp_path / "psutil.py").write_text("open('trace', 'w')")
    monkeypatch.chdir(tmp_path)

    class Seen(Listener):
        def layer(self, entry: Any) -> None:
            seen.append(entry.index)

    prune(str(model), tmp_path / "run", **SETTINGS, execution=PROCESSES, listener=Seen())
    assert sorted(seen) == list(range(LAYERS))
    assert tiny.weights(tmp_path / "run") == expected
    assert not (tmp_path / "trace").exists()


DEADLY = """
import os
import time
from pathlib import Path
from fistapruner.solvers import METHODS

class Deadly:
    def solve(self, problem, constraint, start=None):
        if "layers.3.self_attn.o_proj" in problem.name:
            with Path({log!r}).open("a") as log:
                log.write("died\\n")
            if len(Path({log!r}).read_text().splitlines()) <= {deaths}:
                while not Path({awaited!r}).exists():
                    time.sleep(0.01)
                os._exit(1)
        return METHODS["sparsegpt"]().solve(problem, constraint, start)
"""


@pytest.mark.parametrize("deaths", [2, 99])
def test_workers_that_die_are_replaced(
    model: Path, expected: dict[str, bytes], tmp_path: Path, deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layers are done again; a layer that kills its workers every time stops the run, which then goes on."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: FORKS)
    log, file, out = tmp_path / "log", tmp_path / "mine.py", tmp_path / "run"
    awaited = log if deaths == 2 else out / "layers" / f"{LAYERS - 1:04d}.json"  # the other worker's layer
    file.write_text(DEADLY.format(log=str(log), deaths=deaths, awaited=str(awaited)))
    settings = {**SETTINGS, "method": f"{file}:Deadly"}
    if deaths == 2:
        prune(str(model), out, **settings, execution=PROCESSES)
    else:
        with pytest.raises(FistaPrunerError, match=r"layer 3: workers died 3 times.* again with fewer workers"):
            prune(str(model), out, **settings, execution=PROCESSES)
        assert len(list((out / "layers").glob("*.json"))) == LAYERS - 1
        log.write_text("died\n" * deaths)
        resume(out)
    assert len(log.read_text().splitlines()) == deaths + 1
    assert not (out / "hidden").exists()
    assert tiny.weights(out) == expected


def test_layers_that_wait_for_each_other_are_pruned_here(model: Path, tmp_path: Path) -> None:
    """With propagate=pruned, whatever the executor."""
    said, settings = tiny.Said(), {**SETTINGS, "propagate": "pruned"}
    prune(str(model), tmp_path / "serial", **settings, execution={"threads": 1})
    out = tmp_path / "run"
    prune(str(model), out, **settings, execution=PROCESSES, listener=said)
    assert any("propagate=pruned" in message and "process" in message for message in said.sentences)
    assert not any("worker processes" in message for message in said.sentences)
    assert tiny.weights(out) == tiny.weights(tmp_path / "serial")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{closed}", r"Ray cluster '127\.0\.0\.1:\d+', .* cannot be reached: .*refused"),
        ("ray://127.0.0.1:10001", "HOST:PORT or auto, cannot be reached"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(
    model: Path, tmp_path: Path, address: str, message: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(closed=free.getsockname()[1])  # nothing listens there
        with pytest.raises(FistaPrunerError, match=message):
            prune(str(model), tmp_path / "run", **SETTINGS, execution={"executor": "ray", "address": address})


def test_a_ray_worker_has_its_cores_and_its_gpu_on_one_node() -> None:
    """Ray waits forever for a place that no node has."""
    sizes = [{"CPU": 6.0}, {"CPU": 7.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}, {"GPU": 2.0}]
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": size} for size in sizes]
    nodes += [{"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}, {"Alive": False}]
    assert room_for_workers(nodes, 4, cuda=False) == 4  # of 21 cores
    assert room_for_workers(nodes, 4, cuda=True) == 3  # of 7 GPUs
    assert room_for_workers(nodes, 9, cuda=False) == 0


@pytest.mark.slow
def test_ray_worker_and_head_killed(tmp_path: Path) -> None:
    """A Ray worker dies: its layer is done again. The whole cluster dies: the run stops, and resumes without it."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    layers = 24  # so that some are left when processes are killed
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=layers)
    prune(str(model), tmp_path / "serial", **SETTINGS, execution={"threads": 1})
    expected = tiny.weights(tmp_path / "serial")

    def cut_short(out: Path, workers: int, *names: str) -> int:
        """Kill the first process of each of these names when a layer is done; the exit status of the run."""
        execution = {"executor": "ray", "workers": workers, "threads": 1}
        process = FORKS.Process(target=prune, args=(str(model), out), kwargs={**SETTINGS, "execution": execution})
        process.start()
        victims: dict[str, psutil.Process] = {}  # found before: a search takes as long as several layers
        while len(victims) < len(names) or not list((out / "layers").glob("*.json")):
            assert process.is_alive()
            for child in psutil.Process(process.pid).children(recursive=True) if len(victims) < len(names) else ():
                with suppress(psutil.Error, IndexError):
                    program = child.cmdline()[0].rpartition("/")[2]
                    victims |= {name: child for name in names if name not in victims and program.startswith(name)}
            time.sleep(0.01)
        for victim in victims.values():
            victim.kill()
        process.join()
        return process.exitcode

    out = tmp_path / "run"
    assert cut_short(out, 2, "ray::prune_one") == 0
    assert tiny.weights(out) == expected

    out = tmp_path / "headless"
    # The worker, too: it and the run go on without the rest of the cluster, for as long as many of these layers take.
    assert cut_short(out, 1, "gcs_server", "raylet", "ray::prune_one") != 0
    assert len(list((out / "layers").glob("*.json"))) < layers
    prune(str(model), out, **SETTINGS, execution={"threads": 1})
    assert tiny.weights(out) == expected

"""A run whose worker, silos or broker are killed ends with the adapters of one that nothing disturbed."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from silo_agent.processes import Process, Processes

NAMES = ("north", "south")
STEPS = 5
TRAIN = (
    *("silo", "train", "--model", "tiny", "--head", "1", "--tail", "2", "--wire", "exact", "--noise", "0.05"),
    *("--lr", "0.0005", "--clip", "0.5", "--batch", "2", "--accumulate", "2"),
    *("--run", "clinics", "--silos", "2", "--steps", str(STEPS), "--progress", "jsonl", "--wait", "40"),
)


class Clinics:
    """Brokers, workers with one place for their state, and two silos that train together."""

    def __init__(self, processes: Processes, data: Path, place: Path, brokers: int = 1) -> None:
        self._processes, self._data, self._place = processes, data, place
        self.brokers: list[str] = []
        self.broker_processes: list[Process] = []
        for _ in range(brokers):
            self.brokers.append(processes.broker())
            self.broker_processes.append(processes["broker"])
        self._at = [option for broker in self.brokers for option in ("--broker", broker)]
        self.lines: dict[str, list[str]] = {name: [] for name in NAMES}
        self._told = threading.Condition()

    def worker(self, name: str) -> Process:
        state = ("--state", str(self._place / "state"))
        return self._processes.start(name, "worker", *self._at, "--model", "tiny", *state)

    def restart_broker(self) -> None:
        """Killed, and started again where it was."""
        self.broker_processes[0].stop(signal.SIGKILL)
        self._processes.start("broker", "broker", "--listen", self.brokers[0])

    def silo(self, name: str, *more: str) -> Process:
        def told(line: str) -> None:
            with self._told:
                self.lines[name].append(line)
                self._told.notify_all()

        # A fixed noise is the same in the run that nothing disturbs.
        options = ("--name", name, "--data", str(self._data), "--noise-seed", str(NAMES.index(name)))
        out = ("--out", str(self._place / name))
        return self._processes.start(name, *TRAIN, *self._at, *options, *out, *more, on_line=told)

    def reached(self, name: str, step: int) -> None:
        """Wait until a silo has reported this step."""
        with self._told:
            done = self._told.wait_for(lambda: self._last(name) >= step, timeout=60)
        assert done, f"{name} got as far as step {self._last(name)}"

    def _last(self, name: str) -> int:
        return max((json.loads(line)["step"] for line in self.lines[name]), default=0)

    def end(self, *silos: Process) -> None:
        for silo in silos:
            silo.wait(90)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, chats_in: Callable[[Path], Path]) -> Path:
    """Where the adapters of a run are that nothing disturbed, with a worker that saves nothing."""
    place = tmp_path_factory.mktemp("undisturbed")
    with Processes(place / "logs") as processes:
        clinics = Clinics(processes, chats_in(place), place)
        processes.start("worker", "worker", "--broker", clinics.brokers[0], "--model", "tiny")
        clinics.end(*(clinics.silo(name) for name in NAMES))
    return place


@pytest.fixture
def clinics(processes: Processes, chats: Path, tmp_path: Path) -> Clinics:
    return Clinics(processes, chats, tmp_path)


def assert_equal(place: Path, undisturbed: Path) -> None:
    for name in NAMES:
        files = [at / name / "adapter_model.safetensors" for at in (place, undisturbed)]
        found, expected = map(load_file, files)
        assert found.keys() == expected.keys()
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-6
        assert any(float(tensor.abs().max()) > 5e-4 for key, tensor in expected.items() if "lora_B" in key)
        assert not (place / name / "unfinished.run").exists()
    assert not any(path.is_file() for path in (place / "state").rglob("*")), (
        "a run that is over leaves nothing"
    )


def test_home_workers_are_killed(clinics: Clinics, tmp_path: Path, undisturbed: Path) -> None:
    """As it comes: in the middle of a step, or about its commit. Others have the same place for states."""
    workers = [clinics.worker(f"worker {number}") for number in range(2)]
    silos = [clinics.silo(name) for name in NAMES]
    for step in (1, 3):
        clinics.reached("north", step)
        worker = home(tmp_path, workers)
        worker.stop(signal.SIGKILL)
        workers = [other for other in workers if other is not worker]
        if not workers:
            workers = [clinics.worker("started again")]
    clinics.end(*silos)
    assert_equal(tmp_path, undisturbed)


def home(place: Path, workers: list[Process]) -> Process:
    """The worker that said last that the run is with it."""
    return max(workers, key=lambda worker: worker._log.read_text().count("silo joined run"))


def test_a_silo_and_the_broker_are_killed(clinics: Clinics, tmp_path: Path, undisturbed: Path) -> None:
    """The silo goes on with --resume, though the broker has not yet missed it; then the broker is new."""
    clinics.worker("worker")
    north, south = (clinics.silo(name) for name in NAMES)
    clinics.reached("south", 1)
    south.stop(signal.SIGKILL)
    south = clinics.silo("south", "--resume", str(tmp_path / "south"))
    clinics.reached("south", 3)
    clinics.restart_broker()
    clinics.end(north, south)
    assert_equal(tmp_path, undisturbed)


def test_a_broker_is_killed_and_there_is_another(
    processes: Processes, chats: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """The silos go on at the second broker, with the worker that serves both."""
    clinics = Clinics(processes, chats, tmp_path, brokers=2)
    clinics.worker("worker")
    silos = [clinics.silo(name) for name in NAMES]
    clinics.reached("north", 2)
    clinics.broker_processes[0].stop(signal.SIGKILL)
    clinics.end(*silos)
    assert_equal(tmp_path, undisturbed)

"""Of two brokers the first is killed or stopped while a generation runs: the text is the undisturbed one."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from silo_agent.generation import OnText
from silo_agent.processes import Process, Processes


class Pair:
    """Two brokers and who uses both."""

    def __init__(self, processes: Processes, silo: Any) -> None:
        self._processes, self._silo = processes, silo
        self.endpoints = [self.broker(name, "tcp://127.0.0.1:0") for name in ("first", "second")]
        self.options = [option for url in self.endpoints for option in ("--broker", url)]

    def broker(self, name: str, listen: str) -> str:
        return self._processes.listener(name, "listening on ", "broker", "--listen", listen)

    def worker(self, name: str = "worker") -> Process:
        return self._processes.start(name, "worker", *self.options, "--model", "tiny")

    def __getitem__(self, name: str) -> Process:
        return self._processes[name]

    def generates(self, on_text: OnText | None = None) -> int:
        """A silo of both brokers says what the whole model does; how many tokens it sent."""
        return int(self._silo.writes(self.endpoints, on_text))


@pytest.fixture
def pair(processes: Processes, writer: Callable[[int], Any]) -> Pair:
    return Pair(processes, writer(2))


def once(deed: Callable[[], object]) -> OnText:
    """Do it when some text has come, once."""
    left = [deed]

    def on_text(row: int, text: str) -> None:
        if left:
            left.pop()()

    return on_text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_generation_goes_on_through_the_other_broker(pair: Pair, how: signal.Signals) -> None:
    pair.worker()
    quiet = pair.generates()
    assert pair.generates(once(lambda: os.kill(pair["first"].pid, how))) > quiet, "it was disturbed"
    assert pair.generates() == quiet, "and who comes afterwards finds the other broker as well"


def test_broker_and_worker_are_both_killed_and_started_again(pair: Pair) -> None:
    worker = pair.worker()

    def kill() -> None:
        for process in (pair["first"], worker):
            process.stop(signal.SIGKILL)
        pair.worker("again")
        pair.broker("first again", pair.endpoints[0])

    quiet = pair.generates()
    assert pair.generates(once(kill)) > quiet
    assert pair.generates() == quiet


def test_all_brokers_are_killed_and_started_again(pair: Pair) -> None:
    pair.worker()

    def kill() -> None:
        for name in ("first", "second"):
            pair[name].stop(signal.SIGKILL)
        pair.broker("second again", pair.endpoints[1])

    quiet = pair.generates()
    assert pair.generates(once(kill)) > quiet

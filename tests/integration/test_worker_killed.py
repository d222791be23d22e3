"""A worker is killed while a generation runs: the text is the one that nothing disturbed."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from silo_agent.processes import Process, Processes


@pytest.mark.parametrize("when", ["another worker is there", "it is started again"])
def test_the_text_is_the_undisturbed_one(
    processes: Processes, writer: Callable[[int], Any], when: str
) -> None:
    broker, silo = processes.broker("--silence", "2"), writer(2)

    def worker(name: str) -> Process:
        return processes.start(name, "worker", "--broker", broker, "--model", "tiny")

    first = worker("first")
    again = when == "it is started again"
    sent = silo.writes(
        broker,
        killer(first, lambda: worker("second") if again else None),
        lambda: None if again else worker("second"),
        patience=30.0,
        deadline=30.0,
    )
    assert not first.running()
    assert sent > silo.once, "it was killed in the middle"


def killer(process: Process, then: Callable[[], object]) -> Callable[[int, str], None]:
    """Kill it when some text has come, once."""

    def on_text(row: int, text: str) -> None:
        if process.running():
            process.stop(signal.SIGKILL)
            then()

    return on_text

"""SIGTERM under load: every process ends in time, with the code that says how, and leaves nothing behind."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from broker.link import Link, ZmqLink
from broker.question import ask_pool
from codec.errors import TrunklineError
from silo_agent.processes import Process, Processes
from silo_agent.remote import silo_attach

EXIT_S = 8.0
"""What an interpreter with torch may take to go, on a machine that is busy."""

PROMPT = "The ward board needs a short note"
GENERATE = ("--model", "tiny", "--head", "1", "--tail", "2", "--prompt", PROMPT, "--max-tokens")


def talking(processes: Processes, name: str, broker: str, tokens: int) -> Process:
    """A silo in the midst of a generation."""
    started, options = threading.Event(), ("--broker", broker, *GENERATE, str(tokens))
    silo = processes.start(name, "silo", "generate", *options, on_line=lambda _: started.set())
    until = time.monotonic() + 60
    while not ask_pool(broker, 5).sessions:
        silo.check()
        assert time.monotonic() < until
        time.sleep(0.02)
    return silo


def ends(process: Process, within: float) -> int:
    """Ask it to end; its exit code."""
    process.terminate()
    until = time.monotonic() + within
    while process.running():
        assert time.monotonic() < until, f"{process.name} did not end: {process.last_words()}"
        time.sleep(0.02)
    assert not descendants(process), "a process was left behind"
    assert process.code is not None
    return process.code


def descendants(process: Process) -> list[str]:
    """What still runs in its session: every process here is started in one of its own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def worker(processes: Processes, name: str, broker: str, *options: str) -> Process:
    process = processes.start(name, "worker", "--broker", broker, "--model", "tiny", "--name", name, *options)
    until = time.monotonic() + 60
    while all(each.name != name for each in ask_pool(broker, 5).workers):
        process.check()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


@pytest.mark.timeout(300)
def test_each_of_them_ends_under_load_and_the_others_know_at_once(processes: Processes) -> None:
    broker = processes.broker()
    first = worker(processes, "first", broker, "--drain", "0.5")
    silo = talking(processes, "silo", broker, 2000)

    # A worker hands over: its deadline is shorter than the session, which goes on elsewhere.
    second = worker(processes, "second", broker, "--drain", "20")
    assert ends(first, 0.5 + EXIT_S) == 0
    until = time.monotonic() + 10
    while not (workers := ask_pool(broker, 5).workers) or not workers[0].load:
        silo.check()
        assert time.monotonic() < until
        time.sleep(0.02)

    # A silo says goodbye, and is not heard of as silent ten seconds later. Its work is not done.
    assert ends(silo, EXIT_S) == 128 + signal.SIGTERM
    pool = ask_pool(broker, 5)
    assert (pool.silos, pool.sessions) == (0, 0)

    # A worker with nothing open does not wait for its deadline.
    assert ends(second, EXIT_S) == 0
    assert ask_pool(broker, 5).workers == ()

    # With its broker gone a worker keeps to its deadline too.
    third = worker(processes, "third", broker, "--drain", "0.5")
    talking(processes, "late", broker, 2000)
    assert ends(processes["broker"], 3) == 0
    assert ends(third, 0.5 + EXIT_S) == 0


def hear(link: Link, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        link.receive(0.1)


def test_peers_of_a_broker_that_ends_are_told(processes: Processes) -> None:
    """So that they look for one at once, and not after seconds without a word."""
    broker = processes.broker()
    link = ZmqLink(broker, silo_attach("north"), patience=1.0)
    try:
        until = time.monotonic() + 10
        while not ask_pool(broker, 5).silos:
            assert time.monotonic() < until
        begun = time.monotonic()
        assert ends(processes["broker"], 3) == 0
        with pytest.raises(TrunklineError, match="no broker answered"):
            hear(link, 4)
        assert time.monotonic() - begun < 3.5, "five seconds of silence, and one of patience, otherwise"
    finally:
        link.close()


def test_a_second_signal_ends_at_once(processes: Processes) -> None:
    broker = processes.broker()
    slow = worker(processes, "slow", broker, "--drain", "60")
    talking(processes, "silo", broker, 2000)
    slow.terminate()
    until = time.monotonic() + 10
    while not ask_pool(broker, 5).workers[0].draining:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert slow.running(), "it waits for the session"
    os.kill(slow.pid, signal.SIGTERM)
    begun = time.monotonic()
    while slow.running():
        assert time.monotonic() < begun + 1
        time.sleep(0.01)
    assert slow.code == -signal.SIGTERM

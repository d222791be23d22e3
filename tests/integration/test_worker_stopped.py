"""A worker that is there and does not work, and a silo that is gone without a word."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from silo_agent.processes import Processes
from workers.checkpoint import Checkpoint

HANGS = """
import time
import trunkline
from workers import service, stall
stall._LOOK_S = 0.1
stall.Stall.LEAST = 1.0
part, taken = service.TrunkService._part, []
def hangs(self, share):
    taken.append(share)
    if len(taken) == 5:
        time.sleep(1000)
    return part(self, share)
service.TrunkService._part = hangs
trunkline.cli()
"""
"""A worker whose computing thread is stuck in its fifth pass; its link beats."""


@pytest.fixture
def start(repository: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`start(program, *arguments)`: a Python program beside the test, killed after it."""
    started: list[subprocess.Popen[bytes]] = []

    def run(program: str, *arguments: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=repository))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_the_text_is_the_undisturbed_one(
    processes: Processes,
    writer: Callable[[int], Any],
    start: Callable[..., subprocess.Popen[bytes]],
    how: str,
) -> None:
    broker, silo = processes.broker(), writer(1)
    arguments = ("worker", "--broker", broker, "--model", "tiny")
    program = HANGS if how == "stuck" else "import trunkline; trunkline.cli()"
    first = start(program, *arguments)
    times = []

    def on_text(row: int, text: str) -> None:
        times.append(time.monotonic())
        if how == "stopped" and len(times) == 3:
            os.kill(first.pid, signal.SIGSTOP)

    def second() -> None:
        processes.listener("second", "metrics at ", *arguments, "--metrics", "127.0.0.1:0", timeout=60.0)

    sent = silo.writes(broker, on_text, second, patience=60.0, deadline=120.0, wait=60.0)
    assert sent > silo.once, "it was lost in the middle"
    assert max(after - before for before, after in pairwise(times)) < 30, "no deadline was waited for"
    if how == "stuck":
        assert first.wait(10) == 70, "whoever supervises it starts it again"


SILO = """
import sys, time
import msgspec
from broker.link import ZmqLink
from broker.parcel import Parcel
from codec.messages import Attach, Opened, OpenSession
from codec.plan import ModelCard
endpoint, card, name = sys.argv[1:]
link = ZmqLink(endpoint, Attach(role="silo", name=name, peer=name.encode().ljust(16)), patience=60.0)
card = msgspec.json.decode(card, type=ModelCard)
for number in range(1, 1000):
    asked = OpenSession(id=number, session="s", model=card, start=1, stop=4, rows=4, capacity=256)
    link.send(Parcel.of(asked))
    if isinstance(link.receive(10.0).header, Opened):
        break
    time.sleep(0.1)  # The worker is on its way.
time.sleep(1000)
"""
"""A silo that opens a session, for which memory is reserved, and does nothing more."""


def test_a_silo_that_vanishes_frees_its_pages(
    processes: Processes, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Killed, it is missed at once; stopped, after two heartbeats. The rest is for slow machines."""
    broker = processes.broker()
    arguments = ("worker", "--broker", broker, "--model", "tiny", "--metrics", "127.0.0.1:0")
    url = processes.listener("worker", "metrics at ", *arguments, timeout=60.0)
    card = msgspec.json.encode(Checkpoint("tiny").card(range(1, 4))).decode()
    assert held(url) == 0
    for how, within in ((signal.SIGKILL, 2.0), (signal.SIGSTOP, 5.0)):
        silo = start(SILO, broker, card, how.name)
        assert wait_for(lambda: held(url) > 0, 30.0)
        os.kill(silo.pid, how)
        assert wait_for(lambda: held(url) == 0, within)


def held(url: str) -> float:
    """Bytes of KV caches at a worker."""
    with urllib.request.urlopen(url) as page:
        found = re.search(r'memory_bytes{what="kv"} (\S+)', page.read().decode())
    assert found
    return float(found[1])


def wait_for(condition: Callable[[], bool], within: float) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

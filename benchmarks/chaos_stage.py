"""Broker, workers and their links as real processes, and doing to them what a chaos plan says."""

import contextlib
import os
import random
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_plan import BROKER, SILOS, TRAINER, Disturbance, worker_name
from benchmarks.chaos_tally import Deed
from benchmarks.progress import Progress
from benchmarks.relay import Relay
from broker.question import ask_pool
from codec.errors import LinkError, TrunklineError
from silo_agent.processes import Process, Processes

_PORTS = range(20000, 30000)
"""Below what the system hands out: nobody takes the broker's port while it is down."""
_START_S = 60.0
_TICK_S = 0.02
_ASK_S = 0.25
_DRAIN_S = 3
_LIVELY_S = 2.5
"""A worker that was heard of so lately is there."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who is on the stage. Workers keep in the directory `state` how far runs are."""

    model: str
    workers: int
    silence: float
    state: Path


@dataclass(slots=True)
class _Role:
    """A process that is started again whenever it has ended."""

    arguments: tuple[str, ...]
    process: Process
    starts: int = 1
    since: float = 0.0
    """When something was last done to it, or it was started again."""
    deed: tuple[Disturbance, float] | None = None
    """What is being done to it, and since when."""


class Stage:
    """A context with broker and workers at work. `endpoint` is where silos attach, over a link of theirs."""

    def __init__(self, processes: Processes, cast: Cast, seed: int) -> None:
        """Start them. Raises `TrunklineError` if that fails."""
        self._processes, self._cast = processes, cast
        self._broker = f"tcp://127.0.0.1:{_free_port(random.Random(seed))}"
        self._stack = contextlib.ExitStack()
        names = [worker_name(number) for number in range(cast.workers)]
        # A port of its own for each link: it can be cut alone.
        self._links = {name: Relay("tcp://127.0.0.1:0", self._broker) for name in (SILOS, *names)}
        self._cuts: list[tuple[Disturbance, float]] = []
        self.endpoint = self._links[SILOS].endpoint
        self.trainer: Process | None = None
        """The training silo, which its own user starts again."""
        self.fallen: list[str] = []
        """Who ended unasked, and its last words."""
        self.deeds: list[Deed] = []
        self.left_out = 0
        broker = ("broker", "--listen", self._broker, "--silence", f"{cast.silence:g}")
        self._roles = {BROKER: self._cast_role(BROKER, broker)}
        for name in names:
            self._roles[name] = self._cast_role(name, self._worker(name))

    def __enter__(self) -> "Stage":
        for link in self._links.values():
            self._stack.enter_context(link)
        until = time.monotonic() + _START_S
        while len(self._attached()) < self._cast.workers:
            for role in self._roles.values():
                role.process.check()
            if time.monotonic() > until:
                raise TrunklineError(f"not all workers were there within {_START_S:g} s", side="worker")
            time.sleep(_ASK_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def perform(self, plan: Sequence[Disturbance], seconds: float, progress: Progress) -> None:
        """Do what the plan says for `seconds`, then put everything right again.

        A disturbance is left out if its target is down, and one of a worker if no other is there: to take
        the last one is to measure how fast a process starts.
        """
        begun = time.monotonic()
        coming = deque(plan)
        while (now := time.monotonic()) < begun + seconds:
            self._repair(now)
            while coming and now >= begun + coming[0].at:
                disturbance = coming.popleft()
                if self._ready(disturbance):
                    self._do(disturbance, now)
                else:
                    self.left_out += 1
            progress(f"{now - begun:.0f} of {seconds:.0f} s, {len(self.deeds)} disturbances")
            time.sleep(_TICK_S)
        while any(role.deed for role in self._roles.values()) or self._cuts:
            self._repair(time.monotonic())
            time.sleep(_TICK_S)

    def watch(self) -> None:
        """Start again who fell by itself; when nothing is done any more, while silos finish."""
        self._repair(time.monotonic())

    # --- deeds -------------------------------------------------------------------------------------------

    def _ready(self, disturbance: Disturbance) -> bool:
        target = disturbance.target
        if target == TRAINER:
            return self.trainer is not None and self.trainer.running()
        if target in self._roles and self._roles[target].deed:
            return False
        if target in (BROKER, SILOS):
            return True
        attached = self._attached()
        return target in attached and len(attached) > 1

    def _do(self, disturbance: Disturbance, now: float) -> None:
        if disturbance.target == TRAINER:
            assert self.trainer is not None
            self.trainer.stop(signal.SIGKILL)
            self.deeds.append(Deed(disturbance, now, now))
        elif disturbance.kind == "cut":
            self._links[disturbance.target].cut(disturbance.seconds)
            self._cuts.append((disturbance, now))
        else:
            role = self._roles[disturbance.target]
            role.deed, role.since = (disturbance, now), now
            match disturbance.kind:
                case "kill":
                    role.process.stop(signal.SIGKILL)
                case "pause":
                    os.kill(role.process.pid, signal.SIGSTOP)
                case _:
                    role.process.terminate()

    def _repair(self, now: float) -> None:
        """What has lasted long enough ends."""
        for disturbance, begun in [cut for cut in self._cuts if now >= cut[1] + cut[0].seconds]:
            self._cuts.remove((disturbance, begun))
            self.deeds.append(Deed(disturbance, begun, now))
        for name, role in self._roles.items():
            if role.deed is None:
                if not role.process.running():
                    self.fallen.append(f"{name}: {role.process.last_words()}")
                    self._start(name, role)
                continue
            disturbance, begun = role.deed
            if now < begun + disturbance.seconds:
                continue
            if disturbance.kind == "pause":
                os.kill(role.process.pid, signal.SIGCONT)
            elif role.process.running():
                continue  # It drains.
            else:
                self._start(name, role)
            role.deed = None
            self.deeds.append(Deed(disturbance, begun, now))

    # --- processes ---------------------------------------------------------------------------------------

    def _attached(self) -> set[str]:
        """The workers that could serve; none while the broker is down.

        One that was killed is listed until the broker notices: it counts when it was heard of since then.
        """
        try:
            pool = ask_pool(self._broker, _ASK_S)
        except LinkError:
            return set()
        now = time.monotonic()
        lately = sorted(pool.workers, key=lambda each: -each.silent)  # Of one name the newest comes last.
        heard = {each.name: now - each.silent for each in lately if not each.draining}
        return {
            name
            for name, at in heard.items()
            if now - at < _LIVELY_S and self._roles[name].since < at and not self._roles[name].deed
        }

    def _cast_role(self, name: str, arguments: tuple[str, ...]) -> _Role:
        return _Role(arguments, self._processes.start(name, *arguments))

    def _start(self, name: str, role: _Role) -> None:
        role.process = self._processes.start(f"{name}.{role.starts}", *role.arguments)
        role.starts += 1
        role.since = time.monotonic()

    def _worker(self, name: str) -> tuple[str, ...]:
        link, state = self._links[name].endpoint, self._cast.state
        options = ("--broker", link, "--model", self._cast.model, "--name", name, "--drain", str(_DRAIN_S))
        return ("worker", *options, "--patience", "600", "--state", str(state))


def _free_port(dice: random.Random) -> int:
    """A port of loopback that nobody listens on now."""
    for port in dice.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LinkError("no port is free")

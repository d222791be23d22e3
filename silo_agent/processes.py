"""Starting Trunkline's own processes on this machine, and leaving none behind.

For the demo, the benchmarks and the integration tests: real processes on loopback, free ports.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from codec.errors import LinkError, TrunklineError

_STOP_S = 5.0


class Process:
    """One `trunkline` process; its stderr goes to a log file, its stdout is read line by line."""

    def __init__(self, name: str, arguments: list[str], log: Path, on_line: Callable[[str], None]) -> None:
        self.name, self._log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "trunkline", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops them in order.
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            on_line(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def resident_bytes(self) -> int:
        """Its memory that is resident now, from Linux's /proc."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def terminate(self) -> None:
        """Ask it to end; nothing is awaited."""
        self._popen.terminate()

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.code is None

    @property
    def code(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        return self._popen.poll()

    def wait(self, timeout: float) -> None:
        """Wait for its end and its last line. Raises what it failed with, or if time is up."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TrunklineError(f"{self.name} did not end within {timeout:g} s", hint=self.where()) from None
        self._reader.join(_STOP_S)
        if code:
            raise TrunklineError(f"{self.name} failed: {self.last_words()}", hint=self.where())

    def check(self) -> None:
        """Raises if it ended with an error."""
        if self.code not in (None, 0):
            self.wait(_STOP_S)

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("trunkline: ") if lines else "it said nothing"

    def where(self) -> str:
        """Where to read more."""
        return f"Its log is {self._log}."

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it: ask first, and kill it if it has not gone within five seconds."""
        if self.running():
            self._popen.send_signal(number)
            try:
                self._popen.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._reader.join(_STOP_S)
        if self._popen.stdout is not None:
            self._popen.stdout.close()


def wait_for_all(silos: Sequence[Process], beside: Process, seconds: float, what: str) -> None:
    """Until all silos ended well.

    Raises as soon as one of them, or the process `beside` them, fails; and `what` did not happen once
    `seconds` are over.
    """
    deadline = time.monotonic() + seconds
    while any(silo.running() for silo in silos):
        for process in (*silos, beside):
            process.check()
        if time.monotonic() > deadline:
            raise TrunklineError(f"{what} within {seconds:g} s", hint=silos[0].where())
        time.sleep(0.05)
    for silo in silos:
        silo.wait(seconds)


class Processes:
    """A context manager that stops every process it started, last one first."""

    def __init__(self, logs: Path) -> None:
        """Log files go to the directory `logs`."""
        self._logs = logs
        self._started: list[Process] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.stop()

    def __getitem__(self, name: str) -> Process:
        """The process of that name that was started last. Raises `KeyError`."""
        return {process.name: process for process in self._started}[name]

    def start(self, name: str, *arguments: str, on_line: Callable[[str], None] = lambda _: None) -> Process:
        """Start `trunkline ARGUMENTS`; `on_line` gets every line it prints, on another thread."""
        process = Process(name, list(arguments), self._logs / f"{name}.log", on_line)
        self._started.append(process)
        return process

    def broker(self, *arguments: str, timeout: float = 20.0) -> str:
        """Start a broker on a free loopback port and return its endpoint. Raises `LinkError`."""
        listen = ("broker", "--listen", "tcp://127.0.0.1:0")
        return self.listener("broker", "listening on ", *listen, *arguments, timeout=timeout)

    def listener(self, name: str, says: str, *arguments: str, timeout: float = 20.0) -> str:
        """Start what prints `says` and then where it listens; that endpoint. Raises `LinkError`."""
        endpoint: list[str] = []
        listening = threading.Event()

        def on_line(line: str) -> None:
            if line.startswith(says):
                endpoint.append(line.removeprefix(says).split()[0])
                listening.set()

        self.start(name, *arguments, on_line=on_line)
        self.wait(name, listening, timeout)
        return endpoint[0]

    def wait(self, name: str, started: threading.Event, timeout: float) -> None:
        """Wait until a process has `started`. Raises what it failed with, or `LinkError`."""
        process, deadline = self[name], time.monotonic() + timeout
        while not started.wait(0.05):
            process.check()
            if time.monotonic() > deadline:
                raise LinkError(f"the {name} did not start within {timeout:g} s", hint=process.where())

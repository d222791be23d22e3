"""Ending a process: SIGINT and SIGTERM set an event that every loop looks at."""

import signal
from threading import Event


def stop_on_signals() -> Event:
    """An event that the first SIGINT or SIGTERM sets; a second one interrupts as usual."""
    stop = Event()

    def on_signal(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop

"""Ending a process that is asked to: a service finishes what it has, a command says goodbye."""

import signal
from threading import Event
from types import FrameType

_ASKED = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals() -> Event:
    """For services: an event that the first SIGINT or SIGTERM sets; a second one, of either, ends at once."""
    stop = Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        stop.set()
        for number in _ASKED:
            signal.signal(number, signal.SIG_DFL)

    for number in _ASKED:
        signal.signal(number, on_signal)
    return stop


def leave_on_sigterm() -> None:
    """For commands: SIGTERM raises `SystemExit` in the main thread, as Ctrl-C raises `KeyboardInterrupt`.

    So what is open is closed on the way out, and others need not wait for silence. The exit code is 143,
    a shell's for SIGTERM: the work is not done. A second one ends at once.
    """

    def on_signal(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, on_signal)

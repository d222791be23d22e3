"""A TCP relay on loopback that makes a slow line of a fast one: sockets around `benchmarks.shaper`."""

import errno
import heapq
import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector

from benchmarks.shaper import Pipe, Shaper
from broker.endpoint import check_endpoint, is_ipv6
from codec.errors import UsageError
from codec.logs import Log

_TICK_S = 0.1
_DEAF_S = 1.0
_JOIN_S = 5.0
_WINDOW = 256 << 10
"""What the system may hold of a socket's bytes unread. Its own choice, megabytes, would let a sender
on a slow line believe that everything has left."""
_ABORT = struct.pack("ii", 1, 0)


@dataclass(eq=False, slots=True)
class _Lane:
    """One direction of a connection, from `source` to `sink`; `back` is the other one."""

    source: socket.socket
    sink: socket.socket
    pipe: Pipe
    back: "_Lane" = field(init=False)
    blocked: bool = False
    """The sink takes nothing now: wait until it is writable."""
    armed: bool = False
    """It stands in the relay's timetable."""
    shut: bool = False
    """The sink was told that nothing follows."""
    watched: int = 0
    """What the selector waits for at `source`."""


class Relay:
    """Forwards every connection to `listen` to one of its own to `to`; each direction is a `Shaper`.

    A connection opens at once; its bytes and its end, half-closed or reset, take the line's time.
    Serve it on a thread by entering it as a context, or with `serve`.
    """

    def __init__(self, listen: str, to: str, rtt_ms: float = 0.0, mbit: float = 0.0) -> None:
        """Bind. Raises `UsageError` if an address is bad, taken, or beyond loopback, or no such line is."""
        check_endpoint(listen, free_port=True)
        check_endpoint(to)
        self._shaper = Shaper(rtt_ms, mbit)
        self._family, self._target = _address(to)
        if _address(listen) == (self._family, self._target):
            raise UsageError(f"the relay would lead from {listen} to itself", hint="Give --to another port.")
        self._listener = _listen(listen)
        port = self._listener.getsockname()[1]
        self.endpoint: str = f"{listen.rpartition(':')[0]}:{port}"
        self._selector = DefaultSelector()
        self._lanes: set[_Lane] = set()
        self._timetable: list[tuple[float, int, _Lane]] = []
        self._serial = count()
        self._deaf_until = 0.0
        self._cut: deque[float] = deque()
        self._log = Log("relay")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.serve, args=(self._stop,), name="relay", daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S)

    def cut(self, seconds: float) -> None:
        """Break every connection, losing what is on its way, and take none for so long. From any thread."""
        self._cut.append(seconds)

    def close(self) -> None:
        """End every connection and stop listening; what is on its way is lost. `serve` does so."""
        for lane in list(self._lanes):
            lane.source.close()
        self._lanes.clear()
        self._listener.close()
        self._selector.close()

    def serve(self, stop: threading.Event) -> None:
        """Relay until `stop` is set, then close; within a tenth of a second."""
        self._selector.register(self._listener, EVENT_READ)
        try:
            while not stop.is_set():
                self._wait()
                for key, events in self._selector.select(0):
                    if key.data is None:
                        self._accept()
                    else:
                        self._ready(key.data, events)
                self._keep(time.monotonic())
        finally:
            self.close()

    def _wait(self) -> None:
        """Until a socket is ready or something arrives. epoll counts milliseconds, select micro."""
        left = self._timetable[0][0] - time.monotonic() if self._timetable else _TICK_S
        if left > 0:
            select.select([self._selector.fileno()], [], [], min(left, _TICK_S))

    def _ready(self, lane: _Lane, events: int) -> None:
        """The lane's source has bytes, or room."""
        if events & EVENT_WRITE:
            lane.back.blocked = False
            self._write(lane.back)
        if events & EVENT_READ and lane in self._lanes:
            self._read(lane)

    def _keep(self, now: float) -> None:
        """Keep to the timetable, and break what is to be broken."""
        while self._cut:
            self._break(self._cut.popleft(), now)
        while self._timetable and self._timetable[0][0] <= now:
            lane = heapq.heappop(self._timetable)[2]
            lane.armed = False
            self._write(lane)
        if self._deaf_until and now > self._deaf_until:
            self._deaf_until = 0.0
            self._selector.register(self._listener, EVENT_READ)

    def _break(self, seconds: float, now: float) -> None:
        for lane in list(self._lanes):
            self._close(lane, abort=True)
        self._deafen(now + seconds)

    def _deafen(self, until: float) -> None:
        if not self._deaf_until:
            self._selector.unregister(self._listener)
        self._deaf_until = max(self._deaf_until, until)

    def _accept(self) -> None:
        client = None
        try:
            client = self._listener.accept()[0]
            target = socket.socket(self._family, socket.SOCK_STREAM)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # Too many open files: the connections it has go on.
            self._log.warn("a connection cannot be accepted", why=error.strerror)
            if client is not None:
                client.close()
            self._deafen(time.monotonic() + _DEAF_S)
            return
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW)
        for end in (client, target):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there, back = _Lane(client, target, Pipe(self._shaper)), _Lane(target, client, Pipe(self._shaper))
        there.back, back.back = back, there
        # Until it is connected, the target is a sink that takes nothing.
        there.blocked = True
        self._lanes |= {there, back}
        code = target.connect_ex(self._target)
        if code in (0, errno.EINPROGRESS):
            self._watch(there)
            self._watch(back)
        else:
            self._log.warn("the target cannot be reached", why=errno.errorcode.get(code, code))
            self._broken(back)

    def _read(self, lane: _Lane) -> None:
        try:
            data = lane.source.recv(lane.pipe.room)
        except BlockingIOError:
            return
        except OSError:
            self._broken(lane)
            return
        now = time.monotonic()
        if data:
            lane.pipe.put(data, now)
        else:
            lane.pipe.end("close", now)
        self._arm(lane)
        self._watch(lane)

    def _write(self, lane: _Lane) -> None:
        """Whatever has arrived, and the end if it has."""
        if lane.back not in self._lanes:
            return
        now = time.monotonic()
        while not lane.blocked and (pieces := lane.pipe.arrived(now)):
            try:
                size = lane.sink.sendmsg(pieces)
            except BlockingIOError:
                size = 0
            except OSError:
                self._broken(lane.back)
                return
            lane.pipe.written(size)
            lane.blocked = size < sum(map(len, pieces))
        how = None if lane.blocked else lane.pipe.take_ending(now)
        if how == "reset":
            self._close(lane.back, abort=True)
        elif how == "close":
            self._shut(lane)
        self._arm(lane)
        self._watch(lane)
        self._watch(lane.back)

    def _shut(self, lane: _Lane) -> None:
        """Pass on that the source says no more; when neither side does, the connection is over."""
        lane.shut = True
        try:
            lane.sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._broken(lane.back)
        if lane.back.shut:
            self._close(lane)
            self._close(lane.back)

    def _broken(self, lane: _Lane) -> None:
        """The source is gone without a goodbye: the sink hears of it after what was sent before."""
        self._close(lane)
        lane.back.pipe.drop()
        lane.pipe.end("reset", time.monotonic())
        self._arm(lane)
        self._watch(lane.back)

    def _arm(self, lane: _Lane) -> None:
        due = lane.pipe.due
        if due is not None and not lane.armed and not lane.blocked:
            lane.armed = True
            heapq.heappush(self._timetable, (due, next(self._serial), lane))

    def _watch(self, lane: _Lane) -> None:
        """Wait at the source for what can be used: bytes, or room for what goes back."""
        if lane not in self._lanes:
            return
        wanted = (EVENT_READ if lane.pipe.room else 0) | (EVENT_WRITE if lane.back.blocked else 0)
        if wanted == lane.watched:
            return
        if not wanted:
            self._selector.unregister(lane.source)
        elif lane.watched:
            self._selector.modify(lane.source, wanted, lane)
        else:
            self._selector.register(lane.source, wanted, lane)
        lane.watched = wanted

    def _close(self, lane: _Lane, *, abort: bool = False) -> None:
        """Close the lane's source."""
        if lane not in self._lanes:
            return
        self._lanes.remove(lane)
        if lane.watched:
            self._selector.unregister(lane.source)
        if abort:
            lane.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        lane.source.close()


def _address(endpoint: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    port = int(endpoint.rpartition(":")[2])
    return (socket.AF_INET6, ("::1", port)) if is_ipv6(endpoint) else (socket.AF_INET, ("127.0.0.1", port))


def _listen(endpoint: str) -> socket.socket:
    family, address = _address(endpoint)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"the relay cannot listen on {endpoint}: {error.strerror or error}",
            hint="Another process may hold the port; choose another with --listen.",
        ) from None
    return listener

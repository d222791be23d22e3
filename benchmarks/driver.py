"""Many replay silos on one thread: a socket each, one poll loop, and windows in which all is counted."""

import contextlib
import resource
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq

from benchmarks.replay import Replay
from broker.parcel import Parcel
from codec.errors import NobodyError, ProtocolError, TrunklineError, UsageError
from codec.messages import Answer, Attach, Error, Heartbeat, Leave, Welcome, kind_of

Socket = zmq.Socket[bytes]

_POLL_MS = 20
_BEAT_S = 1.0
_AGAIN_S = 0.25
_SILENCE_S = 60.0
_BURST = 16
_FILES_A_SILO = 3
_FILES_BESIDE = 64


class Measured(msgspec.Struct):
    """What happened between `begun` and `ended` (monotonic seconds).

    `tokens` were served to each silo, `waits` are the seconds of round trips by kind, `size` all bytes
    sent and received with their headers, `cpu` the seconds of CPU that these silos took themselves.
    """

    begun: float
    ended: float
    tokens: list[int]
    waits: dict[str, list[float]]
    size: int
    cpu: float
    errors: list[str]


class _Silo:
    """A socket that beats, and a replay that decides what it says."""

    def __init__(self, context: "zmq.Context[Socket]", endpoint: str, replay: Replay, number: int) -> None:
        self.replay = replay
        self.error = ""
        self.open = False
        self.open_at = float("inf")
        """When to ask for the opening (again)."""
        self.sent: dict[int, tuple[str, float]] = {}
        self.socket: Socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.say(Parcel.of(Attach(role="silo", name=f"replay-{number}", peer=secrets.token_bytes(16))))

    def say(self, parcel: Parcel) -> int:
        """Send; bytes sent."""
        if parcel.header.id:
            self.sent[parcel.header.id] = kind_of(parcel.header), time.monotonic()
        self.socket.send_multipart(parcel.frames(), zmq.NOBLOCK, copy=False)
        return parcel.size + len(parcel.raw)


class Driver:
    """Runs replays against a broker. A replay that meets an error stops; the others go on."""

    def __init__(self, endpoint: str, replays: Sequence[Replay]) -> None:
        """Connect them all. Raises `UsageError` if this process may not open as many files."""
        allow_files(len(replays) * _FILES_A_SILO + _FILES_BESIDE)
        self._context: zmq.Context[Socket] = zmq.Context()
        self._silos = [_Silo(self._context, endpoint, replay, i) for i, replay in enumerate(replays)]
        self._of = {silo.socket: silo for silo in self._silos}
        self._poller = zmq.Poller()
        for silo in self._silos:
            self._poller.register(silo.socket, zmq.POLLIN)
        self._beat_at = time.monotonic() + _BEAT_S
        self._heard = time.monotonic()
        self._waits: dict[str, list[float]] = {}
        self._begin()

    def warm_up(self) -> None:
        """Run until every silo was served, or failed; what follows is counted."""
        self._until_all_served()
        self._begin()

    def measure(self, seconds: float) -> Measured:
        """What happened since the warm-up, or since the measurement before.

        That ended when all silos had been served, and so does this, after at least `seconds`: a window
        between two such moments cuts no step, answer or pass in two.
        """
        self._run(lambda: time.monotonic() > self._begun + seconds)
        self._until_all_served()
        measured = Measured(
            begun=self._begun,
            ended=time.monotonic(),
            tokens=[now - then for now, then in zip(self._tokens(), self._before, strict=True)],
            waits=self._waits,
            size=self._size,
            cpu=time.process_time() - self._cpu,
            errors=[silo.error for silo in self._silos if silo.error],
        )
        self._begin()
        return measured

    def _begin(self) -> None:
        self._begun, self._cpu, self._before = time.monotonic(), time.process_time(), self._tokens()
        self._waits, self._size = {}, 0

    def keep_on(self, until: Callable[[], bool]) -> None:
        """Run, uncounted."""
        self._run(until)

    def close(self) -> None:
        """Say goodbye to the broker and wait until it has read that, for two seconds."""
        for silo in self._silos:
            with contextlib.suppress(zmq.Again):
                silo.say(Parcel.of(Leave()))
        waiting, until = set(self._of), time.monotonic() + 2.0
        while waiting and time.monotonic() < until:
            for socket, _ in self._poller.poll(_POLL_MS):
                if isinstance(_read(socket), Leave):
                    waiting.discard(socket)
        for silo in self._silos:
            silo.socket.close()
        self._context.term()

    def _tokens(self) -> list[int]:
        return [silo.replay.tokens for silo in self._silos]

    def _until_all_served(self) -> None:
        waiting = [(silo, silo.replay.tokens) for silo in self._silos]
        self._run(lambda: all(silo.replay.tokens > before or silo.error for silo, before in waiting))

    def _run(self, until: Callable[[], bool]) -> None:
        self._heard = time.monotonic()
        while not until():
            for socket, _ in self._poller.poll(_POLL_MS):
                self._drain(self._of[socket], until)
                if until():
                    break  # At this very moment, and not after what else has arrived.
            now = time.monotonic()
            if now - self._heard > _SILENCE_S:
                raise TrunklineError(f"no silo was answered for {_SILENCE_S:g} s", hint="See the other logs.")
            for silo in self._silos:
                if silo.open_at <= now:
                    silo.open_at = float("inf")
                    self._say(silo, silo.replay.opening())
            if now >= self._beat_at:
                self._beat_at = now + _BEAT_S
                for silo in self._silos:
                    silo.say(Parcel.of(Heartbeat()))

    def _drain(self, silo: _Silo, until: Callable[[], bool]) -> None:
        for _ in range(_BURST):
            header = self._receive(silo)
            if header is None:
                return
            if isinstance(header, Welcome):
                silo.open_at = 0.0
            elif isinstance(header, Answer):
                self._answer(silo, header)
                if until():
                    return

    def _receive(self, silo: _Silo) -> object:
        try:
            frames = silo.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        self._size += sum(len(frame) for frame in frames)
        return Parcel.read(frames).header

    def _answer(self, silo: _Silo, header: Answer) -> None:
        now = time.monotonic()
        kind, begun = silo.sent.pop(header.id, ("", now))
        if isinstance(header, Error):
            if header.code == NobodyError.code and not silo.open:
                silo.open_at = now + _AGAIN_S
            else:
                silo.error = silo.error or header.what
            return
        silo.open = True
        self._heard = now
        self._waits.setdefault(kind, []).append(now - begun)
        try:
            for parcel in silo.replay.answered(header):
                self._say(silo, parcel)
        except ProtocolError as error:
            silo.error = silo.error or str(error)

    def _say(self, silo: _Silo, parcel: Parcel) -> None:
        self._size += silo.say(parcel)


def _read(socket: Socket) -> object:
    return Parcel.read(socket.recv_multipart(copy=False)).header


def allow_files(wanted: int) -> None:
    """Let this process and its children open `wanted` files. Raises `UsageError` if that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UsageError(
            f"{wanted} open files are needed for so many silos, the system allows {hard}",
            hint="Raise the limit (ulimit -Hn), or take fewer silos.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

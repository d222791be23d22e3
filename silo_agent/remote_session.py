"""The trunk's side of a session, which survives the worker that serves it."""

import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from codec.errors import TrunklineError, UnavailableError
from codec.messages import CloseSession, OpenSession
from silo_agent.packed import Packed
from silo_agent.recording import Recording
from silo_agent.remote import LOST, NOT_YET, Arrival, Remote, unrecovered

_RECOVERIES = 3
"""For one extend, and for a session that may be what its workers fall over. A broker that was restarted, or
a connection that broke, is not counted: only the time is bounded then."""

_PAUSE_S = 0.1
"""Before a broker is asked once more."""

_AHEAD = 16
"""Extends under way at once when a recording is sent again: far below a broker's quota."""


class RemoteSession:
    """A session that some worker serves. If it is lost there, it is opened anew, at this worker or
    another, and what was sent before is sent again, byte for byte."""

    def __init__(
        self, remote: Remote, opening: OpenSession, adapter: Sequence[Tensor], *, wait: float
    ) -> None:
        """Open it. `wait` seconds are given to finding a worker, now and after each loss.

        Raises what `Remote.open` raises.
        """
        self._remote, self._opening, self._adapter, self._wait = remote, opening, adapter, wait
        self._recording = Recording(opening.rows * opening.capacity)
        remote.open(opening, adapter, wait=wait)
        self._intact = True

    def extend(self, packed: Packed) -> Arrival:
        """Carry out an `Extend`; its answer. After an error the session is as it was before.

        Raises what `Remote.take` raises; what tells of a loss only when recovery has failed.
        """
        try:
            if not self._intact:
                raise UnavailableError("the session was lost, and not recovered")
            arrival = self._remote.wait(self._remote.send(packed))
        except LOST as loss:
            arrival = self._recovered(packed, loss)
        self._recording.add(packed)
        return arrival

    def close(self) -> None:
        """Free the worker's caches. Not awaited: the worker may be gone."""
        self._remote.tell(CloseSession(session=self._opening.session))

    def _recovered(self, packed: Packed, loss: TrunklineError) -> Arrival:
        recorded = self._recording.packed
        if recorded is None:
            raise loss
        self._intact = False
        until = time.monotonic() + self._wait
        failure, left = loss, _RECOVERIES
        while left:
            try:
                self._reopen(max(0.0, until - time.monotonic()))
                arrival = self._replayed([*recorded, packed])
            except (*LOST, *NOT_YET) as error:
                failure = error
                if time.monotonic() >= until:
                    break
                if error.at == "broker":
                    time.sleep(_PAUSE_S)
                else:
                    left -= 1
            else:
                self._intact = True
                return arrival
        raise unrecovered(loss, "the session could not be moved", failure) from loss

    def _reopen(self, wait: float) -> None:
        # A worker that is merely slow frees the old caches first; and a broker may choose another one.
        self.close()
        self._remote.open(self._opening, self._adapter, wait=wait, despite=NOT_YET)

    def _replayed(self, packed: Sequence[Packed]) -> Arrival:
        """Send all of it; the answer to the last."""
        under_way: deque[int] = deque()
        try:
            for each in packed:
                if len(under_way) == _AHEAD:
                    self._remote.wait(under_way.popleft())
                under_way.append(self._remote.send(each))
            while len(under_way) > 1:
                self._remote.wait(under_way.popleft())
            return self._remote.wait(under_way.popleft())
        finally:
            self._remote.forget(under_way)

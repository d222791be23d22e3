"""A silo's place in a run, which survives the worker that serves it."""

from collections.abc import Sequence
from contextlib import suppress

import msgspec
from torch import Tensor

from codec.errors import ProtocolError, TrunklineError
from codec.messages import Adapter, CloseRun, GetAdapter, Opened, OpenRun
from silo_agent.remote import LOST, NOT_YET, Remote, unrecovered

_RECOVERIES = 3
"""For one request beside the steps."""


class RemoteRun:
    """A run that some worker serves. If it is lost there, it is joined again, there or elsewhere."""

    def __init__(self, remote: Remote, opening: OpenRun, adapter: Sequence[Tensor], *, wait: float) -> None:
        """`opening` has ticket and seat if the silo was in the run before; `adapter` is the first one.

        `wait` seconds are given to finding a worker, at first and after each loss.
        """
        self._remote, self.opening, self._adapter, self._wait = remote, opening, list(adapter), wait

    @property
    def survives(self) -> bool:
        """Whether it can be joined again: its worker saves it."""
        return bool(self.opening.ticket)

    def open(self) -> int:
        """Join; the step at which the run stands. Raises what `Remote.open` raises."""
        despite = NOT_YET if self.survives else NOT_YET[:1]
        opened = self._remote.open(self.opening, self._adapter, wait=self._wait, despite=despite).header
        if not isinstance(opened, Opened):
            raise ProtocolError("the worker answered an open with something else", side="worker")
        if opened.ticket:
            # The worker has the first adapter by now.
            self._adapter, where = [], {"ticket": opened.ticket, "seat": opened.seat}
            self.opening = msgspec.structs.replace(self.opening, names=(), **where)
        return opened.step

    def rejoin(self, loss: TrunklineError) -> int:
        """Join again after `loss`; the step at which the run stands.

        Raises `loss` if the run does not survive its worker, and what tells of both if nobody has it.
        """
        if not self.survives:
            raise loss
        try:
            return self.open()
        except TrunklineError as failure:
            raise unrecovered(loss, "the run could not be joined again", failure) from loss

    def adapter(self) -> dict[str, Tensor]:
        """The trunk's adapter by global name. Raises what `Remote.take` raises."""
        for _ in range(_RECOVERIES):
            try:
                return self._adapter_now()
            except LOST as loss:
                self.rejoin(loss)
        return self._adapter_now()

    def _adapter_now(self) -> dict[str, Tensor]:
        arrival = self._remote.call(GetAdapter(run=self.opening.run))
        if not isinstance(arrival.header, Adapter):
            raise ProtocolError("the worker answered with something other than an adapter", side="worker")
        return dict(zip(arrival.header.names, arrival.tensors, strict=True))

    def close(self) -> None:
        """This silo is done with the run. A worker that is lost by now does not matter to it."""
        with suppress(*LOST):
            self._remote.call(CloseRun(run=self.opening.run))

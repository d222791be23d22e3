"""A silo's training loop: several micro-batches in flight, one optimizer step at a time.

Per micro-batch: head forward, noise, frame out; trunk output in, tail forward, loss, tail backward,
gradient out; boundary gradient in, head backward. While one micro-batch is on the wire or in the
trunk, others are in head or tail. A free place in the window is filled first, so that the line stays
full; else the loop does what arrived first. So one backward that ends makes room for one forward.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import ProtocolError
from codec.messages import Backward, Commit, Committed, Forward, Result
from codec.plan import RunPlan
from silo_agent.ends import Ends
from silo_agent.loss import loss_and_gradient
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise
from silo_agent.packed import Packed, pack
from silo_agent.remote import Arrival, Remote, expect
from silo_agent.window import Window
from silo_agent.wires import Wires
from workers.optimizer import PartOptimizer

_KEPT = 256
"""Micro-batches of one silo that a worker keeps between forward and backward."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `loss` is the mean over this silo's own loss tokens, `window` how many
    micro-batches may be in flight after it."""

    step: int
    loss: float
    loss_tokens: int
    tokens: int
    grad_norm: float
    learning_rate: float
    trunk_busy: float
    seconds: float
    wire: str
    window: int


@dataclass(slots=True)
class _Flight:
    """A micro-batch between head forward and head backward; `sent` is what the head put out."""

    number: int
    batch: MicroBatch
    sent: Tensor
    returning: bool = False


class Trainer:
    """Trains this silo's ends together with a run's trunk. The run must be open."""

    def __init__(
        self,
        ends: Ends,
        remote: Remote,
        *,
        run: str,
        plan: RunPlan,
        noise: Noise,
        wires: Wires | None = None,
        window: int | None = None,
        patience: float = 600.0,
        step: int = 0,
    ) -> None:
        """`window` micro-batches are in flight at most, None: as many as it takes that the trunk never waits
        for this silo. `patience` bounds the wait for other silos. Without `wires` every bit crosses.
        """
        self._ends, self._remote, self._run, self._plan = ends, remote, run, plan
        self._noise, self._patience = noise, patience
        self._window = Window(window, most=_KEPT)
        self._wires = wires or Wires("exact")
        self._optimizer = PartOptimizer(plan, ends.adapter())
        self._trains_head = bool(ends.head_adapter())
        self._flights: dict[int, _Flight] = {}
        self._prepared: deque[tuple[_Flight, Packed]] = deque()
        self._next = 0
        self._loss = 0.0
        self.step_number = step

    def step(self, micro_batches: Iterable[MicroBatch], following: Sequence[MicroBatch] = ()) -> StepReport:
        """Run the micro-batches through all parts and take one optimizer step.

        `following` are those of the next step: a head that is not trained may begin with them while
        the commit is under way. Raises what `Remote.take` raises; after an error the run cannot go on.
        """
        begun = time.monotonic()
        todo = deque(micro_batches)
        tokens = sum(len(batch.ids) for batch in todo)
        loss_tokens = sum(len(batch.keep) for batch in todo)
        self._loss = 0.0
        while todo or self._flights:
            if todo and len(self._flights) < self._window.size:
                self._start(todo.popleft())
            elif (arrival := self._remote.take()) is not None:
                self._advance(arrival)
        self._window.committed()
        committed = self._commit(loss_tokens, following)
        rate = self._plan.rate_at(self.step_number)
        self.step_number += 1
        return StepReport(
            step=self.step_number,
            loss=self._loss / max(1, loss_tokens),
            loss_tokens=loss_tokens,
            tokens=tokens,
            grad_norm=committed.grad_norm,
            learning_rate=rate,
            trunk_busy=committed.busy,
            seconds=time.monotonic() - begun,
            wire=self._wires.summary(),
            window=self._window.size,
        )

    def _start(self, batch: MicroBatch) -> None:
        begun = time.monotonic()
        if self._prepared and self._prepared[0][0].batch is batch:
            flight, packed = self._prepared.popleft()
        else:
            self._prepared.clear()
            flight, packed = self._prepare(batch)
        self._window.began(flight.number, begun)
        self._send(flight, packed)

    def _prepare(self, batch: MicroBatch) -> tuple[_Flight, Packed]:
        """All that is done for a micro-batch before it leaves."""
        head, key = self._ends.head, self._ends.adapter_key
        with torch.set_grad_enabled(self._trains_head):
            hidden = head.run(batch.ids, batch.lengths, adapter=key, mask=batch.mask)
            sent = self._noise.add(hidden)
        request = Forward(
            run=self._run,
            microbatch=self._next,
            lengths=batch.lengths,
            wire=self._wires.pick("trunk → tail", *sent.shape),
        )
        wire = self._wires.pick("head → trunk", *sent.shape)
        packed = pack(request, [sent], wire=wire, step=self._noise.step, mask=batch.mask)
        self._next += 1
        return _Flight(request.microbatch, batch, sent), packed

    def _send(self, flight: _Flight, packed: Packed) -> None:
        self._flights[self._remote.send(packed)] = flight
        self._window.sent(flight.number, time.monotonic(), packed.size)

    def _advance(self, arrival: Arrival) -> None:
        header, flight = arrival.header, self._flights.pop(arrival.header.id)
        seconds = header.seconds if isinstance(header, Result) else 0.0
        self._window.answered(flight.number, time.monotonic(), seconds)
        if flight.returning:
            if self._trains_head:
                (gradient,) = expect(arrival, 1)
                _check_shape(gradient, flight.sent)
                flight.sent.backward(gradient.to(flight.sent))
            self._window.ended(flight.number, time.monotonic())
            return
        (output,) = expect(arrival, 1)
        _check_shape(output, flight.sent)
        loss, gradient = loss_and_gradient(self._ends, output, flight.batch)
        self._loss += loss
        request = Backward(
            run=self._run,
            microbatch=flight.number,
            wants_gradient=self._trains_head,
            wire=self._wires.pick("trunk → head (gradient)", *gradient.shape) if self._trains_head else "raw",
        )
        flight.returning = True
        wire = self._wires.pick("tail → trunk (gradient)", *gradient.shape)
        self._send(flight, pack(request, [gradient], wire=wire, stochastic=True))

    def _commit(self, loss_tokens: int, following: Sequence[MicroBatch]) -> Committed:
        shared = self._plan.ends == "shared"
        gradients = self._optimizer.gradients() if shared else {}
        request = Commit(
            run=self._run,
            step=self.step_number,
            loss_tokens=loss_tokens,
            square_norm=0.0 if shared else self._optimizer.square_norm(),
            names=tuple(gradients),
        )
        number = self._remote.submit(request, list(gradients.values()), deadline=self._patience)
        if not self._trains_head:
            # What the step will change is not in this head: its next outputs are known already.
            self._prepared.extend(self._prepare(batch) for batch in following[: self._window.size])
        arrival = self._remote.wait(number)
        committed = arrival.header
        if not isinstance(committed, Committed) or committed.step != self.step_number:
            raise ProtocolError("the worker answered a commit with something else", side="worker")
        if shared:
            summed = expect(arrival, len(gradients))
            self._optimizer.replace_gradients(dict(zip(gradients, summed, strict=True)))
        self._optimizer.step(committed.step, committed.divisor, committed.clip)
        return committed


def _check_shape(came: Tensor, sent: Tensor) -> None:
    if came.shape != sent.shape:
        raise ProtocolError(f"{tuple(came.shape)} came back for {tuple(sent.shape)}", side="worker")

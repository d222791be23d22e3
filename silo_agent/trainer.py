"""A silo's training loop: several micro-batches in flight, one optimizer step at a time.

Per micro-batch: head forward, noise, frame out; trunk output in, tail forward, loss, tail backward,
gradient out; boundary gradient in, head backward. While one micro-batch is on the wire or in the
trunk, others are in head or tail. A free place in the window is filled first, so that the line stays
full; else the loop does what arrived first. So one backward that ends makes room for one forward.

If the worker or another silo is lost, the run is joined again. It stands at this silo's step, which is
done again, the same noise on the same hidden states; or one further, and the commit that was not answered
is sent again; or, where its last state was damaged, one back, and so does the silo go.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import ProtocolError, TrunklineError
from codec.messages import Backward, Commit, Committed, Forward, Result
from codec.plan import RunPlan
from silo_agent.ends import Ends
from silo_agent.loss import loss_and_gradient
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise, repeatable
from silo_agent.packed import Packed, pack
from silo_agent.remote import LOST, Arrival, Remote, expect
from silo_agent.snapshot import Standing
from silo_agent.window import Window
from silo_agent.wires import Wires
from workers.optimizer import PartOptimizer

_GRADIENT = "gradient:"

Tensors = dict[str, Tensor]
Rejoin = Callable[[TrunklineError], int]
"""Join the run again after a loss: the step at which it stands. Raises if it cannot."""

Keep = Callable[[Standing, Tensors], None]
"""Keep where a silo stands, and the tensors that belong to it."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `loss` is the mean over this silo's own loss tokens, `window` how many
    micro-batches may be in flight after it, `epsilon` what all steps so far have spent, if that is asked."""

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
    epsilon: float | None = None


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
        rejoin: Rejoin | None = None,
        keep: Keep | None = None,
        freeze_head: bool = False,
    ) -> None:
        """`window` micro-batches are in flight at most, None: as many as it takes that the trunk never waits
        for this silo. `patience` bounds the wait for other silos, and how long one step is tried again.
        Without `wires` every bit crosses; without `rejoin` a loss is the end. `keep` is called before each
        commit. With `freeze_head` the head's adapter stays as it is; not where the ends are shared.
        """
        self._ends, self._remote, self._run, self._plan = ends, remote, run, plan
        self._noise, self._patience, self._rejoin, self._keep = noise, patience, rejoin, keep
        self._window = Window(window)
        self._wires = wires or Wires("exact")
        self._optimizer = PartOptimizer(plan, ends.adapter())
        self._trains_head = bool(ends.head_adapter()) and not freeze_head
        self._flights: dict[int, _Flight] = {}
        self._prepared: deque[tuple[_Flight, Packed]] = deque()
        self._next = 0
        self._loss = 0.0
        self._loss_tokens: int | None = None
        self._before = self._after = noise.moments
        self._secret = noise.secret()
        self._stood: deque[tuple[Standing, Tensors]] = deque(maxlen=2)
        self.step_number = step

    def step(
        self, micro_batches: Iterable[MicroBatch], following: Sequence[MicroBatch] = ()
    ) -> StepReport | None:
        """Run the micro-batches through all parts and take one optimizer step.

        `following` are those of the next step: a head that is not trained may begin with them while
        the commit is under way. None if the run went back: `step_number` is the step to do then.
        Raises what `Remote.take` raises, and what `rejoin` does; the run cannot go on after that.
        """
        begun, until = time.monotonic(), 0.0
        number, batches = self.step_number, tuple(micro_batches)
        while True:
            try:
                loss_tokens = self._accumulate(batches) if self._loss_tokens is None else self._loss_tokens
                committed = self._commit(loss_tokens, following)
                break
            except LOST as loss:
                until = until or time.monotonic() + self._patience
                self._recover(loss, until)
                if self.step_number != number:
                    return None
        return StepReport(
            step=self.step_number,
            loss=self._loss / max(1, loss_tokens),
            loss_tokens=loss_tokens,
            tokens=sum(len(batch.ids) for batch in batches),
            grad_norm=committed.grad_norm,
            learning_rate=self._plan.rate_at(number),
            trunk_busy=committed.busy,
            seconds=time.monotonic() - begun,
            wire=self._wires.summary(),
            window=self._window.size,
        )

    def standing(self) -> tuple[Standing, Tensors]:
        """Where this silo stands, with copies of what it takes to go on from there."""
        tensors = self._optimizer.state()
        for name, parameter in self._optimizer.parameters.items():
            if self._loss_tokens is not None and parameter.grad is not None:
                tensors[f"{_GRADIENT}{name}"] = parameter.grad.clone()
        standing = Standing(
            step=self.step_number,
            loss_tokens=self._loss_tokens,
            loss=self._loss,
            before=self._before,
            after=self._after,
            secret=self._secret,
        )
        return standing, tensors

    def stand(self, standing: Standing, tensors: Mapping[str, Tensor]) -> None:
        """Go on from where a silo stood. Raises `MismatchError` if the tensors do not fit."""
        self._optimizer.restore(tensors)
        for name, parameter in self._optimizer.parameters.items():
            if f"{_GRADIENT}{name}" in tensors:
                parameter.grad = tensors[f"{_GRADIENT}{name}"].to(parameter)
        self.step_number, self._loss_tokens, self._loss = standing.step, standing.loss_tokens, standing.loss
        self._before, self._after, self._secret = standing.before, standing.after, standing.secret
        self._noise.moments = standing.after
        self._prepared.clear()
        if standing.loss_tokens is not None and all(kept is not standing for kept, _ in self._stood):
            self._stood.append((standing, dict(tensors)))

    def settle(self, home: int) -> None:
        """The run stands at step `home`: repeat this silo's commit, or begin its step anew, or the one
        before. Raises `ProtocolError` if there is no way to go on from there."""
        if home == self.step_number + 1 and self._loss_tokens is not None:
            return
        if home == self.step_number - 1:
            for standing, tensors in self._stood:
                if standing.step == home:
                    self.stand(standing, tensors)
                    break
        if home != self.step_number:
            raise ProtocolError(
                f"the run stands at step {home}, and this silo at step {self.step_number}",
                hint="Was it resumed from an old copy? Start every silo of the run anew.",
            )
        self._optimizer.drop_gradients()
        self._prepared.clear()
        self._loss_tokens, self._noise.moments = None, self._before

    def _recover(self, loss: TrunklineError, until: float) -> None:
        """Drop what is in flight, join again and settle. Raises `loss` if that cannot be, or is too late."""
        self._remote.forget(self._flights)
        self._flights.clear()
        self._window.dropped()
        if self._rejoin is None or time.monotonic() > until:
            raise loss
        self.settle(self._rejoin(loss))

    def _accumulate(self, batches: Sequence[MicroBatch]) -> int:
        """All micro-batches through all parts; the tokens that bore loss."""
        todo = deque(enumerate(batches))
        self._loss = 0.0
        while todo or self._flights:
            if todo and len(self._flights) < self._window.size:
                self._start(*todo.popleft())
            elif (arrival := self._remote.take()) is not None:
                self._advance(arrival)
        self._window.committed()
        loss_tokens = sum(len(batch.keep) for batch in batches)
        self._loss_tokens, self._after = loss_tokens, self._noise.moments
        if self._rejoin is not None:
            if self._stood and self._stood[-1][0].step == self.step_number:
                self._stood.pop()  # It was done before, and is not kept twice.
            self._stood.append(self.standing())
            if self._keep is not None:
                self._keep(*self._stood[-1])
        return loss_tokens

    def _start(self, index: int, batch: MicroBatch) -> None:
        begun = time.monotonic()
        if self._prepared and self._prepared[0][0].batch is batch:
            flight, packed = self._prepared.popleft()
        else:
            self._prepared.clear()
            flight, packed = self._prepare(batch, self.step_number, index)
        self._window.began(flight.number, begun)
        self._send(flight, packed)

    def _prepare(self, batch: MicroBatch, step: int, index: int) -> tuple[_Flight, Packed]:
        """All that is done for a step's micro-batch `index` before it leaves."""
        head, key = self._ends.head, self._ends.adapter_key
        with torch.set_grad_enabled(self._trains_head):
            hidden = head.run(batch.ids, batch.lengths, adapter=key, mask=batch.mask)
            sent = self._noise.add(hidden, repeatable(self._secret, step, index))
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
        if not self._trains_head and not self._prepared:
            # What the step will change is not in this head: its next outputs are known already.
            for index, batch in enumerate(following[: self._window.size]):
                self._prepared.append(self._prepare(batch, self.step_number + 1, index))
        arrival = self._remote.wait(number)
        committed = arrival.header
        if not isinstance(committed, Committed) or committed.step != self.step_number:
            raise ProtocolError("the worker answered a commit with something else", side="worker")
        if shared:
            summed = expect(arrival, len(gradients))
            self._optimizer.replace_gradients(dict(zip(gradients, summed, strict=True)))
        self._optimizer.step(committed.step, committed.divisor, committed.clip)
        self.step_number += 1
        self._loss_tokens, self._before = None, self._after
        return committed


def _check_shape(came: Tensor, sent: Tensor) -> None:
    if came.shape != sent.shape:
        raise ProtocolError(f"{tuple(came.shape)} came back for {tuple(sent.shape)}", side="worker")

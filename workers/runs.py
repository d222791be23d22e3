"""What silos ask about runs, and what becomes of a run whose silos vanish or whose worker is a new one.

With a `StateStore` a run survives: who joins and every step is saved before anybody hears of it. Files
are written and read on the saver's thread, while passes for others go on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from broker.ask import RunKey, run_key
from codec.errors import TrunklineError, UnavailableError
from codec.logs import Log
from codec.messages import CloseRun, Commit, Done, Error, Opened, OpenRun
from workers.activations import Activations
from workers.holdings import Holdings, named
from workers.replies import Reply, error_header, unexpected
from workers.run import TrunkRun, told
from workers.saver import Saver
from workers.state import Found, StateStore

_Asked = tuple[bytes, OpenRun, list[Tensor]]


@dataclass(slots=True, eq=False)
class Runs:
    """The runs among the holdings. Without a `store` a run ends with its worker, or with a silo's going."""

    holdings: Holdings
    activations: Activations
    store: StateStore | None = None
    saver: Saver = field(default_factory=Saver)
    _waiting: dict[RunKey, list[_Asked]] = field(default_factory=dict)
    """Who asked to join a run whose state is being read."""
    _log: Log = field(default_factory=lambda: Log("worker"))

    def open(self, silo: bytes, request: OpenRun, tensors: list[Tensor]) -> list[Reply]:
        """Join a run, which is made, or read from the store, if it is not here.

        Raises `UnavailableError` if there is nowhere to read it from, and what joining raises.
        """
        self.holdings.check_model(request)
        asked, key = (silo, request, tensors), run_key(request)
        if key in self._waiting:
            self._waiting[key].append(asked)
            return []
        if key in self.holdings.runs or not request.ticket:
            try:
                return self._join(*asked)
            finally:
                self._free_if_empty(self.holdings.runs.get(key))
        if self.store is None:
            raise UnavailableError(
                "this worker was started without --state", hint="Give all workers the same."
            )
        self._waiting[key] = [asked]
        self.saver.submit(partial(self.store.load, request.ticket), partial(self._read, silo, request))
        return []

    def _read(self, silo: bytes, request: OpenRun, found: Found | TrunklineError) -> list[Reply]:
        """A saved run was read, as this silo had asked; let those in who want to join it."""
        key = run_key(request)
        asked, replies = self._waiting.pop(key), []
        try:
            if isinstance(found, TrunklineError):
                raise found
            self.holdings.resume_run(silo, request, found)
            self._log.say("run goes on from its saved state", run=request.run, step=found.state.step)
        except Exception as error:
            why = self._known(error)
            replies = [Reply(s, error_header(r.id, why)) for s, r, _ in asked if r.ticket]
            asked = [each for each in asked if not each[1].ticket]
        for each, opening, tensors in asked:
            try:
                replies += self._join(each, opening, tensors)
            except Exception as error:
                replies.append(Reply(each, error_header(opening.id, self._known(error))))
        self._free_if_empty(self.holdings.runs.get(key))
        return replies

    def _known(self, error: Exception) -> TrunklineError:
        if isinstance(error, TrunklineError):
            return error
        self._log.failed("run not joined")
        return unexpected(error)

    def _join(self, silo: bytes, request: OpenRun, tensors: list[Tensor]) -> list[Reply]:
        initial = named(request.names, tensors)
        run = self.holdings.open_run(silo, request, initial, self.store)
        seat, anew = run.join(silo, request, initial)
        self._log.say("silo joined run", run=request.run, silos=len(run.ledger.members))
        ticket = run.durable.ticket if run.durable else b""
        opened = Opened(id=request.id, step=run.ledger.step, ticket=ticket, seat=seat)
        return self._begun_anew(run, anew) + self._durably(run, [Reply(silo, opened)])

    def commit(self, silo: bytes, request: Commit, tensors: list[Tensor]) -> list[Reply]:
        """Record a commit; what follows from it. Raises what `TrunkRun.commit` raises."""
        run = self.holdings.run(silo, request.run)
        replies, complete = run.commit(silo, request, named(request.names, tensors))
        if complete:
            self.activations.drop_all(run)  # What was left of the step is void.
        return self._durably(run, replies)

    def close(self, silo: bytes, request: CloseRun) -> list[Reply]:
        """A silo is done with a run; before the last step that ends it. Raises `UnknownNameError`."""
        run = self.holdings.run(silo, request.run)
        return self._leave(silo, run, None, [Reply(silo, Done(id=request.id))])

    def gone(self, silo: bytes, name: str, who: str) -> list[Reply]:
        """A silo called `who` vanished from a run, which waits for it if it survives."""
        run = self.holdings.run(silo, name)
        if run.durable is None:
            return self._leave(silo, run, who, [])
        self.activations.drop_all(run, silo)
        replies = self._begun_anew(run, run.ledger.away(silo))
        self._free_if_empty(run)
        return replies

    def forget(self, silo: bytes) -> list[Reply]:
        """A silo that waits to join vanished, or all did if it is empty. Every request is answered."""
        error, replies = UnavailableError("its silo is gone", side="silo"), []
        for asked in self._waiting.values():
            replies += [Reply(s, error_header(r.id, error)) for s, r, _ in asked if silo in (s, b"")]
            asked[:] = [each for each in asked if silo not in (each[0], b"")]
        return replies

    def _leave(self, silo: bytes, run: TrunkRun, who: str | None, done: list[Reply]) -> list[Reply]:
        self.activations.drop_all(run, silo)
        replies = []
        for member, commit in run.leave(silo, who).items():
            try:
                run.ledger.check(member)
            except TrunklineError as error:
                replies.append(told(member, commit, error))
        if run.durable is not None and (run.ledger.left or not run.ledger.seats):
            self.saver.submit(run.durable.tenure.discard, lambda _: [])
            run.durable.unsaved = False
        replies += self._durably(run, done)
        self._free_if_empty(run)
        return replies

    def _begun_anew(self, run: TrunkRun, void: dict[bytes, Commit] | None) -> list[Reply]:
        """If the step begins anew, nothing of it is kept, and who waits in vain is told."""
        if void is None:
            return []
        run.void()
        self.activations.drop_all(run)
        return [told(member, commit, run.ledger.begins_anew()) for member, commit in void.items()]

    def _free_if_empty(self, run: TrunkRun | None) -> None:
        if run is not None and not run.ledger.members:
            self.activations.forget(run)
            self.holdings.close_run(run)

    def _durably(self, run: TrunkRun, replies: list[Reply]) -> list[Reply]:
        """The replies, or none yet: they are held until all that the run did before is saved."""
        durable = run.durable
        if durable is None or not (durable.unsaved or (durable.saving and replies)):
            return replies
        save: Callable[[], None] = (
            partial(durable.tenure.save, *self.holdings.state_of(run)) if durable.unsaved else lambda: None
        )
        durable.unsaved = False
        durable.saving += 1
        self.saver.submit(save, partial(self._saved, run, replies))
        return []

    def _saved(self, run: TrunkRun, replies: list[Reply], came: TrunklineError | None) -> list[Reply]:
        """Release what waited for a save. After one that failed, the run goes no further here."""
        assert run.durable is not None
        run.durable.saving -= 1
        run.durable.failure = failure = run.durable.failure or came
        if failure is None:
            return replies
        replies = [
            reply
            if isinstance(reply.header, Error)
            else Reply(reply.silo, error_header(reply.header.id, failure))
            for reply in replies
        ]
        if run in self.holdings.runs.values():  # Else it was given up, or freed, before.
            self._log.warn("run given up: its state is not saved", run=run.durable.name, why=str(failure))
            replies += [told(member, commit, failure) for member, commit in run.ledger.commits.items()]
            run.ledger.seats.clear()
            self._free_if_empty(run)
        return replies

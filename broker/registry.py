"""Who is attached, and who holds which session and run."""

from broker.ask import Flow, RunKey, flow_of, run_key
from broker.chain import Chain
from broker.pool import Worker
from broker.quota import Account, Limits
from broker.routes import choose_home, choose_route
from broker.silo import Hold, Silo
from codec.errors import MismatchError, UnavailableError, UnknownNameError
from codec.messages import CloseRun, CloseSession, OpenRun, OpenSession, Request
from codec.partition import Span

START_AGAIN = "Start it again and repeat the command."


class Registry:
    """Silos and workers by alias, and the home of each run. Keeps every worker's load."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.keyed = False
        """Peers are called as their keys are, and a key's peers share its quotas."""
        self._accounts: dict[str, Account] = {}
        self.silos: dict[bytes, Silo] = {}
        self.workers: dict[bytes, Worker] = {}
        self.runs: dict[RunKey, Worker] = {}

    def admit(self, alias: bytes, role: str, name: str) -> Silo | Worker:
        """A peer that is not known."""
        if role == "worker":
            worker = self.workers[alias] = Worker(alias)
            return worker
        account = self._accounts.setdefault(name, Account()) if self.keyed else Account()
        silo = self.silos[alias] = Silo(alias, account=account)
        account.silos.append(silo)
        silo.owed = {number for worker in self.workers.values() for number in worker.inbox.owes(alias)}
        return silo

    def owed(self, alias: bytes, number: int) -> bool:
        """Whether a worker has yet to answer a silo's request of this number, awaited or not."""
        return any(worker.inbox.has_sent(alias, number) for worker in self.workers.values())

    def hold(self, silo: Silo, header: Request) -> Hold:
        """What the request is about, made now if it opens a new name.

        Raises `UnknownNameError`, `UnavailableError` for what left with its worker, `MismatchError` for
        a run that is not the silo's to open, `LimitError` over a quota, and as `choose_route` does.
        """
        flow = flow_of(silo.alias, header)
        names, name = silo.names(flow), flow[2]
        hold = names.get(name)
        if isinstance(header, OpenRun):
            _check_member(silo, header.plan.members, hold)
        if hold is not None and not hold.lost:
            if hold.chain is not None and isinstance(header, OpenSession):
                hold.chain.check(header)
            return hold
        if isinstance(header, OpenSession | OpenRun):
            if hold is None:
                check = silo.account.check_run if isinstance(header, OpenRun) else silo.account.check_session
                check(self.limits)
            hold = names[name] = self._open(flow, header)
            return hold
        if hold is None:
            raise UnknownNameError(f"you have no session or run {name!r} open")
        if isinstance(header, CloseSession | CloseRun):
            del names[name]
        raise UnavailableError(f"worker {hold.lost!r} left, and {name!r} with it", hint=START_AGAIN)

    def release(self, silo: Silo, hold: Hold) -> None:
        """A silo's name is free again."""
        silo.forget(hold)
        if hold.flow[1] == "session":
            self.unload(hold)
        else:
            self.drop_empty_runs()

    def unload(self, hold: Hold) -> None:
        """A session is gone from the workers that still are there."""
        for worker in hold.workers:
            worker.load -= 1

    def drop_empty_runs(self) -> None:
        """A run stays until its last silo has left it."""
        joined = {hold.run for silo in self.silos.values() for hold in silo.runs.values() if not hold.lost}
        for run in [run for run in self.runs if run not in joined]:
            self.runs.pop(run).load -= 1

    def _open(self, flow: Flow, header: OpenSession | OpenRun) -> Hold:
        wanted = header.model, Span(header.start, header.stop), header.encodings
        if isinstance(header, OpenRun):
            key = run_key(header)
            home = self.runs.get(key)
            if home is None:
                home = self.runs[key] = choose_home(header.run, self.workers.values(), *wanted)
                home.load += 1
            return Hold(flow, home, members=header.plan.members)
        stages = choose_route(self.workers.values(), *wanted)
        chain = Chain(header.session, stages) if len(stages) > 1 else None
        hold = Hold(flow, stages[0].worker, chain)
        for worker in hold.workers:
            worker.load += 1
        return hold


def _check_member(silo: Silo, members: tuple[str, ...], hold: Hold | None) -> None:
    """Raises `MismatchError` for who is not among the `members`, or is in such a run of others already."""
    if members and silo.name not in members:
        raise MismatchError(
            f"this run is for {', '.join(members)}, and this silo is {silo.name!r}",
            hint="Name it too (--members), as the broker's operator named its key.",
        )
    if hold is not None and not hold.lost and hold.members != members:
        raise MismatchError(
            f"you are in a run {hold.flow[2]!r} of other members",
            hint="Close it first, or choose another name (--run).",
        )

"""Which worker gets a session or a run, or which several get a session together."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from broker.pool import Worker
from codec.errors import MismatchError, NobodyError, TrunklineError, UnavailableError
from codec.messages import Encodings
from codec.partition import Span
from codec.plan import ModelCard


@dataclass(frozen=True, slots=True)
class Stage:
    """One worker's part of a route, in the order in which hidden states pass."""

    worker: Worker
    blocks: Span


def choose_home(
    run: str, workers: Iterable[Worker], model: ModelCard, blocks: Span, encodings: Encodings
) -> Worker:
    """The home of a run, of the workers that host all its blocks and read these encodings.

    Brokers with the same workers choose the same one without a word between them, and the fewest
    runs would move if a worker came or went: the highest of all hashes of run and worker (rendezvous
    hashing). Raises as `choose_route` does.
    """
    able = _able(list(workers), model, blocks, encodings, most=1)
    return max((w for w in able if w.blocks.contains(blocks)), key=lambda worker: rank(run, worker.alias))


def choose_route(
    workers: Iterable[Worker], model: ModelCard, blocks: Span, encodings: Encodings
) -> tuple[Stage, ...]:
    """The fewest workers whose spans together make up `blocks`; of such routes the least loaded.

    Raises `UnavailableError` while there is none but may be one soon, and `MismatchError` if there are
    only workers of another kind.
    """
    able = _able(list(workers), model, blocks, encodings, most=len(blocks))
    return _shortest(able, blocks, most=len(blocks))


def rank(run: str, alias: bytes) -> bytes:
    """Of all workers the one whose alias has the highest is the run's home."""
    return hashlib.blake2b(run.encode(), key=alias, digest_size=16).digest()


def _able(
    workers: list[Worker], model: ModelCard, blocks: Span, encodings: Encodings, most: int
) -> list[Worker]:
    """Those that may take part in a route of at most `most` stages, of which there is at least one."""
    same = [worker for worker in workers if worker.model and not worker.model.differs_from(model)]
    reading = [worker for worker in same if worker.encodings.issuperset(encodings)]
    staying = [worker for worker in reading if not worker.draining]
    if _shortest(staying, blocks, most):
        return staying
    if _shortest(reading, blocks, most):
        raise UnavailableError(
            f"every worker that hosts {blocks} is about to leave and takes nothing new",
            hint=f"Ask again in a while, or start another: {_start(model)}",
        )
    if _shortest(same, blocks, most):
        raise MismatchError(
            f"no worker that hosts {blocks} reads all of {', '.join(encodings)}",
            side="worker",
            hint="Choose another --wire, or update the workers.",
        )
    raise _nobody(workers, same, model, blocks)


def _shortest(workers: list[Worker], blocks: Span, most: int) -> tuple[Stage, ...]:
    """The fewest stages, then the least load; empty if there is no route of at most `most` stages.

    A stage reaches as far as its worker does: a shorter one would not leave less to the others.
    """
    best: dict[int, tuple[int, int, tuple[Stage, ...]]] = {blocks.start: (0, 0, ())}
    for at in range(blocks.start, blocks.stop):
        if at not in best:
            continue
        stages, load, route = best[at]
        for worker in workers:
            reach = min(worker.blocks.stop, blocks.stop)
            if worker.blocks.start <= at < reach:
                further = (stages + 1, load + worker.load, (*route, Stage(worker, Span(at, reach))))
                if reach not in best or further[:2] < best[reach][:2]:
                    best[reach] = further
    stages, _, route = best.get(blocks.stop, (0, 0, ()))
    return route if stages <= most else ()


def _nobody(workers: list[Worker], same: list[Worker], model: ModelCard, blocks: Span) -> TrunklineError:
    if not workers:
        return NobodyError("no worker is attached to the broker", hint=f"Start one: {_start(model)}")
    if same:
        spans = ", ".join(str(worker.blocks) for worker in same)
        return MismatchError(
            f"blocks {blocks} are needed, the workers host {spans}",
            side="worker",
            hint="Start a worker with --blocks that cover them, or choose other --head and --tail.",
        )
    known = {f"{w.model.name} ({w.model.differs_from(model)})" for w in workers if w.model}
    return MismatchError(
        f"the silo holds {model.name}, the workers hold {', '.join(sorted(known))}",
        hint="Give silo and worker the same --model.",
    )


def _start(model: ModelCard) -> str:
    return f"trunkline worker --broker URL --model {model.name}"

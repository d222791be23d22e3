"""How the pool is: told by the broker to whoever may connect, about silos in numbers alone."""

from broker.pool import Worker
from broker.registry import Registry
from codec.limits import MAX_LISTED
from codec.messages import Pool, WorkerStatus


def pool_status(registry: Registry, number: int, now: float) -> Pool:
    """The answer to the question `number`: a silo learns nothing of another but that it is there."""
    workers = sorted(registry.workers.values(), key=lambda worker: worker.name)
    return Pool(
        id=number,
        workers=tuple(_told(worker, now) for worker in workers[:MAX_LISTED]),
        unlisted=max(0, len(workers) - MAX_LISTED),
        silos=len(registry.silos),
        sessions=sum(len(silo.sessions) for silo in registry.silos.values()),
        runs=len(registry.runs),
    )


def _told(worker: Worker, now: float) -> WorkerStatus:
    return WorkerStatus(
        name=worker.name,
        model=worker.model.name if worker.model else "",
        start=worker.blocks.start,
        stop=worker.blocks.stop,
        load=worker.load,
        draining=worker.draining,
        silent=max(0.0, now - worker.last_heard),
    )

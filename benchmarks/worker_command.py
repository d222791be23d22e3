"""`trunkline bench worker`: a worker that tells how long its trunk computed."""

import secrets

import click

from benchmarks.pace import PACES
from workers import runtime  # before torch: it sets how idle threads wait

_MIB = 1 << 20


@click.command("worker")
@click.option("--broker", required=True, metavar="URL", help="The broker, tcp://127.0.0.1:7555.")
@click.option("--pace", type=click.Choice(list(PACES)), help="Take this GPU's time instead of computing.")
@click.option("--model", default="smollm2-135m", show_default=True, help="Without --pace: what to compute.")
@click.option(
    "--kv-memory",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    metavar="MIB",
    help="Bound on the KV caches of all sessions together.",
)
@click.option("--name", default="worker", show_default=True, help="How logs call this worker.")
def worker(broker: str, pace: str | None, model: str, kv_memory: int, name: str) -> None:
    """A worker for benchmarks: it prints how long its trunk computed, ten times a second.

    With --pace its blocks are not there, and passes take the time they would on a GPU.

    \b
    Examples:
      trunkline bench worker --broker tcp://127.0.0.1:7555 --pace llama-2-7b-h100
      trunkline bench worker --broker tcp://127.0.0.1:7555 --model smollm2-135m
    """
    from benchmarks.meter import Counters, Meter, tell
    from benchmarks.paced_span import PacedSpan
    from broker.link import ZmqLink
    from broker.shutdown import stop_on_signals
    from codec import logs, partition
    from codec.messages import Attach
    from workers.checkpoint import Checkpoint
    from workers.serve import credit_of, serve
    from workers.service import TrunkService
    from workers.span import Span

    logs.configure()
    runtime.quiet_libraries()
    stop = stop_on_signals()
    meter = Meter()
    if pace:
        card = PACES[pace].card
        span: Span = PacedSpan(PACES[pace], meter)
    else:
        checkpoint = Checkpoint(model)
        blocks = partition.Span(0, checkpoint.blocks)
        span, card = Span(checkpoint, blocks), checkpoint.card(range(checkpoint.blocks))
    attach = Attach(
        role="worker",
        name=name,
        peer=secrets.token_bytes(16),
        model=card,
        start=0,
        stop=card.blocks,
        credit=credit_of(span),
    )
    service = TrunkService(span, card, kv_memory * _MIB)

    def counters() -> Counters:
        busy = service.busy
        passes, tokens = (sum(of.values()) for of in (dict(busy.passes), dict(busy.tokens)))
        return {"busy": busy.seconds, "passes": passes, "tokens": tokens}

    link = ZmqLink(broker, attach)
    try:
        tell(meter.counters if pace else counters, click.echo, stop)
        serve(link, service, stop)
    finally:
        link.close()

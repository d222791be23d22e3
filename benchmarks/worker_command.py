"""`trunkline bench worker`: a worker that tells how long its trunk computed."""

import click

from benchmarks.pace import PACES
from workers import runtime  # before torch: it sets how idle threads wait
from workers.commands import MIB, kv_memory_option


@click.command("worker")
@click.option("--broker", required=True, metavar="URL", help="The broker, tcp://127.0.0.1:7555.")
@click.option("--pace", type=click.Choice(list(PACES)), help="Take this GPU's time instead of computing.")
@click.option("--model", default="smollm2-135m", show_default=True, help="Without --pace: what to compute.")
@kv_memory_option
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
    from workers.checkpoint import Checkpoint
    from workers.serve import serve, worker_attach
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
    service = TrunkService(span, card, kv_memory * MIB)

    def counters() -> Counters:
        busy = service.busy
        passes, tokens = (sum(of.values()) for of in (dict(busy.passes), dict(busy.tokens)))
        return {"busy": busy.seconds, "passes": passes, "tokens": tokens}

    link = ZmqLink(broker, worker_attach(span, card, name))
    try:
        tell(meter.counters if pace else counters, click.echo, stop)
        serve(link, service, stop)
    finally:
        link.close()

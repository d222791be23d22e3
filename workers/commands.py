"""`trunkline worker` and `trunkline models`."""

import socket
from collections.abc import Callable
from pathlib import Path

import click

from broker.key_files import link_keys
from workers import runtime  # before torch: it sets how idle threads wait

MIB = 1 << 20


def _memory_option(
    name: str, default: int | None, help: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        name, type=click.IntRange(min=1), default=default, show_default=True, metavar="MIB", help=help
    )


def _share_option(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return _memory_option(
        name, None, "How much of it is each silo's own; more is lent while it is free.  [default: half]"
    )


def _share(own: int | None, whole: int) -> int:
    """Bytes of a memory that are each silo's own, of what was asked for in MiB."""
    return whole * MIB // 2 if own is None else own * MIB


kv_memory_option = _memory_option("--kv-memory", 2048, "Bound on the KV caches of all sessions together.")


@click.command("worker")
@click.option(
    "--broker",
    "brokers",
    required=True,
    multiple=True,
    metavar="URL",
    help="The broker, tcp://127.0.0.1:7555. Once for each: a worker attaches to all of them.",
)
@click.option("--model", required=True, help="Hub id, local directory, or a name `models fetch` knows.")
@click.option("--blocks", metavar="START:STOP", help="Blocks to host.  [default: all]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(runtime.DTYPES), default="auto", show_default=True)
@kv_memory_option
@_share_option("--kv-per-silo")
@_memory_option(
    "--activation-memory",
    4096,
    "Bound on what micro-batches keep between forward and backward; beyond, it is computed again.",
)
@_share_option("--activation-per-silo")
@_memory_option(
    "--adapter-memory", 8192, "Bound on adapters and their optimizers; a silo may bring half of it."
)
@click.option(
    "--state",
    metavar="URL",
    help="Where runs are saved after every step, so that they survive: a directory or an fsspec URL, the "
    "same for all workers.  [default: a run ends with its worker]",
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics there; port 0 too.")
@click.option(
    "--drain",
    type=click.FloatRange(min=0.0),
    default=30.0,
    show_default=True,
    help="Seconds in which what is open may end after SIGTERM; nothing new is taken meanwhile.",
)
@click.option(
    "--stall",
    type=click.FloatRange(min=1.0),
    default=120.0,
    show_default=True,
    metavar="S",
    help="A pass that takes so long is stuck, and one that takes ten times as long as such passes did: the "
    "worker ends, so that its sessions go on elsewhere.",
)
@click.option(
    "--name",
    default=socket.gethostname,
    help="How logs call this worker.  [default: the key's, or host name]",
)
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="This worker's secret key.")
@click.option("--broker-key", metavar="FILE", help="The broker's public key: its file, or the key itself.")
@click.option(
    "--patience",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds to wait while every broker is lost.",
)
def worker(
    brokers: tuple[str, ...],
    model: str,
    blocks: str | None,
    device: str,
    dtype: str,
    kv_memory: int,
    kv_per_silo: int | None,
    activation_memory: int,
    activation_per_silo: int | None,
    adapter_memory: int,
    state: str | None,
    metrics: str | None,
    drain: float,
    stall: float,
    name: str,
    key: Path | None,
    broker_key: str | None,
    patience: float,
) -> None:
    """Host a span of a model's blocks and compute for silos. Sees no text, token ids or labels.

    \b
    Examples:
      trunkline worker --broker tcp://127.0.0.1:7555 --model smollm2-135m
      trunkline worker --broker tcp://127.0.0.1:7555 --model meta-llama/Llama-2-7b-hf --blocks 2:30
      trunkline worker --broker tcp://127.0.0.1:7555 --model smollm2-135m --state /srv/runs
      trunkline worker --broker tcp://hub.example:7555 --model smollm2-135m \\
          --key keys/gpu1.secret --broker-key hub.public
      trunkline worker --broker tcp://127.0.0.1:7555 --broker tcp://127.0.0.1:7556 \\
          --model smollm2-135m
    """
    from broker.links import attach_everywhere
    from broker.metrics import serve_metrics
    from broker.shutdown import stop_on_signals
    from codec import logs, partition
    from workers.checkpoint import Checkpoint
    from workers.metrics import WorkerMetrics
    from workers.serve import serve, worker_attach
    from workers.service import TrunkService
    from workers.span import Span
    from workers.stall import end_if_stuck
    from workers.state import StateStore

    logs.configure()
    runtime.quiet_libraries()
    keys = link_keys(key, broker_key, "worker")
    store = StateStore.at(state) if state else None
    stop = stop_on_signals()
    checkpoint = Checkpoint(model)
    hosted = partition.Span.parse(blocks) if blocks else partition.Span(0, checkpoint.blocks)
    where = runtime.choose_device(device)
    span = Span(checkpoint, hosted, dtype=runtime.choose_dtype(dtype, where), device=where)
    card = checkpoint.card(range(hosted.start, hosted.stop))
    log = logs.Log("worker")
    log.say("hosting", model=model, blocks=str(hosted), mib=span.weight_bytes // MIB, device=str(where))
    service = TrunkService(
        span,
        card,
        kv_memory * MIB,
        activation_memory * MIB,
        store,
        kv_share=_share(kv_per_silo, kv_memory),
        activation_share=_share(activation_per_silo, activation_memory),
        adapter_bytes=adapter_memory * MIB,
    )
    if metrics:
        click.echo(f"metrics at {serve_metrics(metrics, WorkerMetrics(service), 'worker')}")
    link = attach_everywhere(brokers, worker_attach(span, card, name), patience=patience, keys=keys)
    end_if_stuck(service.busy, link, stall)
    try:
        serve(link, service, stop, drain_s=drain)
    finally:
        link.close()
    log.say("stopped")


@click.group("models")
def models() -> None:
    """Models that Trunkline knows by name."""


@models.command("fetch")
@click.argument("name")
def fetch(name: str) -> None:
    """Download NAME once and convert it to safetensors in the user's cache.

    \b
    Examples:
      trunkline models fetch smollm2-135m
      trunkline models fetch tiny
    """
    from workers import catalog

    runtime.quiet_libraries()
    directory = catalog.fetch(name, lambda line: click.echo(line, err=True))
    click.echo(str(directory))

"""`trunkline broker`."""

from collections.abc import Callable
from pathlib import Path

import click

from broker.heap import keep_freed_memory
from broker.keyring import KeyRing
from broker.metrics import BrokerMetrics, serve_metrics
from broker.quota import Limits
from broker.router import Router
from broker.server import Server
from broker.shutdown import stop_on_signals
from codec import logs

_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _most(name: str, default: int, what: str) -> _Decorator:
    return click.option(name, default=default, show_default=True, type=click.IntRange(min=1), help=what)


@click.command("broker")
@click.option(
    "--listen",
    default="tcp://127.0.0.1:7555",
    show_default=True,
    metavar="URL",
    help="Where silos and workers attach; port 0 takes a free one.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Let in only whom the keys there allow (trunkline keys). Needed to listen beyond loopback.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics there; port 0 too.")
@click.option(
    "--heartbeat",
    type=click.FloatRange(min=0.1),
    default=Limits().heartbeat,
    show_default=True,
    metavar="S",
    help="How often peers beat. One of whom nothing comes for two heartbeats is gone.",
)
@click.option(
    "--silence",
    type=click.FloatRange(min=2.0),
    default=Limits().silence,
    show_default=True,
    metavar="S",
    help="Seconds without a message after which a peer is gone although its machine answers.",
)
@_most("--max-sessions", Limits().sessions, "Sessions that a silo may have open.")
@_most("--max-runs", Limits().runs, "Runs that a silo may be in.")
@_most("--max-requests", Limits().requests, "Requests of a silo that may wait for answers.")
@_most("--max-mib", Limits().bytes >> 20, "MiB of tensors in these requests.")
@_most("--max-attaches", Limits().attaches, "Attaches of a silo or worker in a minute.")
def broker(
    listen: str,
    keys: Path | None,
    metrics: str | None,
    heartbeat: float,
    silence: float,
    max_mib: int,
    **quotas: int,
) -> None:
    """Route messages between silos and workers. Needs no GPU and never looks into a tensor.

    Quotas hold for each key: peers that attach with one key share them. Without --keys they hold for each
    attached silo.

    \b
    Examples:
      trunkline broker
      trunkline broker --listen tcp://127.0.0.1:0 --metrics 127.0.0.1:9100
      trunkline broker --listen tcp://10.0.0.5:7555 --keys keys
    """
    logs.configure()
    keep_freed_memory()
    most = {name.removeprefix("max_"): number for name, number in quotas.items()}
    limits = Limits(heartbeat=heartbeat, silence=silence, bytes=max_mib << 20, **most)
    server = Server(listen, Router(limits), KeyRing(keys) if keys else None)
    try:
        if metrics:
            click.echo(f"metrics at {serve_metrics(metrics, BrokerMetrics(server), 'broker')}")
        stop = stop_on_signals()
        click.echo(f"listening on {server.endpoint}")
        server.serve(stop)
    finally:
        server.close()

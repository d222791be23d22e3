"""`trunkline relay`."""

import click

from benchmarks.relay import Relay
from broker.shutdown import stop_on_signals
from codec import logs


@click.command("relay")
@click.option(
    "--listen",
    default="tcp://127.0.0.1:7556",
    show_default=True,
    metavar="URL",
    help="Where silos and workers attach instead; port 0 takes a free one.",
)
@click.option(
    "--to", default="tcp://127.0.0.1:7555", show_default=True, metavar="URL", help="Where the broker listens."
)
@click.option(
    "--rtt-ms", type=float, default=0.0, show_default=True, help="Round trip in ms, half of it each way."
)
@click.option(
    "--mbit",
    type=float,
    default=0.0,
    show_default=True,
    help="Megabits per second, of each connection in each direction; 0 is unlimited.",
)
def relay(listen: str, to: str, rtt_ms: float, mbit: float) -> None:
    """Stand between a silo or worker and its broker like a slow network, on this machine.

    Connections open at once; what they carry is late and slow. Nothing is lost or reordered.

    \b
    Examples:
      trunkline relay --rtt-ms 50 --mbit 100
      trunkline relay --listen tcp://127.0.0.1:0 --to tcp://127.0.0.1:7555 --mbit 20
    """
    logs.configure()
    slow = Relay(listen, to, rtt_ms, mbit)
    try:
        stop = stop_on_signals()
        click.echo(f"relaying {slow.endpoint} to {to}")
        slow.serve(stop)
    finally:
        slow.close()

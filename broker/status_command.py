"""`trunkline status`."""

from pathlib import Path
from typing import TextIO

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from broker.key_files import link_keys
from broker.question import ask_pool
from codec.errors import UnavailableError
from codec.messages import Pool


@click.command("status")
@click.option(
    "--broker", default="tcp://127.0.0.1:7555", show_default=True, metavar="URL", help="The broker to ask."
)
@click.option("--worker", metavar="NAME", help="Healthy only if this worker is attached.")
@click.option("--any", "without_workers", is_flag=True, help="Healthy without any worker too.")
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="A secret key that it allows.")
@click.option("--broker-key", metavar="FILE", help="The broker's public key: its file, or the key itself.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="Seconds for the broker to answer.",
)
@click.option("--json", "json_file", type=click.File("w"), metavar="FILE", help="Write it here; - is stdout.")
def status(
    broker: str,
    worker: str | None,
    without_workers: bool,
    key: Path | None,
    broker_key: str | None,
    timeout: float,
    json_file: TextIO | None,
) -> None:
    """Who is attached to a broker, and can work be done? A health check: exit code 0, or 1 and one line.

    Healthy is a broker that answers and has a worker that is not about to leave. Asking attaches
    nobody; a silo's or worker's key will do. Of silos only numbers are told.

    \b
    Examples:
      trunkline status
      trunkline status --any
      trunkline status --broker tcp://hub.example:7555 --key keys/gpu1.secret \\
          --broker-key hub.public --worker gpu1 --json -
    """
    pool = ask_pool(broker, timeout, link_keys(key, broker_key, None))
    if json_file is not None:
        json_file.write(msgspec.json.encode(_plain(pool)).decode() + "\n")
    else:
        _show(pool)
    if worker is not None:
        # One of many that were not listed cannot be told from one that is not there.
        if not pool.unlisted and all(each.name != worker for each in pool.workers):
            raise UnavailableError(f"no worker {worker!r} is attached to {broker}", side="worker")
    elif not without_workers and not pool.unlisted and all(each.draining for each in pool.workers):
        raise UnavailableError(
            f"no worker of {broker} takes new work",
            side="worker",
            hint="Start one: trunkline worker --broker URL --model M",
        )


def _plain(pool: Pool) -> dict[str, object]:
    """What `--json` writes."""
    return {name: getattr(pool, name) for name in ("workers", "unlisted", "silos", "sessions", "runs")}


def _show(pool: Pool) -> None:
    table = Table("worker", "model", "blocks", "load", "", box=SIMPLE_HEAD)
    for each in pool.workers:
        note = "draining" if each.draining else f"silent for {each.silent:.0f} s" if each.silent > 3 else ""
        # Text, not markup: names come from others.
        cells = (each.name, each.model, f"{each.start}:{each.stop}", str(each.load), note)
        table.add_row(*map(Text, cells))
    console = Console()
    if pool.workers:
        console.print(table)
    if pool.unlisted:
        console.print(f"and {pool.unlisted} workers more")
    console.print(f"silos {pool.silos}, sessions {pool.sessions}, runs {pool.runs}", highlight=False)

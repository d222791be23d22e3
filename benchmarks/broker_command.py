"""`trunkline bench broker`: routed messages a second, beside a plain proxy."""

from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

_OPTIONS = (
    click.option("--sizes", default="1024,65536,1048576", show_default=True, help="Bytes of payload."),
    click.option(
        "--count", default=4000, show_default=True, type=click.IntRange(min=64), help="Requests a round."
    ),
    click.option(
        "--window", default=32, show_default=True, type=click.IntRange(1, 64), help="Requests at once."
    ),
    click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1)),
    click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here."),
)


def round_trip_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every benchmark of round trips through a broker can be told."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command("broker")
@round_trip_options
def broker(sizes: str, count: int, window: int, rounds: int, json_path: Path | None) -> None:
    """How many messages a second does the broker route, beside zmq.proxy, which only passes them on?

    \b
    Examples:
      trunkline bench broker --json broker.json
      trunkline bench broker --sizes 1024 --rounds 1
    """
    from benchmarks.broker import measure
    from benchmarks.numbers import numbers
    from silo_agent.report import write_report

    wanted = [int(size) for size in numbers(sizes, least=4, example="--sizes 1024,65536")]
    with Console(stderr=True).status("starting") as status:
        results = measure(sizes=wanted, count=count, window=window, rounds=rounds, progress=status.update)
    table = Table("bytes", "broker/s", "zmq.proxy/s", "ratio", "added µs, 50 %", "99 %", box=None)
    for row in results["rows"]:
        table.add_row(
            str(row["bytes"]),
            f"{row['broker_per_s']:.0f}",
            f"{row['proxy_per_s']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['added_us_p50']:.0f}",
            f"{row['added_us_p99']:.0f}",
        )
    Console().print(table)
    settings = {"sizes": wanted, "count": count, "window": window, "rounds": rounds}
    write_report(json_path, "broker", settings, results)

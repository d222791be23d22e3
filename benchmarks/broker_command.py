"""`trunkline bench broker`: routed messages a second, beside a plain proxy."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def tell_round_trips(
    bench: str,
    measure: Callable[..., dict[str, Any]],
    columns: Mapping[str, str],
    *,
    sizes: str,
    json_path: Path | None,
    **options: int,
) -> None:
    """Measure as told, print a row for each size and write the report.

    `columns` are a table's titles, and how a row's figures are written below them.
    """
    from benchmarks.numbers import numbers
    from silo_agent.report import write_report

    wanted = [int(size) for size in numbers(sizes, least=4, example="--sizes 1024,65536")]
    settings = {"sizes": wanted, **options}
    with Console(stderr=True).status("starting") as status:
        results = measure(**settings, progress=status.update)
    table = Table(*columns, box=None)
    for row in results["rows"]:
        table.add_row(*(cell.format(**row) for cell in columns.values()))
    Console().print(table)
    write_report(json_path, bench, settings, results)


@click.command("broker")
@round_trip_options
def broker(**options: Any) -> None:
    """How many messages a second does the broker route, beside zmq.proxy, which only passes them on?

    \b
    Examples:
      trunkline bench broker --json broker.json
      trunkline bench broker --sizes 1024 --rounds 1
    """
    from benchmarks.broker import measure

    columns = {
        "bytes": "{bytes}",
        "broker/s": "{broker_per_s:.0f}",
        "zmq.proxy/s": "{proxy_per_s:.0f}",
        "ratio": "{ratio:.2f}",
        "added µs, 50 %": "{added_us_p50:.0f}",
        "99 %": "{added_us_p99:.0f}",
    }
    tell_round_trips("broker", measure, columns, **options)

"""`trunkline bench curve`: what keys cost, side by side with none."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.broker_command import round_trip_options


@click.command("curve")
@round_trip_options
def curve(sizes: str, count: int, window: int, rounds: int, json_path: Path | None) -> None:
    """What do keys cost? Round trips through a real broker with CURVE and without, in turns.

    \b
    Examples:
      trunkline bench curve --json curve.json
      trunkline bench curve --sizes 1024 --rounds 1
    """
    from benchmarks.curve import measure
    from benchmarks.numbers import numbers
    from silo_agent.report import write_report

    wanted = [int(size) for size in numbers(sizes, least=4, example="--sizes 1024,65536")]
    with Console(stderr=True).status("starting") as status:
        results = measure(sizes=wanted, count=count, window=window, rounds=rounds, progress=status.update)
    table = Table(
        "bytes", "without/s", "with keys/s", "ratio", "alone µs, 50 %", "added µs, 50 %", "99 %", box=None
    )
    for row in results["rows"]:
        table.add_row(
            str(row["bytes"]),
            f"{row['plain_per_s']:.0f}",
            f"{row['curve_per_s']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['plain_us_p50']:.0f}",
            f"{row['added_us_p50']:.0f}",
            f"{row['added_us_p99']:.0f}",
        )
    Console().print(table)
    settings = {"sizes": wanted, "count": count, "window": window, "rounds": rounds}
    write_report(json_path, "curve", settings, results)

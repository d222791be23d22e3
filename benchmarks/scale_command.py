"""`trunkline bench scale`: what many silos cost the broker, and whether each gets its share."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from workers import runtime  # before torch: it sets how idle threads wait


@click.command("scale")
@click.option("--silos", default="1,8,64,256,512", show_default=True, help="How many at once.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement, at least.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="A PNG beside --json.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def scale(silos: str, seconds: float, plot: bool, json_path: Path | None) -> None:
    """How many silos can be attached? Throughput, fairness and the broker's memory, with tiny frames.

    Fairness is Jain's index over the tokens served to each silo: 1 if all got the same.

    \b
    Examples:
      trunkline bench scale --json scale.json
      trunkline bench scale --silos 1,64 --seconds 3
    """
    from benchmarks.numbers import numbers
    from benchmarks.plots import lines, picture_beside
    from benchmarks.scale import measure
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    wanted = [int(number) for number in numbers(silos, least=1, example="--silos 1,64,512")]
    picture = picture_beside(json_path, plot)
    with Console(stderr=True).status("starting") as status:
        results = measure(silos=wanted, seconds=seconds, progress=status.update)
    table = Table(
        "silos", "tokens/s", "fairness", "broker kB/silo", "errors", "round trip, ms", "99 %, ms", box=None
    )
    for row in results["rows"]:
        table.add_row(
            str(row["silos"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['fairness']:.3f}",
            f"{row['broker_bytes_per_silo'] / 1000:.0f}",
            str(row["errors"]),
            f"{row['wait_ms_p50']:.1f}",
            f"{row['wait_ms_p99']:.1f}",
        )
    console = Console()
    console.print(table)
    write_report(json_path, "scale", {"silos": wanted, "seconds": seconds}, results)
    if picture is not None:
        names = {
            "tokens_per_s": "tokens per second",
            "fairness": "fairness",
            "broker_bytes_per_silo": "broker, bytes per silo",
        }
        lines(results["rows"], "silos", names, picture)
        console.print(f"plot: {picture}", highlight=False)

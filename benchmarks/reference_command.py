"""`trunkline bench reference`: what each idea brings, from the published way of working to ours."""

from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from benchmarks.pace import PACES
from codec.messages import Wire
from codec.partition import Partition
from workers import runtime  # before torch: it sets how idle threads wait

_COUNT = click.IntRange(min=1)


@click.command("reference")
@click.option("--pace", type=click.Choice(list(PACES)), default="llama-2-7b-h100", show_default=True)
@click.option("--head", default=2, show_default=True, metavar="P")
@click.option("--tail", default=2, show_default=True, metavar="Q")
@click.option("--silos", default=4, show_default=True, type=_COUNT, help="Silos that train together.")
@click.option("--sessions", default=8, show_default=True, type=_COUNT, help="Sessions that decode together.")
@click.option("--length", default=500, show_default=True, type=_COUNT, help="Tokens of a sequence or prompt.")
@click.option(
    "--padded-to", default=920, show_default=True, type=_COUNT, help="What the published way pads to."
)
@click.option("--new-tokens", "new", default=64, show_default=True, type=_COUNT, help="After each prompt.")
@click.option(
    "--window", default=4, show_default=True, type=_COUNT, help="Micro-batches of a silo in flight."
)
@click.option("--accumulate", default=8, show_default=True, type=_COUNT, help="Micro-batches in a step.")
@click.option("--wire", type=click.Choice(get_args(Wire)), default="steps", show_default=True)
@click.option("--rtt-ms", default=50.0, show_default=True, help="Round trip of every silo's line.")
@click.option("--mbit", default=100.0, show_default=True, help="Its rate each way; 0 is unlimited.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each measurement, at least.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="A PNG beside --json.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def reference(plot: bool, json_path: Path | None, **given: Any) -> None:
    """What does each of our ideas bring? From the published way of working to ours, one at a time.

    R1 is the published way: one client at a time, in lockstep, padded fp16 frames, three round trips a
    training step and two a generated token. R0 is the older way: no KV cache, the whole sequence and a
    dense mask for every token. All on one paced trunk, with real frames over a real broker.

    \b
    Examples:
      trunkline bench reference --json reference.json
      trunkline bench reference --rtt-ms 10 --mbit 1000 --seconds 4
    """
    from benchmarks.plots import ladder, picture_beside
    from benchmarks.ways import Size, generation_ways, measure, training_ways
    from codec.errors import UsageError
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    if given["padded_to"] < given["length"]:
        raise UsageError(f"{given['length']} tokens do not fit into {given['padded_to']}")
    picture = picture_beside(json_path, plot)
    how = {"accumulate": given["accumulate"], "window": given["window"], "wire": given["wire"]}
    with Console(stderr=True).status("starting") as status:
        results = measure(
            given["pace"],
            Partition(given["head"], given["tail"]),
            Size(given["length"], given["padded_to"], given["new"]),
            training=training_ways(silos=given["silos"], **how),
            generation=generation_ways(silos=given["sessions"], wire=given["wire"]),
            rtt_ms=given["rtt_ms"],
            mbit=given["mbit"],
            seconds=given["seconds"],
            progress=status.update,
        )
    label = f"paced, {given['pace']}"
    console = Console()
    for task, found in results.items():
        table = Table(f"{task} ({label})", "", "tokens/s", "gain", "bytes/token", "trunk busy", box=None)
        for row in found["rows"]:
            table.add_row(
                row["name"],
                row["label"],
                f"{row['tokens_per_s']:,.2f}",
                f"{row['gain']:.2f}",
                f"{row['bytes_per_token']:,.0f}",
                f"{row['trunk_busy']:.1%}",
            )
        console.print(table)
        console.print(f"{found['times_r1']:.1f} × R1, {found['times_r0']:.1f} × R0\n", highlight=False)
    settings = given | {"pace_source": PACES[given["pace"]].source}
    write_report(json_path, "reference", settings, {"paced": True, **results})
    if picture is not None:
        ladder({task: found["rows"] for task, found in results.items()}, label, picture)
        console.print(f"plot: {picture}", highlight=False)

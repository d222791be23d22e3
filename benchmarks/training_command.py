"""`trunkline bench train`: split training beside centralised training."""

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from workers import runtime  # before torch: it sets how idle threads wait

_COUNT = click.IntRange(min=1)


@click.command("train")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--head", default=2, show_default=True, metavar="P")
@click.option("--tail", default=2, show_default=True, metavar="Q")
@click.option("--silos", default="1,2,4", show_default=True, help="How many at once.")
@click.option("--batch", default=4, show_default=True, type=_COUNT, help="Sequences in a micro-batch.")
@click.option(
    "--accumulate", default=2, show_default=True, type=_COUNT, help="Micro-batches of a silo in a step."
)
@click.option(
    "--steps", default=4, show_default=True, type=click.IntRange(min=2), help="The first is not counted."
)
@click.option("--rounds", default=3, show_default=True, type=_COUNT)
@click.option("--plot/--no-plot", default=True, show_default=True, help="A PNG beside --json.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def train(silos: str, plot: bool, json_path: Path | None, **given: Any) -> None:
    """How fast is split training beside centralised LoRA training of the whole model, at the same batch?

    Every silo is a real one in a process of its own; centralised is plain transformers and PEFT on the
    very same micro-batches. They take turns.

    \b
    Examples:
      trunkline bench train --json train.json
      trunkline bench train --model tiny --silos 1,2 --steps 3 --rounds 1
    """
    from benchmarks.numbers import numbers
    from benchmarks.plots import lines, picture_beside
    from benchmarks.training import Settings, measure
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    wanted = [int(number) for number in numbers(silos, least=1, example="--silos 1,2,4")]
    picture = picture_beside(json_path, plot)
    settings = Settings(**given)
    with Console(stderr=True).status("reading the model") as status:
        results = measure(settings, wanted, status.update)
    table = Table("silos", "split, tokens/s", "centralised", "ratio", "trunk busy", box=None)
    for row in results["rows"]:
        table.add_row(
            str(row["silos"]),
            f"{row['tokens_per_s']:,.1f}",
            f"{row['central_tokens_per_s']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['trunk_busy']:.1%}",
        )
    console = Console()
    console.print(table)
    write_report(json_path, "train", dataclasses.asdict(settings) | {"silos": wanted}, results)
    if picture is not None:
        names = {"tokens_per_s": "split, tokens per second", "ratio": "times centralised"}
        lines(results["rows"], "silos", names, picture)
        console.print(f"plot: {picture}", highlight=False)

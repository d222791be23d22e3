"""`trunkline bench soak`: does anything grow, stick or fail in the long run?"""

from pathlib import Path

import click
from rich.console import Console

from workers import runtime  # before torch: it sets how idle threads wait


@click.command("soak")
@click.option("--model", default="tiny", show_default=True)
@click.option("--head", default=1, show_default=True, metavar="P")
@click.option("--tail", default=1, show_default=True, metavar="Q")
@click.option("--minutes", type=click.FloatRange(min=0.1), default=15.0, show_default=True)
@click.option("--silos", type=click.IntRange(min=1), default=6, show_default=True, help="At work at a time.")
@click.option("--seed", default=0, show_default=True, help="Of what the silos do.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="A PNG beside --json.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def soak(
    model: str,
    head: int,
    tail: int,
    minutes: float,
    silos: int,
    seed: int,
    plot: bool,
    json_path: Path | None,
) -> None:
    """Does anything grow, stick or fail in the long run?

    Silos join, generate, train and leave, some without a word, while one worker of two is drained and
    replaced every 15 seconds. Ends with exit code 1 if a request failed or none was done.

    \b
    Examples:
      trunkline bench soak --json soak.json
      trunkline bench soak --minutes 1 --silos 3
    """
    from benchmarks.plots import lines, picture_beside
    from benchmarks.soak import measure
    from codec.partition import Partition
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    picture = picture_beside(json_path, plot)
    with Console(stderr=True).status("starting") as status:
        results = measure(
            model, Partition(head, tail), minutes=minutes, slots=silos, seed=seed, progress=status.update
        )
    done = ", ".join(f"{number} {kind}" for kind, number in sorted(results["done"].items()))
    click.echo(f"done: {done}; {results['workers_replaced']} workers replaced")
    click.echo(f"errors: {results['errors']}, stuck: {results['stuck']}")
    for error in results["first_errors"]:
        click.echo(f"  {error}")
    for name, memory in results["memory"].items():
        click.echo(
            f"memory of the {name}: {memory['early_mib']:.1f} MiB after the warm-up, "
            f"{memory['late_mib']:.1f} at the end ({memory['growth']:+.1%})"
        )
    settings = {
        "model": model,
        "head": head,
        "tail": tail,
        "minutes": minutes,
        "silos": silos,
        "seed": seed,
    }
    write_report(json_path, "soak", settings, results)
    if picture is not None:
        rows = [
            {"seconds": at, **{name: values[index][1] for name, values in results["samples"].items()}}
            for index, (at, _) in enumerate(results["samples"]["broker"])
        ]
        names = {"broker": "broker, MiB", "worker": "worker, MiB"}
        lines(rows, "seconds", names, picture, scale="linear")
        click.echo(f"plot: {picture}")
    if results["errors"] or results["stuck"] or not results["done"]:
        raise SystemExit(1)

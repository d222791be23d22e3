"""`trunkline bench chaos`: is anything lost or wrong when processes die all the time?"""

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from workers import runtime  # before torch: it sets how idle threads wait

_NEAR = 1e-6
"""How far an adapter may be from the undisturbed one's (fp32)."""


@click.command("chaos")
@click.option("--model", default="tiny", show_default=True)
@click.option("--head", default=1, show_default=True, metavar="P")
@click.option("--tail", default=1, show_default=True, metavar="Q")
@click.option("--minutes", type=click.FloatRange(min=0.1), default=2.0, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of what happens, and when.")
@click.option("--workers", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--silos", type=click.IntRange(min=1), default=4, show_default=True, help="That generate.")
@click.option("--train/--no-train", default=True, show_default=True, help="A silo that trains besides.")
@click.option("--steps", type=click.IntRange(min=1), default=40, show_default=True, help="Of each run.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.5),
    default=2.5,
    show_default=True,
    help="Seconds to the next, on average.",
)
@click.option(
    "--silence", type=click.FloatRange(min=2.0), default=10.0, show_default=True, help="The broker's."
)
@click.option("--plot/--no-plot", default=True, show_default=True, help="A PNG beside --json.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def chaos(model: str, head: int, tail: int, plot: bool, json_path: Path | None, **given: Any) -> None:
    """Is anything lost or wrong when processes are killed, stopped and cut off all the time?

    A request is a generation or a training step. Lost is one whose user got an error, wrong a generation
    whose tokens are not the undisturbed one's. A wait of 0.25 s or more for the trunk that a disturbance
    reaches into is a recovery; it is counted from the disturbance to the answer, at the silo. Ends with
    exit code 1 if anything was lost, wrong, or ended unasked, or nothing was done at all.

    \b
    Examples:
      trunkline bench chaos --minutes 10 --json chaos.json
      trunkline bench chaos --seed 7 --no-train --every 1
    """
    from benchmarks.chaos import Settings, measure
    from benchmarks.plots import chaos_timeline, picture_beside
    from codec.partition import Partition
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    picture = picture_beside(json_path, plot)
    settings = Settings(model=model, cut=Partition(head, tail), **given)
    click.echo(f"seed {settings.seed}")
    with Console(stderr=True).status("starting") as status:
        results = measure(settings, status.update)
    _tell(results)
    write_report(json_path, "chaos", dataclasses.asdict(settings), results)
    if picture is not None:
        chaos_timeline(results["timeline"], picture)
        click.echo(f"plot: {picture}")
    wrong = results["lost"] or results["wrong"] or results["fallen"]
    idle = not results["generations"] or (settings.train and not results["training_runs"])
    if wrong or idle or (results["adapter_max_abs_diff"] or 0.0) > _NEAR:
        raise SystemExit(1)


def _tell(results: dict[str, Any]) -> None:
    done = ", ".join(f"{number} {kind}" for kind, number in results["disturbances"].items())
    click.echo(f"disturbances: {done}; {results['kills']} kills")
    click.echo(
        f"requests: {results['requests']} ({results['generations']} generations of {results['tokens']} "
        f"tokens, {results['training_steps']} training steps in {results['training_runs']} finished runs)"
    )
    click.echo(f"lost: {results['lost']}, wrong: {results['wrong']}")
    for what in (*results["first_lost"], *results["fallen"][:5]):
        click.echo(f"  {what}")
    if results["adapter_max_abs_diff"] is not None:
        click.echo(f"largest difference of an adapter: {results['adapter_max_abs_diff']:.3g}")
    for kind, found in (("all", _all(results)), *results["recovery_by_kind"].items()):
        if found["count"]:
            figures = (
                f"p50 {found['p50_s']:.2f} s, p99 {found['p99_s']:.2f} s, longest {found['max_s']:.2f} s"
            )
            click.echo(f"recovery, {kind}: {figures} ({found['count']} waits)")


def _all(results: dict[str, Any]) -> dict[str, Any]:
    return {
        "count": results["recoveries"],
        **{f"{name}_s": results[f"recovery_{name}_s"] for name in ("p50", "p99", "max")},
    }

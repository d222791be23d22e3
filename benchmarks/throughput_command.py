"""`trunkline bench throughput`: is the trunk ever idle, and what does the pipeline cost."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from benchmarks.pace import PACES
from codec.messages import Wire
from workers import runtime  # before torch: it sets how idle threads wait

_COUNT = click.IntRange(min=1)
_REAL = {"sequences": 2, "length": 32, "accumulate": 2}
"""So small that a step of eight silos takes two slow cores some seconds."""
_PACED = {"sequences": 4, "length": 128, "accumulate": 16}


@click.command("throughput")
@click.option("--silos", default=8, show_default=True, type=_COUNT, help="Replay silos at once.")
@click.option("--workers", default=1, show_default=True, type=_COUNT)
@click.option("--task", type=click.Choice(["train", "generate"]), default="train", show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["pipelined", "lockstep"]),
    default="pipelined",
    show_default=True,
    help="Lockstep: a silo has one micro-batch in flight.",
)
@click.option("--rtt-ms", default=0.0, show_default=True, help="Round trip of every silo's line.")
@click.option("--mbit", default=0.0, show_default=True, help="Its rate each way; 0 is unlimited.")
@click.option("--pace", type=click.Choice(list(PACES)), help="Take this GPU's time instead of computing.")
@click.option("--model", default="smollm2-135m", show_default=True, help="Without --pace.")
@click.option("--head", default=2, show_default=True, metavar="P")
@click.option("--tail", default=2, show_default=True, metavar="Q")
@click.option("--sequences", type=_COUNT, help="In a micro-batch.  [default: 2, with --pace 4]")
@click.option(
    "--length", type=_COUNT, help="Tokens of a sequence, or of a prompt.  [default: 32, with --pace 128]"
)
@click.option(
    "--window", default=4, show_default=True, type=_COUNT, help="Micro-batches of a silo in flight."
)
@click.option("--accumulate", type=_COUNT, help="Micro-batches in a step.  [default: 2, with --pace 16]")
@click.option("--runs", type=_COUNT, help="Runs the silos are spread over.  [default: one a worker]")
@click.option("--new-tokens", "new", default=64, show_default=True, type=_COUNT, help="After each prompt.")
@click.option("--wire", type=click.Choice(get_args(Wire)), default="steps", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement, at least.")
@click.option("--rounds", default=5, show_default=True, type=_COUNT)
@click.option("--plot/--no-plot", default=True, show_default=True, help="A PNG beside --json.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def throughput(mode: str, runs: int | None, plot: bool, json_path: Path | None, **given: Any) -> None:
    """How much of the time does the trunk compute, and how fast beside the same batches in one process?

    The load comes from replay silos, which send boundary tensors recorded beforehand and compute
    nothing. Busy is what the workers themselves count: passes through the trunk and optimizer steps,
    without codec and sockets; of a paced trunk, the time its passes take on the GPU.

    \b
    Examples:
      trunkline bench throughput --silos 8 --json throughput.json
      trunkline bench throughput --pace llama-2-7b-h100 --silos 8 --rtt-ms 50 --mbit 100
      trunkline bench throughput --task generate --silos 16 --mode lockstep
    """
    from benchmarks.plots import busy_timeline, picture_beside
    from benchmarks.throughput import Settings, measure
    from codec.errors import UsageError
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    picture = picture_beside(json_path, plot)
    for name, value in (_PACED if given["pace"] else _REAL).items():
        given[name] = given[name] or value
    given["runs"] = runs or min(given["workers"], given["silos"])
    if given["runs"] > given["silos"]:
        raise UsageError(f"{given['silos']} silos cannot be in {given['runs']} runs")
    if mode == "lockstep":
        given["window"] = 1
    settings = Settings(**given)
    with Console(stderr=True).status("starting") as status:
        results = measure(settings, status.update)
    label = f"paced, {settings.pace}" if settings.pace else settings.model
    console = Console()
    console.print(
        f"[bold]{label}[/]: trunk busy {results['trunk_busy']:.1%}, {results['tokens_per_s']:,.0f} tokens/s, "
        f"{results['ratio_to_inprocess']:.2f} of one process, "
        f"{results['bytes_per_token']:,.0f} bytes a token, {results['tokens_per_pass']:,.0f} tokens a pass",
        highlight=False,
    )
    table = Table("request", "count", "50 %, ms", "99 %, ms", box=None)
    for kind, found in results["latency_ms"].items():
        table.add_row(kind, f"{found['count']}", f"{found['p50']:.1f}", f"{found['p99']:.1f}")
    console.print(table)
    cores = ", ".join(f"{name} {share:.2f}" for name, share in results["cores"].items())
    console.print(f"cores in use: {cores}", highlight=False)
    report = {"mode": mode, **dataclasses.asdict(settings)}
    if settings.pace:
        report["pace_source"] = PACES[settings.pace].source
    write_report(json_path, "throughput", report, results)
    if picture is not None:
        busy_timeline(results["timeline"], label, picture)
        console.print(f"plot: {picture}", highlight=False)

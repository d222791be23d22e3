"""`trunkline bench link`: which wire is there first on which link."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from workers import runtime  # before torch: it sets how idle threads wait


@click.command("link")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option(
    "--tokens", default=512, show_default=True, type=click.IntRange(min=2), help="In a micro-batch."
)
@click.option("--noise", default=0.05, show_default=True, help="On head → trunk, relative.")
@click.option("--mbit", default="10,100,1000,0", show_default=True, help="Rates to try; 0 is plain loopback.")
@click.option("--rtt-ms", default=10.0, show_default=True, help="Round trip of the shaped links.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def link(
    model: str, tokens: int, noise: float, mbit: str, rtt_ms: float, rounds: int, json_path: Path | None
) -> None:
    """Is --wire auto ever slower than sending the plain bytes? Over shaped links, side by side.

    \b
    Examples:
      trunkline bench link --model smollm2-135m --json link.json
      trunkline bench link --model tiny --mbit 5,50 --rtt-ms 50
    """
    from benchmarks.link import measure
    from benchmarks.numbers import numbers
    from benchmarks.parts import Parts
    from benchmarks.texts import tokenized
    from codec.partition import Partition
    from silo_agent.report import write_report
    from workers.checkpoint import Checkpoint

    runtime.quiet_libraries()
    rates = numbers(mbit, least=0, example="--mbit 10,100,0")
    checkpoint = Checkpoint(model)
    with Console(stderr=True).status("running the model") as status:
        texts = tokenized(str(checkpoint.ref), None, tokens=tokens, max_length=tokens)
        sent, _, gradient, _ = Parts(checkpoint, Partition(2, 2), texts).boundaries()
        results = measure(
            sent[:tokens],
            gradient[:tokens],
            noise=noise,
            rates=rates,
            rtt_ms=rtt_ms,
            rounds=rounds,
            progress=status.update,
        )
    table = Table(
        "link, Mbit/s", "measured", "what", "raw, ms", "auto, ms", "auto / raw", "auto picked", box=None
    )
    for row in results["rows"]:
        for what in ("train", "decode"):
            found = row[what]
            table.add_row(
                f"{row['mbit']:g}" if row["mbit"] else "loopback",
                f"{row['measured_mbit']:.0f}" if row["measured_mbit"] else "",
                "micro-batch" if what == "train" else "one token",
                f"{found['raw_ms']:.2f}",
                f"{found['auto_ms']:.2f}",
                f"{found['ratio']:.2f}",
                " / ".join(dict.fromkeys(found["picks"])),
            )
    Console().print(table)
    settings = {
        "model": model,
        "tokens": tokens,
        "noise": noise,
        "mbit": rates,
        "rtt_ms": rtt_ms,
        "rounds": rounds,
    }
    write_report(json_path, "link", settings, results)

"""`trunkline bench decode`: the trunk's tokens per second, for one session and for many."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from workers import runtime  # before torch: it sets how idle threads wait

_COUNT = click.IntRange(min=1)


@click.command("decode")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--head", default=2, show_default=True, metavar="P")
@click.option("--tail", default=2, show_default=True, metavar="Q")
@click.option("--sessions", default="1,2,4,8,16", show_default=True, help="How many at once.")
@click.option("--context", default=64, show_default=True, type=_COUNT, help="Tokens before the first step.")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(min=2), help="Steps of each.")
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement with replay silos.")
@click.option("--rounds", default=3, show_default=True, type=_COUNT)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def decode(
    model: str,
    head: int,
    tail: int,
    sessions: str,
    context: int,
    tokens: int,
    seconds: float,
    rounds: int,
    json_path: Path | None,
) -> None:
    """How many tokens a second does the trunk decode, for one session and for many at once?

    \b
    Examples:
      trunkline bench decode --model smollm2-135m --json decode.json
      trunkline bench decode --model tiny --sessions 1,4 --tokens 16
    """
    from benchmarks.decode import measure
    from benchmarks.numbers import numbers
    from codec.partition import Partition
    from silo_agent.report import write_report

    runtime.quiet_libraries()
    wanted = [int(number) for number in numbers(sessions, least=1, example="--sessions 1,4,16")]
    with Console(stderr=True).status("reading the model") as status:
        results = measure(
            model,
            Partition(head, tail),
            sessions=wanted,
            context=context,
            tokens=tokens,
            seconds=seconds,
            rounds=rounds,
            progress=status.update,
        )
    table = Table("sessions", "tokens/s", "times one", "step, ms", "99 %, ms", box=None)
    for row in results["rows"]:
        table.add_row(
            str(row["sessions"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['scaling']:.2f}",
            f"{row['step_ms_p50']:.1f}",
            f"{row['step_ms_p99']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"a real silo, head and tail included: {results['real_silo_tokens_per_s']:.1f} tokens/s, "
        f"{results['ratio_to_transformers']:.2f} times transformers' "
        f"{results['transformers_tokens_per_s']:.1f}",
        highlight=False,
    )
    console.print(
        f"{results['prompts']} prompts of that silo at once: {results['prompts_tokens_per_s']:.1f} tokens/s, "
        f"{results['prompts_scaling']:.2f} times one",
        highlight=False,
    )
    settings = {
        "model": model,
        "head": head,
        "tail": tail,
        "sessions": wanted,
        "context": context,
        "tokens": tokens,
        "seconds": seconds,
        "rounds": rounds,
    }
    write_report(json_path, "decode", settings, results)

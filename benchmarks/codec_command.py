"""`trunkline bench codec` and `trunkline bench noise`: what the boundary costs, in bits and in loss."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from codec.partition import Partition
from workers import runtime  # before torch: it sets how idle threads wait

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_COUNT = click.IntRange(min=1)
_OPTIONS = [
    click.option("--model", default="smollm2-135m", show_default=True),
    click.option("--head", default=2, show_default=True, metavar="P"),
    click.option("--tail", default=2, show_default=True, metavar="Q"),
    click.option(
        "--text", "file", type=_FILE, help="Plain text, one sequence a line.  [default: the demo's notes]"
    ),
    click.option("--tokens", default=4096, show_default=True, type=_COUNT, help="Stop after this many."),
    click.option(
        "--max-length", default=920, show_default=True, type=_COUNT, help="Tokens of a line that are used."
    ),
    click.option("--draws", default=2, show_default=True, type=_COUNT, help="Draws of the noise."),
    click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here."),
]


def _options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _texts(given: dict[str, Any]) -> Any:
    from benchmarks.texts import tokenized
    from workers.checkpoint import Checkpoint

    runtime.quiet_libraries()
    ref = str(Checkpoint(given["model"]).ref)
    return tokenized(ref, given["file"], tokens=given["tokens"], max_length=given["max_length"])


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


@click.command("codec")
@_options
@click.option("--noise", default=0.05, show_default=True, help="On head → trunk, relative.")
@click.option("--padded-to", default=920, show_default=True, help="Length that the published code pads to.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="A picture beside the report.")
def codec(json_path: Path | None, plot: bool, **given: Any) -> None:
    """What does each encoding cost, in bits, in loss and in time? On the model's own boundaries.

    \b
    Examples:
      trunkline bench codec --model smollm2-135m --json codec.json
      trunkline bench codec --model smollm2-135m --text passages.txt --tokens 4096
    """
    from benchmarks.codec import measure
    from benchmarks.plots import picture_beside, rate_distortion
    from silo_agent.report import write_report

    picture = picture_beside(json_path, plot)
    console = Console()
    with Console(stderr=True).status("reading the model") as status:
        results = measure(
            given["model"],
            Partition(given["head"], given["tail"]),
            _texts(given),
            noise=given["noise"],
            draws=given["draws"],
            padded_to=given["padded_to"],
            progress=status.update,
        )
    console.print(_table(results["rows"]))
    lz4, traffic = results["plain_lz4"], results["traffic"]
    console.print(
        f"{results['tokens']} tokens, loss {results['loss_exact']:.4f}, with noise alone "
        f"{results['loss_noise_alone']:.4f}\n"
        f"plain lz4 of fp32: {lz4['bits']:.2f} bits, {lz4['encode_ms']:.2f} + {lz4['decode_ms']:.2f} ms; "
        f"a copy of 4 MiB: {results['rows'][0]['memcpy_ms']:.2f} ms\n"
        f"all four boundaries, steps: {traffic['bytes']:,} bytes; as fp16 padded to "
        f"{traffic['padded_to']}: {traffic['padded_fp16_bytes']:,}, "
        f"{traffic['times_fewer']:.1f} times as many",
        highlight=False,
    )
    for wire, cost in results["one_token"].items():
        console.print(
            f"one token, {wire:5}: {cost['bytes']:5} bytes with the header, "
            f"{cost['send_us']:3.0f} µs to send, {cost['receive_us']:3.0f} µs to receive",
            highlight=False,
        )
    write_report(json_path, "codec", _settings(given), results)
    if picture is not None:
        rate_distortion(results["rows"], picture)
        console.print(f"plot: {picture}", highlight=False)


def _table(rows: list[dict[str, Any]]) -> Table:
    names = ("bits", "entropy", "loss", "error", "encode ms", "decode ms", "copies")
    table = Table("boundary, wire", *names, box=None)
    before = ""
    for row in rows:
        if row["boundary"] != before:
            before = row["boundary"]
            table.add_row(before, style="bold")
        times = "" if row["factor"] == 1.0 else f" × {row['factor']:g}"
        table.add_row(
            f"  {row['wire']}{times}",
            f"{row['bits']:.2f}",
            "" if row["entropy"] is None else f"{row['entropy']:.2f}",
            "" if row["loss_change"] is None else f"{row['loss_change']:+.4f}",
            f"{row['relative_error']:.4f}",
            f"{row['encode_ms']:.2f}",
            f"{row['decode_ms']:.2f}",
            f"{row['copies']:.1f}",
        )
    return table


@click.command("noise")
@_options
@click.option("--positions", default=32, show_default=True, type=_COUNT, help="Where distances are taken.")
@click.option("--seed", default=0, show_default=True, help="Of positions, candidates and noise.")
def noise(json_path: Path | None, **given: Any) -> None:
    """Would noise scaled per channel hurt less than one deviation for all, at equal protection?

    \b
    Examples:
      trunkline bench noise --model smollm2-135m --text passages.txt --json noise.json
    """
    from benchmarks.noise import measure
    from silo_agent.report import write_report

    with Console(stderr=True).status("reading the model") as status:
        results = measure(
            given["model"],
            Partition(given["head"], given["tail"]),
            _texts(given),
            positions=given["positions"],
            draws=given["draws"],
            seed=given["seed"],
            progress=status.update,
        )
    table = Table("shape", "scale", "distance to the closest", "loss", "spread of the loss")
    for row in results["rows"]:
        table.add_row(
            row["shape"],
            f"{row['scale']:.4f}",
            f"{row['distance']:.1f}",
            f"{row['loss_change']:+.4f}",
            f"{row['loss_change_spread']:.4f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{results['tokens']} tokens, loss without noise {results['loss_exact']:.4f}", highlight=False
    )
    write_report(json_path, "noise", _settings(given), results)

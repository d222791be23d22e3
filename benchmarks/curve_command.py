"""`trunkline bench curve`: what keys cost, side by side with none."""

from typing import Any

import click

from benchmarks.broker_command import round_trip_options, tell_round_trips


@click.command("curve")
@round_trip_options
def curve(**options: Any) -> None:
    """What do keys cost? Round trips through a real broker with CURVE and without, in turns.

    \b
    Examples:
      trunkline bench curve --json curve.json
      trunkline bench curve --sizes 1024 --rounds 1
    """
    from benchmarks.curve import measure

    columns = {
        "bytes": "{bytes}",
        "without/s": "{plain_per_s:.0f}",
        "with keys/s": "{curve_per_s:.0f}",
        "ratio": "{ratio:.2f}",
        "alone µs, 50 %": "{plain_us_p50:.0f}",
        "added µs, 50 %": "{added_us_p50:.0f}",
        "99 %": "{added_us_p99:.0f}",
    }
    tell_round_trips("curve", measure, columns, **options)

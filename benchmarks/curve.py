"""What do keys cost? Round trips through a real broker with and without them, side by side.

Load and echo are those of `benchmarks.broker`. Each message is encrypted and decrypted twice on its
way and twice on the way back: between silo and broker, and between broker and worker.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.broker import BenchKeys, Way, in_turns
from benchmarks.progress import Progress
from broker.key_files import make_key, read_public, read_secret
from broker.keyring import allow
from broker.keys import KeyRole, LinkKeys
from silo_agent.processes import Processes


def measure(
    *, sizes: Sequence[int], count: int, window: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Round trips per second with `window` requests under way, and the latency of one at a time.

    Each round sends `count` requests of each of the `sizes` (bytes of payload), fewer of large ones.
    Ratios and what is added are medians over the rounds: in each round both meet the same machine.
    """
    with tempfile.TemporaryDirectory() as name, Processes(Path(name)) as processes:
        ways = Way("without keys", "broker"), Way("with keys", "broker", _keys(Path(name)))
        rates, waits = in_turns(processes, ways, sizes, count, window, rounds, progress)
    rows = []
    for size in sizes:
        plain, curve = (rates[size, way.name] for way in ways)
        percentiles = [
            tuple(statistics.quantiles(latencies, n=100) for latencies in pair)
            for pair in zip(*(waits[size, way.name] for way in ways), strict=True)
        ]
        rows.append(
            {
                "bytes": size,
                "plain_per_s": statistics.median(plain),
                "curve_per_s": statistics.median(curve),
                "ratio": statistics.median(c / p for c, p in zip(curve, plain, strict=True)),
                "plain_us_p50": statistics.median(p[49] for p, _ in percentiles) * 1e6,
                "added_us_p50": statistics.median(c[49] - p[49] for p, c in percentiles) * 1e6,
                "added_us_p99": statistics.median(c[98] - p[98] for p, c in percentiles) * 1e6,
            }
        )
    return {"window": window, "rows": rows}


def _keys(home: Path) -> BenchKeys:
    _, public = make_key(home / "hub", "broker", "hub")

    def pair(role: KeyRole) -> LinkKeys:
        secret, own = make_key(home / "peers", role, role)
        allow(home / "hub", read_public(own))
        return LinkKeys(read_secret(secret), read_public(public).key)

    return BenchKeys(home / "hub", pair("silo"), pair("worker"))

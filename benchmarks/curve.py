"""What do keys cost? Round trips through a real broker with and without them, side by side.

Load and echo are those of `benchmarks.broker`. Each message is encrypted and decrypted twice on its
way and twice on the way back: between silo and broker, and between broker and worker.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.broker import BenchKeys, line, load
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
    rates: dict[tuple[int, bool], list[float]] = {}
    waits: dict[tuple[int, bool], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name, Processes(Path(name)) as processes:
        made = _keys(Path(name))
        for number in range(rounds):
            for size in sizes:
                requests = max(64, min(count, (256 << 20) // size))
                for keyed in (False, True):
                    said = "with keys" if keyed else "without keys"
                    progress(f"round {number + 1} of {rounds}, {size} bytes, {said}")
                    with line("broker", processes, requests, made if keyed else None) as socket:
                        rate, latencies = load(socket, "broker", size, requests, window)
                    rates.setdefault((size, keyed), []).append(rate)
                    waits.setdefault((size, keyed), []).append(statistics.quantiles(latencies, n=100))
    rows = []
    for size in sizes:
        plain, curve = rates[size, False], rates[size, True]
        percentiles = list(zip(waits[size, False], waits[size, True], strict=True))
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

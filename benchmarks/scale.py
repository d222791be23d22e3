"""How many silos can be attached? Throughput, fairness and the broker's memory, with tiny frames.

Every silo decodes in a session of its own, as fast as it is answered, on a paced trunk that takes next
to no time: what is left is the broker, the sockets and the worker's service. Each number of silos gets
a fresh broker.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.driver import allow_files
from benchmarks.figures import jain, percentile
from benchmarks.load import Load
from benchmarks.pace import PACES
from benchmarks.progress import Progress
from benchmarks.recording import crossing, made_up
from benchmarks.replay import Generation, Trunk
from benchmarks.stack import Stack
from codec.partition import Span
from silo_agent.processes import Processes

_PACE = "tiny"
_PROMPT, _NEW = 4, 2
_FILES_A_PEER = 2
_FILES_BESIDE = 64


def measure(*, silos: Sequence[int], seconds: float, progress: Progress) -> dict[str, Any]:
    """One row for each number of `silos`, measured for about `seconds`.

    Raises `UsageError` if the system allows too few open files.
    """
    allow_files(max(silos) * _FILES_A_PEER + _FILES_BESIDE)  # The broker's, which inherits it.
    return {"paced": True, "rows": [_row(number, seconds, progress) for number in silos]}


def _row(silos: int, seconds: float, progress: Progress) -> dict[str, Any]:
    paced = PACES[_PACE]
    trunk = Trunk(paced.card, Span(0, paced.blocks), "raw")
    sent = made_up([_PROMPT], paced.hidden).sent
    prompt, token = crossing(sent, "raw"), crossing(sent[:1], "raw")
    progress(f"{silos} silos, starting")
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        stack = Stack(processes, worker=("--pace", _PACE))
        empty = stack.broker_bytes()
        with Load(stack.endpoint, [Generation(trunk, prompt, token, _NEW) for _ in range(silos)]) as load:
            load.warm_up()
            progress(f"{silos} silos, measuring")
            served = load.measure(seconds)
            full = stack.broker_bytes()
            stack.settle(served.ended)
            passes = stack.tokens_per_pass(served.begun, served.ended)
    waits = served.waits["extend"]
    return {
        "silos": silos,
        "tokens_per_s": sum(served.rates),
        "fairness": jain(served.rates),
        "broker_bytes": full,
        "broker_bytes_per_silo": (full - empty) / silos,
        "errors": len(served.errors),
        "first_error": served.errors[0] if served.errors else None,
        "tokens_per_pass": passes,
        "wait_ms_p50": percentile(waits, 50) * 1e3,
        "wait_ms_p99": percentile(waits, 99) * 1e3,
        "replay_cores": served.cpu,
    }

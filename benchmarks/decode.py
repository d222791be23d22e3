"""How many tokens a second does the trunk decode, for one session and for many at once?

A real broker and a real worker; the sessions are replay silos, which send made-up hidden states of the
right size and compute nothing, so that what is measured is the pipeline and the trunk. Beside them
one session of a real silo, head and tail included, against plain transformers' `generate` on the whole
model with as many threads.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.load import Load
from benchmarks.progress import Progress
from benchmarks.recording import crossing
from benchmarks.reference import greedy, whole_model
from benchmarks.replay import Decoding, Trunk
from broker.link import ZmqLink
from codec.errors import TrunklineError
from codec.partition import Partition
from silo_agent.ends import Ends
from silo_agent.noise import Noise, NoiseScale
from silo_agent.processes import Processes
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from workers.checkpoint import Checkpoint

_WAIT_S = 120.0
_PROMPTS = 16
"""That one silo sends together."""


def measure(
    model: str,
    partition: Partition,
    *,
    sessions: Sequence[int],
    context: int,
    tokens: int,
    seconds: float,
    rounds: int,
    progress: Progress,
) -> dict[str, Any]:
    """Tokens per second for each number of `sessions`, each with `context` tokens before them.

    Medians over `rounds` rounds of `seconds`, in which contexts grow by up to `tokens` again and again; the
    numbers of sessions take turns. The real silo generates `tokens` tokens.
    """
    checkpoint = Checkpoint(model)
    ends = Ends(checkpoint, partition)
    trunk = Trunk(ends.card, ends.trunk, "raw")
    hidden = torch.randn(context, ends.card.hidden)
    found: dict[int, list[float]] = {number: [] for number in sessions}
    latencies: dict[int, list[float]] = {number: [] for number in sessions}
    real: list[float] = []
    many: list[float] = []
    plain: list[float] = []
    prompt = torch.randint(5, checkpoint.config.vocab_size, (context,)).tolist()
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        broker = processes.broker()
        processes.start("worker", "worker", "--broker", broker, "--model", model)
        whole = whole_model(str(checkpoint.ref))
        for round_number in range(rounds):
            for number in sessions:
                progress(f"round {round_number + 1} of {rounds}, {number} sessions")
                rate, waits = _together(broker, trunk, number, hidden, tokens, seconds)
                found[number].append(rate)
                latencies[number] += waits
            progress(f"round {round_number + 1} of {rounds}, a real silo")
            real.append(_real(broker, ends, prompt, 1, tokens))
            many.append(_real(broker, ends, prompt, _PROMPTS, tokens))
            begun = time.perf_counter()
            greedy(whole, prompt, tokens)
            plain.append(tokens / (time.perf_counter() - begun))
    rates = {number: statistics.median(values) for number, values in found.items()}
    one = rates[min(sessions)] / min(sessions)
    return {
        "rows": [
            {
                "sessions": number,
                "tokens_per_s": rates[number],
                "scaling": rates[number] / one,
                "step_ms_p50": statistics.median(latencies[number]) * 1e3,
                "step_ms_p99": statistics.quantiles(latencies[number], n=100)[98] * 1e3,
            }
            for number in sessions
        ],
        "real_silo_tokens_per_s": statistics.median(real),
        "prompts": _PROMPTS,
        "prompts_tokens_per_s": statistics.median(many),
        "prompts_scaling": statistics.median(m / r for m, r in zip(many, real, strict=True)),
        "transformers_tokens_per_s": statistics.median(plain),
        "ratio_to_transformers": statistics.median(r / p for r, p in zip(real, plain, strict=True)),
    }


def _together(
    broker: str, trunk: Trunk, number: int, hidden: Tensor, tokens: int, seconds: float
) -> tuple[float, list[float]]:
    """Tokens per second of `number` sessions that decode at once, and the seconds of each step."""
    prompt, token = crossing(hidden, "raw"), crossing(hidden[:1], "raw")
    sessions = [Decoding(trunk, prompt, token, tokens) for _ in range(number)]
    with Load(broker, sessions) as load:
        load.warm_up()
        served = load.measure(seconds)
    if served.errors:
        raise TrunklineError(served.errors[0], side="silo")
    return sum(served.rates), served.waits["extend"]


def _real(broker: str, ends: Ends, prompt: Sequence[int], rows: int, tokens: int) -> float:
    """Tokens per second of one real session with `rows` prompts, their pass included as in `generate`."""
    remote = Remote(ZmqLink(broker, silo_attach("real"), patience=_WAIT_S), deadline=_WAIT_S)
    try:
        capacity = len(prompt) + tokens
        quiet = Noise(NoiseScale())
        with Session(ends, remote, rows=rows, capacity=capacity, noise=quiet, wait=_WAIT_S) as session:
            begun = time.perf_counter()
            logits = session.extend(range(rows), [prompt] * rows)
            for _ in range(tokens - 1):
                logits = session.extend(range(rows), [[token] for token in logits.argmax(-1).tolist()])
            return rows * tokens / (time.perf_counter() - begun)
    finally:
        remote.close()

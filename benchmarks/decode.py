"""How many tokens a second does the trunk decode, for one session and for many at once?

A real broker and a real worker; the sessions are replay silos, which send made-up hidden states of the
right size and compute nothing, so that what is measured is the pipeline and the trunk. Beside them
one session of a real silo, head and tail included, against plain transformers' `generate` on the whole
model with as many threads.
"""

import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.progress import Progress
from benchmarks.reference import greedy, whole_model
from broker.link import ZmqLink
from codec.messages import CloseSession, Extend, OpenSession
from codec.partition import Partition
from codec.plan import ModelCard
from silo_agent.ends import Ends
from silo_agent.noise import Noise, NoiseScale
from silo_agent.processes import Processes
from silo_agent.remote import Remote, expect, silo_attach
from silo_agent.session import Session
from workers.checkpoint import Checkpoint

_WAIT_S = 120.0


class _Replay:
    """A silo that sends hidden states made up beforehand."""

    def __init__(self, broker: str, card: ModelCard, trunk: tuple[int, int], capacity: int) -> None:
        self._remote = Remote(ZmqLink(broker, silo_attach("replay"), patience=_WAIT_S), deadline=_WAIT_S)
        self._name, self._at = secrets.token_hex(4), 0
        start, stop = trunk
        opening = OpenSession(
            session=self._name, model=card, start=start, stop=stop, rows=1, capacity=capacity
        )
        self._remote.open(opening, [], wait=_WAIT_S)
        self._hidden = torch.randn(capacity, card.hidden)

    def extend(self, tokens: int) -> float:
        """Seconds until the next `tokens` tokens came back."""
        begun = time.perf_counter()
        sent = self._hidden[self._at : self._at + tokens]
        request = Extend(session=self._name, rows=(0,), starts=(self._at,), lengths=(tokens,), wire="raw")
        expect(self._remote.call(request, [sent], wire="raw"), 1)
        self._at += tokens
        return time.perf_counter() - begun

    def close(self) -> None:
        """Free the session and leave."""
        self._remote.tell(CloseSession(session=self._name))
        self._remote.close()


def measure(
    model: str,
    partition: Partition,
    *,
    sessions: Sequence[int],
    context: int,
    tokens: int,
    rounds: int,
    progress: Progress,
) -> dict[str, Any]:
    """Tokens per second for each number of `sessions`, each with `context` tokens before them.

    Medians over `rounds` rounds of `tokens` tokens a session; the numbers of sessions take turns.
    """
    checkpoint = Checkpoint(model)
    ends = Ends(checkpoint, partition)
    trunk = ends.trunk.start, ends.trunk.stop
    found: dict[int, list[float]] = {number: [] for number in sessions}
    latencies: dict[int, list[float]] = {number: [] for number in sessions}
    real: list[float] = []
    plain: list[float] = []
    prompt = torch.randint(5, checkpoint.config.vocab_size, (context,)).tolist()
    with tempfile.TemporaryDirectory() as logs, Processes(Path(logs)) as processes:
        broker = processes.broker()
        processes.start("worker", "worker", "--broker", broker, "--model", model)
        whole = whole_model(str(checkpoint.ref))
        for round_number in range(rounds):
            for number in sessions:
                progress(f"round {round_number + 1} of {rounds}, {number} sessions")
                rate, waits = _together(broker, ends.card, trunk, number, context, tokens)
                found[number].append(rate)
                latencies[number] += waits
            progress(f"round {round_number + 1} of {rounds}, a real silo")
            real.append(_real(broker, ends, prompt, tokens))
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
        "transformers_tokens_per_s": statistics.median(plain),
        "ratio_to_transformers": statistics.median(r / p for r, p in zip(real, plain, strict=True)),
    }


def _together(
    broker: str, card: ModelCard, trunk: tuple[int, int], number: int, context: int, tokens: int
) -> tuple[float, list[float]]:
    """Tokens per second of `number` sessions that decode at once, and the seconds of each step."""
    silos = [_Replay(broker, card, trunk, context + tokens) for _ in range(number)]
    ready = threading.Barrier(number + 1)

    def decode(silo: _Replay) -> list[float]:
        silo.extend(context)
        ready.wait(_WAIT_S)
        return [silo.extend(1) for _ in range(tokens)]

    with ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(decode, silo) for silo in silos]
        ready.wait(_WAIT_S)
        begun = time.perf_counter()
        waits = [wait for future in futures for wait in future.result()]
        seconds = time.perf_counter() - begun
    for silo in silos:
        silo.close()
    return number * tokens / seconds, waits


def _real(broker: str, ends: Ends, prompt: Sequence[int], tokens: int) -> float:
    """Tokens per second of one real session, the prompt's pass included as in `generate`."""
    remote = Remote(ZmqLink(broker, silo_attach("real"), patience=_WAIT_S), deadline=_WAIT_S)
    try:
        capacity = len(prompt) + tokens
        quiet = Noise(NoiseScale())
        with Session(ends, remote, rows=1, capacity=capacity, noise=quiet, wait=_WAIT_S) as session:
            begun = time.perf_counter()
            logits = session.extend([0], [prompt])
            for _ in range(tokens - 1):
                logits = session.extend([0], [[int(logits[0].argmax())]])
            return tokens / (time.perf_counter() - begun)
    finally:
        remote.close()

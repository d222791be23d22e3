"""Of two brokers the first is killed or stopped while a generation runs: the text is the undisturbed one."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from broker.link import ZmqLink
from codec.partition import Partition
from silo_agent.ends import Ends
from silo_agent.generation import generate
from silo_agent.noise import Noise, NoiseScale
from silo_agent.processes import Process, Processes
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from workers import catalog
from workers.checkpoint import Checkpoint

PROMPTS = ["The ward board needs a short note", "Chest pain since"]
TOKENS = 16


class Pair:
    """Two brokers and who uses both."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.endpoints = [self.broker(name, "tcp://127.0.0.1:0") for name in ("first", "second")]
        self.options = [option for url in self.endpoints for option in ("--broker", url)]
        self.tiny = str(catalog.fetch("tiny"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.tiny)
        self.ends = Ends(Checkpoint(self.tiny), Partition(1, 2))
        self.whole = AutoModelForCausalLM.from_pretrained(self.tiny, dtype=torch.float32)

    def broker(self, name: str, listen: str) -> str:
        return self._processes.listener(name, "listening on ", "broker", "--listen", listen)

    def worker(self, name: str = "worker") -> Process:
        return self._processes.start(name, "worker", *self.options, "--model", "tiny")

    def __getitem__(self, name: str) -> Process:
        return self._processes[name]

    def generates(self, on_text: Callable[[int, str], None] = lambda row, text: None) -> int:
        """A silo of both brokers says what the whole model does; how many tokens it sent."""
        prompts = [list(self.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
        remote = Remote(ZmqLink(self.endpoints, silo_attach("north"), patience=40.0), deadline=40.0)
        try:
            with Session(
                self.ends, remote, rows=2, capacity=80, noise=Noise(NoiseScale()), wait=40.0
            ) as session:
                answers = generate(
                    session,
                    self.tokenizer,
                    prompts,
                    max_tokens=TOKENS,
                    ends=frozenset(),
                    on_text=on_text,
                )
        finally:
            remote.close()
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt])
            greedy = self.whole.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            assert answer.tokens == greedy[0, len(prompt) :].tolist()
        return remote.traffic.tokens["extend up"]


@pytest.fixture
def pair(processes: Processes) -> Pair:
    return Pair(processes)


def once(deed: Callable[[], object]) -> Callable[[int, str], None]:
    """Do it when some text has come, once."""
    left = [deed]

    def on_text(row: int, text: str) -> None:
        if left:
            left.pop()()

    return on_text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_generation_goes_on_through_the_other_broker(pair: Pair, how: signal.Signals) -> None:
    pair.worker()
    quiet = pair.generates()
    assert pair.generates(once(lambda: os.kill(pair["first"].pid, how))) > quiet, "it was disturbed"
    assert pair.generates() == quiet, "and who comes afterwards finds the other broker as well"


def test_broker_and_worker_are_both_killed_and_started_again(pair: Pair) -> None:
    worker = pair.worker()

    def kill() -> None:
        for process in (pair["first"], worker):
            process.stop(signal.SIGKILL)
        pair.worker("again")
        pair.broker("first again", pair.endpoints[0])

    quiet = pair.generates()
    assert pair.generates(once(kill)) > quiet
    assert pair.generates() == quiet


def test_all_brokers_are_killed_and_started_again(pair: Pair) -> None:
    pair.worker()

    def kill() -> None:
        for name in ("first", "second"):
            pair[name].stop(signal.SIGKILL)
        pair.broker("second again", pair.endpoints[1])

    quiet = pair.generates()
    assert pair.generates(once(kill)) > quiet

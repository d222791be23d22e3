"""A worker is killed while a generation runs: the text is the one that nothing disturbed."""

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


@pytest.mark.parametrize("when", ["another worker is there", "it is started again"])
def test_the_text_is_the_undisturbed_one(processes: Processes, when: str) -> None:
    broker = processes.broker("--silence", "2")
    tiny = str(catalog.fetch("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]

    def worker(name: str) -> Process:
        return processes.start(name, "worker", "--broker", broker, "--model", "tiny")

    remote = Remote(ZmqLink(broker, silo_attach("north"), patience=30.0), deadline=30.0)
    first = worker("first")
    ends = Ends(Checkpoint(tiny), Partition(1, 2))
    try:
        with Session(ends, remote, rows=2, capacity=80, noise=Noise(NoiseScale()), wait=40.0) as session:
            if when == "another worker is there":
                worker("second")
            answers = generate(
                session,
                tokenizer,
                prompts,
                max_tokens=TOKENS,
                ends=frozenset(),
                on_text=killer(first, lambda: worker("second") if when == "it is started again" else None),
            )
    finally:
        remote.close()
    assert not first.running()
    once = sum(len(prompt) + TOKENS - 1 for prompt in prompts)
    assert remote.traffic.tokens["extend up"] > once, "it was killed in the middle"
    whole = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        greedy = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert answer.tokens == greedy[0, len(prompt) :].tolist()


def killer(process: Process, then: Callable[[], object]) -> Callable[[int, str], None]:
    """Kill it when some text has come, once."""

    def on_text(row: int, text: str) -> None:
        if process.running():
            process.stop(signal.SIGKILL)
            then()

    return on_text

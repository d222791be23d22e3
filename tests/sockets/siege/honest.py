"""An honest silo beside the hostile ones: what it generates must be what the whole model generates."""

import threading
import time

import torch
from transformers import AutoModelForCausalLM

from broker.link import ZmqLink
from broker.pool import alias_of
from codec.partition import Partition
from silo_agent.ends import Ends
from silo_agent.noise import Noise, NoiseScale
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from workers.checkpoint import Checkpoint

_PROMPT = [5, 17, 300, 42, 9]
_TOKENS = 12


class Honest(threading.Thread):
    """Generates again and again in one session, until it is told to stop."""

    def __init__(self, endpoint: str, model: str) -> None:
        super().__init__(name="honest", daemon=True)
        checkpoint = Checkpoint(model)
        self._ends = Ends(checkpoint, Partition(1, 2))
        self.card = self._ends.card
        attach = silo_attach("north")
        self.alias = alias_of(attach.peer)
        self._remote = Remote(ZmqLink(endpoint, attach, patience=60.0), deadline=60.0)
        whole = AutoModelForCausalLM.from_pretrained(checkpoint.ref, dtype=torch.float32)
        ids = torch.tensor([_PROMPT])
        greedy = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS,
                                do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        self._right = greedy[0, len(_PROMPT) :].tolist()
        self.generated = 0
        self.seconds: list[float] = []
        """Of each token."""
        self.error: BaseException | None = None
        self._stop_now = threading.Event()

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            with Session(
                self._ends, self._remote, rows=1, capacity=64, noise=Noise(NoiseScale()), wait=30.0
            ) as session:
                while not self._stop_now.is_set():
                    tokens = self._generate(session)
                    if tokens != self._right:
                        raise AssertionError(f"{tokens} were generated, {self._right} are right")
                    self.generated += 1
                    time.sleep(0.02)
        except BaseException as error:
            self.error = error
        finally:
            self._remote.close()

    def _generate(self, session: Session) -> list[int]:
        tokens: list[int] = []
        new, start = _PROMPT, 0
        while len(tokens) < _TOKENS:
            begun = time.monotonic()
            logits = session.extend([0], [new], starts=[start])
            self.seconds.append(time.monotonic() - begun)
            start, new = start + len(new), [int(logits[0].argmax())]
            tokens += new
        return tokens

    def stop(self) -> None:
        """End after the present generation. Raises what it failed with."""
        self._stop_now.set()
        self.join(90)
        if self.error is not None:
            raise self.error

"""The tiny model, whole and split, and a pool of one worker behind a broker in memory."""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import silo_agent
from broker.memory import MemoryBroker, MemoryLink
from broker.parcel import Parcel
from broker.pool import alias_of
from broker.routes import rank
from codec.messages import Attach, Extend, Header, OpenRun
from codec.partition import Partition
from codec.partition import Span as Blocks
from codec.plan import RunPlan
from silo_agent.ends import Ends
from silo_agent.microbatch import MicroBatch
from silo_agent.noise import Noise, NoiseScale
from silo_agent.remote import Remote, silo_attach
from silo_agent.session import Session
from silo_agent.trainer import Trainer
from workers import runtime
from workers.catalog import fetch
from workers.checkpoint import Checkpoint
from workers.serve import serve
from workers.service import TrunkService
from workers.span import Span
from workers.state import StateStore

QUIET = Noise(NoiseScale())
Handle = Callable[[TrunkService, Sequence[Parcel]], list[Parcel]]


@dataclass(frozen=True)
class Tiny:
    """The model directory, what is needed to split it, and the whole of it to compare with."""

    path: Path
    checkpoint: Checkpoint
    tokenizer: Any
    whole: Any

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """What the unsplit model says, `[tokens, vocabulary]`."""
        return self.whole(torch.tensor([ids])).logits[0]

    def greedy(self, ids: Sequence[int], tokens: int, **settings: Any) -> list[int]:
        """What transformers' own `generate` appends to the prompt."""
        prompt = torch.tensor([ids])
        out = self.whole.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            **settings,
        )
        return out[0, len(ids) :].tolist()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        path = fetch("tiny")
    runtime.quiet_libraries()
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    return Tiny(path, Checkpoint(str(path)), AutoTokenizer.from_pretrained(path), whole)


@pytest.fixture
def own_log() -> Iterator[None]:
    """What a command does to logging is undone afterwards."""
    log = logging.getLogger("trunkline")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="session")
def clinics() -> list[Path]:
    """The demo's own data: real chat examples of two silos."""
    return sorted((Path(silo_agent.__file__).parent / "demo").glob("*.jsonl"))


class Pool:
    """A broker, and a worker that can come late or leave; everything that passed is recorded."""

    def __init__(self, tiny: Tiny, handle: Handle) -> None:
        self.broker = MemoryBroker()
        self._tiny, self._handle = tiny, handle
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._links: list[MemoryLink] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "the worker hangs"

    @cached_property
    def _identities(self) -> Iterator[bytes]:
        """Of workers, so that the first to attach is the home of the run `run`, then the next."""
        peers = [secrets.token_bytes(16) for _ in range(16)]
        return iter(sorted(peers, key=lambda peer: rank("run", alias_of(peer)), reverse=True))

    def attach_worker(self) -> MemoryLink:
        """A worker's link without a worker behind it: the test answers, or nobody does."""
        checkpoint = self._tiny.checkpoint
        card = checkpoint.card(range(checkpoint.blocks))
        name, peer = "pool", next(self._identities)
        link = self.broker.link(Attach(role="worker", name=name, peer=peer, model=card, stop=card.blocks))
        self._links.append(link)
        return link

    def start_worker(self, kv_bytes: int = 1 << 26, store: StateStore | None = None) -> None:
        self._work(serve, self.attach_worker(), self._service(kv_bytes, store), self._stop)

    def start_moody_worker(
        self,
        mood: Callable[[Parcel], list[Parcel] | None],
        store: StateStore | None = None,
        told: Callable[[Parcel], list[Parcel]] = lambda answer: [answer],
    ) -> None:
        """A worker that asks `mood` first: what it answers instead, or None; `told` says what becomes of an
        answer of its own. It leaves on `EOFError`."""
        link, service = self.attach_worker(), self._service(1 << 26, store)

        def live() -> None:
            while not self._stop.is_set():
                parcel = link.receive(0.05)
                try:
                    answers = mood(parcel) if parcel else []
                    if parcel and answers is None:
                        answers = [a for own in self._handle(service, [parcel]) for a in told(own)]
                except EOFError:
                    return link.close()
                for answer in answers or ():
                    link.send(answer)
            return None

        self._work(live)

    def start_mortal_worker(self, extends: int) -> None:
        """A worker that answers so many extends, takes one more, and leaves."""
        left = iter(range(extends))

        def mood(parcel: Parcel) -> None:
            if isinstance(parcel.header, Extend) and next(left, None) is None:
                raise EOFError

        self.start_moody_worker(mood)

    def _service(self, kv_bytes: int, store: StateStore | None = None) -> TrunkService:
        checkpoint = self._tiny.checkpoint
        span = Span(checkpoint, Blocks(0, checkpoint.blocks))
        return TrunkService(span, checkpoint.card(range(checkpoint.blocks)), kv_bytes, store=store)

    def _work(self, target: Callable[..., None], *arguments: Any) -> None:
        work = threading.Thread(target=target, args=arguments, daemon=True)
        work.start()
        self._threads.append(work)

    def lose_workers(self) -> None:
        """The workers leave as far as the broker knows."""
        for link in self._links:
            link.close()

    def remote(self, deadline: float = 30.0, name: str = "north") -> Remote:
        return Remote(self.broker.link(silo_attach(name)), deadline=deadline)

    def ends(self, head: int = 2, tail: int = 2, dtype: torch.dtype = torch.float32) -> Ends:
        return Ends(self._tiny.checkpoint, Partition(head, tail), dtype=dtype)

    def session(
        self,
        *,
        rows: int = 1,
        capacity: int = 160,
        noise: Noise = QUIET,
        ends: Ends | None = None,
        remote: Remote | None = None,
        **options: Any,
    ) -> Session:
        where = ends or self.ends(), remote or self.remote()
        return Session(*where, rows=rows, capacity=capacity, noise=noise, **options)

    def trainer(
        self, plan: RunPlan, *, noise: Noise = QUIET, window: int = 2, freeze_head: bool = False
    ) -> Trainer:
        """A silo's trainer in an open run."""
        ends, remote = self.ends(), self.remote()
        ends.adapt(plan.lora, plan.seed)
        opening = OpenRun(run="run", model=ends.card, start=ends.trunk.start, stop=ends.trunk.stop, plan=plan)
        remote.open(opening, [], wait=5)
        return Trainer(
            ends, remote, run="run", plan=plan, noise=noise, window=window, freeze_head=freeze_head
        )

    def sent(self, kind: type[Header] = Extend) -> list[Parcel]:
        """The recorded messages of one kind, in order."""
        return [parcel for parcel in self.broker.passed if isinstance(parcel.header, kind)]


@pytest.fixture
def new_pool(tiny: Tiny, handle: Handle) -> Callable[[], Pool]:
    """For tests that compare what passes in several: a context manager without a worker yet."""
    return lambda: Pool(tiny, handle)


@pytest.fixture
def bare_pool(new_pool: Callable[[], Pool]) -> Iterator[Pool]:
    """A broker to which no worker is attached yet."""
    with new_pool() as pool:
        yield pool


@pytest.fixture
def pool(bare_pool: Pool) -> Pool:
    bare_pool.start_worker()
    return bare_pool


@pytest.fixture(scope="session")
def random_batches() -> Callable[[int], list[MicroBatch]]:
    """Micro-batches of random token ids with loss on every second half."""

    def make(number: int, seed: int = 0) -> list[MicroBatch]:
        from silo_agent.microbatch import Example, pack_examples

        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(number):
            lengths = torch.randint(6, 20, (2,), generator=generator).tolist()
            ids = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]
            made.append(
                pack_examples(
                    [Example(tuple(i), tuple(t >= len(i) // 2 for t in range(len(i)))) for i in ids]
                )
            )
        return made

    return make

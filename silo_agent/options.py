"""The options all silo commands share, and the silo they describe."""

import dataclasses
import functools
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from broker.key_files import link_keys
from codec.messages import Wire
from codec.partition import Partition
from codec.plan import LoraPlan
from workers import runtime  # before torch: it sets how idle threads wait

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from broker.link import ZmqLink
    from silo_agent.adapters import SavedAdapter
    from silo_agent.ends import Ends
    from silo_agent.noise import Noise, NoiseScale
    from silo_agent.remote import Remote
    from silo_agent.session import Session
    from silo_agent.wires import Choice, Wires

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

_BROKER = [
    click.option(
        "--broker",
        required=True,
        multiple=True,
        metavar="URL",
        help="The broker, tcp://127.0.0.1:7555. Several, one option for each, are used one at a time: "
        "the next when one is lost or has no worker.",
    ),
]
_MODEL = [
    click.option("--model", required=True, help="Hub id, directory, or a name `models fetch` knows."),
    click.option("--head", default=2, show_default=True, metavar="P", help="Blocks kept before the trunk."),
    click.option("--tail", default=2, show_default=True, metavar="Q", help="Blocks kept after the trunk."),
    click.option(
        "--noise",
        default=0.0,
        metavar="S",
        help="Gaussian noise on what leaves, in units of the boundary's own standard deviation.",
    ),
    click.option("--noise-abs", default=0.0, metavar="S", help="The same as an absolute deviation."),
    click.option("--noise-mean-abs", default=0.0, metavar="V", help="The same by its mean absolute value."),
    click.option(
        "--noise-clip",
        default=0.0,
        metavar="C",
        help="Shorten each token's vector to this L2 norm before the noise; 0: do not.",
    ),
    click.option("--noise-seed", type=int, help="Repeat the noise (tests only: removes its protection)."),
    click.option(
        "--wire",
        type=click.Choice(["auto", *get_args(Wire)]),
        default="auto",
        show_default=True,
        help="How tensors cross: auto picks for each boundary what is there first; exact and raw keep "
        "every bit; bf16 and fp16 cast; steps quantises to about 6 bits, q8 to q4 in blocks.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option("--dtype", type=click.Choice(runtime.DTYPES), default="auto", show_default=True),
]
_LINK = [
    click.option(
        "--name", default=socket.gethostname, help="How others' logs call this silo, if it has no key."
    ),
    click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="This silo's secret key."),
    click.option(
        "--broker-key", metavar="FILE", help="The broker's public key: its file, or the key itself."
    ),
    click.option(
        "--wait", default=60.0, show_default=True, metavar="S", help="Seconds to wait for broker and worker."
    ),
    click.option(
        "--deadline", default=120.0, show_default=True, metavar="S", help="Seconds a request may take."
    ),
]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options that say what the silo computes and how it crosses, as given."""

    model: str
    head: int
    tail: int
    noise: float
    noise_abs: float
    noise_mean_abs: float
    noise_clip: float
    noise_seed: int | None
    wire: "Choice"
    device: str
    dtype: str

    def scale(self) -> "NoiseScale":
        """The noise asked for. Raises `UsageError`."""
        from silo_agent.noise import NoiseScale

        return NoiseScale(self.noise, self.noise_abs, self.noise_mean_abs, self.noise_clip)

    def placed(self) -> "tuple[torch.device, torch.dtype]":
        """Where and in what numbers it computes. Raises `UsageError` for a device that is not there."""
        device = runtime.choose_device(self.device)
        return device, runtime.choose_dtype(self.dtype, device)


@dataclass(frozen=True, slots=True)
class SiloOptions(ModelOptions):
    """The shared options as given."""

    broker: tuple[str, ...]
    name: str
    key: Path | None
    broker_key: str | None
    wait: float
    deadline: float

    def link(self) -> "ZmqLink":
        """A link to the broker. Raises what `link_keys` and `ZmqLink` raise."""
        from broker.link import ZmqLink
        from silo_agent.remote import silo_attach

        keys = link_keys(self.key, self.broker_key, "silo")
        return ZmqLink(self.broker, silo_attach(self.name), patience=self.wait, keys=keys)

    def check_delta(self, delta: float | None) -> None:
        """Raises `UsageError` if `--delta` is given and no account can be."""
        if delta is not None:
            from silo_agent.accountant import check_accountable

            check_accountable(self.scale(), self.noise_seed, delta)


@dataclass(frozen=True, slots=True)
class Silo:
    """A silo ready to work: its parts of the model, tokenizer, noise, and the way to the trunk."""

    options: SiloOptions
    ends: "Ends"
    tokenizer: "PreTrainedTokenizerBase"
    remote: "Remote"
    noise: "Noise"
    wires: "Wires"
    stop_tokens: frozenset[int]

    def _use(self, saved: "SavedAdapter | None") -> "tuple[LoraPlan, dict[str, Tensor]] | None":
        """Put a saved adapter on head and tail; the trunk's part is returned for the session."""
        if saved is None:
            return None
        self.ends.adapt(saved.plan, seed=0, initial=saved.tensors)
        return saved.plan, saved.within(self.ends.trunk)

    def session(self, rows: int, capacity: int, saved: "SavedAdapter | None") -> "Session":
        """A session of `rows` sequences of up to `capacity` tokens, with a saved adapter if given."""
        from silo_agent.session import Session

        return Session(
            self.ends,
            self.remote,
            rows=rows,
            capacity=capacity,
            noise=self.noise,
            wires=self.wires,
            adapter=self._use(saved),
            wait=self.options.wait,
        )

    def traffic(self) -> dict[str, Any]:
        """Tensor bytes and tokens that crossed so far, and what `auto` picked, by boundary."""
        return {**dataclasses.asdict(self.remote.traffic), "wires": self.wires.report()}

    def spent(self, delta: float | None) -> dict[str, Any]:
        """What all that was sent at the head spends together, said on stderr too; nothing without a delta.

        For a session, where what is sent next may hang on all before.
        """
        if delta is None:
            return {}
        from silo_agent.accountant import Account, said

        account = Account(self.noise.scale, delta, (self.noise.vectors,))
        click.echo(said(account.epsilon(1), delta, "all that this command sent"), err=True)
        return {"account": account.report(1)}


def gathered(name: str, kind: Callable[..., Any], options: Sequence[Callable[[Any], Any]]) -> Decorator:
    """A decorator that adds `options` to a command, which gets them as `name`: one dataclass `kind`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            chosen = {field.name: given.pop(field.name) for field in dataclasses.fields(cast("Any", kind))}
            command(**given, **{name: kind(**chosen)})

        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate


silo_options = gathered("options", SiloOptions, [*_BROKER, *_MODEL, *_LINK])
"""Add the shared options to a command; it gets them as one `SiloOptions` named `options`."""

delta_option = click.option(
    "--delta",
    type=float,
    metavar="D",
    help="Say what the hidden states sent spend as (epsilon, D); needs --noise-clip and absolute noise.",
)

_BROKER_IF_ANY = click.option(
    "--broker", multiple=True, metavar="URL", help="Measure the way through it too."
)
silo_options_offline = gathered("options", SiloOptions, [_BROKER_IF_ANY, *_MODEL, *_LINK])
"""The same for a command that can do without a broker; it is empty then."""

model_options = gathered("options", ModelOptions, _MODEL)
"""The same for a command that talks to no broker; it gets a `ModelOptions`."""


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of `--model`. Raises `ModelError` for a model that does not exist or cannot be split."""
    from transformers import AutoTokenizer

    from workers.checkpoint import Checkpoint

    runtime.quiet_libraries()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(Checkpoint(model).ref)
    return tokenizer


@contextmanager
def open_silo(options: SiloOptions, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Silo]:
    """Load head and tail and attach to the broker; the link is closed at the end.

    What `--wire auto` picked is then said on stderr.

    Raises any `TrunklineError`: bad options, unknown model, unreachable broker.
    """
    from silo_agent.ends import Ends
    from silo_agent.noise import Noise
    from silo_agent.remote import Remote
    from silo_agent.wires import Wires
    from workers.checkpoint import Checkpoint

    scale = options.scale()
    device, dtype = options.placed()
    partition = Partition(options.head, options.tail)
    checkpoint = Checkpoint(options.model)
    partition.spans(checkpoint.blocks)
    noise = Noise(scale, seed=options.noise_seed, device=str(device))
    link = options.link()
    remote = Remote(link, deadline=options.deadline)
    try:
        ends = Ends(checkpoint, partition, dtype=dtype, device=device)
        wires = Wires(
            options.wire,
            speed=lambda: link.speed,
            encodings=lambda: link.encodings,
            noise=options.noise,
            dtype=dtype,
            device=device,
        )
        yield Silo(
            options=options,
            ends=ends,
            tokenizer=tokenizer,
            remote=remote,
            noise=noise,
            wires=wires,
            stop_tokens=_stop_tokens(checkpoint.ref, tokenizer),
        )
        if wires.picks:
            click.echo(f"wire: {wires.summary()}", err=True)
    finally:
        remote.close()


def load_saved(directory: Path | None) -> "SavedAdapter | None":
    """The adapter at `directory`, if one is given. Raises `ModelError`."""
    if directory is None:
        return None
    from silo_agent.adapters import read_adapter

    return read_adapter(directory)


def _stop_tokens(ref: str, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(ref).eos_token_id
    except OSError:
        ends = None
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(cast("list[int]", ends) if isinstance(ends, list) else [ends])

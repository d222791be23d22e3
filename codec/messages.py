"""The headers: one small typed struct for everything that crosses (docs/protocol.md).

On the wire a header is one byte, the protocol version, and then a msgpack map whose `kind` names
the struct. Each entry of a header's `tensors` describes one tensor frame that follows it; a `mask`
describes one frame more, the last.

By these types alone no text, token id or label can cross: tensors are floating point, and the
integers are lengths, positions and counters.
"""

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from codec.errors import ProtocolError, Side
from codec.limits import (
    MASK_PER_RUN,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_LISTED,
    MAX_MASK,
    MAX_MASK_WIDTH,
    MAX_ROWS,
    MAX_TENSORS,
    MAX_TOKENS,
)
from codec.plan import LoraPlan, ModelCard, ModelName, Name, Positive, Real, RunPlan

PROTOCOL = 3

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Block = Annotated[int, Meta(ge=0, le=4096)]
DType = Literal["f32", "bf16", "f16"]
Encoding = Literal["raw", "planes", "steps", "blocks"]
Wire = Literal["raw", "exact", "bf16", "fp16", "steps", "q8", "q7", "q6", "q5", "q4"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
"""What this side reads and writes, all of it."""

Encodings = Annotated[tuple[Encoding, ...], Meta(max_length=len(ENCODINGS))]
Role = Literal["silo", "worker"]
Secret = Annotated[bytes, Meta(max_length=16)]
"""Random bytes that name something to those who know them; empty for nothing."""

Lengths = Annotated[
    tuple[Annotated[int, Meta(ge=1, le=MAX_TOKENS)], ...], Meta(min_length=1, max_length=MAX_ROWS)
]
Positions = Annotated[tuple[Tokens, ...], Meta(max_length=MAX_ROWS)]
Rows = Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_ROWS)], ...], Meta(min_length=1, max_length=MAX_ROWS)]


class TensorSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor frame: its dtype and shape, and how its bytes are encoded (`codec.frames`).

    `sizes` are the stored bytes of the frame's parts: one for `raw`, one per byte plane for `planes`.
    `step` is the quantisation step of `steps`, and 0 for other encodings; `outliers` is how many codes
    of `steps` did not fit a byte.
    """

    dtype: DType
    shape: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=MAX_DIMS)]
    encoding: Encoding
    sizes: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=4)]
    step: Annotated[float, Meta(ge=0)] = 0.0
    outliers: Count = 0


class MaskSpec(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One mask `[queries, keys]` (`codec.masks`): `runs` runs of `width` bits; bits if both are 0."""

    queries: Annotated[int, Meta(ge=0, le=MAX_MASK)]
    keys: Annotated[int, Meta(ge=0, le=MAX_MASK)]
    runs: Annotated[int, Meta(ge=0, le=MAX_MASK // MASK_PER_RUN)]
    width: Annotated[int, Meta(ge=0, le=MAX_MASK_WIDTH)]


Specs = Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAX_TENSORS)]


class Header(
    Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True, forbid_unknown_fields=True
):
    """Base of all headers. `id` is the request's number, chosen by its sender; answers repeat it."""

    id: Count = 0
    tensors: Specs = ()


class Attach(Header, frozen=True, tag="attach"):
    """First message of every peer. `peer` is its secret 16-byte identity, kept over reconnects.

    `encodings` are those it reads. A worker adds its model's card, the blocks `[start, stop)` that it
    hosts, and its `credit`: how many tokens may be under way to it without an answer. 0 is no bound.
    """

    role: Role
    name: Name
    peer: Annotated[bytes, Meta(min_length=16, max_length=16)]
    encodings: Encodings = ENCODINGS
    model: ModelCard | None = None
    start: Block = 0
    stop: Block = 0
    credit: Count = 0


class Welcome(Header, frozen=True, tag="welcome"):
    """The broker's answer to `attach`: beat at least every `heartbeat` seconds.

    `resumed` if the broker still knew this peer; otherwise nothing of what it had is left.
    `encodings` are those that every worker attached now reads: a silo keeps to them.
    """

    heartbeat: Positive
    resumed: bool = False
    encodings: Encodings = ENCODINGS


class Heartbeat(Header, frozen=True, tag="heartbeat"):
    """Sign of life; the broker answers with the same, `id` included, so that a peer can time it."""


class Leave(Header, frozen=True, tag="leave"):
    """A peer says goodbye; the broker forgets it, tells who needs to know, and answers the same."""


class Drain(Header, frozen=True, tag="drain"):
    """A worker wants nothing new: what it has goes on, new sessions and runs go elsewhere.

    The broker answers with the same.
    """


class Gone(Header, frozen=True, tag="gone"):
    """Broker to worker: the silo in the peer frame left or fell silent; free what it held."""

    name: Name


class Status(Header, frozen=True, tag="status"):
    """How is the pool? Whoever may connect may ask, attached or not, and in whatever role."""


class WorkerStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """One worker: what it hosts, its `load` in sessions and runs, and seconds since it was heard."""

    name: Name
    model: ModelName
    start: Block
    stop: Block
    load: Count
    draining: bool
    silent: Real


class Pool(Header, frozen=True, tag="pool"):
    """The answer to `status`: workers by name, of which `unlisted` more are there; of silos, what they
    have open and their runs the mere numbers."""

    workers: Annotated[tuple[WorkerStatus, ...], Meta(max_length=MAX_LISTED)]
    unlisted: Count
    silos: Count
    sessions: Count
    runs: Count


class OpenSession(Header, frozen=True, tag="open-session"):
    """Open a generation over blocks `[start, stop)`: `rows` sequences of up to `capacity` tokens.

    `adapter` and `names` describe the trunk adapter whose tensors follow; without it the base
    model answers. `encodings` are those that the worker must read. A silo that `replays` can send all
    of the session again: the worker may close it, unused, when others need its memory.
    """

    session: Name
    model: ModelCard
    start: Block
    stop: Block
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    capacity: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    encodings: Encodings = ()
    replays: bool = False
    adapter: LoraPlan | None = None
    names: Names = ()


class OpenRun(Header, frozen=True, tag="open-run"):
    """Join a run over blocks `[start, stop)`. All silos must bring the same plan and first adapter.

    `encodings` are those that the worker must read. A silo that was in the run joins it again with the
    `ticket` and the `seat` that it got: it takes its own place, and needs no first adapter.
    """

    run: Name
    model: ModelCard
    start: Block
    stop: Block
    plan: RunPlan
    encodings: Encodings = ()
    names: Names = ()
    ticket: Secret = b""
    seat: Secret = b""


class Opened(Header, frozen=True, tag="opened"):
    """The session or run is open; a run stands at `step`.

    A run that survives its worker has a `ticket`, which its members share, and each has a `seat`: both
    are secret, and come with `open-run` when the run is joined again.
    """

    step: Count = 0
    ticket: Secret = b""
    seat: Secret = b""


class CloseSession(Header, frozen=True, tag="close-session"):
    """Free the session's KV cache."""

    session: Name


class CloseRun(Header, frozen=True, tag="close-run"):
    """This silo is done with the run; the last one to close frees it."""

    run: Name


class Done(Header, frozen=True, tag="done"):
    """The request was carried out; there is nothing else to say."""


class Extend(Header, frozen=True, tag="extend"):
    """Run new tokens of a session's `rows` through the trunk and its KV caches.

    One tensor `[sum(lengths), hidden]`: the rows' new hidden states, packed. `starts` are the
    positions of each row's first new token; a start below the row's length rolls the row back.
    `wire` is how the answer is to cross. A `mask` `[T, T]` says which of these tokens see which within
    a sequence; without it attention is causal.
    """

    session: Name
    rows: Rows
    starts: Positions
    lengths: Lengths
    wire: Wire = "exact"
    mask: MaskSpec | None = None


class Forward(Header, frozen=True, tag="forward"):
    """Training: run a packed micro-batch `[sum(lengths), hidden]` through the trunk and keep the
    activations for the `backward` of the same `microbatch`. `wire` is how the answer is to cross,
    `mask` as in `extend`."""

    run: Name
    microbatch: Count
    lengths: Lengths
    wire: Wire = "exact"
    mask: MaskSpec | None = None


class Backward(Header, frozen=True, tag="backward"):
    """The gradient `[sum(lengths), hidden]` of the summed loss at the trunk's output.

    The answer carries the gradient at the trunk's input if `wants_gradient`, and crosses as `wire`.
    """

    run: Name
    microbatch: Count
    wants_gradient: bool = True
    wire: Wire = "exact"


class Result(Header, frozen=True, tag="result"):
    """The tensor asked for; `seconds` is what the trunk took to compute it."""

    seconds: Real = 0.0


class Commit(Header, frozen=True, tag="commit"):
    """This silo's part of a step is complete: `loss_tokens` tokens bore loss, and the gradients of
    its own parts, of the summed loss, have the squared norm `square_norm`.

    With shared ends their gradients follow (`names`), and `square_norm` is 0.
    """

    run: Name
    step: Count
    loss_tokens: Count
    square_norm: Real
    names: Names = ()


class Committed(Header, frozen=True, tag="committed"):
    """The trunk took step `step`. Silos divide their gradients by `divisor`, multiply by `clip`
    and step. With shared ends the summed gradients follow, in the order of the commit's names.

    `busy` is the share of time the trunk computed since the step before.
    """

    step: Count
    divisor: Positive
    clip: Annotated[float, Meta(gt=0, le=1)]
    grad_norm: Real
    busy: Real = 0.0


class GetAdapter(Header, frozen=True, tag="get-adapter"):
    """Ask for the run's trunk adapter as it stands."""

    run: Name


class Adapter(Header, frozen=True, tag="adapter"):
    """The trunk adapter's tensors, named as in the unsplit model."""

    names: Names


class Error(Header, frozen=True, tag="error"):
    """Request `id` failed: what happened, on whose side, and what to do (`codec.errors`)."""

    code: Name
    what: str
    side: Side
    hint: str = ""


Request = OpenSession | OpenRun | CloseSession | CloseRun | Extend | Forward | Backward | Commit | GetAdapter
Answer = Opened | Done | Result | Committed | Adapter | Error
Control = Attach | Welcome | Heartbeat | Leave | Drain | Gone | Status | Pool
AnyHeader = Request | Answer | Control


def kind_of(header: Header) -> str:
    """What a header's `kind` says."""
    return str(type(header).__struct_config__.tag)


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyHeader] = msgspec.msgpack.Decoder(AnyHeader)
_VERSION = bytes([PROTOCOL])


def encode_header(header: AnyHeader) -> bytes:
    """The header's bytes: protocol version, then msgpack."""
    return _VERSION + _encoder.encode(header)


def decode_header(data: bytes | memoryview) -> AnyHeader:
    """Read a header. Raises `ProtocolError` for another version, a bad kind or a bad field."""
    view = memoryview(data)
    if not 1 < len(view) <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(view)} bytes is not within 2 to {MAX_HEADER_BYTES}")
    if view[0] != PROTOCOL:
        raise ProtocolError(
            f"the peer speaks protocol {view[0]}, this side speaks {PROTOCOL}",
            hint="Install the same Trunkline version on every side.",
        )
    try:
        return _decoder.decode(view[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a header: {error}") from None

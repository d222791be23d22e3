"""Headers: their exact bytes, what they refuse, and what cannot be said with them."""

import subprocess
import sys
import time
import tracemalloc
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from codec import messages
from codec.errors import ProtocolError
from codec.limits import MAX_HEADER_BYTES, MAX_NAME, MAX_REAL, MAX_ROWS, MAX_TENSORS, MAX_TOKENS
from codec.messages import (
    Adapter,
    AnyHeader,
    Attach,
    Backward,
    CloseRun,
    CloseSession,
    Commit,
    Committed,
    Done,
    Drain,
    Error,
    Extend,
    Forward,
    GetAdapter,
    Gone,
    Heartbeat,
    Leave,
    MaskSpec,
    Opened,
    OpenRun,
    OpenSession,
    Pool,
    Result,
    Status,
    TensorSpec,
    Welcome,
    WorkerStatus,
    decode_header,
    encode_header,
)
from codec.plan import LoraPlan, ModelCard, RunPlan

CARD = ModelCard(name="a/b", fingerprint="f00d", blocks=30, hidden=576, samples={2: "ab", 27: "cd"})
LORA = LoraPlan(rank=4, alpha=8.0, targets=("q_proj", "up_proj"))
PLAN = RunPlan(
    silos=3, steps=50, ends="shared", lora=LORA, learning_rate=0.5, warmup_steps=5, schedule="cosine",
    betas=(0.5, 0.75), eps=0.125, weight_decay=0.25, clip_norm=2.0, seed=7, members=("a", "b", "c"),
)  # fmt: skip
SPECS = (
    TensorSpec("f32", (7, 576), "raw", (16128,)),
    TensorSpec("bf16", (), "raw", (2,)),
    TensorSpec("f16", (64, 128), "planes", (8000, 900)),
    TensorSpec("f32", (64, 128), "steps", (8100, 40, 60), 0.25, 12),
    TensorSpec("f32", (64, 128), "blocks", (256, 4096, 1500)),
)

MASK = MaskSpec(4, 64, 6, 12)

HEADERS: dict[str, AnyHeader] = {
    "attach": Attach(
        id=1,
        role="worker",
        name="w0",
        peer=bytes(range(16)),
        encodings=("raw", "planes"),
        model=CARD,
        start=2,
        stop=28,
        credit=8192,
    ),
    "welcome": Welcome(id=1, heartbeat=2.5, resumed=True, encodings=("raw", "steps")),
    "heartbeat": Heartbeat(id=3),
    "leave": Leave(),
    "drain": Drain(id=2),
    "gone": Gone(name="s0"),
    "status": Status(id=14),
    "pool": Pool(
        id=14,
        workers=(WorkerStatus(name="w0", model="a/b", start=2, stop=28, load=3, draining=True, silent=0.5),),
        unlisted=2,
        silos=5,
        sessions=7,
        runs=1,
    ),
    "open-session": OpenSession(
        id=4,
        tensors=SPECS[:2],
        session="s",
        model=CARD,
        start=2,
        stop=28,
        rows=3,
        capacity=300,
        encodings=("raw", "steps"),
        replays=True,
        adapter=LORA,
        names=("a", "b"),
    ),
    "open-run": OpenRun(
        id=5,
        tensors=SPECS[:1],
        run="r",
        model=CARD,
        start=2,
        stop=28,
        plan=PLAN,
        encodings=("raw", "blocks"),
        names=("a",),
        ticket=bytes(range(16)),
        seat=bytes(range(16, 32)),
    ),
    "opened": Opened(id=5, step=9, ticket=bytes(range(16)), seat=bytes(range(16, 32))),
    "close-session": CloseSession(id=6, session="s"),
    "close-run": CloseRun(id=7, run="r"),
    "done": Done(id=7),
    "extend": Extend(
        id=8,
        tensors=SPECS[:1],
        session="s",
        rows=(0, 2),
        starts=(0, 300),
        lengths=(6, 1),
        wire="bf16",
        mask=MASK,
    ),
    "forward": Forward(
        id=9, tensors=SPECS[2:], run="r", microbatch=1 << 40, lengths=(60, 4), wire="steps", mask=MASK
    ),
    "backward": Backward(id=10, tensors=SPECS[2:], run="r", microbatch=1, wants_gradient=False, wire="q6"),
    "result": Result(id=10, tensors=SPECS, seconds=0.25),
    "commit": Commit(
        id=11, tensors=SPECS[:1], run="r", step=9, loss_tokens=512, square_norm=1.5, names=("a",)
    ),
    "committed": Committed(
        id=11, tensors=SPECS[:1], step=10, divisor=512.0, clip=0.5, grad_norm=2.0, busy=0.75
    ),
    "get-adapter": GetAdapter(id=12, run="r"),
    "adapter": Adapter(id=12, tensors=SPECS[:2], names=("a", "b")),
    "error": Error(id=13, code="limit", what="too much", side="worker", hint="send less"),
}

GOLDEN: dict[str, str] = {
    "attach": (
        "038aa46b696e64a6617474616368a4726f6c65a6776f726b6572a46e616d65a27730a470656572c41000010203040506"
        "0708090a0b0c0d0e0fa9656e636f64696e677392a3726177a6706c616e6573a56d6f64656c85a46e616d65a3612f62ab"
        "66696e6765727072696e74a466303064a6626c6f636b731ea668696464656ecd0240a773616d706c65738202a261621b"
        "a26364a5737461727402a473746f701ca6637265646974cd2000a2696401"
    ),
    "welcome": (
        "0385a46b696e64a777656c636f6d65a9686561727462656174cb4004000000000000a7726573756d6564c3a9656e636f"
        "64696e677392a3726177a57374657073a2696401"
    ),
    "heartbeat": "0382a46b696e64a9686561727462656174a2696403",
    "leave": "0381a46b696e64a56c65617665",
    "drain": "0382a46b696e64a5647261696ea2696402",
    "status": "0382a46b696e64a6737461747573a269640e",
    "pool": (
        "0387a46b696e64a4706f6f6ca7776f726b6572739187a46e616d65a27730a56d6f64656ca3612f62a5737461727402a4"
        "73746f701ca46c6f616403a8647261696e696e67c3a673696c656e74cb3fe0000000000000a8756e6c697374656402a5"
        "73696c6f7305a873657373696f6e7307a472756e7301a269640e"
    ),
    "gone": "0382a46b696e64a4676f6e65a46e616d65a27330",
    "open-session": (
        "038da46b696e64ac6f70656e2d73657373696f6ea773657373696f6ea173a56d6f64656c85a46e616d65a3612f62ab66"
        "696e6765727072696e74a466303064a6626c6f636b731ea668696464656ecd0240a773616d706c65738202a261621ba2"
        "6364a5737461727402a473746f701ca4726f777303a86361706163697479cd012ca9656e636f64696e677392a3726177"
        "a57374657073a77265706c617973c3a76164617074657283a472616e6b04a5616c706861cb4020000000000000a77461"
        "726765747392a6715f70726f6aa775705f70726f6aa56e616d657392a161a162a2696404a774656e736f72739296a366"
        "33329207cd0240a372617791cd3f00cb00000000000000000096a46266313690a37261779102cb000000000000000000"
    ),
    "open-run": (
        "038ca46b696e64a86f70656e2d72756ea372756ea172a56d6f64656c85a46e616d65a3612f62ab66696e676572707269"
        "6e74a466303064a6626c6f636b731ea668696464656ecd0240a773616d706c65738202a261621ba26364a57374617274"
        "02a473746f701ca4706c616e8da573696c6f7303a5737465707332a4656e6473a6736861726564a46c6f726183a47261"
        "6e6b04a5616c706861cb4020000000000000a77461726765747392a6715f70726f6aa775705f70726f6aad6c6561726e"
        "696e675f72617465cb3fe0000000000000ac7761726d75705f737465707305a87363686564756c65a6636f73696e65a5"
        "626574617392cb3fe0000000000000cb3fe8000000000000a3657073cb3fc0000000000000ac7765696768745f646563"
        "6179cb3fd0000000000000a9636c69705f6e6f726dcb4000000000000000a47365656407a76d656d6265727393a161a1"
        "62a163a9656e636f64696e677392a3726177a6626c6f636b73a56e616d657391a161a67469636b6574c4100001020304"
        "05060708090a0b0c0d0e0fa473656174c410101112131415161718191a1b1c1d1e1fa2696405a774656e736f72739196"
        "a36633329207cd0240a372617791cd3f00cb000000000000000000"
    ),
    "opened": (
        "0385a46b696e64a66f70656e6564a47374657009a67469636b6574c410000102030405060708090a0b0c0d0e0fa47365"
        "6174c410101112131415161718191a1b1c1d1e1fa2696405"
    ),
    "close-session": "0383a46b696e64ad636c6f73652d73657373696f6ea773657373696f6ea173a2696406",
    "close-run": "0383a46b696e64a9636c6f73652d72756ea372756ea172a2696407",
    "done": "0382a46b696e64a4646f6e65a2696407",
    "extend": (
        "0389a46b696e64a6657874656e64a773657373696f6ea173a4726f7773920002a67374617274739200cd012ca76c656e"
        "67746873920601a477697265a462663136a46d61736b940440060ca2696408a774656e736f72739196a36633329207cd"
        "0240a372617791cd3f00cb000000000000000000"
    ),
    "forward": (
        "0388a46b696e64a7666f7277617264a372756ea172aa6d6963726f6261746368cf0000010000000000a76c656e677468"
        "73923c04a477697265a57374657073a46d61736b940440060ca2696409a774656e736f72739396a36631369240cc80a6"
        "706c616e657392cd1f40cd0384cb00000000000000000096a36633329240cc80a5737465707393cd1fa4283ccb3fd000"
        "00000000000c96a36633329240cc80a6626c6f636b7393cd0100cd1000cd05dccb000000000000000000"
    ),
    "backward": (
        "0387a46b696e64a86261636b77617264a372756ea172aa6d6963726f626174636801ae77616e74735f6772616469656e"
        "74c2a477697265a27136a269640aa774656e736f72739396a36631369240cc80a6706c616e657392cd1f40cd0384cb00"
        "000000000000000096a36633329240cc80a5737465707393cd1fa4283ccb3fd00000000000000c96a36633329240cc80"
        "a6626c6f636b7393cd0100cd1000cd05dccb000000000000000000"
    ),
    "result": (
        "0384a46b696e64a6726573756c74a77365636f6e6473cb3fd0000000000000a269640aa774656e736f72739596a36633"
        "329207cd0240a372617791cd3f00cb00000000000000000096a46266313690a37261779102cb00000000000000000096"
        "a36631369240cc80a6706c616e657392cd1f40cd0384cb00000000000000000096a36633329240cc80a5737465707393"
        "cd1fa4283ccb3fd00000000000000c96a36633329240cc80a6626c6f636b7393cd0100cd1000cd05dccb000000000000"
        "000000"
    ),
    "commit": (
        "0388a46b696e64a6636f6d6d6974a372756ea172a47374657009ab6c6f73735f746f6b656e73cd0200ab737175617265"
        "5f6e6f726dcb3ff8000000000000a56e616d657391a161a269640ba774656e736f72739196a36633329207cd0240a372"
        "617791cd3f00cb000000000000000000"
    ),
    "committed": (
        "0388a46b696e64a9636f6d6d6974746564a4737465700aa764697669736f72cb4080000000000000a4636c6970cb3fe0"
        "000000000000a9677261645f6e6f726dcb4000000000000000a462757379cb3fe8000000000000a269640ba774656e73"
        "6f72739196a36633329207cd0240a372617791cd3f00cb000000000000000000"
    ),
    "get-adapter": "0383a46b696e64ab6765742d61646170746572a372756ea172a269640c",
    "adapter": (
        "0384a46b696e64a761646170746572a56e616d657392a161a162a269640ca774656e736f72739296a36633329207cd02"
        "40a372617791cd3f00cb00000000000000000096a46266313690a37261779102cb000000000000000000"
    ),
    "error": (
        "0386a46b696e64a56572726f72a4636f6465a56c696d6974a477686174a8746f6f206d756368a473696465a6776f726b"
        "6572a468696e74a973656e64206c657373a269640d"
    ),
}

KINDS: dict[str, Any] = {
    cls.__struct_config__.tag: cls for cls in typing.get_args(AnyHeader) if cls is not None
}


# --- the format --------------------------------------------------------------------------------------


def test_every_kind_has_its_golden_bytes() -> None:
    assert HEADERS.keys() == GOLDEN.keys() == KINDS.keys()
    defined = {
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, messages.Header) and value is not messages.Header
    }
    assert set(KINDS.values()) == defined


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_has_the_bytes_it_always_had(kind: str) -> None:
    """A change here is a change of the protocol: raise `PROTOCOL`, and say so in docs/protocol.md."""
    assert encode_header(HEADERS[kind]).hex() == GOLDEN[kind]
    assert decode_header(bytes.fromhex(GOLDEN[kind])) == HEADERS[kind]


@pytest.mark.parametrize("kind", HEADERS)
def test_each_golden_header_says_all_that_its_kind_can_say(kind: str) -> None:
    """So that no field's place or name can change unseen."""
    said = set(msgspec.msgpack.decode(bytes.fromhex(GOLDEN[kind])[1:], strict=False))
    optional = {"id", "tensors"}
    fields = set(KINDS[kind].__struct_fields__) - optional
    assert fields <= said <= fields | optional | {"kind"}


def test_what_has_its_default_value_is_not_sent() -> None:
    assert encode_header(Done()) == b"\x03" + msgspec.msgpack.encode({"kind": "done"})
    assert encode_header(Leave(id=0)) == b"\x03" + msgspec.msgpack.encode({"kind": "leave"})


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_may_lie_in_a_larger_buffer(kind: str) -> None:
    data = bytes.fromhex(GOLDEN[kind])
    assert decode_header(memoryview(b"??" + data + b"??")[2:-2]) == HEADERS[kind]


# --- what is refused ---------------------------------------------------------------------------------


def test_another_protocol_version_says_what_to_do() -> None:
    for version in (0, 1, 255):
        with pytest.raises(ProtocolError, match=f"speaks protocol {version}, this side speaks 3") as caught:
            decode_header(bytes([version]) + encode_header(Done())[1:])
        assert "same Trunkline version" in caught.value.hint


@pytest.mark.parametrize("size", [0, 1, MAX_HEADER_BYTES + 1])
def test_a_header_has_a_size(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"a header of {size} bytes"):
        decode_header(b"\x03" * size)


def refused(fields: dict[str, Any]) -> str:
    with pytest.raises(ProtocolError, match="not a header") as caught:
        decode_header(b"\x03" + msgspec.msgpack.encode(fields))
    return caught.value.what


@pytest.mark.parametrize("kind", ["", "Done", "text", "open_session", "labels", 3, None])
def test_kinds_are_a_closed_table(kind: object) -> None:
    assert "kind" in refused({"kind": kind})


def test_a_header_without_a_kind_is_refused() -> None:
    assert "kind" in refused({"id": 3})


@pytest.mark.parametrize("kind", HEADERS)
def test_unknown_fields_are_refused_in_every_kind(kind: str) -> None:
    fields = msgspec.msgpack.decode(encode_header(HEADERS[kind])[1:], strict=False)
    assert "tokens" in refused({**fields, "tokens": [1, 2, 3]})


@pytest.mark.parametrize("kind", HEADERS)
def test_every_field_without_a_default_is_required(kind: str) -> None:
    fields = msgspec.msgpack.decode(encode_header(HEADERS[kind])[1:], strict=False)
    for field in msgspec.structs.fields(KINDS[kind]):
        if field.required:
            rest = {key: value for key, value in fields.items() if key != field.name}
            assert field.name in refused(rest)


NAN, INF = float("nan"), float("inf")
BAD_FIELDS: list[tuple[str, str, list[object]]] = [
    ("done", "id", [-1, (1 << 62) + 1, 1.5, "1", None]),
    ("attach", "role", ["broker", "", 0]),
    ("attach", "name", ["", "x" * (MAX_NAME + 1), b"w0", 0]),
    ("attach", "peer", [b"", bytes(15), bytes(17), 0]),
    ("attach", "start", [-1, 4097]),
    ("pool", "workers", [[{}], [{"name": "w"}], "w0", [1]]),
    ("welcome", "heartbeat", [0.0, -1.0, NAN, INF]),
    ("open-session", "rows", [0, MAX_ROWS + 1]),
    ("open-session", "capacity", [0, MAX_TOKENS + 1]),
    ("open-session", "encodings", [["pickle"], "raw", ["raw"] * 9]),
    ("attach", "encodings", [["zlib"], "raw", ["raw"] * 9]),
    ("extend", "wire", ["int8", "", "pickle", "auto"]),
    ("forward", "mask", [[4, 64, 6], [-4, 64, 6, 12], [4, 64, 6, 29], b"bits", "text"]),
    ("open-session", "session", ["", "x" * (MAX_NAME + 1)]),
    ("open-session", "names", [[""], ["x" * (MAX_NAME + 1)], ["a"] * (MAX_TENSORS + 1), "a"]),
    ("extend", "rows", [[], [-1], [MAX_ROWS], [0] * (MAX_ROWS + 1)]),
    ("extend", "starts", [[-1], [MAX_TOKENS + 1], [0] * (MAX_ROWS + 1)]),
    ("extend", "lengths", [[], [0], [-1], [MAX_TOKENS + 1], [1] * (MAX_ROWS + 1), [1.0], ["1"]]),
    ("forward", "lengths", [[], [0], 3, None]),
    ("forward", "microbatch", [-1, 1 << 63]),
    ("backward", "wants_gradient", [1, "yes", None]),
    ("result", "seconds", [-0.1, NAN, INF]),
    ("commit", "square_norm", [-1.0, NAN, INF, -INF, 2 * MAX_REAL]),
    ("commit", "loss_tokens", [-1, 0.5]),
    ("committed", "divisor", [0.0, -1.0, NAN, INF]),
    ("committed", "clip", [0.0, 1.5, NAN]),
    ("committed", "grad_norm", [-1.0, NAN, INF]),
    ("error", "side", ["hub", ""]),
    ("error", "code", ["", "x" * (MAX_NAME + 1)]),
    ("result", "tensors", [[["f32", [1], "raw", [4]]] * (MAX_TENSORS + 1), ["f32"], "f32", {}]),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        pytest.param(kind, field, value, id=f"{kind}-{field}-{n}")
        for kind, field, values in BAD_FIELDS
        for n, value in enumerate(values)
    ],
)
def test_a_value_out_of_range_is_named(kind: str, field: str, value: object) -> None:
    fields = msgspec.msgpack.decode(encode_header(HEADERS[kind])[1:], strict=False)
    assert f"$.{field}" in refused({**fields, field: value})


@pytest.mark.parametrize(
    "spec",
    [
        ["f64", [1], "raw", [8]],
        ["i64", [1], "raw", [8]],
        ["u8", [1], "raw", [1]],
        ["str", [1], "raw", [1]],
        ["f32", [1], "pickle", [4]],
        ["f32", [1], "zlib", [4]],
        ["f32", [-1], "raw", [4]],
        ["f32", [1, 1, 1, 1, 1], "raw", [4]],
        ["f32", [1], "raw", []],
        ["f32", [1], "raw", [1, 1, 1, 1, 1]],
        ["f32", [1], "raw", [-4]],
        ["f32", [1.0], "raw", [4]],
        ["f32", [1], "raw"],
        ["f32", [1], "raw", [4], "more"],
        ["f32", [1], "steps", [1], 0.5, -1],
        ["f32", [1], "steps", [1], 0.5, 0, 0],
        {"dtype": "f32", "shape": [1], "encoding": "raw", "sizes": [4]},
    ],
)
def test_a_tensor_is_floating_point_in_a_known_encoding(spec: object) -> None:
    assert "$.tensors[0]" in refused({"kind": "result", "tensors": [spec]})


@settings(max_examples=500)
@given(st.binary(max_size=200))
@example(b"\x03\x81\xa4kind" + b"\x91" * 100_000)
@example(b"\x03" + b"\x91" * 1_000_000)
@example(b"\x03\x81\xa4kind\xa4\xff\xff\xff\xff")
@example(b"\x03\xdf\xff\xff\xff\xff")
def test_random_bytes_are_not_a_header(data: bytes) -> None:
    for candidate in (data, b"\x03" + data):
        try:
            header = decode_header(candidate)
        except ProtocolError:
            continue
        assert isinstance(header, messages.Header)


@settings(max_examples=500)
@given(
    st.sampled_from(sorted(HEADERS)),
    st.lists(
        st.tuples(st.integers(0, 10_000), st.binary(max_size=5), st.integers(0, 3)), min_size=1, max_size=4
    ),
)
def test_a_damaged_header_is_refused_or_is_another_header(
    kind: str, edits: list[tuple[int, bytes, int]]
) -> None:
    data = encode_header(HEADERS[kind])
    for at, new, dropped in edits:
        at %= len(data) + 1
        data = data[:at] + new + data[at + dropped :]
    try:
        header = decode_header(data)
    except ProtocolError:
        return
    assert decode_header(encode_header(header)) == header


CLAIMS = {
    "strings": b"\xdb",
    "byte strings": b"\xc6",
    "arrays": b"\xdd",
    "maps": b"\xdf",
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("count", [1 << 24, (1 << 32) - 1])
@pytest.mark.parametrize(
    ("kind", "field", "inner"),
    [
        ("result", "tensors", b""),
        ("forward", "lengths", b""),
        ("adapter", "names", b""),
        ("error", "what", b""),
        ("attach", "peer", b""),
        ("attach", "model", b"\x81\xa7samples"),
        ("open-session", "adapter", b"\x81\xa7targets"),
        ("open-session", "adapter", b""),
    ],
)
def test_a_small_header_that_claims_much_costs_nothing(
    claim: str, count: int, kind: str, field: str, inner: bytes
) -> None:
    words = b"".join(msgspec.msgpack.encode(word) for word in ("kind", kind, field))
    data = b"\x03\x82" + words + inner + CLAIMS[claim] + count.to_bytes(4, "big") + b"\x01" * 20
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(ProtocolError):
        decode_header(data)
    taken, peak = time.monotonic() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert taken < 1.0


# --- what cannot be said -----------------------------------------------------------------------------


def leaves(kind: Any, path: str) -> dict[str, Any]:
    """Every place of a type that holds a value of its own: `commit.names[]`, `open-run.plan.seed`."""
    if isinstance(kind, inspect.Metadata):
        return leaves(kind.type, path)
    if isinstance(kind, inspect.StructType):
        return {
            place: leaf
            for field in kind.fields
            for place, leaf in leaves(field.type, f"{path}.{field.encode_name}").items()
        }
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return leaves(kind.item_type, f"{path}[]")
    if isinstance(kind, inspect.TupleType):
        return {
            p: leaf for n, t in enumerate(kind.item_types) for p, leaf in leaves(t, f"{path}[{n}]").items()
        }
    if isinstance(kind, inspect.DictType):
        return leaves(kind.key_type, f"{path}{{key}}") | leaves(kind.value_type, f"{path}{{}}")
    if isinstance(kind, inspect.UnionType):
        found: dict[str, Any] = {}
        for option in kind.types:
            if not isinstance(option, inspect.NoneType):
                found |= leaves(option, path)
        return found
    return {path: kind}


PLACES = {
    place: leaf
    for kind, cls in sorted(KINDS.items())
    for place, leaf in leaves(inspect.type_info(cls), kind).items()
}

NAMES = {
    "attach.name",
    "gone.name",
    "open-session.session",
    "close-session.session",
    "extend.session",
    *(f"{kind}.run" for kind in ("open-run", "close-run", "forward", "backward", "commit", "get-adapter")),
    *(f"{kind}.names[]" for kind in ("open-session", "open-run", "commit", "adapter")),
    *(
        f"{kind}.model.{field}"
        for kind in ("attach", "open-session", "open-run")
        for field in ("name", "fingerprint", "samples{}")
    ),
    "open-session.adapter.targets[]",
    "open-run.plan.lora.targets[]",
    "pool.workers[].name",
    "pool.workers[].model",
    "open-run.plan.members[]",
}
ERRORS = {"error.code", "error.what", "error.hint"}
LISTS_OF_NUMBERS = {
    *(f"{kind}.tensors[].{field}[]" for kind in KINDS for field in ("shape", "sizes")),
    *(f"{kind}.tensors[].{field}" for kind in KINDS for field in ("step", "outliers")),
    "extend.rows[]",
    "extend.starts[]",
    "extend.lengths[]",
    "forward.lengths[]",
    *(f"{kind}.model.samples{{key}}" for kind in ("attach", "open-session", "open-run")),
    "open-run.plan.betas[0]",
    "open-run.plan.betas[1]",
    *(f"pool.workers[].{field}" for field in ("start", "stop", "load", "silent")),
}


def test_no_field_can_hold_text_but_names_and_errors() -> None:
    """A field for text or labels would have to be added to this list, in plain sight."""
    texts = {place for place, leaf in PLACES.items() if isinstance(leaf, inspect.StrType)}
    assert texts == NAMES | ERRORS
    for place in NAMES:
        assert PLACES[place].max_length <= 512


def test_no_list_of_numbers_can_hold_token_ids() -> None:
    """The lists there are say how long, where and how large; a new one must be added here."""
    numbers = {
        place
        for place, leaf in PLACES.items()
        if isinstance(leaf, inspect.IntType | inspect.FloatType) and ("[" in place or "{" in place)
    }
    assert numbers == LISTS_OF_NUMBERS


def test_every_other_field_is_one_number_one_word_of_a_table_or_16_secret_bytes() -> None:
    others = {place: leaf for place, leaf in PLACES.items() if place not in NAMES | ERRORS | LISTS_OF_NUMBERS}
    simple = inspect.IntType | inspect.FloatType | inspect.BoolType | inspect.LiteralType
    rest = {place: leaf for place, leaf in others.items() if not isinstance(leaf, simple)}
    assert rest.keys() == {"attach.peer"} | {
        f"{kind}.{secret}" for kind in ("open-run", "opened") for secret in ("ticket", "seat")
    }
    assert all(leaf.max_length == 16 for leaf in rest.values())


def test_tensors_are_floating_point_by_schema() -> None:
    dtypes = {place: leaf.values for place, leaf in PLACES.items() if place.endswith(".dtype")}
    assert len(dtypes) == len(KINDS)
    assert {value for values in dtypes.values() for value in values} == {"f32", "bf16", "f16"}


@pytest.mark.parametrize(
    "module", ["messages", "frames", "planes", "masks", "partition", "plan", "errors", "limits"]
)
def test_the_broker_path_does_not_import_torch(module: str, repository: Path) -> None:
    code = f"import sys, codec.{module}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "codec" in loaded
    assert not loaded & {"torch", "transformers", "peft", "safetensors", "accelerate", "zmq"}

"""Facts and tensors as the bytes of one file, under a digest that tells every damage.

The digest, 32 bytes of BLAKE2b over all that follows; the length of the facts, 8 bytes, the least
significant first; the facts as JSON; the tensors as safetensors.
"""

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from codec.errors import SaveError

T = TypeVar("T", bound=msgspec.Struct)

_DIGEST = 32
_LENGTH = 8


def seal(facts: msgspec.Struct, tensors: Mapping[str, Tensor]) -> bytes:
    """The file's bytes. Tensors may be on any device."""
    text = msgspec.json.encode(facts)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    body = b"".join((len(text).to_bytes(_LENGTH, "little"), text, safetensors.torch.save(plain)))
    return _digest(body) + body


def unseal(data: bytes, kind: type[T]) -> tuple[T, dict[str, Tensor]]:
    """What was sealed. Raises `SaveError` for bytes that are not exactly those, or of another version."""
    digest, body = data[:_DIGEST], memoryview(data)[_DIGEST:]
    if len(body) < _LENGTH or _digest(body) != digest:
        raise SaveError("the file is damaged: its digest is another one")
    start = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    try:
        return msgspec.json.decode(body[_LENGTH:start], type=kind), safetensors.torch.load(
            bytes(body[start:])
        )
    except (msgspec.DecodeError, SafetensorError) as error:
        raise SaveError(
            f"the file was written by another version of Trunkline: {error}",
            hint="Go on with the version that wrote it.",
        ) from None


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()

"""A value for any type of a message, so that no kind and no field can be forgotten."""

from random import Random
from typing import Any

from msgspec import NODEFAULT, inspect


def example(kind: type, rng: Random, **given: Any) -> Any:
    """A struct of that type whose fields are drawn, near the edges of what their types allow."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return _struct(info, rng, given)


def _struct(info: inspect.StructType, rng: Random, given: dict[str, Any]) -> Any:
    fields = dict(given)
    for field in info.fields:
        optional = field.default is not NODEFAULT or field.default_factory is not NODEFAULT
        if field.name not in fields and not (optional and rng.random() < 0.3):
            fields[field.name] = _draw(field.type, rng)
    if fields.get("members"):  # In order, and as many as the silos.
        fields["members"] = tuple(sorted(set(fields["members"])))
        fields["silos"] = len(fields["members"])
    return info.cls(**fields)


def _draw(info: inspect.Type, rng: Random) -> Any:
    match info:
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.IntType():
            least = info.ge if info.ge is not None else 0 if info.gt is None else info.gt + 1
            most = info.le if info.le is not None else 1 << 40 if info.lt is None else info.lt - 1
            return rng.choice([least, most, rng.randint(least, most), min(most, least + rng.randrange(9))])
        case inspect.FloatType():
            usual = [0.0, 1e-9, 0.25, 0.5, 1.0, 3.7, 1e9, 1e300]
            return rng.choice([value for value in usual if _within(value, info)])
        case inspect.StrType():
            return "aé漢z"[: rng.randint(info.min_length or 0, 4)]
        case inspect.BytesType():
            return rng.randbytes(info.min_length or 4)
        case inspect.LiteralType():
            return rng.choice(info.values)
        case inspect.VarTupleType():
            least = info.min_length or 0
            return tuple(_draw(info.item_type, rng) for _ in range(rng.randint(least, least + 3)))
        case inspect.TupleType():
            return tuple(_draw(item, rng) for item in info.item_types)
        case inspect.DictType():
            return {_draw(info.key_type, rng): _draw(info.value_type, rng) for _ in range(rng.randrange(3))}
        case inspect.UnionType():
            return _draw(rng.choice(info.types), rng)
        case inspect.StructType():
            return _struct(info, rng, {})
    raise TypeError(f"no example of {info}: add its type here")


def _within(value: float, info: inspect.FloatType) -> bool:
    return (
        (info.ge is None or value >= info.ge)
        and (info.gt is None or value > info.gt)
        and (info.le is None or value <= info.le)
        and (info.lt is None or value < info.lt)
    )

"""How much memory a silo may take on this machine."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from codec.errors import UsageError

if TYPE_CHECKING:
    import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.8
"""Of what is free, the rest being for all that is not counted and for what others will want."""
_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes of `8GB`, `512 MiB` or `1000000`. Raises `UsageError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{text!r} is no size", hint="Write it as 8GB or 512MiB.")
    return int(float(match[1]) * unit)


def usable_memory(device: "torch.device") -> int:
    """The bytes a silo may take: a share of what is free on its device.

    Raises `UsageError` where the system does not say.
    """
    if device.type == "cuda":
        import torch

        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE * min(free_memory(), _container_room()))


def free_memory() -> int:
    """What programs may still take without swapping. Raises `UsageError` where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass  # Not Linux.
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        raise UsageError("this system does not say what memory is free", hint="Give --memory.") from None


def _container_room() -> float:
    """What this container, if it is one that is bounded, leaves; files it has cached can go."""
    try:
        bound = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # No such bound, or "max".
        return float("inf")
    return max(0, bound - used + (int(cached[1]) if cached else 0))

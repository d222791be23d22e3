"""The broker's heap: what a message leaves is kept for the next one.

glibc gives the end of a heap back to the system as soon as 128 KiB of it are free, which two messages of
64 kB are: the next ones' pages come from the system again, zeroed, about three page faults a message.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for `mallopt`, from its malloc.h."""

_KEPT_BYTES = 32 << 20
"""At the end of each heap, of which a broker has two or three."""
_MAPPED_FROM = 16 << 20
"""Larger messages have pages of their own, which go back with them. Left to itself glibc raises both
thresholds with the largest block it saw freed, to twice these; where one is set neither moves any more."""


def keep_freed_memory() -> None:
    """Tell glibc; another C library is left as it is."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)

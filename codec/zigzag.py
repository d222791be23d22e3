"""Zigzag: integers of either sign as unsigned ones, small ones as small ones (0, -1, 1, -2, ...)."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def zigzag(values: Ints) -> Ints:
    """int64 of less than 63 bits to int64 of 0 and more."""
    return (values << 1) ^ (values >> 63)


def unzigzag(codes: Ints) -> Ints:
    """Back from `zigzag`."""
    return (codes >> 1) ^ -(codes & 1)

"""What a peer may claim. Every decoder checks against these before it allocates anything."""

MAX_HEADER_BYTES = 1 << 20
"""One header; adapters of a few hundred tensors need tens of kilobytes."""

MAX_TENSORS = 4096
"""Tensor frames in one message."""

MAX_FRAME_BYTES = 1 << 28
"""One tensor, decoded or on the wire."""

MAX_MESSAGE_BYTES = 1 << 29
"""All tensors of one message, decoded or on the wire."""

MAX_DIMS = 4
MAX_NAME = 128
MAX_ROWS = 4096
"""Sequences in one session or micro-batch."""

MAX_TOKENS = 1 << 20
"""Tokens in one session row or micro-batch."""

MAX_REAL = 1e300
"""Rates, norms and the like: finite, and so is the sum of a run's."""

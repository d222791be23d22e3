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
MAX_LISTED = 64
"""Workers that one answer to `status` lists."""

MAX_ROWS = 4096
"""Sequences in one session or micro-batch."""

MAX_TOKENS = 1 << 20
"""Tokens in one session row or micro-batch."""

MAX_REAL = 1e300
"""Rates, norms and the like: finite, and so is the sum of a run's."""

MAX_MASK = 1 << 26
"""Elements of one attention mask, its rows rounded up to 64: 8192 by 8192."""

MASK_PER_RUN = 32
"""Elements that a mask's run must tell on average: at `MAX_MASK_WIDTH` bits a run that saves in any case."""

MAX_MASK_WIDTH = 28
"""Bits of the zigzagged difference between two runs of at most `MAX_MASK`."""

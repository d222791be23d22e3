"""Copies between host and GPU: through pinned memory, in the stream's order, without a wait for each.

Torch copies from and to pageable memory only while the calling thread waits for all that its stream was
told before; from and to pinned memory, told `non_blocking`, a copy is one more entry in the thread's
current stream ("Use pinned memory buffers" and "Asynchronous execution" in
https://docs.pytorch.org/docs/stable/notes/cuda.html). Both ends of the rule are kept here:

* *Up*: what comes after in the same stream sees the tensor whole. Another stream, or the host, has to
  wait for this one first (`workers.serve` does, once a message).
* *Down*: the host may not look before `settle`.

Pinning memory is slow, so it is used again: it comes from torch's caching host allocator, which notes
the stream of each such copy and hands a block out anew only once its tensor is gone and the stream is
past the copy. Neither a source let go of early nor an error half-way needs care. What stays pinned is
what was once under way together: the tensors of a message on each of two threads, and frames that wait
to be sent.

On a CPU nothing is copied.
"""

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on `device`; on a CPU it is `host` itself."""
    if device.type != "cuda" or not host.numel():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """The tensor on the host, to be read after `settle`; on a CPU it is `tensor` itself."""
    if not tensor.is_cuda:
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def settle(device: torch.device) -> None:
    """Wait for all that this thread's current stream on `device` was told, copies too."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()

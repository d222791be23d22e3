"""What both ends must agree on: messages, tensor frames, lengths, partitions and errors.

No sockets here. Everything the broker imports from this room works without torch.
"""

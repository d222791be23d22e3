"""A data owner's side: text, tokenizer, head, tail, noise, training and generation.

Nothing in this room sends text, token ids or labels.
"""

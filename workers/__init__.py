"""Spans of decoder blocks, and the service that runs the trunk for many silos.

Nothing in this room sees text, token ids of the trunk's silos, or labels.
"""

"""Routing between silos and workers, and the link both use to reach it. No torch, no tensors."""

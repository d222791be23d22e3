"""How much of a model a silo keeps: measured, and decided from the figures."""

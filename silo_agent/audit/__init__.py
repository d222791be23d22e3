"""What a curious worker can read of what a silo sends: attacks on the silo's own text, run on the silo."""

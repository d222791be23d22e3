"""The demo: everything on this machine, with a small fictional data set of two clinics."""

"""Benches: one module per question; run as ``python -m bench.NAME``."""

# First of all, because it keeps BLAS to one thread, which NumPy reads on import.
import rtfocus  # noqa: F401

"""rtfocus: finds, corrects and records defocus while a microscope acquires."""

import os

__version__ = "0.1.0"

# The loop brings its own threads. BLAS threads spin while they wait and take the
# cores from them: a matrix product of 0.3 ms was seen to last 70 ms. Read when
# NumPy is first imported; a user's own setting holds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

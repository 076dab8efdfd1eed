"""Print the focus estimates of a running processor: rtfocus run, or process."""

import sys

import rtfocus

endpoint = sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:5573"
timeout_s = float(sys.argv[2]) if len(sys.argv) > 2 else 60
for estimate in rtfocus.estimates(endpoint, timeout_s=timeout_s):
    found = estimate.defocus_um
    where = "background" if found is None else f"{found:.1f} um"
    print(estimate.sequence, where, f"{100 * estimate.confidence:.0f} %", flush=True)

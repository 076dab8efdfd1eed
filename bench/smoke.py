"""Smoke: every bench runs through with a few frames; asserts nothing about time.

python -m bench.smoke
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

BENCHES = (
    "startup",
    "transport",
    "writer",
    "stages",
    "deconvolution",
    "kill",
    "loop",
    "loop_hold",
    "recorded",
    "plans",
    "reading",
    "gpu",
    "view",
    "batch",
)


def main() -> None:
    """Run each bench with ``--smoke``; stop at the first that fails."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for bench in BENCHES:
            print(f"-- bench.{bench}", flush=True)
            out = Path(folder) / f"{bench}.json"
            command = [sys.executable, "-m", f"bench.{bench}", "--smoke"]
            subprocess.run([*command, "--out", str(out)], check=True)
            if not out.is_file():
                raise SystemExit(f"bench.{bench} wrote no {out.name}")


if __name__ == "__main__":
    main()

"""Record a short run without a microscope, then read its folder.

An argument is where run folders are made: ``python read_a_run.py runs``.
"""

import sys

import rtfocus

folder = sys.argv[1] if len(sys.argv) > 1 else "runs"
changes = ["run.name=example", "acquisition.mda.time_plan.loops=5"]
config = rtfocus.load_config("demo", [f"run.folder={folder}", *changes])
recorded = rtfocus.run(config)

# What `run` returns; later, or elsewhere, it is opened by its folder.
run = rtfocus.open_run(recorded.folder)
print(run.outcome)
print("raw", dict(zip(run.raw.axes, run.raw.shape)), run.raw.dtype)
print("pixel", run.pixel_size_um, "um; tile step", run.defocus.pixel_size_um, "um")
print("first plane", run.restored[0, 0, 0].shape)
for row in run.frames[:3]:
    print(row["t"], row["status"], f"{row['defocus_um']:.1f} um at z {row['z_um']:.1f}")

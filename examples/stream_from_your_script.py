"""Send what your own script acquires to rtfocus, beside your own file.

The core is yours: here Micro-Manager's DemoCamera (package mm-test-adapters).
"""

import sys
from pathlib import Path

import mm_test_adapters
import useq
from pymmcore_plus import CMMCorePlus

import rtfocus

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
adapters = mm_test_adapters.device_adapter_path()
core = CMMCorePlus(mm_path=str(adapters))
core.loadSystemConfiguration(f"{adapters}/MMConfig_demo.cfg")

sequence = useq.MDASequence(
    channels=[{"config": "DAPI", "exposure": 5}, {"config": "FITC", "exposure": 5}],
    time_plan={"interval": 0.05, "loops": 5},
)
light = "numerical_aperture: 0.3, pixel_size_um: 1.0"  # as the core says: 10x, 1 um
config = rtfocus.load_config(
    "democamera",
    [
        f"run.folder={folder}",
        "run.name=streamed",
        "processing.classifier=delpnet",
        f"channels.0.optics={{{light}, wavelength_nm: 460}}",
        f"channels.1.optics={{{light}, wavelength_nm: 520}}",
    ],
)
mine = folder / "mine.ome.tiff"

with rtfocus.stream(core, config) as live:
    live.estimateReady.connect(
        lambda found: print("frame", found.sequence, found.defocus_um, flush=True)
    )
    core.mda.run(sequence, output=[live, mine])

print(live.reports[0])
run = live.runs[0]
print(run.outcome, "in", run.folder)

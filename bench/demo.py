"""What engines make of the demo's field, apart from its stage and its clock.

    nice python -m bench.demo --seeds 7 1 2 3 --pairs rtfocus-2+wiener delpnet+wiener
    nice python -m bench.demo --through-focus --pairs rtfocus-2+none

The first line photographs the tilted demo with its left edge in focus and judges map
and restoration as `rtfocus demo` does. The second one photographs a flat field at known
defocus: by how much the estimate is off says whether an engine counts from the plane
where the optics are in focus.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.config import Config, load_config
from rtfocus.config.sections import VirtualMicroscopeConfig
from rtfocus.drawing.canvas import enlarge
from rtfocus.evaluation.scores import match_intensity, pearson, psnr
from rtfocus.files import resource_folder
from rtfocus.microscope.virtual_devices import Sensor
from rtfocus.microscope.virtual_specimen import Truth, VirtualSpecimen
from rtfocus.offline import ImageProcessor

EXPOSURE_MS = 10.0
HELD_PX = 128
"""Width of the region that the demo holds in focus."""


def setting(pair: str, seed: int, waves: float | None) -> tuple[Config, OpticalSystem]:
    """Return the demo's config with a classifier and a restoration, and its optics."""
    classifier, method = pair.split("+")
    overrides = [
        f"processing.classifier={classifier}",
        f"processing.restoration.method={method}",
        f"microscope.specimen.seed={seed}",
    ]
    if waves is not None:
        overrides.append(f"channels.0.optics.aberrations.spherical_waves={waves}")
    config = load_config(resource_folder("configs") / "demo.yaml", overrides)
    optics = config.channels[0].optics
    assert optics is not None, "the demo's channel has optics"
    return config, optics


def photograph(
    config: Config, optics: OpticalSystem, away_um: float, *, flat: bool = False
) -> tuple[NDArray[np.generic], Truth]:
    """Return a frame whose held region is so far from focus, and its truth."""
    microscope = config.microscope
    assert isinstance(microscope, VirtualMicroscopeConfig)
    surface = microscope.surface.model_copy(
        update={"drift_um_per_min": 0.0} | ({"tilt_x_um": 0.0} if flat else {})
    )
    microscope = microscope.model_copy(update={"surface": surface})
    specimen = VirtualSpecimen(microscope, optics)
    z_um = float(specimen.defocus_um(0.0)[:, :HELD_PX].mean()) - away_um
    light = specimen.image(z_um)
    return Sensor(microscope).expose(light, EXPOSURE_MS), specimen.truth(z_um)


def judged(pair: str, seed: int, waves: float | None) -> dict[str, float]:
    """Return the figures of one frame of the tilted field."""
    config, optics = setting(pair, seed, waves)
    raw, truth = photograph(config, optics, 0.0)
    with ImageProcessor(config) as processor:
        result = processor.restore(raw, channel="DAPI")
    assert result.defocus is not None
    assert result.restored is not None
    sharp = match_intensity(raw, truth.sharp)
    found = np.abs(np.asarray(enlarge(result.defocus.defocus_um, raw.shape)))
    known = ~np.isnan(found)
    true = np.abs(truth.defocus_um)[known]
    span = float(np.ptp(sharp))
    before, after = (
        psnr(sharp, match_intensity(sharp, image), data_range=span)
        for image in (raw, result.restored)
    )
    return {
        "raw dB": before,
        "restored dB": after,
        "map's correlation": pearson(true, found[known]),
        "mean error um": float(np.abs(found[known] - true).mean()),
    }


def through_focus(
    pair: str, seed: int, waves: float | None
) -> Iterator[tuple[float, float]]:
    """Yield defocus and mean estimate of a flat field, both in depths of field."""
    config, optics = setting(pair, seed, waves)
    unit_um = optics.defocus_unit_um
    with ImageProcessor(config) as processor:
        for away in np.arange(-3, 3.5, 1.0):
            raw, _ = photograph(config, optics, float(away) * unit_um, flat=True)
            found = processor.classify(raw, channel="DAPI").defocus
            assert found is not None
            yield float(away), float(np.nanmedian(found.defocus_um)) / unit_um


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=["rtfocus-2+wiener"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[7, 1, 2, 3])
    parser.add_argument("--waves", type=float, help="spherical aberration, told too")
    parser.add_argument("--through-focus", action="store_true")
    given = parser.parse_args()
    for pair in given.pairs:
        for seed in given.seeds:
            if given.through_focus:
                print(pair, seed, "defocus: found, in depths of field")
                for away, found in through_focus(pair, seed, given.waves):
                    print(f"  {away:+.1f}: {found:+.2f}")
            else:
                figures = judged(pair, seed, given.waves)
                told = "  ".join(f"{k} {v:.2f}" for k, v in figures.items())
                print(pair, seed, told, flush=True)


if __name__ == "__main__":
    main()

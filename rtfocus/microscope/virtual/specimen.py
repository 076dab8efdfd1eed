"""Specimen: what the objective makes of a scene from where the stages stand.

Pure: arrays in, arrays out, no core and no clock. "Sharp" means as this
microscope sees the scene in focus, so defocus 0 is the scene itself and the PSF
turns focus into defocus (He 2020: level 0 is not convolved).
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.config.microscope import VirtualMicroscopeConfig
from rtfocus.microscope.virtual.scene import read_recording, read_scene
from rtfocus.microscope.virtual.surface import Surface
from rtfocus.optics.blur import BlurredPlanes

Image = NDArray[np.float32]
Key = TypeVar("Key")
Value = TypeVar("Value")

# Blurred planes this far apart are mixed linearly in between.
_PLANE_STEP_UM = 0.5
# Heights are rounded to this, far below any depth of field, so that a slowly
# drifting specimen is not blurred anew for every frame.
_HEIGHT_STEP_UM = 0.05
_SITES_KEPT = 6
_PLANES_KEPT = 48
_VIEWS_KEPT = 12


@dataclass(frozen=True, slots=True)
class Truth:
    """What a frame would show in perfect focus, and how far it is from it."""

    sharp: Image
    """Axes (y, x) or (y, x, rgb), 1.0 = brightest part of the scene."""
    defocus_um: Image
    """Axes (y, x); positive = specimen too far from the objective."""


class VirtualSpecimen:
    """One channel of a specimen on a tilted, curved, drifting surface.

    The scene goes on beyond the frame as its own mirror image, so the xy-stage
    may go anywhere.
    """

    def __init__(
        self,
        config: VirtualMicroscopeConfig,
        optics: OpticalSystem,
        *,
        channel: int = 0,
    ) -> None:
        """Draw or read the scene; `channel` picks the structure shown.

        Parameters
        ----------
        config
            Frame size, specimen and surface.
        optics
            The true optics; its pixel size is the frame's.
        channel
            Index of the channel: procedural scenes differ between channels.

        Raises
        ------
        ConfigError, InputError
            If the specimen's file cannot be used.
        """
        self.shape = (config.height_px, config.width_px)
        self.is_recorded = config.specimen.kind == "stack"
        self._optics = optics
        self._surface = Surface(config.surface, self.shape)
        self._sites: OrderedDict[tuple[int, int], BlurredPlanes] = OrderedDict()
        self._views: OrderedDict[tuple[int, int, int], Image] = OrderedDict()
        self._drift_um_per_min = config.surface.drift_um_per_min
        self._z_step_um = config.specimen.z_step_um
        if self.is_recorded:
            self._recording = read_recording(
                config.specimen, self.shape, channel=channel
            )
            self._scene = self._recording[0]
        else:
            self._scene = read_scene(
                config.specimen, self.shape, rgb=config.rgb, channel=channel
            )

    def defocus_um(
        self, z_um: float, *, x_um: float = 0.0, y_um: float = 0.0, time_s: float = 0.0
    ) -> Image:
        """Return the defocus of every pixel, axes (y, x): height minus stage z.

        Parameters
        ----------
        z_um
            Position of the z-stage, which carries the objective.
        x_um, y_um
            Position of the xy-stage.
        time_s
            Time since the start, for the drift.
        """
        x_px, y_px = self._to_px(x_um), self._to_px(y_um)
        height = self._surface.height_um(x_px=x_px, y_px=y_px, time_s=time_s)
        return height - np.float32(z_um)

    def image(
        self, z_um: float, *, x_um: float = 0.0, y_um: float = 0.0, time_s: float = 0.0
    ) -> Image:
        """Return the expected light, without noise; see `defocus_um`.

        The array is shared between calls: do not write to it.
        """
        place = (self._to_px(x_um), self._to_px(y_um))
        rise_um = self._drift_um_per_min * time_s / 60.0
        key = (*place, round((z_um - rise_um) / _HEIGHT_STEP_UM))
        if key in self._views:
            self._views.move_to_end(key)
            return self._views[key]
        if self.is_recorded:
            view = self._recorded_plane(z_um - rise_um, place)
        else:
            height = self._surface.height_um(x_px=place[0], y_px=place[1])
            seen_from = np.float32(key[2] * _HEIGHT_STEP_UM)
            view = self._site(place).at(height - seen_from)
        view.flags.writeable = False
        _keep(self._views, key, view, _VIEWS_KEPT)
        return view

    def truth(
        self, z_um: float, *, x_um: float = 0.0, y_um: float = 0.0, time_s: float = 0.0
    ) -> Truth:
        """Return the sharp scene and the defocus map; see `defocus_um`.

        Raises
        ------
        ValueError
            For a recorded stack, of which nobody knows the truth.
        """
        if self.is_recorded:
            msg = "a recorded z-stack has no known truth; use an image or a drawing"
            raise ValueError(msg)
        sharp = self._view_of(self._scene, (self._to_px(x_um), self._to_px(y_um)))
        return Truth(
            sharp=sharp,
            defocus_um=self.defocus_um(z_um, x_um=x_um, y_um=y_um, time_s=time_s),
        )

    def _to_px(self, distance_um: float) -> int:
        return round(distance_um / self._optics.pixel_size_um)

    def _site(self, place: tuple[int, int]) -> BlurredPlanes:
        if place in self._sites:
            self._sites.move_to_end(place)
            return self._sites[place]
        planes = BlurredPlanes(
            self._view_of(self._scene, place),
            self._optics,
            step_um=_PLANE_STEP_UM,
            keep_focus=True,
            capacity=_PLANES_KEPT,
        )
        _keep(self._sites, place, planes, _SITES_KEPT)
        return planes

    def _recorded_plane(self, z_um: float, place: tuple[int, int]) -> Image:
        """Return the real plane nearest to the stage; plane 0 lies at the surface."""
        height = float(self._surface.height_um().mean())
        number = round((z_um - height) / self._z_step_um)
        number = min(max(number, 0), len(self._recording) - 1)
        return self._view_of(self._recording[number], place)

    def _view_of(self, scene: Image, place: tuple[int, int]) -> Image:
        """Cut a frame out of the scene and its mirror images."""
        if place == (0, 0):
            return scene.copy()
        x_px, y_px = place
        rows = _mirrored(y_px, scene.shape[0])
        columns = _mirrored(x_px, scene.shape[1])
        return np.ascontiguousarray(scene[rows][:, columns])


def _mirrored(start: int, side: int) -> NDArray[np.int64]:
    """Return `side` indices from `start` on in 0 1 2 ... 2 1 0 1 2 ..."""
    turn = max(2 * (side - 1), 1)
    place = np.arange(start, start + side) % turn
    return np.minimum(place, turn - place) % side


def _keep(
    kept: "OrderedDict[Key, Value]", key: Key, value: Value, capacity: int
) -> None:
    """Remember a value; the least recently used one makes room."""
    kept[key] = value
    if len(kept) > capacity:
        kept.popitem(last=False)

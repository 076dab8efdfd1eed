"""Virtual specimen: what the objective makes of a scene from where the stages stand.

Pure: arrays in, arrays out, no core and no clock. The scene is the light of the
specimen; what the camera sees of it has passed the objective, in focus too, so no
image is as sharp as the scene. Defocus 0 is where the optics have their largest Strehl
ratio: their aberrations are Zernike's, which are balanced about that plane. Up to a
spherical aberration of 0.3 waves images are sharpest there, within a quarter of a depth
of field; beyond it each specimen is sharpest elsewhere.

Heights of the surface are counted like the z-stage: along the optical axis, away from
the objective. The z-stage carries the objective; moving it up by 1 um moves the plane
of focus 1 um towards the specimen, which Micro-Manager calls a focus direction of
+1. A surface at 5 um is in focus with the stage at 5 um, so

    defocus_um = height_um - z_um

is positive where the specimen is too far from the objective.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import (
    SpecimenConfig,
    SurfaceConfig,
    VirtualMicroscopeConfig,
)
from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries
from rtfocus.optics.formation import BlurredPlanes
from rtfocus.specimens import draw_specimen, draw_stained, normalise_sharp


class Surface:
    """Height of a tilted, curved, drifting specimen."""

    def __init__(self, config: SurfaceConfig, shape: tuple[int, int]) -> None:
        self._config = config
        # -0.5 to +0.5 from edge to edge, so that a tilt is the rise over the frame.
        self._y = _edge_to_edge(shape[0])[:, None]
        self._x = _edge_to_edge(shape[1])[None, :]
        self._still = self._height(0.0, 0.0)

    def height_um(
        self, *, x_px: float = 0.0, y_px: float = 0.0, time_s: float = 0.0
    ) -> NDArray[np.float32]:
        """Return the height of every pixel, axes (y, x), in um.

        Parameters
        ----------
        x_px, y_px
            Where the frame's centre lies on the specimen; tilt and bow go on
            beyond the first frame.
        time_s
            Time since the first exposure, for the drift.
        """
        rise = np.float32(drift_um(self._config, time_s))
        if x_px == 0 and y_px == 0:
            return self._still + rise
        rows, columns = self._still.shape
        return self._height(x_px / columns, y_px / rows) + rise

    def _height(self, shift_x: float, shift_y: float) -> NDArray[np.float32]:
        config = self._config
        x, y = self._x + shift_x, self._y + shift_y
        # A parabola that is `bow` in the middle and 0 in the corners of the frame.
        bow = config.bow_um * (1.0 - 2.0 * (x**2 + y**2))
        height = config.z_um + config.tilt_x_um * x + config.tilt_y_um * y + bow
        return np.asarray(height, dtype=np.float32)


def drift_um(config: SurfaceConfig, time_s: float) -> float:
    """Return how far the surface has moved, so long after the first exposure."""
    return config.drift_um_per_min * max(time_s - config.drift_from_s, 0.0) / 60.0


def _edge_to_edge(side: int) -> NDArray[np.float64]:
    return np.linspace(-0.5, 0.5, side) if side > 1 else np.zeros(1)


Image = NDArray[np.float32]


def read_scene(
    config: SpecimenConfig, shape: tuple[int, int], *, rgb: bool, channel: int
) -> Image:
    """Draw or read the sharp scene; axes (y, x) or (y, x, rgb), values in [0, 1].

    Parameters
    ----------
    shape
        Height and width of the scene.
    rgb
        Whether the camera sees colours: ``tissue`` is then a stained section, other
        grey scenes are tinted.
    channel
        Channels of one specimen show different structures: each is drawn anew.
    """
    if config.kind == "image" or config.kind == "stack":
        series = open_images(_image_path(config))[0]
        plane = series.read(c=min(channel, series.sizes["c"] - 1))
        scene = normalise_sharp(plane, shape)
    else:
        rng = np.random.default_rng([config.seed, channel])
        if rgb and config.kind == "tissue":
            return draw_stained(shape, rng)
        scene = draw_specimen(config.kind, shape, rng)
    if rgb and scene.ndim == 2:
        return _tinted(scene)
    if not rgb and scene.ndim == 3:
        return np.asarray(scene.mean(axis=2), dtype=np.float32)
    return scene


def read_recording(
    config: SpecimenConfig, shape: tuple[int, int], *, rgb: bool, channel: int
) -> Image:
    """Read a recorded z-stack; axes (z, y, x) or (z, y, x, rgb), one scale for all.

    A camera that sees colours is shown it tinted.

    Raises
    ------
    ConfigError
        If the file holds a single plane.
    """
    path = _image_path(config)
    series = open_images(path)[0]
    count = series.sizes["z"] if series.sizes["z"] > 1 else series.sizes["t"]
    if count < 2:
        msg = f"'{path}' holds one plane; a 'stack' needs several along z"
        raise ConfigError(msg)
    c = min(channel, series.sizes["c"] - 1)
    planes = np.stack([_grey(_plane(series, number, c)) for number in range(count)])
    # Levelled together, so that a plane keeps its brightness against the others.
    black, white = np.percentile(planes, [0.1, 99.9])
    planes = np.clip((planes - black) / max(float(white - black), 1e-6), 0.0, 1.0)
    levelled = np.stack(
        [
            normalise_sharp(plane, shape, black_percentile=0, white_percentile=100)
            * np.float32(plane.max() - plane.min())
            + np.float32(plane.min())
            for plane in planes
        ]
    )
    return _tinted(levelled) if rgb else levelled


def _tinted(scene: Image) -> Image:
    """Show a grey scene as a colour camera sees blue-green fluorescence."""
    return scene[..., None] * np.array([0.25, 0.85, 1.0], dtype=np.float32)


def _image_path(config: SpecimenConfig) -> Path:
    if config.path is None:
        msg = f"specimen.kind '{config.kind}' needs specimen.path, an image file"
        raise ConfigError(msg)
    return config.path


def _plane(series: ImageSeries, number: int, c: int) -> NDArray[np.generic]:
    if series.sizes["z"] > 1:
        return series.read(c=c, z=number)
    return series.read(t=number, c=c)


def _grey(plane: NDArray[np.generic]) -> Image:
    pixels = np.asarray(plane, dtype=np.float32)
    return pixels.mean(axis=2) if pixels.ndim == 3 else pixels


# Blurred planes this far apart are mixed linearly in between.
_PLANE_STEP_UM = 0.5
# Heights are rounded to this, far below any depth of field, so that a slowly
# drifting specimen is not blurred anew for every frame.
_HEIGHT_STEP_UM = 0.05
# Of one site: a tilted frame needs all of its planes at once.
_PLANES_KEPT = 48
# Two sites of 2048 x 2048 pixels tilted by 10 um; the newest is kept whatever its size.
_SITES_BYTES = 768 << 20
_VIEWS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Truth:
    """The scene that a frame shows, and how far it is from focus."""

    sharp: Image
    """The scene itself, sharper than any objective shows it; axes (y, x) or
    (y, x, rgb), 1.0 = its brightest part."""
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
        self._surface_config = config.surface
        self._z_step_um = config.specimen.z_step_um
        if self.is_recorded:
            self._recording = read_recording(
                config.specimen, self.shape, rgb=config.rgb, channel=channel
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
            Time since the first exposure, for the drift.
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
        from_surface_um = z_um - drift_um(self._surface_config, time_s)
        key = (*place, self._height_number(from_surface_um))
        if key not in self._views:
            self._views[key] = self._light_at(place, key[2])
            if len(self._views) > max(_VIEWS_BYTES // self._scene.nbytes, 1):
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

    def _light_at(self, place: tuple[int, int], height_number: int) -> Image:
        """Return the light at a place of the specimen, from a height above it."""
        if self.is_recorded:
            view = self._view_of(self._recording[height_number], place)
        else:
            height = self._surface.height_um(x_px=place[0], y_px=place[1])
            seen_from = np.float32(height_number * _HEIGHT_STEP_UM)
            view = self._site(place).at(height - seen_from)
            self._forget_sites()
        view.flags.writeable = False
        return view

    def truth(
        self, z_um: float, *, x_um: float = 0.0, y_um: float = 0.0, time_s: float = 0.0
    ) -> Truth:
        """Return the scene and the defocus map; see `defocus_um`.

        Raises
        ------
        ValueError
            For a recorded stack, whose truth is not known.
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
        self._sites[place] = BlurredPlanes(
            self._view_of(self._scene, place),
            self._optics,
            step_um=_PLANE_STEP_UM,
            capacity=_PLANES_KEPT,
        )
        return self._sites[place]

    def _forget_sites(self) -> None:
        """Forget the sites that were not looked at for longest; the newest stays."""
        held = sum(site.nbytes for site in self._sites.values())
        while held > _SITES_BYTES and len(self._sites) > 1:
            held -= self._sites.popitem(last=False)[1].nbytes

    def _height_number(self, z_um: float) -> int:
        """Return the number of a height among those that look different.

        Of a recording that of the nearest plane; plane 0 lies at the surface.
        """
        if not self.is_recorded:
            return round(z_um / _HEIGHT_STEP_UM)
        height = float(self._surface.height_um().mean())
        number = round((z_um - height) / self._z_step_um)
        return min(max(number, 0), len(self._recording) - 1)

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

"""Hold: what one position's images tell, and what the stage is sent to."""

from collections import deque
from dataclasses import replace as replace_field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus
from scipy.stats import norm

from rtfocus.autofocus.appearance import (
    EDGES,
    RINGS,
    Appearance,
    DefocusModels,
    Spectrum,
    amplitude_spectrum,
)
from rtfocus.autofocus.belief import Drift, Mode, modes_of_weights
from rtfocus.autofocus.devices import CoreStage
from rtfocus.autofocus.execution import Verdict
from rtfocus.autofocus.hold import Correction, Holder, SpectrumAtZ
from rtfocus.autofocus.plans import surface_at
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.errors import TransportError
from rtfocus.focusing import Focusing
from rtfocus.frame import Estimate, FocusReading
from rtfocus.holding import MOST_SEARCHES, HeldPlace
from rtfocus.optics.formation import BlurredPlanes, CameraModel
from rtfocus.specimens import draw_specimen

OPTICS = OpticalSystem(0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.2))
UNIT_UM = OPTICS.defocus_unit_um
DARK = 100.0
SIDE_PX = 160
HERE = (0, None)
FOUND_UM = 21.0
"""Stage z at which a search found focus before the first visit."""


class Field:
    """A tilted specimen, photographed at any defocus in depths of field."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        sharp = draw_specimen("nuclei", (SIDE_PX, SIDE_PX), self.rng)
        self.planes = BlurredPlanes(sharp, OPTICS, step_um=UNIT_UM / 8, capacity=64)
        self.tilt_um = np.linspace(-0.25, 0.25, SIDE_PX, dtype=np.float32) * UNIT_UM
        self.camera = CameraModel(
            photons=2000.0,
            gain_e_per_count=0.6,
            offset_counts=DARK,
            read_noise_e=1.6,
            bit_depth=16,
        )

    def look(self, defocus: float) -> Spectrum:
        away = np.broadcast_to(
            np.float32(defocus * UNIT_UM) + self.tilt_um, (SIDE_PX, SIDE_PX)
        )
        light = np.clip(self.planes.at(np.ascontiguousarray(away)), 0, None)
        pixels = self.camera.expose(light, self.rng)
        return Spectrum(*amplitude_spectrum(pixels, dark_counts=DARK))


def test_a_spectrum_is_the_mean_power_of_every_ring() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.poisson(500, (97, 130)).astype(np.uint16)
    spectrum, noise = amplitude_spectrum(pixels, dark_counts=DARK)
    window = np.outer(np.hanning(97), np.hanning(130))
    power = np.abs(np.fft.rfft2((pixels - pixels.mean()) * window)) ** 2
    away = np.hypot(np.fft.fftfreq(97)[:, None], np.fft.rfftfreq(130)[None, :])
    ring = np.digitize(away, EDGES) - 1
    mean = (
        np.array(
            [
                power[ring == n].mean() if (ring == n).any() else 0.0
                for n in range(RINGS)
            ]
        )
        / (window**2).sum()
    )
    floor = np.median(mean[-3:])
    light = pixels.mean() - DARK
    assert noise == pytest.approx(np.sqrt(floor) / light, rel=1e-5)
    np.testing.assert_allclose(
        spectrum, np.sqrt(np.clip(mean - floor, 0, None)) / light, rtol=2e-3, atol=1e-6
    )


@lru_cache
def models() -> DefocusModels:
    return DefocusModels(OPTICS)


@pytest.fixture(scope="module")
def field() -> Field:
    return Field()


def test_side_and_distance_are_told_within_a_depth_of_field(field: Field) -> None:
    known = [(away, field.look(away)) for away in (1.3, 0.05, -0.9)]
    seen = Appearance(models(), known)
    candidates = np.arange(-3, 3.05, 0.1)
    for true in (-1.0, -0.6, 0.6, 1.0):
        weights, misfit = seen.weights([(0.0, field.look(true))], candidates)
        assert candidates @ weights == pytest.approx(true, abs=0.45)
        assert misfit < 3
    # Two planes of a stack together: one place of focus.
    planes = [(place, field.look(0.6 - place)) for place in (-0.5, 0.5)]
    weights, _ = seen.weights(planes, candidates)
    assert candidates @ weights == pytest.approx(0.6, abs=0.25)


def test_an_image_of_nothing_fits_no_defocus(field: Field) -> None:
    seen = Appearance(models(), [(away, field.look(away)) for away in (1.3, 0.0)])
    dark = np.random.default_rng(1).poisson(400, (SIDE_PX, SIDE_PX)).astype(np.uint16)
    look = Spectrum(*amplitude_spectrum(dark, dark_counts=DARK))
    assert seen.weights([(0.0, look)], np.arange(-3, 3.05, 0.1))[1] > 3


class Held:
    """One position under a holder, in a room that warms up."""

    def __init__(
        self,
        field: Field,
        limits: Limits,
        um_per_s: float = 0.0,
        *,
        interval_s: float = 1.0,
        late: int = 0,
        holder: Holder | None = None,
    ) -> None:
        self.unread: deque[Estimate] = deque()
        self.late = late
        self.field, self.um_per_s, self.interval_s = field, um_per_s, interval_s
        self.drift_um = 0.0
        self.made: list[Correction] = []
        rule = MoveRule(limits, 0.15 * UNIT_UM, 15.0)
        ours = Holder(models(), rule, on_correction=self.made.append)
        self.holder = holder or ours
        looks = [self.seen(away) for away in (1.3, -0.9, 0.0)]
        self.holder.begin(HERE, 0.0, FOUND_UM, looks, limits)
        self.z_um, self.frame = FOUND_UM, 0

    def seen(self, away: float) -> SpectrumAtZ:
        look = self.field.look(away)
        return SpectrumAtZ(FOUND_UM - away * UNIT_UM, look.amplitude, look.noise)

    def visit(self, image: str = "good") -> float:
        """Correct, expose, and return how far from focus, in depths of field."""
        self.frame += 1
        time_s = self.frame * self.interval_s
        now_ns = round(time_s * 1e9)
        self.z_um += self.holder.correction_um(HERE, time_s, now_ns)
        self.drift_um += self.um_per_s * self.interval_s
        seen = self.image(image)
        if image != "none":
            self.unread.append(seen)
        while len(self.unread) > self.late:
            self.holder.take(self.unread.popleft())
        return self.away

    @property
    def away(self) -> float:
        """How far the stage is from focus, in depths of field."""
        return (FOUND_UM + self.drift_um - self.z_um) / UNIT_UM

    def image(self, image: str) -> Estimate:
        """Expose one, from where the stage stands."""
        look = self.field.look(self.away)
        reading = FocusReading(
            None,
            None,
            False,
            "blank" if image == "blank" else None,
            spectrum=look.amplitude.tolist(),
            noise=look.noise,
        )
        z_um = None if image == "moving" else self.z_um
        return Estimate(
            *("test", self.frame, None, None, False, 0.0, 1.0, z_um, 0.0),
            {"t": self.frame, "p": 0, "c": 0, "z": 0},
            round(self.frame * self.interval_s * 1e9) + 1,
            0,
            reading,
        )


def test_a_drift_is_followed_past_bad_frames(field: Field) -> None:
    held = Held(field, Limits(-50, 50), um_per_s=0.15)
    images = ["blank" if frame in (9, 20) else "good" for frame in range(30)]
    images[14] = "moving"
    away = [abs(held.visit(image)) for image in images]
    assert np.mean(away) < 0.4
    assert max(away) < 0.8
    assert not held.holder.lost(HERE)
    assert all(abs(made.step_um) < UNIT_UM for made in held.made)


def test_without_images_the_stage_is_not_sent_on(field: Field) -> None:
    held = Held(field, Limits(-50, 50), um_per_s=0.3)
    for _ in range(10):
        held.visit()
    before_um = held.z_um
    for _ in range(20):
        held.visit("none")
    assert abs(held.z_um - before_um) < 2 * UNIT_UM
    assert "no image" in held.made[-1].reason


def test_by_images_of_nothing_the_stage_is_not_sent_on(field: Field) -> None:
    held = Held(field, Limits(-50, 50), um_per_s=0.3)
    for _ in range(10):
        held.visit()
    before_um = held.z_um
    for _ in range(20):
        held.visit("blank")
    assert abs(held.z_um - before_um) < 2 * UNIT_UM
    assert "cannot be explained" in held.made[-1].reason
    for _ in range(4):  # the light is on again
        away = held.visit()
    assert abs(away) < 0.5


def test_a_reader_that_does_not_keep_up_is_told(field: Field) -> None:
    """A slow classifier: every image is read ten visits after it was exposed."""
    held = Held(field, Limits(-50, 50), late=10)
    for _ in range(30):
        held.visit()
        assert abs(held.z_um - FOUND_UM) < 0.5 * UNIT_UM
    assert held.made[-1].reason.startswith("its images are read 11 s late")
    assert held.made[-1].is_late
    prompt = Held(field, Limits(-50, 50), late=2)
    for _ in range(30):
        prompt.visit()
    assert not any(made.is_late or "late" in made.reason for made in prompt.made)


def demo_stage() -> CMMCorePlus:
    """Return a core with a z-stage and nothing else."""
    pytest.importorskip("mm_test_adapters", reason="the DemoCamera is not installed")
    core = CMMCorePlus()
    core.loadDevice("Z", "DemoCamera", "DStage")
    core.initializeDevice("Z")
    core.setFocusDevice("Z")
    return core


def focusing_of(told: list[str]) -> Focusing:
    optics = {"numerical_aperture": 0.36, "wavelength_nm": 451, "pixel_size_um": 0.65}
    config = {
        "autofocus": {"mode": "hold"},
        "channels": [{"name": "DAPI", "optics": optics}],
    }
    return Focusing(parse_config(config), told.append)


def test_lost_focus_is_searched_rarely_and_not_for_ever(field: Field) -> None:
    core, told, searched_s = demo_stage(), [], []
    stage = CoreStage(core)
    held = Held(field, Limits(-50, 50), interval_s=10.0)

    def search() -> Verdict:
        searched_s.append(held.frame * 10)
        stage.go_to(7.0)
        if len(searched_s) == 2:
            msg = "no frame was read"
            raise TransportError(msg)
        return Verdict(False, "blank", 0.0, 7.0, images=3, moves=1, seconds=1.0)

    focuser = focusing_of(told).focuser(core, lambda *_: 0)
    place = HeldPlace(focuser, held.holder, stage, search)
    for _ in range(100):  # the light is off
        held.visit("blank")
        place.follow(held.frame * 10.0)
    assert len(searched_s) == MOST_SEARCHES
    assert searched_s[0] <= 40
    waited_s = np.diff(searched_s)
    assert all(waited_s >= [30, 60, 120, 240])
    assert max(waited_s) < 300
    assert stage.position_um() == 0.0
    assert told[-1].endswith("until images show it; not searched any more")
    for image in ["good"] * 3 + ["blank"] * 4:
        held.visit(image)
        place.follow(held.frame * 10.0)
    assert len(searched_s) == MOST_SEARCHES + 1
    assert abs(held.z_um - FOUND_UM) < 0.5 * UNIT_UM


def test_what_a_focus_device_holds_is_left_alone_and_searched_anew_afterwards(
    field: Field,
) -> None:
    core, told, searched = demo_stage(), [], []
    core.loadDevice("PFS", "DemoCamera", "DAutoFocus")
    core.initializeDevice("PFS")
    core.setAutoFocusDevice("PFS")
    stage = CoreStage(core)
    held = Held(field, Limits(-50, 50), interval_s=10.0)

    def search() -> Verdict:
        searched.append(stage.position_um())
        stage.go_to(12.0)
        return Verdict(False, "blank", 8.0, 12.0, images=3, moves=1, seconds=1.0)

    place = HeldPlace(
        focusing_of(told).focuser(core, lambda *_: 0), held.holder, stage, search
    )
    core.enableContinuousFocus(True)
    for _ in range(3):
        held.visit()
        assert place.follow(held.frame * 10.0) == 0.0
        assert place.is_paused
    place.search(held.frame * 10.0, "searched as asked for")
    assert (stage.position_um(), searched) == (0.0, [])
    stage.go_to(8.0)  # the device follows the specimen
    core.enableContinuousFocus(False)
    for _ in range(3):  # nothing that was known before moves the stage
        place.follow(held.frame * 10.0)
        assert stage.position_um() == 8.0
    assert not place.is_paused
    assert searched == [8.0]
    assert [line for line in told if "PFS" in line] == told[:1]
    assert told[1] == "focus is not searched as asked for: a focus device holds it"
    assert told[2] == "focus is lost and searched again (1 of 5)"


def test_that_images_are_late_is_told_once_in_a_run() -> None:
    told: list[str] = []
    focusing = focusing_of(told)
    focuser = focusing.focuser(demo_stage(), lambda *_: 0)
    for behind in (10, 12):
        holder = focusing.holder(focuser, ["DAPI"])
        held = Held(Field(), Limits(-50, 50), late=behind, holder=holder)
        for _ in range(30):
            held.visit()
    reasons = {line["reason"] for line in focuser.journal.drain()}
    late = {reason for reason in reasons if "s late" in reason}
    assert len(late) > 1
    (line,) = [line for line in told if "follows late" in line]
    assert any(reason in line for reason in late)


def test_no_correction_leads_beyond_the_limits(field: Field) -> None:
    limits = Limits(FOUND_UM - 1, FOUND_UM + 1)
    for um_per_s, visits, said in (
        (0.3, 15, "drift"),
        (1.0, 6, "drift, cut by the limits"),
    ):
        held = Held(field, limits, um_per_s=um_per_s)
        for _ in range(visits):
            held.visit()
            assert limits.holds(held.z_um)
        assert said in {made.reason for made in held.made}
        assert held.made[-1].reason == "at the limits"


def test_places_settle_for_one_another_which_way_they_drift() -> None:
    """Every image says how far, not which way."""
    places, rate, rng = 12, -0.02, np.random.default_rng(4)
    heights = rng.normal(0, 3, places)
    drift, stage = Drift(0.0), np.zeros(places)
    late = []
    for visit in range(8 * places):
        place, time_s = visit % places, float(visit)
        focus = heights[place] + rate * time_s
        if visit < places:
            stage[place] = focus + rng.normal(0, 0.1)
            drift.begin(place, time_s, stage[place])
        elif drift.is_sure():
            stage[place] = drift.focus(place, time_s)
        away = abs(focus - stage[place]) + rng.normal(0, 0.05)
        # A deviation of 0.15: what is near focus looks like focus.
        modes = [Mode(0.5, stage[place] + side * away, 0.15) for side in (-1, 1)]
        drift.see(place, time_s, modes)
        late.append(abs(focus - drift.focus(place, time_s)))
    assert np.mean(late[-3 * places :]) < 0.25
    assert max(late[-3 * places :]) < 0.6


class JointFilter:
    """A Kalman filter of drift, speed and all heights at once, by the textbook."""

    def __init__(self, course: Any) -> None:
        self.mean, self.covariance = course.state, course.covariance

    def ahead(self, step_s: float, noise: NDArray[np.float64]) -> None:
        move = np.eye(len(self.mean))
        move[0, 1] = step_s
        self.mean = move @ self.mean
        self.covariance = move @ self.covariance @ move.T
        self.covariance[:2, :2] += noise
        # What a course supposes: heights tell of each other by the present state alone.
        state, ties = self.covariance[:2, :2], self.covariance[2:, :2]
        own = np.diag(self.covariance)[2:].copy()
        self.covariance[2:, 2:] = ties @ np.linalg.solve(state, ties.T)
        np.fill_diagonal(self.covariance[2:, 2:], own)

    def begun(self, place: int, focus: float, variance: float) -> None:
        # The height is what the search found less the drift.
        take = np.eye(max(len(self.mean), place + 3), len(self.mean))
        take[place + 2] = 0.0
        take[place + 2, 0] = -1.0
        self.mean = take @ self.mean
        self.mean[place + 2] += focus
        self.covariance = take @ self.covariance @ take.T
        self.covariance[place + 2, place + 2] += variance

    def seen(self, place: int, mode: Mode) -> float:
        """Take a reading in, and return how likely it was."""
        look = np.zeros(len(self.mean))
        look[0] = look[place + 2] = 1.0
        variance = look @ self.covariance @ look + mode.sd_um**2
        away = mode.mean_um - look @ self.mean
        gain = self.covariance @ look / variance
        self.mean = self.mean + gain * away
        self.covariance = self.covariance - np.outer(gain, gain) * variance
        return float(norm.pdf(away, scale=np.sqrt(variance)))


def test_a_course_is_a_kalman_filter_of_the_drift_and_all_heights() -> None:
    rng = np.random.default_rng(7)
    course = Drift(0.0)._courses[0]
    joint = JointFilter(course)
    for step in range(60):
        place = int(rng.integers(4)) if step >= 4 else step
        still = replace_field(course, covariance=np.zeros((2, 2)))
        step_s = float(rng.uniform(0.1, 20.0))
        joint.ahead(step_s, still.ahead(step_s).covariance)
        course = course.ahead(step_s)
        if step < 4 or step == 30:  # found, and found anew
            focus = float(rng.normal(0, 3))
            joint.begun(place, focus, 0.01)
            course = course.begun(place, focus, 0.01)
        else:
            expected = float(joint.mean[0] + joint.mean[place + 2])
            mode = Mode(0.7, expected + float(rng.normal(0, 0.5)), 0.4)
            before = course.weight
            likely = joint.seen(place, mode)
            course = course.seen(place, mode)
            assert course.weight == pytest.approx(before * 0.7 * likely, rel=1e-3)
            course = replace_field(course, weight=1.0)
        known = joint.covariance
        close = {"rtol": 1e-3, "atol": 1e-4}
        np.testing.assert_allclose(course.state, joint.mean[:2], **close)
        np.testing.assert_allclose(course.heights, joint.mean[2:], **close)
        np.testing.assert_allclose(course.covariance, known[:2, :2], **close)
        np.testing.assert_allclose(course.ties, known[2:, :2], **close)
        np.testing.assert_allclose(course.variances, np.diag(known)[2:], **close)


def test_what_a_drift_may_do_in_two_steps_it_may_do_in_one() -> None:
    course = Drift(0.0)._courses[0].begun(0, 1.0, 0.04).ahead(5.0)
    once, twice = course.ahead(70.0), course.ahead(30.0).ahead(40.0)
    np.testing.assert_allclose(once.covariance, twice.covariance, rtol=1e-9)
    np.testing.assert_allclose(once.ties, twice.ties, rtol=1e-9)
    # Beside a speed that stays, the drift wanders, and so does the speed.
    grown = course.ahead(100.0).covariance - course.covariance
    speed_sd = np.sqrt(course.covariance[1, 1])
    assert np.sqrt(grown[0, 0]) > 100.0 * speed_sd
    assert 0.0 < np.sqrt(grown[1, 1]) < speed_sd


def test_a_course_that_may_be_lost_knows_less_and_counts_less() -> None:
    course = Drift(0.0)._courses[0].begun(0, 1.0, 0.04)
    lost = course.lost()
    more = lost.covariance - course.covariance
    assert more[0, 0] > 0.0
    assert more[1, 1] > 0.0
    assert more[0, 1] == more[1, 0] == 0.0
    assert lost.weight < 0.1 * course.weight
    assert course.is_like(lost)
    assert not course.is_like(
        replace_field(lost, state=course.state + np.array([1.0, 0.0]))
    )


def test_two_sides_of_focus_are_two_modes() -> None:
    places = np.arange(-3, 3.05, 0.1)
    two = sum(np.exp(-0.5 * ((places - side) / 0.3) ** 2) for side in (-0.6, 0.6))
    assert len(modes_of_weights(places, two)) == 1
    modes = modes_of_weights(places, two, valley=0.8)
    assert sorted(mode.mean_um for mode in modes) == pytest.approx([-0.6, 0.6], abs=0.1)


def test_three_images_of_nothing_lose_a_place(field: Field) -> None:
    held = Held(field, Limits(-50, 50))
    for _ in range(4):
        held.visit("blank")
    assert held.holder.lost(HERE)


def test_images_of_a_lost_place_do_not_lose_it_again_once_it_is_found(
    field: Field,
) -> None:
    held = Held(field, Limits(-50, 50))
    for _ in range(4):
        held.visit("blank")
    for _ in range(600):  # in a plan nobody asks for a correction meanwhile
        held.frame += 1
        held.holder.take(held.image("blank"))
    assert len(held.holder._arrived) == 512
    found_s = held.frame + 1.0
    held.frame += 2
    looks = [held.seen(away) for away in (1.3, -0.9, 0.0)]
    held.holder.begin(HERE, found_s, FOUND_UM, looks)
    held.holder.correction_um(HERE, found_s + 1, round((found_s + 1) * 1e9))
    assert not held.holder.lost(HERE)
    assert not held.holder._arrived
    held.visit()
    held.holder.correction_um(HERE, found_s + 2, round((found_s + 2) * 1e9))
    assert held.holder.explains(HERE)


def test_images_of_places_that_nobody_holds_are_not_kept(field: Field) -> None:
    held = Held(field, Limits(-50, 50))
    elsewhere = replace(held.image("good"), index={"t": 0, "p": 1, "c": 0, "z": 0})
    held.holder.take(elsewhere)
    assert not held.holder._arrived
    held.holder.take(held.image("good"))
    assert len(held.holder._arrived) == 1


def test_new_places_start_on_the_plate() -> None:
    assert surface_at([(0, 0, 3.0)], 500, None) == pytest.approx(3.0)
    line = [(0, 0, 1.0), (100, 0, 2.0)]
    assert surface_at(line, 300, 900) == pytest.approx(4.0)
    plane = [(0, 0, 1.0), (100, 0, 2.0), (0, 100, 0.0)]
    assert surface_at(plane, 100, 100) == pytest.approx(1.0)

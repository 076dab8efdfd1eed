"""Searches on stages that do not do as they are told: found, or refused with reason.

Images are ring amplitudes computed by the optics; no network takes part.
"""

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rtfocus.autofocus.appearance import (
    FREQUENCIES,
    Transfer,
    change,
    modulation_table,
    sharpness,
)
from rtfocus.autofocus.belief import Belief, Mode
from rtfocus.autofocus.execution import BroughtSearch, Verdict, run_search
from rtfocus.autofocus.looks import Look
from rtfocus.autofocus.planes import FocusCalibration, PlaneComparison
from rtfocus.autofocus.policy import (
    Limits,
    MoveRule,
    Probe,
    SearchRule,
    Stay,
    move_rule,
    save_calibration,
)
from rtfocus.autofocus.search import FocusSearch
from rtfocus.autofocus.survey import Survey
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import MicroscopeError
from rtfocus.frame import FocusReading

OPTICS = OpticalSystem(0.45, 520.0, 0.6, aberrations=Aberrations(spherical_waves=-0.3))
UNIT = OPTICS.defocus_unit_um
NOISE = 2e-4
# Little detail: over more than a depth of field images look alike.
COARSE = 0.01 / FREQUENCIES * np.exp(-((FREQUENCIES / 0.1) ** 2))


@pytest.fixture(scope="module")
def comparison() -> PlaneComparison:
    return PlaneComparison(OPTICS)


@pytest.fixture(scope="module")
def transfer() -> Transfer:
    return Transfer(modulation_table(OPTICS), OPTICS.sampling)


class World:
    """A field in focus at z = 0 and a stage with a fault."""

    def __init__(
        self, transfer: Transfer, start: float, fault: str = "none", seed: int = 1
    ) -> None:
        self._transfer, self._fault = transfer, fault
        self._rng = np.random.default_rng(seed)
        self._said = self._began = start * UNIT
        self._waits: float | None = None
        self.z_um = self._said
        self.commands: list[float] = []
        self.focus_um = 0.0
        self.jumps: dict[int, float] = {}
        """By number of image: where focus is from then on, in depths of field."""
        self.moves_left = 1_000
        """Then it stands still and goes on to say that it moves."""
        self.lag = 1
        """Images until a stage that is late or a stop behind arrives."""
        self.left = 1.0
        """Of the way of one a stop behind, until it arrives."""
        self._images = 0

    def position_um(self) -> float:
        return self._said

    def say_um(self, z_um: float) -> None:
        self._said = z_um

    def go_to(self, z_um: float) -> None:
        self.commands.append(z_um)
        self._said, way = z_um, z_um - self._began
        if self.moves_left == 0:
            return
        self.moves_left -= 1
        if self._fault == "a stop behind" and self._waits is not None:
            self.z_um = self._waits
        if self._fault in ("late", "a stop behind"):
            self._waits, self._images_left = z_um, self.lag
            self.z_um = z_um + self.left * (self.z_um - z_um)
        else:
            gain = {"stuck": 0.0, "reversed": -1.0, "half": 0.5}.get(self._fault, 1.0)
            if self._fault == "play":
                # As screws do: it moves once the play is used up.
                self.z_um = min(max(self.z_um, z_um), z_um + 0.6 * UNIT)
            else:
                self.z_um = self._began + gain * way

    def look(self, _: float) -> FocusReading:
        self.focus_um = self.jumps.get(self._images, self.focus_um / UNIT) * UNIT
        self._images += 1
        away = (self.focus_um - self.z_um) / UNIT
        if self._waits is not None:
            self._images_left -= 1
            if self._images_left == 0:
                self.z_um, self._waits = self._waits, None
        # Edges: amplitudes fall with the frequency; specimens have no rings of zero.
        detail = COARSE if self._fault == "coarse" else 0.01 / FREQUENCIES
        spectrum = detail * self._transfer.amplitudes(np.array(away))
        spectrum = np.abs(spectrum + self._rng.normal(0, 0.05 * NOISE, 48))
        if self._fault == "dark":
            spectrum = np.zeros(48)
        if self._fault == "empty":
            # A few sensor rows and a speck: the same at every z but for the noise.
            spectrum = 3 * NOISE * (0.1 / FREQUENCIES) * self._rng.normal(1, 0.1, 48)
        return FocusReading(
            abs(away) * UNIT,
            1.5 * UNIT,
            False,
            "blank" if self._fault == "dark" else None,
            spectrum=spectrum.tolist(),
            noise=NOISE,
        )


def searched(
    comparison: PlaneComparison, world: World, *, verify: bool = False
) -> Verdict:
    start = world.position_um()
    search = FocusSearch(
        comparison,
        MoveRule(Limits(start - 20 * UNIT, start + 20 * UNIT), 0.1 * UNIT, 12 * UNIT),
        SearchRule(verify=verify),
    )
    return run_search(search, world, world.look)


@pytest.mark.parametrize("start", [-3.4, -0.3, 1.1, 4.2])
def test_an_honest_stage_is_focused_in_few_images(
    comparison: PlaneComparison, transfer: Transfer, start: float
) -> None:
    world = World(transfer, start)
    verdict = searched(comparison, world)
    assert verdict.focused, verdict.reason
    assert not verdict.notes
    assert verdict.start_um == start * UNIT
    assert verdict.end_um == world.commands[-1]
    assert abs(world.z_um) < 0.25 * UNIT
    assert verdict.images == 3


def test_focus_found_among_saturated_pixels_is_told_with_them(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    world = World(transfer, 1.1)

    def look(z_um: float) -> FocusReading:
        return msgspec.structs.replace(world.look(z_um), saturated=0.012)

    moves = MoveRule(Limits(-20 * UNIT, 20 * UNIT), 0.1 * UNIT, 12 * UNIT)
    search = FocusSearch(comparison, moves, SearchRule(verify=False))
    verdict = run_search(search, world, look)
    assert verdict.focused, verdict.reason
    assert verdict.notes == ("1.2 % of the pixels are saturated: focus may lie beside",)


@pytest.mark.parametrize(
    ("fault", "words"), [("reversed", "against"), ("late", "late"), ("half", "half")]
)
@pytest.mark.parametrize("start", [-2.6, 2.3])
def test_a_stage_that_answers_oddly_is_named_and_focused_all_the_same(
    comparison: PlaneComparison,
    transfer: Transfer,
    fault: str,
    words: str,
    start: float,
) -> None:
    world = World(transfer, start, fault)
    verdict = searched(comparison, world)
    assert verdict.focused, verdict.reason
    assert abs(world.z_um) < 0.5 * UNIT
    assert any(words in note for note in verdict.notes), verdict.notes


@pytest.mark.parametrize("start", [-4.2, -2.6, -0.3, 0.8, 1.9, 2.3, 4.7])
def test_a_late_stage_is_named_where_every_place_is_reached_from_below(
    comparison: PlaneComparison, transfer: Transfer, start: float
) -> None:
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    for fault in ("none", "a stop behind"):
        world = World(transfer, start, fault)
        for stop_um in rule.settling(world.position_um()):
            world.go_to(stop_um)
        search = FocusSearch(comparison, rule, SearchRule(verify=False))
        verdict = run_search(search, world, world.look)
        is_named = any("late" in note for note in verdict.notes)
        assert is_named is (fault != "none"), verdict
        assert verdict.focused, verdict.reason
        assert abs(world.z_um) < 0.5 * UNIT


def rested_um(world: World) -> float:
    """Return where a stage stands when it has arrived."""
    return world.z_um if world._waits is None else world._waits


@pytest.mark.parametrize(
    ("lag", "left", "verify"),
    [(2, 1.0, False), (1, 0.5, False), (1, 1.0, True)],
)
@pytest.mark.parametrize("start", [-2.6, -0.3, 0.8, 2.3, 4.7])
def test_a_stage_that_lags_is_named_and_leaves_nothing_blurrier(
    comparison: PlaneComparison,
    transfer: Transfer,
    start: float,
    lag: int,
    left: float,
    *,
    verify: bool,
) -> None:
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    world = World(transfer, start, "a stop behind")
    world.lag, world.left = lag, left
    for stop_um in rule.settling(world.position_um()):
        world.go_to(stop_um)
    search = FocusSearch(comparison, rule, SearchRule(verify=verify))
    verdict = run_search(search, world, world.look)
    assert any("late" in note for note in verdict.notes), verdict
    assert abs(rested_um(world)) < (0.5 if verdict.focused else abs(start)) * UNIT + 0.1
    assert verdict.focused or "arrives after its image" in verdict.reason


def test_a_search_canceled_as_its_stage_is_seen_late_ends_where_it_began(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    world = World(transfer, 2.0)
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    search = FocusSearch(comparison, rule, SearchRule(verify=True))
    for stands in (0.0, 2.0):
        world.z_um = stands * UNIT
        unread = msgspec.structs.replace(world.look(0.0), refusal="two_peaks")
        unread = msgspec.structs.replace(unread, defocus_um=None, sd_um=None)
        search.observe(2.0 * UNIT, unread)
    assert search.survey.arrival.is_late
    assert search.belief.is_empty
    assert search.give_up("canceled").back_um == 0.0


@pytest.mark.parametrize("start", [-4.2, -0.3, 0.2, 2.3])
def test_a_stage_that_runs_the_other_way_is_not_suspected_of_lagging(
    comparison: PlaneComparison, transfer: Transfer, start: float
) -> None:
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    world = World(transfer, start, "reversed")
    for stop_um in rule.settling(world.position_um()):
        world.go_to(stop_um)
    search = FocusSearch(comparison, rule, SearchRule(verify=False))
    verdict = run_search(search, world, world.look)
    assert verdict.focused, verdict.reason
    assert abs(world.z_um) < 0.25 * UNIT
    assert verdict.images <= 4


@pytest.mark.parametrize("verify", [False, True])
def test_images_taken_again_that_stay_the_same_show_no_late_stage(
    comparison: PlaneComparison, transfer: Transfer, *, verify: bool
) -> None:
    # The field is seen elsewhere than the stage was sent, and does not come nearer.
    world = World(transfer, 0.0)
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    search = FocusSearch(comparison, rule, SearchRule(verify=verify))
    for place, seen in ((0.5, -1.5), (-2.0, -3.0), (1.5, -2.0)):
        for number in range(5):
            # Where a stage says that it stands differs a little from time to time.
            world.z_um = seen * UNIT
            search.observe(place * UNIT + 0.01 * number, world.look(0.0))
            if search.decide() != Probe(0.0):
                break
        assert number < 3
        assert not search.survey.arrival.is_late
    assert verify or search.survey.arrival.is_suspect


def test_a_stage_that_sticks_at_a_stop_on_the_way_does_not_end_in_focus(
    transfer: Transfer,
) -> None:
    world = World(transfer, 4.7)
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    comparison = PlaneComparison(OPTICS, fine=True)
    search = FocusSearch(comparison, rule, SearchRule(verify=False))
    # From above it goes to -1.2 before -0.2, and there it stays.
    for place, stands in ((3.5, 3.5), (1.5, 1.5), (-0.2, -1.2), (0.2, -1.2)):
        world.z_um = stands * UNIT
        search.observe(place * UNIT, world.look(0.0))
        assert not isinstance(search.decide(), Stay)


def test_a_stage_that_does_not_move_is_refused_by_name(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    verdict = searched(comparison, World(transfer, 2.0, "stuck"))
    assert not verdict.focused
    assert "does not answer" in verdict.reason


@pytest.mark.parametrize(
    ("moves", "start", "verify"),
    [(1, 0.8, False), (1, 4.0, False), (1, 1.6, True)],
)
def test_a_stage_that_sticks_amid_a_search_is_refused_by_name(
    comparison: PlaneComparison,
    transfer: Transfer,
    moves: int,
    start: float,
    *,
    verify: bool,
) -> None:
    world = World(transfer, start)
    world.moves_left = moves
    verdict = searched(comparison, world, verify=verify)
    assert not verdict.focused
    assert "does not answer" in verdict.reason


def test_a_stage_that_sticks_at_focus_is_not_in_focus_beside_it(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    world = World(transfer, -3.2)
    world.moves_left = 3
    verdict = searched(comparison, world, verify=True)
    assert not verdict.focused or abs(world.z_um) < 0.5 * UNIT


def test_nothing_to_see_ends_where_it_began(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    world = World(transfer, 2.0, "dark")
    verdict = searched(comparison, world)
    assert (verdict.focused, verdict.reason[:5]) == (False, "blank")
    assert not world.commands


def test_a_field_with_too_little_to_see_is_refused_by_that_reason(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    reasons: Counter[bool] = Counter()
    for seed in range(40):
        world = World(transfer, 1.0, "empty", seed)
        verdict = searched(comparison, world)
        assert not verdict.focused
        by_noise = "no more than by noise" in verdict.reason
        # All images may look alike by chance, as of a stage that stands still.
        assert by_noise or "or show only dirt" in verdict.reason
        assert world.z_um == pytest.approx(verdict.start_um)
        reasons[by_noise] += 1
    assert min(reasons.values()) >= 10


def test_images_that_do_not_change_tell_of_no_focus_far_away(
    comparison: PlaneComparison,
) -> None:
    spectra, noise = np.tile(0.01 / FREQUENCIES, (3, 1)), np.full(3, NOISE)
    for places in ([-2.0, -0.5, 1.0], [-3.0, 0.0, 3.0]):
        fit = comparison.fit(np.array(places) * UNIT, spectra, noise)
        assert fit.unexplained > 0.02, places
        assert fit.probability(0.0, 5.0 * UNIT) > 0.95


def test_a_probe_goes_farther_where_both_sides_were_seen(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    search = FocusSearch(comparison, MoveRule(Limits(-50, 50), 0.1, 40))
    world = World(transfer, 0.0)
    for world.z_um in (-1.2 * UNIT, 1.2 * UNIT, 0.0):
        search.observe(world.z_um, world.look(world.z_um))
    assert search._probe(1.2 * UNIT) == Probe(-2.4 * UNIT)
    assert search._probe(1.9 * UNIT) == Probe(-1.9 * UNIT)


def test_a_place_is_contradicted_by_another_image_only(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    world = World(transfer, 0.0)
    seen = [world.look(world.z_um) for world.z_um in (0.0, 3.0 * UNIT)]
    for last, contradicted in ((seen[0], False), (seen[1], True)):
        places = (0.0, 3.0 * UNIT, 0.1 * UNIT)
        looks = [Look.of(*pair) for pair in zip(places, [*seen, last], strict=True)]
        survey = Survey(comparison, looks=looks)
        assert survey.does_stand_still(list(places[2:])) is contradicted


@pytest.mark.parametrize("images", [2, 3, 6, 12])
def test_noise_is_told_from_what_defocus_changes(
    comparison: PlaneComparison, transfer: Transfer, images: int
) -> None:
    places = np.linspace(-1.0, 1.3, images) * UNIT
    for seed in range(100):
        for fault, clear in (("none", True), ("empty", False)):
            world = World(transfer, 0.0, fault, seed)
            looks = []
            for world.z_um in places:
                looks.append(Look.of(world.z_um, world.look(world.z_um)))
            survey = Survey(comparison, looks=looks)
            assert survey.is_change_clear() is clear, (fault, seed)


def test_optics_that_nobody_checked_ask_for_blur_on_both_sides(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    verdict = searched(comparison, World(transfer, 2.3), verify=True)
    assert verdict.focused, verdict.reason
    seen = [(step.z_um - verdict.end_um) / UNIT for step in verdict.steps]
    assert min(seen) < -0.2
    assert max(seen) > 0.2


def test_play_that_nobody_measured_does_not_move_focus(
    comparison: PlaneComparison, transfer: Transfer, tmp_path: Path
) -> None:
    limits = Limits(-100, 100)
    rule = move_rule(AutofocusConfig(), limits, UNIT)
    for start in (2.3, 0.8):
        world = World(transfer, start, "play")
        search = FocusSearch(comparison, rule, SearchRule(verify=True))
        verdict = run_search(search, world, world.look)
        assert verdict.focused, verdict.reason
        assert abs(world.z_um) < 0.3 * UNIT
        # It stands where the stage says, so the next plan that goes there finds it.
        assert world.z_um == pytest.approx(verdict.end_um, abs=0.01)
    told = AutofocusConfig(backlash_um=0.0)
    assert move_rule(told, limits, UNIT).overshoot_um == 0.0
    calibration = tmp_path / "focus.yaml"
    # Nor does play that came after a calibration.
    for problems in ([], ["not these optics"]):
        found = FocusCalibration(
            *("DAPI", 0.0, 0.0, 0.01, 1, 1, 0.0, 0.0, 1.0, 20.0, UNIT), problems
        )
        save_calibration(calibration, found)
        given = AutofocusConfig(calibration=calibration)
        assert move_rule(given, limits, UNIT).overshoot_um == UNIT


@pytest.mark.parametrize("start", [-0.6, -0.5, 3.1])
def test_images_that_look_alike_about_focus_are_no_stage_that_stands_still(
    comparison: PlaneComparison, transfer: Transfer, start: float
) -> None:
    # The aberration puts the sharpest plane beside z = 0.
    planes = np.arange(-1.5, 1.5, 0.05)
    seen = [sharpness(COARSE * line) for line in transfer.amplitudes(-planes)]
    sharpest_um = planes[int(np.argmax(seen))] * UNIT
    world = World(transfer, start, "coarse")
    verdict = searched(comparison, world, verify=True)
    assert verdict.focused, verdict.reason
    assert abs(world.z_um - sharpest_um) < 0.5 * UNIT, sharpest_um / UNIT
    assert verdict.images <= 9


# The first image is taken twice.
@pytest.mark.parametrize(("image", "jump"), [(4, -0.8), (4, -1.5), (5, -0.8)])
def test_focus_that_has_moved_since_it_was_seen_is_followed(
    comparison: PlaneComparison, transfer: Transfer, image: int, jump: float
) -> None:
    rule = move_rule(AutofocusConfig(), Limits(-100, 100), UNIT)
    world = World(transfer, 2.3)
    world.jumps[image] = jump
    search = FocusSearch(comparison, rule, SearchRule(verify=True))
    verdict = run_search(search, world, world.look)
    assert verdict.focused, verdict.reason
    assert abs(world.z_um - jump * UNIT) < 0.5 * UNIT


def seen_at(
    comparison: PlaneComparison,
    transfer: Transfer,
    places: list[float],
    *,
    calibrated: bool = True,
) -> Survey:
    """Return what images from places, in depths of field, say together."""
    world = World(transfer, 0.0)
    survey = Survey(comparison, calibrated=calibrated)
    for place in places:
        world.z_um = place * UNIT
        survey.add(world.z_um, world.look(world.z_um))
    return survey


def test_images_from_one_side_of_focus_do_not_drive_out_those_from_afar(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    few, more = [-0.2, 0.5, -0.1], [4.7, -0.2, 0.5, -0.1]
    sd_um = seen_at(comparison, transfer, more).belief.best.sd_um
    assert sd_um < 0.5 * seen_at(comparison, transfer, few).belief.best.sd_um
    around = seen_at(comparison, transfer, [4.7, -1.0, 1.2, 0.0])
    assert len(around._planes()) == 3


@pytest.mark.parametrize(
    ("aperture", "waves", "places"),
    [(0.975, -0.05, (1.3, -3.5, 0.2)), (0.925, 0.05, (1.8, -1.9, 0.2))],
)
def test_optics_a_little_off_are_no_stage_that_arrives_late(
    aperture: float, waves: float, places: tuple[float, ...]
) -> None:
    table = modulation_table(OPTICS, extra_waves=waves)
    world = World(Transfer(table, OPTICS.sampling, aperture), places[0])
    search = FocusSearch(
        PlaneComparison(OPTICS, fine=True),
        MoveRule(Limits(-100, 100), 0.1 * UNIT, 12 * UNIT, 1, UNIT),
        SearchRule(verify=False),
    )
    for place in places:
        world.z_um = place * UNIT
        search.observe(world.z_um, world.look(world.z_um))
    assert search.survey.arrival.doubt < 0.1


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [(None, "does not answer"), ("few_tiles", "no more than by noise")],
)
def test_a_stage_is_not_blamed_where_the_engine_finds_hardly_a_specimen(
    comparison: PlaneComparison,
    transfer: Transfer,
    refusal: str | None,
    reason: str,
) -> None:
    world = World(transfer, 1.0, "stuck")
    search = FocusSearch(comparison, MoveRule(Limits(-100, 100), 0.1, 40))

    def look(z_um: float) -> FocusReading:
        return msgspec.structs.replace(world.look(z_um), refusal=refusal)

    assert reason in run_search(search, world, look).reason


def test_far_apart_images_end_where_the_optics_put_focus_between_them(
    comparison: PlaneComparison, transfer: Transfer
) -> None:
    places = [-1.1, -0.25, 0.12]
    survey = seen_at(comparison, transfer, places, calibrated=False)
    top_um = survey.peak_um()
    assert top_um == pytest.approx(survey.belief.best.mean_um)
    assert -0.25 * UNIT < top_um < 0.12 * UNIT
    # A place that is clearly less sharp is none to end beside.
    less = seen_at(comparison, transfer, [-1.1, 0.0, 1.3], calibrated=False)
    assert less.peak_um() == less.best_seen.z_um


def test_where_the_engine_reads_focus_images_unlike_any_optics_lead_nowhere(
    comparison: PlaneComparison,
) -> None:
    # Bright field: least contrast in focus, most a depth of field beside it.
    contrast = {0.0: 0.6, -1.2: 1.0, 2.4: 0.5, 1.2: 1.1}
    for away_um, refusal, ends_um in (
        (0.0, None, 0.0),
        (3.0 * UNIT, None, 1.2 * UNIT),
        (3.0 * UNIT, "blank", 0.0),
    ):
        survey = Survey(comparison, calibrated=False)
        for place, share in contrast.items():
            detail = 0.01 / FREQUENCIES * np.where(FREQUENCIES > 0.05, share, 1 / share)
            read = FocusReading(
                away_um, UNIT, False, refusal, spectrum=detail.tolist(), noise=NOISE
            )
            survey.add(place * UNIT, read)
        assert survey.fit is not None
        assert survey.fit.unexplained > 0.06
        assert survey.best_known_um(0.0) == pytest.approx(ends_um)


def test_noise_is_no_sharpness_and_no_change() -> None:
    rng = np.random.default_rng(2)
    detail = 0.01 / FREQUENCIES * np.exp(-((FREQUENCIES / 0.1) ** 2))
    noisy = detail + np.abs(rng.normal(0, 0.2 * NOISE, 48))
    assert sharpness(noisy, NOISE) == pytest.approx(sharpness(detail), rel=0.02)
    assert change(detail, noisy, NOISE) < 0.07
    assert change(detail, 0.01 / FREQUENCIES, NOISE) > 0.5
    assert change(detail, detail[:5], NOISE) == 1.0


def sent_up(moves: MoveRule, most_images: int = 50) -> BroughtSearch:
    """A search of another package that only ever goes up by three depths of field."""
    return BroughtSearch(
        "up",
        lambda z_um, reading: Probe(3 * UNIT),
        moves,
        unit_um=UNIT,
        most_images=most_images,
    )


UPWARDS = MoveRule(Limits(-5 * UNIT, 50 * UNIT), 0.1 * UNIT, 12 * UNIT)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_search_that_breaks_off_leaves_the_stage_at_the_best_z_seen(
    transfer: Transfer, *, is_lost: bool
) -> None:
    world = World(transfer, 1.0)

    def look(z_um: float) -> FocusReading:
        if len(world.commands) < 3:
            return world.look(z_um)
        if is_lost:  # where it stands now, nobody can tell what is on the way
            world.say_um(51 * UNIT)
        raise MicroscopeError("the camera does not answer")

    with pytest.raises(MicroscopeError, match="does not answer"):
        run_search(sent_up(UPWARDS), world, look)
    up = [4 * UNIT, 7 * UNIT, 10 * UNIT]
    assert world.commands == pytest.approx(up if is_lost else [*up, UNIT])


def test_a_search_without_progress_ends_at_the_best_z_seen(transfer: Transfer) -> None:
    world, search, time_s = World(transfer, 1.0), sent_up(UPWARDS), [100.0]

    def look(z_um: float) -> FocusReading:
        time_s[0] += 1.0
        if len(world.commands) in (2, 3):  # it is believed to be ever nearer
            away_um = (5 - len(world.commands)) * UNIT
            search.belief = Belief.of([Mode(1.0, z_um + away_um, UNIT)])
        return world.look(z_um)

    verdict = run_search(search, world, look, timeout_s=3, clock=lambda: time_s[0])
    assert (verdict.focused, verdict.reason) == (False, "no progress for 3 s")
    # The fifth image was the last nearer to it, the ninth comes over 3 s later.
    assert (verdict.images, verdict.moves, verdict.seconds) == (9, 9, 9.0)
    assert verdict.end_um == world.z_um == pytest.approx(UNIT)
    assert [step.seconds for step in verdict.steps] == list(range(1, 10))
    assert verdict.steps[0].belief_um is None
    assert verdict.steps[2].belief_um == pytest.approx(10 * UNIT)


def test_a_search_that_is_canceled_ends_at_the_best_z_but_not_where_it_is_in_focus(
    transfer: Transfer,
) -> None:
    world, seen = World(transfer, 1.0), []
    verdict = run_search(
        sent_up(UPWARDS),
        world,
        world.look,
        on_step=seen.append,
        is_canceled=lambda: len(world.commands) == 2,
    )
    assert (verdict.focused, verdict.reason) == (False, "canceled")
    assert (verdict.images, verdict.moves) == (3, 3)
    assert verdict.correction_um == pytest.approx(0)
    assert world.z_um == pytest.approx(UNIT)
    assert tuple(seen) == verdict.steps
    stays = BroughtSearch(
        "stays", lambda *_: Stay(), UPWARDS, unit_um=UNIT, most_images=3
    )
    verdict = run_search(
        stays, world, world.look, timeout_s=0, is_canceled=lambda: True
    )
    assert (verdict.focused, verdict.images, verdict.moves) == (True, 1, 0)

"""He's level scale and the defocus units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.channel import OpticalSystem
from rtfocus.optics.levels import (
    DefocusLevels,
    from_defocus_waves,
    to_defocus_waves,
)


def test_the_default_scale_is_he_2020():
    scale = DefocusLevels()
    assert scale.values_um == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
    assert [scale.level(value) for value in scale.values_um] == list(range(11))


def test_the_nearest_level_wins_on_both_sides_of_focus():
    scale = DefocusLevels()
    values = [0.9, 1.0, -1.0, 2.9, -3.1, 35.0, -32.0]
    assert scale.levels(values).tolist() == [0, 1, 1, 1, 2, 10, 10]
    assert scale.levels(np.zeros((2, 3))).shape == (2, 3)


@given(step=st.floats(0.1, 10.0), count=st.integers(2, 40))
def test_levels_return_to_themselves(step, count):
    scale = DefocusLevels(step, count)
    assert scale.levels(scale.values_um).tolist() == list(range(count))


def test_levels_off_the_scale_and_impossible_scales_are_refused():
    with pytest.raises(ValueError, match=r"not on the scale 0\.\.10"):
        DefocusLevels().defocus_um(11)
    with pytest.raises(ValueError, match="need step_um > 0"):
        DefocusLevels(step_um=0.0)


def test_defocus_waves_are_z_na_squared_over_n_lambda():
    optics = OpticalSystem(1.4, 520.0, 0.065, refractive_index=1.518)
    waves = to_defocus_waves(optics, -2.0)
    assert waves == pytest.approx(-2.0 * 1.4**2 / (1.518 * 0.52))
    assert from_defocus_waves(optics, waves) == pytest.approx(-2.0)

"""He's level scale and the unit of defocus."""

import pytest

from rtfocus.channel import OpticalSystem
from rtfocus.training.level_tiles import DefocusLevels


def test_the_default_scale_is_he_2020():
    scale = DefocusLevels()
    assert scale.values_um == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
    assert scale.defocus_um(10) == 20


def test_levels_off_the_scale_and_impossible_scales_are_refused():
    with pytest.raises(ValueError, match=r"not on the scale 0\.\.10"):
        DefocusLevels().defocus_um(11)
    with pytest.raises(ValueError, match="need step_um > 0"):
        DefocusLevels(step_um=0.0)


def test_the_unit_of_defocus_is_n_lambda_over_na_squared():
    optics = OpticalSystem(1.4, 520.0, 0.065, refractive_index=1.518)
    assert optics.defocus_unit_um == pytest.approx(1.518 * 0.52 / 1.4**2)

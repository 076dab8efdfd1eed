"""The unit of defocus."""

import pytest

from rtfocus.channel import OpticalSystem


def test_the_unit_of_defocus_is_n_lambda_over_na_squared():
    optics = OpticalSystem(1.4, 520.0, 0.065, refractive_index=1.518)
    assert optics.defocus_unit_um == pytest.approx(1.518 * 0.52 / 1.4**2)

"""Pixel sizes and units of metadata: every right value, and unknown stays unknown."""

import math

import numpy as np
import pytest
import tifffile
from image_file_kit import flat, ome_pixels, ome_xml, write_pages
from scipy import constants as si

from rtfocus.errors import InputError
from rtfocus.images.metadata import coordinate_um, length_um, time_s
from rtfocus.images.reading import open_images


@pytest.mark.parametrize(
    ("value", "unit", "um"),
    [
        (325, "nm", 0.325),
        (0.325, "\u03bcm", 0.325),  # Greek mu
        (0.325, "\u00b5m", 0.325),  # micro sign
        (0.325, "\\u00B5m", 0.325),  # as ImageJ escapes it
        (0.325, "Âµm", 0.325),  # UTF-8 read as Latin-1
        (325000, "pm", 0.325),
        (3250, "\u00c5", 0.325),
        (3250, "\u212b", 0.325),  # angstrom sign
        (3250, "angstrom", 0.325),
        (325, "nanometer", 0.325),
        (325, "nanometre", 0.325),
        (0.000325, "millimeter", 0.325),
        (0.325, "Microns", 0.325),
        (1, "Mm", 1e12),
        (1, "mm", 1e3),
        (1, "in", 25400),
        (1, "thou", 25.4),
        (2, "pt", 25400 / 36),
        (1, "yd", 914400),
        ("0.5", "um", 0.5),
        (1, "pixel", None),
        (1, "reference frame", None),
        (1, None, None),
        (0, "um", None),
        (-1, "um", None),
        (math.nan, "um", None),
        (math.inf, "um", None),
        (10**400, "um", None),
        ("wide", "um", None),
        (True, "um", None),
    ],
)
def test_lengths_in_um(value, unit, um) -> None:
    found = length_um(value, unit)
    assert found == (None if um is None else pytest.approx(um, rel=1e-9))


PREFIXES = "yotta zetta exa peta tera giga mega kilo hecto deca deci centi milli micro"
PREFIXES += " nano pico femto atto zepto yocto"
LETTERS = "Y Z E P T G M k h da d c m \u00b5 n p f a z y".split()


def test_every_prefix_is_worth_what_the_si_says() -> None:
    for prefix, letter in zip(PREFIXES.split(), LETTERS, strict=True):
        factor = getattr(si, prefix.replace("deca", "deka"))
        worth = pytest.approx(factor, rel=1e-11, abs=0)
        for unit in (f"{letter}m", f"{prefix}meter", f"{prefix}metres"):
            assert length_um(1e-6, unit) == worth, unit
        for unit in (f"{letter}s", f"{prefix}second", f"{prefix}seconds"):
            assert time_s(1, unit) == worth, unit


def test_every_other_unit_is_worth_what_its_definition_says() -> None:
    lengths = {"in": si.inch, "ft": si.foot, "yd": si.yard, "mi": si.mile}
    lengths |= {"pt": si.point, "ua": si.au, "ly": si.light_year, "pc": si.parsec}
    lengths |= {"thou": si.mil, "li": si.inch / 12, "angstrom": si.angstrom}
    lengths |= {"foot": si.foot, "feet": si.foot, "yards": si.yard, "miles": si.mile}
    lengths |= {"inches": si.inch, '"': si.inch, "parsecs": si.parsec}
    for unit, metres in lengths.items():
        assert length_um(1e-6, unit) == pytest.approx(metres, rel=1e-9, abs=0), unit
    times = {"min": si.minute, "h": si.hour, "hr": si.hour, "d": si.day}
    times |= {"hours": si.hour, "days": si.day, "minutes": si.minute}
    times |= {"sec": 1, "msec": si.milli, "us": si.micro}
    for unit, seconds in times.items():
        assert time_s(1, unit) == pytest.approx(seconds), unit


def test_times_and_coordinates() -> None:
    assert time_s(250, "ms") == 0.25
    assert time_s(2, "minute") == 120
    assert time_s(5, "millisecond") == 0.005
    assert time_s(1, "um") is None
    assert coordinate_um(-3, "mm") == -3000
    assert coordinate_um(0, "um") == 0
    assert coordinate_um(1, "reference frame") is None


@pytest.mark.parametrize(
    ("value", "unit", "um"),
    [
        (325, "nm", 0.325),
        (0.325, "\u03bcm", 0.325),
        (0.325 / 25400, "in", 0.325),
        (1, "pixel", None),
        (1, "reference frame", None),
        (0.5, None, 0.5),
    ],
)
def test_ome_tiff_pixel_size_in_its_unit(tmp_path, value, unit, um) -> None:
    metadata = {"axes": "YX"}
    for axis in "XY":
        metadata[f"PhysicalSize{axis}"] = value
        if unit:
            metadata[f"PhysicalSize{axis}Unit"] = unit
    tifffile.imwrite(tmp_path / "a.tif", flat(1), ome=True, metadata=metadata)
    (series,) = open_images(tmp_path / "a.tif")
    assert series.pixel_size_um == (None if um is None else pytest.approx(um))


def test_each_image_of_an_ome_tiff_has_its_own_size_and_y_its_own(tmp_path) -> None:
    with tifffile.TiffWriter(tmp_path / "two.ome.tif", ome=True) as file:
        for y_um, x_um in ((0.65, 0.65), (0.25, 0.5)):
            size = {"PhysicalSizeX": x_um, "PhysicalSizeY": y_um}
            file.write(flat(1), metadata={"axes": "YX", **size})
    square, flatter = open_images(tmp_path / "two.ome.tif")
    assert square.pixel_size_um == 0.65
    assert (flatter.pixel_size_y_um, flatter.pixel_size_x_um) == (0.25, 0.5)
    with pytest.raises(InputError, match=r"0\.25 um \(y\) by 0\.5 um \(x\)"):
        _ = flatter.pixel_size_um


@pytest.mark.parametrize("axes", ["", "X", "Y", "XY"])
def test_the_resolution_tags_count_where_the_ome_xml_has_no_size(
    tmp_path, axes
) -> None:
    stated = {f"PhysicalSize{axis}": 0.65 for axis in axes}
    tifffile.imwrite(
        tmp_path / "a.tif",
        flat(1),
        ome=True,
        metadata={"axes": "YX", **stated},
        resolution=(1e4 / 0.325, 1e4 / 0.325),
        resolutionunit="CENTIMETER",
    )
    (series,) = open_images(tmp_path / "a.tif")
    um = 0.65 if axes else 0.325
    assert series.pixel_size_um == pytest.approx(um, rel=1e-5)


@pytest.mark.parametrize(
    ("per_unit", "unit", "um"),
    [
        (1e4 / 0.325, "CENTIMETER", 0.325),
        (25400 / 0.325, "INCH", 0.325),
        (72, "INCH", None),
        (300, "INCH", None),
        (300 / 2.54, "CENTIMETER", None),
        (1, "CENTIMETER", None),
        (1e4 / 0.325, "NONE", None),
    ],
)
def test_tiff_resolution(tmp_path, per_unit, unit, um) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, flat(1), resolution=(per_unit, per_unit), resolutionunit=unit
    )
    (series,) = open_images(path)
    assert series.pixel_size_um == (None if um is None else pytest.approx(um, rel=1e-5))


@pytest.mark.parametrize(
    ("unit", "um"),
    [
        ("micron", 0.5),
        ("microns", 0.5),
        ("um", 0.5),
        ("\\u00B5m", 0.5),
        ("nm", 0.0005),
        ("pixel", None),
        ("", None),
    ],
)
def test_imagej_units_and_spacing(tmp_path, unit, um) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        flat(1, shape=(3, 8, 9)),
        imagej=True,
        resolution=(2.0, 4.0),
        metadata={"axes": "ZYX", "unit": unit, "spacing": 2.0, "finterval": 0.5},
    )
    (series,) = open_images(tmp_path / "a.tif")
    sizes = (series.pixel_size_y_um, series.pixel_size_x_um, series.z_step_um)
    right = (None,) * 3 if um is None else (um / 2, um, 4 * um)
    assert sizes == (right if um is None else pytest.approx(right))
    assert series.time_step_s == 0.5


def test_ome_xml_fills_every_field(tmp_path) -> None:
    before = (
        '<Instrument ID="I"><Objective ID="O" LensNA="0.8"/></Instrument>'
        '<Plate ID="P" Name="drug" Rows="2" Columns="12"><Well ID="W" Row="1" '
        'Column="10"><WellSample ID="S" Index="0"><ImageRef ID="Image:0"/>'
        "</WellSample></Well></Plate>"
    )
    body = (
        '<Channel ID="C" Name="Cy5" Color="-16776961" EmissionWavelength="670" '
        'ExcitationWavelength="0.64" ExcitationWavelengthUnit="µm"/>'
        '<TiffData IFD="0" PlaneCount="1"/><Plane TheZ="0" TheC="0" TheT="0" '
        'PositionX="-1.5" PositionXUnit="mm" PositionZ="3" PositionZUnit="µm"/>'
    )
    size = 'PhysicalSizeZ="2000" PhysicalSizeZUnit="nm" TimeIncrement="1.5"'
    image = (
        '<Image ID="Image:0" Name="x">'
        '<ObjectiveSettings ID="O" RefractiveIndex="1.33"/>'
        f'{ome_pixels(body, size)}<StageLabel Name="B11"/></Image>'
    )
    path = write_pages(tmp_path / "a.ome.tif", [flat(1)], ome_xml(image, before=before))
    (series,) = open_images(path)
    (channel,) = series.channels
    assert channel.name == "Cy5"
    assert channel.color == "FF0000"
    assert channel.emission_nm == 670
    assert channel.excitation_nm == pytest.approx(640)
    assert series.numerical_aperture == 0.8
    assert series.refractive_index == 1.33
    assert series.z_step_um == 2
    assert series.time_step_s == 1.5
    assert series.position == "B11"
    assert (series.stage.x_um, series.stage.y_um, series.stage.z_um) == (-1500, None, 3)
    place = series.place
    assert (place.plate, place.rows[place.row]) == ("drug", "B")
    assert (place.columns[place.column], place.field) == ("11", 0)
    assert len(place.columns) == 12
    # Nothing else in the file says how large its pixels are.
    assert series.pixel_size_um is None


@pytest.mark.parametrize(
    ("places", "z_rises"),
    [("4 3.5 3", False), ("-1 0 1", True), ("2 2 2", None), ("1 3 2", None)],
)
def test_the_places_of_slices_say_which_way_z_runs(tmp_path, places, z_rises) -> None:
    # In no order, as some programs write them; of the other channel in another one.
    planes = [
        f'<Plane TheZ="{z}" TheC="{c}" TheT="0" PositionZ="{-um if c else um}"/>'
        for z, um in enumerate(map(float, places.split()))
        for c in (0, 1)
    ]
    body = '<TiffData IFD="0" PlaneCount="6"/>' + "".join(reversed(planes))
    pixels = ome_pixels(body).replace('SizeZ="1"', 'SizeZ="3"', 1)
    pixels = pixels.replace('SizeC="1"', 'SizeC="2"', 1)
    path = tmp_path / "a.ome.tif"
    write_pages(path, [flat(n) for n in range(6)], ome_xml(f"<Image>{pixels}</Image>"))
    (series,) = open_images(path)
    assert series.sizes == {"t": 1, "c": 2, "z": 3}
    assert series.z_rises is z_rises
    assert series.stage is None  # in units of a reference frame


@pytest.mark.parametrize(("spacing", "z_rises"), [(2.0, None), (-2.0, False)])
def test_a_negative_spacing_says_that_z_falls(tmp_path, spacing, z_rises) -> None:
    metadata = {"axes": "ZYX", "unit": "um", "spacing": spacing}
    planes = np.zeros((3, 8, 9), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", planes, imagej=True, metadata=metadata)
    (series,) = open_images(tmp_path / "a.tif")
    assert (series.z_step_um, series.z_rises) == (2.0, z_rises)

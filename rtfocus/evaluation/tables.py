"""Tables: outcomes as rows of text, the same for terminal and Markdown."""

from collections.abc import Callable, Sequence

from rtfocus.evaluation.run import Outcome

Rows = list[list[str]]

RESTORED_COLUMNS = (
    "data",
    "engine",
    "before dB",
    "PSNR dB",
    "gain dB",
    "worst gain",
    "SSIM",
    "PCC",
    "MSE",
    "sharp in dB",
    "mult-adds/px",
    "ms/Mpx",
    "CPU ms/Mpx",
)
"""Of restored images; ``sharp in``: frames in focus against their input."""
LEVEL_COLUMNS = (
    "data",
    "engine",
    "tiles",
    "right",
    "within one",
    "top 3",
    "sign right",
    "called empty",
    "calibration error",
    "within 1 sigma",
    "mean error um",
    "mult-adds/px",
    "ms/Mpx",
    "CPU ms/Mpx",
)
"""Of the tiles that hold a specimen."""

_SHARP = "sharp"


def tables(outcomes: Sequence[Outcome]) -> tuple[Rows, Rows]:
    """Return the rows of restored images and those of levels."""
    ordered = sorted(outcomes, key=_by_data(outcomes))
    restored = [_restored(one) for one in ordered if one.frames]
    levels = [_levels(one) for one in ordered if one.levels is not None]
    return restored, levels


def _by_data(outcomes: Sequence[Outcome]) -> Callable[[Outcome], int]:
    """Order by data set, contenders within as they were given."""
    names = list(dict.fromkeys(one.data.name for one in outcomes))
    return lambda one: names.index(one.data.name)


def _restored(one: Outcome) -> list[str]:
    groups = one.groups()
    everything, sharp = groups["all"], groups.get(_SHARP)
    before, after = everything["before"], everything["after"]
    return [
        one.data.name,
        one.contender.title,
        f"{before['psnr_db']:.2f}",
        f"{after['psnr_db']:.2f}",
        f"{everything['gain_db']:+.2f}",
        f"{everything['worst_gain_db']:+.2f}",
        f"{after['ssim']:.4f}",
        f"{after['pcc']:.4f}",
        f"{after['mse']:.4g}",
        "" if sharp is None else f"{sharp['after']['psnr_db']:.1f}",
        *_cost(one),
    ]


def _levels(one: Outcome) -> list[str]:
    found = {} if one.levels is None else one.levels.summary()
    ranks = found.get("top_k")
    shares = (
        found.get("accuracy"),
        found.get("within_one"),
        ranks[2] if ranks else None,
        found.get("sign_right"),
        found.get("called_background"),
    )
    return [
        one.data.name,
        one.contender.title,
        str(found.get("tiles", 0)),
        *map(_share, shares),
        _share(found.get("calibration_error")),
        _share(found.get("within_one_sigma")),
        "" if found.get("mean_error_um") is None else f"{found['mean_error_um']:.2f}",
        *_cost(one),
    ]


def _cost(one: Outcome) -> list[str]:
    operations = one.contender.multiply_adds_per_pixel()
    return [
        "" if operations is None else f"{operations:,.0f}",
        *(
            "" if taken is None else f"{taken:,.0f}"
            for taken in (one.ms_per_megapixel, one.cpu_ms_per_megapixel)
        ),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

"""Section: the form every part of the config shares."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the config; its docstrings are the reference."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )

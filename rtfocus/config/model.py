"""Config model: the whole file."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, PrivateAttr, field_validator, model_validator

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.autofocus import AutofocusConfig
from rtfocus.config.microscope import (
    AcquisitionConfig,
    MicroscopeConfig,
    VirtualMicroscopeConfig,
)
from rtfocus.config.processor import (
    CameraConfig,
    ProcessingConfig,
    RestorationConfig,
    StoreConfig,
    TransportConfig,
)
from rtfocus.config.section import Section
from rtfocus.files import MOST_NAME_BYTES, is_reserved_name


class RunConfig(Section):
    """Name and place of the run."""

    name: str = "run"
    """The run folder is ``NAME.rtfocus``. A name that every system takes: at most
    200 bytes, not ``con`` or its like, no dot or space at the end."""
    folder: Path = Path("runs")
    """Where run folders are made."""

    @field_validator("name")
    @classmethod
    def _fits_every_system(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            msg = (
                "letters, digits, spaces and _ . + - can be in a name, a letter or "
                "digit comes first"
            )
            raise ValueError(msg)
        if is_reserved_name(name):
            msg = (
                "Windows reserves such names (con, nul, com1 ...; a dot or space at "
                "the end); choose another"
            )
            raise ValueError(msg)
        size = len(name.encode())
        if size > MOST_NAME_BYTES:
            msg = f"its {size} bytes are more than {MOST_NAME_BYTES}; shorten it"
            raise ValueError(msg)
        return name


class ChannelConfig(Section):
    """One channel: its light, and what it is processed with."""

    name: str = "default"
    """Micro-Manager preset name; ``default`` covers channels not listed."""
    optics: OpticalSystem | None = None
    """None: frames of this channel are recorded, not restored."""
    classifier: str | None = None
    """Overrides ``processing.classifier`` for this channel."""
    restoration: RestorationConfig | None = None
    """Overrides ``processing.restoration`` for this channel."""

    @property
    def channel(self) -> Channel:
        """The part that travels with the frames."""
        return Channel(name=self.name, optics=self.optics)


class Config(Section):
    """An rtfocus configuration; each side reads the sections it needs."""

    run: RunConfig = RunConfig()
    microscope: MicroscopeConfig = VirtualMicroscopeConfig()
    acquisition: AcquisitionConfig = AcquisitionConfig()
    camera: CameraConfig = CameraConfig()
    channels: Annotated[list[ChannelConfig], Field(min_length=1)] = [ChannelConfig()]
    processing: ProcessingConfig = ProcessingConfig()
    autofocus: AutofocusConfig = AutofocusConfig()
    transport: TransportConfig = TransportConfig()
    store: StoreConfig = StoreConfig()
    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """Where it was read from, absolute; None: it was made by a program."""
        return self._file

    def read_from(self, path: Path) -> "Config":
        """Note the file it was read from; returns itself."""
        self._file = path.resolve()
        return self

    @model_validator(mode="after")
    def _channel_names_unique(self) -> "Config":
        names = [channel.name for channel in self.channels]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            msg = f"channels {sorted(doubled)} are listed twice; names must be unique"
            raise ValueError(msg)
        return self

    def channel(self, name: str) -> ChannelConfig:
        """Return the entry of a channel, or ``default``, or an empty one."""
        by_name = {channel.name: channel for channel in self.channels}
        found = by_name.get(name) or by_name.get("default") or ChannelConfig()
        return found.model_copy(update={"name": name})

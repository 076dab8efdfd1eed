"""Config model: the whole file, autofocus, and the reference: every key and meaning."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.sections import (
    AcquisitionConfig,
    AlarmConfig,
    CameraConfig,
    DemoCameraConfig,
    MicroManagerConfig,
    MicroscopeConfig,
    ProcessingConfig,
    ReplayConfig,
    RestorationConfig,
    Section,
    StoreConfig,
    TransportConfig,
    VirtualMicroscopeConfig,
)
from rtfocus.errors import ConfigError
from rtfocus.files import MOST_NAME_BYTES, is_reserved_name


class RunConfig(Section):
    """Name and place of the run."""

    name: str = "run"
    """The run folder is ``NAME.rtfocus``. The name must be valid on every system: at
    most 200 bytes, not ``con`` or the like, no dot or space at the end."""
    folder: Path = Path("runs")
    """Where run folders are made; ``~`` is the home folder."""

    @field_validator("folder")
    @classmethod
    def _in_full(cls, folder: Path) -> Path:
        for part in folder.parts:
            if re.fullmatch(r"\$\{?\w+\}?|%\w+%", part) and not folder.exists():
                msg = f"'{part}' is not filled in here; write the whole path"
                raise ValueError(msg)
        try:
            return folder.expanduser()
        except RuntimeError as error:
            msg = "this user has no home folder; write the whole path"
            raise ValueError(msg) from error

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
    """One channel: its optics, and how it is processed."""

    name: str = "default"
    """Name of the Micro-Manager preset; ``default`` is for channels not listed."""
    optics: OpticalSystem | None = None
    """Its optics; null: its frames are recorded, not restored."""
    classifier: str | None = None
    """Overrides ``processing.classifier`` for this channel."""
    restoration: RestorationConfig | None = None
    """Overrides ``processing.restoration`` for this channel."""

    @property
    def channel(self) -> Channel:
        """The part that travels with the frames."""
        return Channel(name=self.name, optics=self.optics)


def _off_of_yaml(value: object) -> object:
    """Take the word ``off``, which YAML reads as a truth value, for itself."""
    return "off" if value is False else value


Region = tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt]


class AutofocusConfig(Section):
    """Focus found and held with the images themselves."""

    mode: Annotated[Literal["off", "hold"], BeforeValidator(_off_of_yaml)] = "off"
    """``hold``: keep every position in focus while a plan runs. Both modes carry out
    an ``autofocus_plan`` of device ``rtfocus``."""
    search: str = "rtfocus"
    """What searches for focus: ``rtfocus``, or the name of a search that an installed
    package brings (entry point in group ``rtfocus.autofocus``)."""
    actuator: Literal["stage", "offset"] = "stage"
    """``offset``: a hardware focus device (PFS, CRISP) holds focus, and its offset is
    moved instead of the z-stage; all z below are then those of the offset."""
    offset_device: str | None = None
    """Stage device that is the offset; null: Micro-Manager's autofocus offset."""
    offset_um_per_unit: float = 1.0
    """How far one unit of the offset moves the plane of focus, in um."""
    low_um: float | None = None
    """Lowest z that autofocus may ever go to; null: `reach_um` below the start."""
    high_um: float | None = None
    """Highest z; null: `reach_um` above the start."""
    reach_um: PositiveFloat = 30.0
    """Farthest from the z at the start, whatever the limits say."""
    most_um: PositiveFloat = 15.0
    """Longest step of a search; the way back to the best z may be longer."""
    deadband: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Smallest correction worth a move, in depths of field (n lambda / NA^2)."""
    direction: Literal["auto", "toward", "away", "unknown"] = "auto"
    """Where larger z moves the plane of focus: ``toward`` the specimen or ``away``
    from it; ``auto``: as set in Micro-Manager's hardware wizard."""
    safe_side: Literal["auto", "down", "up"] = "auto"
    """Side where the objective cannot touch the specimen; ``auto``: away from it."""
    approach: Literal["either", "up", "down"] = "either"
    """Direction of every last move of a search, against backlash; ``either``: up,
    unless `backlash_um` says that there is none."""
    backlash_um: NonNegativeFloat = 0.0
    """How far to overshoot, so as to arrive in the direction of `approach`. 0: 1.5
    times what the calibration measured. Not given, and without a calibration that can
    be trusted: a depth of field."""
    calibration: Path | None = None
    """File of ``rtfocus calibrate``; null: a search takes one more image to be sure."""
    focus_channel: str | None = None
    """Channel whose images show focus; null: a search uses the present one, hold the
    first of the plan."""
    channel_offsets_um: dict[str, float] = {}
    """Focus of a channel minus that of the focus channel."""
    region: Region | None = None
    """x, y, width, height in pixels of what shall be in focus; null: all."""
    most_images: Annotated[int, Field(ge=2)] = 12
    """Most images that one search may take."""
    max_retries: Annotated[int, Field(ge=1)] | None = None
    """Searches at one place before focus counts as not found; null: as the event says,
    3 in an ``autofocus_plan``."""
    timeout_s: PositiveFloat = 60.0
    """A search ends after this time without progress."""
    request_timeout_s: PositiveFloat = 10.0
    """Longest wait for the estimate of one image."""
    on_failure: Literal["continue", "skip"] = "continue"
    """After a failed search: acquire the position as it is, or skip its events."""

    @model_validator(mode="after")
    def _one_holds(self) -> "AutofocusConfig":
        if self.mode == "hold" and self.actuator == "offset":
            msg = (
                "mode 'hold' with actuator 'offset': the hardware holds focus already; "
                "set mode: off and search by an autofocus_plan"
            )
            raise ValueError(msg)
        if self.offset_um_per_unit == 0:
            msg = "offset_um_per_unit 0 moves nothing; give um per unit of the offset"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _limits_in_order(self) -> "AutofocusConfig":
        low, high = self.low_um, self.high_um
        if low is not None and high is not None and low >= high:
            msg = f"low_um {low:g} is not below high_um {high:g}; swap them"
            raise ValueError(msg)
        return self


class Config(Section):
    """An rtfocus configuration; each side reads the sections it needs."""

    run: RunConfig = RunConfig()
    microscope: MicroscopeConfig = VirtualMicroscopeConfig()
    acquisition: AcquisitionConfig = AcquisitionConfig()
    camera: CameraConfig = CameraConfig()
    channels: Annotated[list[ChannelConfig], Field(min_length=1)] = [ChannelConfig()]
    processing: ProcessingConfig = ProcessingConfig()
    autofocus: AutofocusConfig = AutofocusConfig()
    alarm: AlarmConfig = AlarmConfig()
    transport: TransportConfig = TransportConfig()
    store: StoreConfig = StoreConfig()
    _file: Path | None = PrivateAttr(default=None)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # All sections would be pages.
        yield None, None if self.file is None else str(self.file)
        known = type(self).model_fields.items()
        own = [name for name, key in known if getattr(self, name) != key.default]
        yield "not_default", own

    @property
    def file(self) -> Path | None:
        """Where it was read from, absolute; null: it was made by a program."""
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

    def channel(self, name: str | None) -> ChannelConfig:
        """Return the entry of a channel, of None the only; or ``default``; or none."""
        by_name = {channel.name: channel for channel in self.channels}
        if name is None:
            name = next(iter(by_name)) if len(by_name) == 1 else "default"
        settings = by_name.get(name) or by_name.get("default") or ChannelConfig()
        return settings.model_copy(update={"name": name})

    def changed(self, section: str, **changes: Any) -> "Config":
        """Return it with other values in one of its sections."""
        changed = getattr(self, section).model_copy(update=changes)
        return self.model_copy(update={section: changed})

    def with_processing(self, **changes: Any) -> "Config":
        """Return it with other values in its section ``processing``."""
        return self.changed("processing", **changes)

    def with_preview(self, **changes: Any) -> "Config":
        """Return it with other values in ``transport.preview``."""
        preview = self.transport.preview.model_copy(update=changes)
        return self.changed("transport", preview=preview)

    def as_known(self, optics: OpticalSystem | None) -> "Config":
        """Return it; blind where neither `optics` nor a channel's say what they are."""
        if optics is not None or any(channel.optics for channel in self.channels):
            return self
        return self.with_processing(blind=True)

    def without_restoration(self) -> "Config":
        """Return it with nothing restored, of no channel."""
        update = {"method": "none", "orientations": 1}
        none = self.processing.restoration.model_copy(update=update)
        channels = [c.model_copy(update={"restoration": None}) for c in self.channels]
        config = self.with_processing(restoration=none)
        return config.model_copy(update={"channels": channels})

    def without_optics(self) -> "Config":
        """Return it with the optics of no channel: each image has its own."""
        channels = [c.model_copy(update={"optics": None}) for c in self.channels]
        return self.model_copy(update={"channels": channels})

    def channels_of(self, names: Sequence[str], number: int) -> list[ChannelConfig]:
        """Return the entry for every channel of an image, by the names in its file.

        Without `names` in the file the config's channels count in their order.
        """
        names = list(names) or [channel.name for channel in self.channels]
        named = [*names, *["default"] * (number - len(names))]
        return [self.channel(name) for name in named[:number]]

    def engines_of(self, channel: str | None) -> tuple[str | None, RestorationConfig]:
        """Return classifier and restoration of a channel: its own, or those of all."""
        own, every = self.channel(channel), self.processing
        return own.classifier or every.classifier, own.restoration or every.restoration

    def optics_of(self, channel: str | None) -> tuple[str, OpticalSystem]:
        """Return a channel by its name, and its optics.

        Parameters
        ----------
        channel
            None: ``default`` where there is one, else the only one.

        Raises
        ------
        ConfigError
            If there is no such channel, several to choose from, or no optics for it.
        """
        there = [one.name for one in self.channels]
        where = "the config" if self.file is None else f"'{self.file}'"
        known = f"{where} has {', '.join(there) or 'no channels'}"
        if channel is None:
            channel = self.channel(None).name
            if channel not in there:
                msg = f"which channel is meant? {known}; choose one (--channel)"
                raise ConfigError(msg)
        if channel not in there and "default" not in there:
            msg = f"no channel '{channel}': {known}; give one of them (--channel)"
            raise ConfigError(msg)
        optics = self.channel(channel).optics
        if optics is None:
            msg = (
                f"{where} states no optics for channel '{channel}'; give it "
                "numerical_aperture, wavelength_nm and pixel_size_um under 'optics'"
            )
            raise ConfigError(msg)
        return channel, optics

    def kept_with_data(self) -> dict[str, Any]:
        """Return it as it is kept with the data: without pairing and receivers.

        A webhook's address is often the only secret of its receiver.
        """
        secret = {"transport": {"pairing"}, "alarm": {"webhook", "command"}}
        return self.model_dump(mode="json", exclude=secret)


_SOURCES = (VirtualMicroscopeConfig, DemoCameraConfig, MicroManagerConfig, ReplayConfig)


def reference() -> str:
    """Return the reference as Markdown: one table per section."""
    lines: list[str] = []
    for name, info in Config.model_fields.items():
        if name == "microscope":
            for source in _SOURCES:
                default = source.model_fields["source"]
                word = get_args(default.annotation)[0]
                lines += _table(f"microscope: source {word}", source, "microscope")
        elif name == "channels":
            lines += _table("channels (a list)", _section(info), "channels.N")
        else:
            lines += _table(name, _section(info), name)
    lines += [f"### optics: {_first_line(OpticalSystem)}", "", *_HEAD]
    lines += [_row(*entry) for entry in _optics_rows()]
    return "\n".join(lines) + "\n"


_HEAD = ["| key | default | meaning |", "|---|---|---|"]


def _table(title: str, section: type[BaseModel], prefix: str) -> list[str]:
    head = [f"### {title}: {_first_line(section)}", "", *_HEAD]
    return [*head, *(_row(*entry) for entry in _rows(section, prefix)), ""]


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    meanings = _meanings(section)
    for name, info in section.model_fields.items():
        inner = _section(info)
        key = f"{prefix}.{name}"
        if inner is None or _is_optional(info):
            yield key, _default(info), meanings.get(name, "")
        # A channel's restoration has the keys of processing.restoration.
        if inner is not None and key != "channels.N.restoration":
            yield from _rows(inner, key)


def _meanings(section: type) -> dict[str, str]:
    """Return what stands below each field of a class and of those it comes from.

    pydantic could keep them beside the fields: every start would take a fifth of a
    second to find them.
    """
    meanings: dict[str, str] = {}
    for one in reversed(section.__mro__):
        if one is object or one is BaseModel:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                meanings[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return meanings


def _section(info: FieldInfo) -> Any:
    """Return the model a field holds, also inside a list or an option."""
    for part in (info.annotation, *get_args(info.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _is_optional(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    return _as_yaml(info.get_default())


def _as_yaml(value: object) -> str:
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return words[value]
    return str(value)


def _optics_rows() -> Iterator[tuple[str, str, str]]:
    meanings = _meanings(OpticalSystem)
    for one in fields(OpticalSystem):
        default = one.default if one.default is not MISSING else None
        shown = _as_yaml(default) if one.default is not MISSING else "required"
        if one.default_factory is not MISSING:
            shown = "none"
        text = meanings.get(one.name, "")
        if is_dataclass(one.type):
            text += " " + ", ".join(f"`{part.name}`" for part in fields(one.type))
        yield f"optics.{one.name}", shown, text


def _row(key: str, default: str, meaning: str) -> str:
    text = " ".join(meaning.split()).replace("``", "`").replace("|", "\\|")
    return f"| `{key}` | `{default}` | {text} |"


def _first_line(model: type) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]

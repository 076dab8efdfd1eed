"""Config: one YAML file, one frozen model per section, unknown keys refused."""

from rtfocus.config.loading import find_config, load_config, parse_config
from rtfocus.config.model import ChannelConfig, Config, RunConfig

__all__ = [
    "ChannelConfig",
    "Config",
    "RunConfig",
    "find_config",
    "load_config",
    "parse_config",
]

"""Kernel cache: what TensorRT for RTX compiled on the card, kept for the next start.

Its plans hold no machine code: kernels are compiled at the first inference of a
shape, which takes seconds, unless the library's runtime cache brings them along.
It checks by itself whether they suit the card, and compiles anew if not.
"""

import logging
from pathlib import Path
from typing import Any

from rtfocus.processing.gpu.cache_folder import write_atomically

logger = logging.getLogger(__name__)


class KernelCache:
    """The runtime cache of one engine on one GPU, and its file.

    Parameters
    ----------
    config
        Runtime configuration (``IRuntimeConfig``) of the engine; gets the cache.
    path
        File to read now and to write at `save`.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._cache: Any = config.create_runtime_cache()
        self._size = self._read()
        config.set_runtime_cache(self._cache)

    def _read(self) -> int:
        try:
            kept = self._path.read_bytes()
        except FileNotFoundError:
            logger.warning("compiling GPU kernels, at this first start only")
            return 0
        except OSError as error:
            logger.warning("'%s' cannot be read: %s", self._path, error.strerror)
            return 0
        if not self._cache.deserialize(kept):
            logger.warning("'%s' is of no use: compiling GPU kernels anew", self._path)
            return 0
        return len(kept)

    def save(self) -> None:
        """Write the file if kernels were added since it was read."""
        kernels = bytes(self._cache.serialize())
        if len(kernels) == self._size:
            return
        try:
            write_atomically(self._path, kernels)
        except OSError as error:
            logger.warning(
                "compiled GPU kernels cannot be kept in '%s' (%s)",
                self._path,
                error.strerror,
            )
            return
        self._size = len(kernels)

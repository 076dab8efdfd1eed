"""Choice: of an ordered list of kinds those that this machine can use, with reasons."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from rtfocus.errors import EngineError

logger = logging.getLogger(__name__)


class _Kind(Protocol):
    @property
    def name(self) -> str: ...


K = TypeVar("K", bound=_Kind)


def usable(
    what: str,
    wanted: str,
    kinds: Sequence[K],
    why_unavailable: Callable[[K], str | None],
    remedy: str = "",
) -> Iterator[K]:
    """Yield the kinds that can be used, in order; those behind are not even asked.

    Parameters
    ----------
    what
        For messages, e.g. ``GPU backend``.
    wanted
        Name of a kind, or ``auto`` for any.
    kinds
        The best first.
    why_unavailable
        Reason why one cannot be used, with the remedy; None: it can.
    remedy
        Ends the message if there is none.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; gives each reason.
    """
    reasons: list[str] = []
    found = False
    for kind in kinds:
        if wanted not in ("auto", kind.name):
            continue
        why = why_unavailable(kind)
        if why is not None:
            reasons.append(f"{kind.name}: {why}")
            continue
        if not found:
            passed_over = f" (not {'; '.join(reasons)})" if reasons else ""
            logger.info("%s: %s%s", what, kind.name, passed_over)
        found = True
        yield kind
    if not found:
        known = ", ".join(kind.name for kind in kinds)
        told = "; ".join(reasons) or f"known are {known} and auto"
        msg = f"no {what} for '{wanted}': {told}{remedy}"
        raise EngineError(msg)

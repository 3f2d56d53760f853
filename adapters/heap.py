"""The heap, as the garbage collector lists it: who refers to something, and what there is of a sort.

The one thing to know: what `gc.freeze` put aside is in none of these lists, so that a holder made
before it would not be found, and what it holds be taken for lost. Whoever asks here therefore undoes
the freeze first.
"""

from __future__ import annotations

import gc
from typing import Any

from store.logs import get_logger

log = get_logger("adapters.heap")


def objects() -> list[Any]:
    """All objects that the collector knows."""
    _thaw()
    return gc.get_objects()


def referrers(thing: Any) -> list[Any]:
    """What refers to a thing, the frames that run included."""
    _thaw()
    return gc.get_referrers(thing)


def _thaw() -> None:
    if count := gc.get_freeze_count():
        gc.unfreeze()
        log.debug("gc.freeze undone: what it put aside may hold what is in doubt", objects=count)

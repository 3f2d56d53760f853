"""What may have been meant by a name that does not exist. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from difflib import get_close_matches

_OFFERED = 3
_COMPARED = 400


def nearest(wanted: str, known: Iterable[str]) -> tuple[str, ...]:
    """A few of the known names, the likeliest first: those that begin with `wanted`, then those like it.

    Comparing costs a millisecond for a dozen names, so that of many only those are compared that share
    the most pairs of letters.
    """
    names = tuple(known)
    begun = heapq.nsmallest(
        _OFFERED, (name for name in names if name.startswith(wanted)), key=_size
    )
    pairs = _pairs(wanted)
    likely = heapq.nlargest(_COMPARED, names, key=lambda name: len(pairs & _pairs(name)))
    alike = get_close_matches(wanted, likely, _OFFERED, cutoff=0.5)
    return tuple(dict.fromkeys([*begun, *alike]))[:_OFFERED]


def _size(name: str) -> tuple[int, str]:
    return len(name), name


def _pairs(text: str) -> set[str]:
    return {text[at : at + 2] for at in range(len(text) - 1)}

"""The agenda: what to look at when. Pure; a heap of moments, each with what falls due then.

Moments are rounded up to slots of a few milliseconds, so that a million sessions with the same idle
limit cost a list entry each, not a heap node each.
"""

from __future__ import annotations

import heapq
from math import inf

SLOT_MS = 4


class Agenda:
    """References by the moment at which they are to be looked at."""

    def __init__(self) -> None:
        self._slots: dict[int, list[str]] = {}
        self._order: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def add(self, at_ms: float, ref: str) -> None:
        """Looks at `ref` at `at_ms`, or up to `SLOT_MS` later. A moment without end is never."""
        if at_ms == inf:
            return
        slot = -(-int(at_ms) // SLOT_MS)
        refs = self._slots.get(slot)
        if refs is None:
            self._slots[slot] = [ref]
            heapq.heappush(self._order, slot)
        else:
            refs.append(ref)

    def pop_due(self, now_ms: int) -> list[str]:
        """What is to be looked at by now; it leaves the agenda."""
        due: list[str] = []
        while self._order and self._order[0] * SLOT_MS <= now_ms:
            due += self._slots.pop(heapq.heappop(self._order))
        return due

    def next_at(self) -> float:
        """The next moment, in ms; `inf` when there is none."""
        return self._order[0] * SLOT_MS if self._order else inf

"""The agenda: what to look at when. Pure; a heap of moments, each with what falls due then.

Moments are gathered in slots, so that a million sessions with the same idle limit cost a list entry
each, not a heap node each. Slots are a few milliseconds wide for what is near; what is far goes into
wide ones, by their beginning: who looks then finds that it is early, by a thousandth of the wait at
most, and puts it in again.
"""

from __future__ import annotations

import heapq
from math import inf

SLOT_MS = 4
_EARLY = 1024
"""A slot is no wider than the wait divided by this."""


class Agenda:
    """References by the moment at which they are to be looked at."""

    def __init__(self) -> None:
        self._slots: dict[int, list[str]] = {}
        self._order: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def add(self, at_ms: float, ref: str, now_ms: int) -> None:
        """Looks at `ref` at `at_ms`, up to `SLOT_MS` later, or before. A moment without end is never.

        Args:
            at_ms, ref: when to look at what.
            now_ms: the present; what lies more than some seconds ahead of it comes early.
        """
        if at_ms == inf:
            return
        at = int(at_ms)
        width = 1 << max(0, ((at - now_ms) // _EARLY).bit_length() - 1)
        slot = at - at % width if width > SLOT_MS else -(-at // SLOT_MS) * SLOT_MS
        refs = self._slots.get(slot)
        if refs is None:
            self._slots[slot] = [ref]
            heapq.heappush(self._order, slot)
        else:
            refs.append(ref)

    def pop_due(self, now_ms: int) -> list[str]:
        """What is to be looked at by now; it leaves the agenda."""
        due: list[str] = []
        while self._order and self._order[0] <= now_ms:
            due += self._slots.pop(heapq.heappop(self._order))
        return due

    def next_at(self) -> float:
        """The next moment, in ms; `inf` when there is none."""
        return self._order[0] if self._order else inf

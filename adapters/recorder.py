"""The recorder: what happens in this process becomes events, numbered and in order.

`record` takes about a microsecond and never waits: it numbers the event and puts it into the outbox.
The host drains the outbox in batches (group commit): while one batch is on its way the next one
gathers, so the rate adapts to the load without a timer. A batch stays in the outbox until Redis has
acknowledged it, and is sent again as it is when the answer got lost.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import islice

import structlog

from store.event import EVENT_TYPES, NO_DIGEST, EventRow, Scalar, check_ref, encode

BATCH = 500
"""Events sent in one round trip at the most."""

log = structlog.get_logger("adapters.recorder")

trace_id: ContextVar[str | None] = ContextVar("agent_reconciler_trace_id", default=None)
"""Set it per request: the events recorded within carry it."""


class Recorder:
    """Numbers events of one process incarnation and keeps them until they are acknowledged.

    Args:
        process: the incarnation.
        wake: called when there is something to send; from whichever thread recorded it.
    """

    def __init__(self, process: str, wake: Callable[[], None]) -> None:
        self.process = process
        self.seq = 0
        self._wake = wake
        self._lock = threading.Lock()
        self._outbox: deque[EventRow] = deque()
        self._encoded: list[bytes] = []
        self._digest = NO_DIGEST

    def __len__(self) -> int:
        """Events recorded and not yet acknowledged."""
        return len(self._outbox)

    def record(
        self,
        type: str,
        ref: str,
        *,
        uses: Sequence[str] | None = None,
        owned_by: str | None = None,
        reason: str | None = None,
        order_id: str | None = None,
        attrs: dict[str, Scalar] | None = None,
    ) -> int:
        """Records one event.

        Args:
            type: an event type, see `store.EventType`.
            ref: the resource, `kind/id`.
            uses: what it keeps alive; None says nothing new about it.
            owned_by: what it dies with; None says nothing new about it.
            reason: why, in words.
            order_id: the order that this answers.
            attrs: small and flat; never conversation content.

        Returns:
            The sequence number of the event.

        Raises:
            ValueError: the type is unknown, or a reference is not `kind/id`.
        """
        if type not in EVENT_TYPES:
            raise ValueError(f"{type!r} is not an event type")
        check_ref(ref)
        with self._lock:
            self.seq = seq = self.seq + 1
            self._outbox.append(
                EventRow(
                    type,
                    ref,
                    self.process,
                    seq,
                    time.time(),
                    None,
                    None if uses is None else tuple(uses),
                    owned_by,
                    reason,
                    order_id,
                    attrs,
                    trace_id.get(),
                )
            )
        self._wake()
        return seq

    def batch(self) -> tuple[int, list[bytes]]:
        """The next events to send: seq of the first, and the encoded events.

        The same ones again until `acknowledge` is called for them.
        """
        if not self._encoded:
            with self._lock:
                rows = list(islice(self._outbox, BATCH))
            for row in rows:
                try:
                    payload, digest = encode(row, self._digest)
                except (TypeError, ValueError) as error:
                    # It has its number already: something must stand there, or nothing follows it.
                    log.warning("event recorded without its details", ref=row.ref, error=str(error))
                    payload, digest = encode(_bare(row, error), self._digest)
                self._encoded.append(payload)
                self._digest = digest
        first = self._outbox[0].seq if self._outbox else self.seq + 1
        return first, self._encoded

    def acknowledge(self) -> None:
        """The batch is in the log."""
        for _ in self._encoded:
            self._outbox.popleft()
        self._encoded = []


def _bare(row: EventRow, error: Exception) -> EventRow:
    """An event without what cannot be encoded: the caller gave values that are not text."""
    return EventRow(
        row.type,
        row.ref.encode("utf-8", "replace").decode(),
        row.process,
        row.seq,
        row.at,
        reason=f"its details could not be encoded: {type(error).__name__}",
    )

"""The recorder: what happens in this process becomes events, numbered and in order.

`record` takes about two microseconds and never waits: it numbers the event, encodes it, and puts it into
the outbox. The sender drains the outbox in batches (group commit): while one batch is on its way the
next one gathers, so the rate adapts to the load without a timer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from opentelemetry.trace import format_trace_id

from adapters.outbox import Outbox
from store.event import EVENT_TYPES, EventRow, Scalar, check_ref, encode_body
from store.logs import get_logger
from store.tracing import Origin, current_span_context

log = get_logger("adapters.recorder")

trace_id: ContextVar[str | None] = ContextVar("agent_reconciler_trace_id", default=None)
"""Set it per request: the events recorded within carry it. Where it is not set, they carry the trace id
of the OpenTelemetry span they are recorded in, if there is one."""


def origin() -> Origin | None:
    """The request that the caller works for; None where nobody said."""
    given, span = trace_id.get(), current_span_context()
    if given is not None:
        mine = span is not None and format_trace_id(span.trace_id) == given
        return Origin(given, span if mine else None)
    return None if span is None else Origin(format_trace_id(span.trace_id), span)


class Recorder:
    """Numbers the events of one process incarnation.

    Args:
        outbox: takes the events; its process is the incarnation.
        wake: called when there is something to send; from whichever thread recorded it.

    Attributes:
        process: the incarnation.
        seq: of the last event recorded.
    """

    def __init__(self, outbox: Outbox, wake: Callable[[], None]) -> None:
        self.process = outbox.process
        self.outbox = outbox
        self.seq = outbox.recorded
        self._wake = wake

    def __len__(self) -> int:
        """Events recorded and not yet acknowledged."""
        return len(self.outbox)

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
        trace: str | None = None,
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
            trace: id of the trace it belongs to; None takes the caller's, see `trace_id`.

        Returns:
            The sequence number of the event.

        Raises:
            ValueError: the type is unknown, or a reference is not `kind/id`.
        """
        if type not in EVENT_TYPES:
            raise ValueError(
                f"{type!r} is not an event type; these are: {', '.join(sorted(EVENT_TYPES))}"
            )
        check_ref(ref)
        if trace is None and (trace := trace_id.get()) is None:
            span = current_span_context()
            if span is not None:
                trace = format_trace_id(span.trace_id)
        with self.outbox.lock:
            seq = self.seq + 1
            body = _body(
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
                    trace,
                )
            )
            self.seq = seq
            self.outbox.add(body)
        self._wake()
        return seq

    def end(self, reason: str) -> None:
        """Ends the log of a process whose outbox was full, right after the last event that was kept."""
        with self.outbox.lock:
            row = EventRow(
                "process_stopped", f"process/{self.process}", self.process,
                self.outbox.recorded + 1, time.time(), reason=reason,
            )  # fmt: skip
            self.outbox.add_last(encode_body(row))


def _body(row: EventRow) -> bytes:
    try:
        return encode_body(row)
    except (TypeError, ValueError) as error:
        # The caller gave values that are not text: that something happened is recorded all the same.
        log.warning("event recorded without its details", ref=row.ref, error=str(error))
        return encode_body(_bare(row, error))


def _bare(row: EventRow, error: Exception) -> EventRow:
    """An event without what cannot be encoded."""
    return EventRow(
        row.type,
        row.ref.encode("utf-8", "replace").decode(),
        row.process,
        row.seq,
        row.at,
        reason=f"its details could not be encoded: {type(error).__name__}",
    )

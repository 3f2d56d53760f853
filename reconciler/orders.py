"""Orders on their way: announced in the log, sent to their hosts, and their outcomes heard.

What is requested is written under the lease of the partition, in one script call with the orders, so
that whoever lost the lease asks for nothing. An outcome is an event like any other; it is known by the
id of its order.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence

import msgspec
from opentelemetry.trace import Span, SpanKind

from reconciler.fold import Event
from reconciler.metrics import Metrics
from reconciler.partitions import Partitions
from reconciler.plan import Step
from reconciler.policy import Policy
from reconciler.tail import Tail
from store.errors import Fenced
from store.event import EventRow, Scalar
from store.logs import get_logger
from store.messages import Action, HostPort, Order
from store.namespace import Namespace
from store.tracing import failed, trace_id_of, traceparent_of, tracer

log = get_logger("reconciler.orders")

_OUTCOMES = frozenset({"cleaned_up", "adopted", "cleanup_failed", "cleanup_refused"})

Sent = tuple[Step, asyncio.Future[Event]]
"""What was asked for, and the event that will tell what became of it."""


class Orders:
    """The orders of one worker.

    Args:
        namespace: of the log.
        acting: the partitions it acts for.
        tail: folds what is requested before anybody plans again.
        policy: gives the time limits.
        metrics: of the worker.
        hosts: hosts in this very process, which are reached directly.
    """

    def __init__(
        self,
        namespace: Namespace,
        acting: Partitions,
        tail: Tail,
        policy: Policy,
        metrics: Metrics,
        hosts: Iterable[HostPort],
    ) -> None:
        self._namespace = namespace
        self._acting = acting
        self._tail = tail
        self._policy = policy
        self._metrics = metrics
        self._local = {host.process: host for host in hosts}
        self._sent: dict[str, Sent] = {}
        self._spans: dict[str, Span] = {}

    async def send(self, steps: Sequence[Step]) -> list[Sent]:
        """Writes what is requested into the log, and sends the orders, per partition.

        Raises:
            Fenced: a lease is no longer held.
        """
        sent: list[Sent] = []
        unwritten: set[str] = set()
        try:
            await self._write(steps, sent, unwritten)
        finally:
            # They were not sent, as far as is known: with the next try they are others.
            for order_id in unwritten:
                self._sent.pop(order_id, None)
                self._end_span(order_id, "unknown")
        return sent

    async def _write(self, steps: Sequence[Step], sent: list[Sent], unwritten: set[str]) -> None:
        by_partition: dict[int, list[tuple[EventRow, Order]]] = {}
        for step in steps:
            order = self._order(step)
            outcome: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
            self._sent[order.id] = (step, outcome)
            sent.append((step, outcome))
            unwritten.add(order.id)
            pair = (_request(step, order), order)
            by_partition.setdefault(self._namespace.partition_of(step.process), []).append(pair)
        for partition, pairs in by_partition.items():
            channel = self._acting.channels.get(partition)
            if channel is None:
                raise Fenced(f"partition {partition} is no longer held by this worker")
            events = [event for event, _ in pairs]
            away = [order for _, order in pairs if order.process not in self._local]
            try:
                await channel.write(events, away)
            except Fenced as error:
                self._acting.lose(partition, str(error))
                raise
            unwritten.difference_update(order.id for _, order in pairs)
            for process, host in self._local.items():
                if mine := [order for _, order in pairs if order.process == process]:
                    host.execute(mine)
            for _, order in pairs:
                self._metrics.orders.labels(order.action).inc()
            # The requests are in the fold before anybody plans again: nothing is asked for twice.
            await self._tail.catch_up([partition])

    def _order(self, step: Step) -> Order:
        """The order for a step, with a span that ends when its outcome is heard."""
        order = _order(step, self._policy)
        span = tracer.start_span(
            f"order {step.action}", kind=SpanKind.PRODUCER,
            attributes={
                "agent_reconciler.ref": step.ref,
                "agent_reconciler.process": step.process,
                "agent_reconciler.order_id": order.id,
                "agent_reconciler.sort": step.sort,
                "agent_reconciler.cause": step.cause,
                "agent_reconciler.reason": step.reason,
            },
        )  # fmt: skip
        traceparent = traceparent_of(span)
        if traceparent is None:
            return order
        self._spans[order.id] = span
        return msgspec.structs.replace(order, traceparent=traceparent)

    def _end_span(self, order_id: str, outcome: str) -> None:
        span = self._spans.pop(order_id, None)
        if span is not None:
            span.set_attribute("agent_reconciler.outcome", outcome)
            if outcome == "failed":
                failed(span, outcome)
            span.end()

    async def ask_report(self, processes: Iterable[str]) -> dict[str, str]:
        """Has hosts look at their registries themselves; returns what their answers will be known by."""
        asked: dict[str, str] = {}
        for process in processes:
            order = Order(
                f"r-{uuid.uuid4().hex[:12]}", process, Action.REPORT, f"process/{process}"
            )
            channel = self._acting.channels.get(self._namespace.partition_of(process))
            if process in self._local:
                self._local[process].execute([order])
            elif channel is not None:
                await channel.write([], [order])
            else:
                continue
            asked[process] = order.id
        return asked

    def heard(self, event: Event, at_ms: int) -> None:
        """An event was folded: if it is an outcome, whoever waits for it learns of it."""
        if event.order_id is None or event.order_id not in self._sent:
            return
        step, outcome = self._sent[event.order_id]
        # What went along with it carries the order's id, too, and is not its outcome.
        mine = event.ref == step.ref and (event.attrs or {}).get("registry") == step.registry
        if mine and event.type in _OUTCOMES:
            del self._sent[event.order_id]
            self._end_span(event.order_id, self._count(step, event, at_ms))
            if not outcome.done():
                outcome.set_result(event)

    def _count(self, step: Step, event: Event, at_ms: int) -> str:
        outcome = {"cleanup_failed": "failed", "cleanup_refused": "refused"}.get(event.type, "done")
        kind = step.ref.partition("/")[0] if step.registry is None else "index_entry"
        self._metrics.count_outcome(kind, step.cause, outcome)
        if outcome == "done":
            if step.since_ms:
                self._metrics.teardown_seconds.observe(max(0, at_ms - step.since_ms) / 1000)
        elif outcome == "failed":
            log.warning(
                "teardown failed",
                ref=step.ref, process=step.process, order_id=event.order_id, reason=event.reason,
            )  # fmt: skip
        return outcome

    def forget(self, processes: Iterable[str]) -> None:
        """Nobody here waits any more for what these answer."""
        gone = set(processes)
        for order_id in [id for id, (step, _) in self._sent.items() if step.process in gone]:
            del self._sent[order_id]
            self._end_span(order_id, "unknown")


def _order(step: Step, policy: Policy) -> Order:
    return Order(
        id=f"o-{uuid.uuid4().hex[:12]}",
        process=step.process,
        action=step.action,
        ref=step.ref,
        seq=step.seq,
        reason=step.reason,
        after=step.after,
        stage=step.stage,
        timeout=policy.teardown_timeout,
        registry=step.registry,
        key=step.key,
        circle=dict(step.circle),
    )


def _request(step: Step, order: Order) -> EventRow:
    """The event that announces an order; writer and seq are filled in by the channel."""
    attrs: dict[str, Scalar] = {
        "action": str(step.action), "sort": step.sort, "expected_seq": step.seq,
    }  # fmt: skip
    if step.registry is not None:
        attrs |= {"registry": step.registry, "key": step.key}
    return EventRow(
        "cleanup_requested", step.ref, "", 0, time.time(), step.process,
        reason=step.reason, order_id=order.id, attrs=attrs, trace_id=trace_id_of(order.traceparent),
    )  # fmt: skip

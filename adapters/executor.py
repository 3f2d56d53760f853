"""Carries out orders, under their preconditions. The host's half of "nothing in use is torn down".

An order is checked and its entry marked as terminating in one tick, without an await between: the
resource is the very one that the worker saw (same last seq, same object in the registry), nobody has
it acquired, nothing alive uses it. Otherwise the order is refused with the reason, as an event, and
the worker decides afresh. A teardown has a time limit; the one that hangs is cancelled and reported,
and holds up only what must not go before it.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import Span, SpanKind

from adapters.entry import Entry, current_order
from store.event import Scalar
from store.logs import get_logger
from store.messages import Action, Order
from store.tracing import context_of, failed, tracer

if TYPE_CHECKING:
    from adapters.host import Host

log = get_logger("adapters.executor")

_stage = attrgetter("stage")


class Refusal(Exception):
    """A precondition does not hold: `stale`, `gone` or `busy`, and why. A teardown may raise it."""

    @property
    def outcome(self) -> str:
        """The same as one of `adapters.metrics.OUTCOMES`."""
        word = str(self).partition(":")[0]
        return word if word in {"stale", "gone", "busy"} else "refused"


class _NoEnd(TimeoutError):
    """A teardown did not end within its time."""


class _NotSaved(RuntimeError):
    """The recovery record of a session was not saved, so it stays."""


class Executor:
    """Carries out the orders of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._hanging: set[asyncio.Task[None]] = set()
        self._untracked: dict[str, Entry] = {}

    async def execute(self, orders: Sequence[Order]) -> None:
        """Carries out orders that came together, side by side, begun in the order of their stages.

        One waits for those of earlier stages about what has to go before it, and for no others: a
        teardown that hangs delays only what hangs on it. What sets the log right is done in the tick
        in which it begins, so that all that follows finds it done.
        """
        turns: dict[str, list[asyncio.Task[None]]] = defaultdict(list)
        by_stage = groupby(sorted(orders, key=_stage), key=_stage)
        async with asyncio.TaskGroup() as group:
            for _, of_stage in by_stage:
                begun = []
                for order in of_stage:
                    first = [task for ref in (order.ref, *order.after) for task in turns[ref]]
                    begun.append((order.ref, group.create_task(self._in_turn(order, first))))
                for ref, task in begun:
                    turns[ref].append(task)

    async def _in_turn(self, order: Order, first: Sequence[asyncio.Task[None]]) -> None:
        if first:
            await asyncio.wait(first)
        await self._one(order)

    async def _one(self, order: Order) -> None:
        if order.action == Action.REPORT:
            self._host.report(order.id)
            return
        token = current_order.set(order)
        try:
            with self._span(order) as span:
                outcome = await self._carry_out(order)
                span.set_attribute("agent_reconciler.outcome", outcome)
                if outcome in {"failed", "timed_out", "not_saved"}:
                    # Not the words of the error: they are the service's own, whatever is in them.
                    failed(span, outcome)
        finally:
            current_order.reset(token)
        self._host.metrics.count_order(order.action, outcome)

    def _span(self, order: Order) -> AbstractContextManager[Span]:
        """The span of an order: a child of the worker's, linked to the request that made the resource."""
        entry = self._host.entries.get(order.ref)
        origin = entry.origin if entry is not None else None
        about = {
            "agent_reconciler.ref": order.ref,
            "agent_reconciler.process": order.process,
            "agent_reconciler.order_id": order.id,
            "agent_reconciler.reason": order.reason,
        }
        if origin is not None:
            about["agent_reconciler.created_by_trace"] = origin.trace_id
        return tracer.start_as_current_span(
            order.action.replace("_", " "), context_of(order.traceparent), SpanKind.CONSUMER,
            attributes=about, links=origin.links if origin is not None else None,
            record_exception=False,
        )  # fmt: skip

    async def _carry_out(self, order: Order) -> str:
        """Carries out one order, and records what became of it; that as one word."""
        try:
            match order.action:
                case Action.TEARDOWN:
                    await self._teardown(order)
                case Action.DROP_ENTRY:
                    self._drop_entry(order)
                case Action.CLOSE_GHOST:
                    self._close_ghost(order)
                case Action.ADOPT:
                    self._adopt(order)
                case _:
                    raise Refusal(f"gone: this host does not know the action {order.action!r}")
        except Refusal as refusal:
            self._outcome("cleanup_refused", order, str(refusal))
            return refusal.outcome
        except Exception as error:
            # A function of the service raised: that ends this order, not those after it.
            reason = str(error) or type(error).__name__
            ours = isinstance(error, _NoEnd | _NotSaved)
            log.warning(
                "order failed",
                action=str(order.action), ref=order.ref, order_id=order.id, reason=reason,
                exc_info=None if ours else error,
            )  # fmt: skip
            self._outcome("cleanup_failed", order, reason)
            if isinstance(error, _NoEnd):
                return "timed_out"
            return "not_saved" if isinstance(error, _NotSaved) else "failed"
        return "done"

    def _outcome(self, type: str, order: Order, reason: str) -> None:
        attrs: dict[str, Scalar] | None = None
        if order.registry is not None:
            attrs = {"registry": order.registry, "key": order.key}
        self._host.recorder.record(type, order.ref, reason=reason, order_id=order.id, attrs=attrs)

    # --- teardown -------------------------------------------------------------------------------

    def _check(self, order: Order) -> Entry:
        """The entry that an order may end now; it is marked before anybody else can run.

        Raises:
            Refusal: a precondition does not hold.
        """
        entry = self._host.entries.get(order.ref)
        if entry is None and order.seq == 0:
            # It is untracked, and the policy says to end it. It stays untracked until it has gone:
            # adopting it first would make it desired if its teardown failed.
            entry = self._untracked.get(order.ref) or self._host.untracked(order.ref)
        if entry is None:
            raise Refusal("gone: it is not alive in this process")
        if entry.terminating:
            raise Refusal(f"busy: order {entry.terminating} is ending it")
        self._host.look_at(entry)  # What the service noted in the object itself counts, too.
        if entry.seq != order.seq:
            raise Refusal(f"stale: its last event is seq {entry.seq}, the order knew {order.seq}")
        if entry.holders:
            raise Refusal(f"busy: it is acquired by {entry.holders}")
        if entry.registry is not None and not self._host.holds(entry):
            raise Refusal("gone: its registry does not hold it, or holds another object")
        for other, seq in order.circle.items():
            member = self._host.entries.get(other)
            if member is not None and (member.holders or member.seq != seq):
                raise Refusal(f"busy: {other} is in a circle with it, and was used since")
        if user := self._host.user_of(order.ref, besides=order.circle):
            raise Refusal(f"busy: {user} uses it")
        for other in order.after:
            if other in self._host.entries and other not in order.circle:
                raise Refusal(f"busy: {other} has to go first, and is still alive")
        entry.terminating = order.id
        return entry

    async def _teardown(self, order: Order) -> None:
        entry = self._check(order)
        if entry.seq == 0:
            self._untracked[order.ref] = entry
        task = asyncio.ensure_future(self._end(entry, order))
        # As long as it runs, whatever became of the order, nobody can acquire what it takes apart.
        task.add_done_callback(lambda _: self._let_go(entry))
        began = time.perf_counter()
        try:
            await self._bounded(task, order.timeout)
        finally:
            self._host.metrics.teardown_seconds.observe(time.perf_counter() - began)
        if entry.seq == 0:
            self._outcome("cleaned_up", order, order.reason)

    async def _end(self, entry: Entry, order: Order) -> None:
        registry = entry.registry
        id = entry.ref.partition("/")[2]
        if registry is None:
            handler = self._host.handlers.get(entry.ref.partition("/")[0])
            if handler is None:
                raise RuntimeError("no registry and no handler of this process can end it")
            await _call(handler, id, None)
            self._host.forget(entry, reason=order.reason)
            return
        if registry.save is not None:
            try:
                await _call(registry.save, id, entry.obj)
            except Exception as error:
                self._host.metrics.saves.labels("failed").inc()
                raise _NotSaved(f"it stays, its recovery record was not saved: {error}") from error
            self._host.metrics.saves.labels("saved").inc()
        await _call(registry.teardown or close, id, entry.obj)
        if self._host.entries.get(entry.ref) is entry:
            if self._host.holds(entry):
                registry.pop(entry.key, None)
            else:
                # The teardown took it out behind the registry's back.
                self._host.forget(entry, reason=order.reason)
        elif entry.seq == 0 and self._host.holds(entry):
            registry.pop(entry.key, None)

    async def _bounded(self, task: asyncio.Task[None], timeout: float) -> None:
        """Waits for a teardown, but not longer than `timeout` seconds, even if it ignores that."""
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout)
        except asyncio.CancelledError:
            self._give_up(task)
            raise
        if done:
            if task.cancelled():
                raise RuntimeError("it was cancelled from within")
            return task.result()
        self._give_up(task)
        raise _NoEnd(f"no end after {timeout:g} s; it was cancelled")

    def _give_up(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._hanging.add(task)
        task.add_done_callback(self._ended_late)

    def _ended_late(self, task: asyncio.Task[None]) -> None:
        self._hanging.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a cancelled teardown failed later", reason=str(error))

    def _let_go(self, entry: Entry) -> None:
        if self._untracked.get(entry.ref) is entry:
            del self._untracked[entry.ref]
        if self._host.entries.get(entry.ref) is entry:
            entry.terminating = ""

    # --- the others: each in one tick -----------------------------------------------------------

    def _drop_entry(self, order: Order) -> None:
        if order.ref in self._host.entries:
            raise Refusal(f"stale: {order.ref} is alive")
        index = self._host.indexes.get(order.registry or "")
        dropped = index is not None and index.drop(order.key or "", order.ref)
        self._outcome(
            "cleaned_up", order, order.reason if dropped else "the entry was gone already"
        )

    def _close_ghost(self, order: Order) -> None:
        entry = self._host.entries.get(order.ref)
        if entry is not None:
            if entry.seq != order.seq:
                raise Refusal(f"stale: its last event is seq {entry.seq}, not {order.seq}")
            if entry.registry is None or self._host.holds(entry):
                raise Refusal("stale: it is alive")
            self._host.forget(entry, reason=order.reason)
        else:
            self._outcome("cleaned_up", order, order.reason)

    def _adopt(self, order: Order) -> None:
        if order.ref in self._host.entries:
            raise Refusal("stale: it is known by now")
        if self._host.adopt(order.ref, order_id=order.id) is None:
            raise Refusal("gone: no registry holds it")


async def _call(function: Callable[[str, Any], Any], id: str, obj: Any) -> None:
    result = function(id, obj)
    if inspect.isawaitable(result):
        await result


async def close(id: str, obj: Any) -> None:
    """Closes an object by its own `aclose` or `close`; one that has neither needs no closing."""
    for name in ("aclose", "close"):
        method = getattr(obj, name, None)
        if callable(method):
            result = method()
            if inspect.isawaitable(result):
                await result
            return

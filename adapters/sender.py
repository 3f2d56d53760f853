"""The sender: brings what a host records, and what it holds, to Redis; the host's only way out.

Group commit: while one batch is on its way the next gathers in the outbox. Inventory goes with the
events it belongs to. Nothing here ever holds up the service: when Redis is away the outbox waits, in
memory and then in a file; when Redis comes back from a failover with less than it acknowledged, that is
found by the heartbeat or by the next batch, and sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.trace import SpanKind
from redis.exceptions import RedisError

from adapters.inventory import InventoryBook
from adapters.leftovers import send_left_behind
from adapters.metrics import HostMetrics
from adapters.outbox import OUTBOX_LIMIT, Forgotten, Outbox, SpillUnreadable
from adapters.recorder import Recorder
from adapters.spill import SPILL_LIMIT
from store.channel import HostChannel
from store.connection import Store
from store.durability import Confirmation, Durability, confirmation
from store.errors import Fenced, NotConfirmed, SequenceGap
from store.event import process_id
from store.log import EventLog
from store.logs import get_logger
from store.messages import Summary
from store.namespace import open_namespace
from store.refusals import Unavailable
from store.tasks import check_cancelled, meanwhile
from store.tracing import tracer

log = get_logger("adapters.sender")

RETRY_FIRST, RETRY_LONGEST = 0.05, 1.0
"""Seconds between tries while Redis is away. The worker gives hosts six seconds to be back."""
_PUBLISH_SPACING = 0.01
_SPILL_RETRY = 5.0

AWAY: tuple[type[Exception], ...] = (*Unavailable, RedisError, NotConfirmed)
"""What says that it may be tried again later: whatever a server says, a host never gives up."""
CANNOT_SEND: tuple[type[Exception], ...] = (
    *AWAY, TimeoutError, Fenced, SequenceGap, SpillUnreadable,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutboxOptions:
    """How much an outbox may hold, and where; see `Host.connect`."""

    limit: int = OUTBOX_LIMIT
    spill_dir: Path | None = None
    spill_limit: int = SPILL_LIMIT
    durability: str | Durability | None = None


class Sender:
    """Sends for one host, through all its incarnations.

    Args:
        name: of the service.
        book: what the host holds.
        summary: makes the summary of an inventory; called in the tick in which it is taken.
        reborn: called when the process must go on as a new one, with the new recorder.
        options: of the outbox.
        metrics: of the host.

    Attributes:
        recorder: of the present incarnation.
        channel: the host's end, once opened.
        answers: report orders that the next inventory answers.
        beat_now: set to have the lease renewed, and Redis asked what it has, at once.
        connected: Redis answered when last asked.
    """

    recorder: Recorder
    channel: HostChannel

    def __init__(
        self,
        name: str,
        book: InventoryBook,
        summary: Callable[[], Summary],
        reborn: Callable[[Recorder], None],
        options: OutboxOptions,
        metrics: HostMetrics,
    ) -> None:
        self.answers: list[str] = []
        self.beat_now = asyncio.Event()
        self._name = name
        self._book = book
        self._summary = summary
        self._reborn = reborn
        self._options = options
        self._metrics = metrics
        self._report_due = False
        self._last_publish = 0.0
        self._wake = asyncio.Event()
        self._awake = False
        self._crowd = asyncio.Event()
        self.thread = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.connected = True
        self._confirm: Confirmation | None = None
        self._lease_ms = 0
        self._new_recorder()
        self._sending = self.outbox

    def _new_recorder(self) -> None:
        outbox = Outbox(
            process_id(self._name), limit=self._options.limit, crowded=self._told_of_crowd
        )
        self.recorder = Recorder(outbox, self.wake)

    @property
    def outbox(self) -> Outbox:
        return self.recorder.outbox

    async def open(self, store: Store, event_log: EventLog, lease_ms: int) -> None:
        """Makes ready to send.

        Raises:
            DurabilityError: the server cannot give what was asked for.
        """
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self._store, self._log, self._lease_ms = store, event_log, lease_ms
        self._namespace = await event_log.namespace()
        self._confirm = await confirmation(store, self._options.durability)
        self.channel = HostChannel(self._namespace, self.recorder.process)
        await self._open_spill()

    async def _open_spill(self) -> None:
        if self._options.spill_dir is not None:
            await self.outbox.open_spill(self._options.spill_dir, self._options.spill_limit)

    # --- waking ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to send. Called on every event, from any thread: it must cost nothing."""
        if self._awake or self.loop is None:
            return
        self._awake = True
        self._set(self._wake)

    def report(self) -> None:
        """The inventory is to be published, changed or not."""
        self._report_due = True
        self.wake()

    @property
    def unpublished(self) -> bool:
        """The inventory has changed since it was last published, or is asked for."""
        return self._book.dirty or self._report_due

    def _told_of_crowd(self) -> None:
        self._set(self._crowd)

    def _set(self, event: asyncio.Event) -> None:
        if self.loop is None or threading.get_ident() == self.thread:
            event.set()
        else:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is left to send.
                self.loop.call_soon_threadsafe(event.set)

    # --- tasks ----------------------------------------------------------------------------------

    async def send(self) -> None:
        """Sends what has gathered, again and again, while there is something."""
        retry = RETRY_FIRST
        self._wake.set()  # It may begin again, where something unexpected had ended it.
        while True:
            check_cancelled()
            await self._wake.wait()
            try:
                await self.drain()
                self.set_connected(True)
                retry = RETRY_FIRST
            except SpillUnreadable as error:
                log.error("events wait in the spill file", error=str(error))
                self._wake.set()
                await asyncio.sleep(_SPILL_RETRY)
            except AWAY as error:
                self.set_connected(False, error)
                self._wake.set()
                await asyncio.sleep(retry)
                retry = min(retry * 2, RETRY_LONGEST)
            except Fenced as error:
                if self._sending is self.outbox:  # Else the heartbeat learned of it first.
                    await self.go_on_as_new(str(error), "fenced")
            except SequenceGap as error:
                await self._send_again(error.expected)

    async def guard(self) -> None:
        """Moves events into the spill file when memory is half full; connected or not."""
        while True:
            check_cancelled()
            await self._crowd.wait()
            self._crowd.clear()
            if not await self.outbox.relieve() and self._options.spill_dir is not None:
                await asyncio.sleep(_SPILL_RETRY)
                self._crowd.set()

    async def inherit(self) -> None:
        """Sends what earlier incarnations of the service left in their spill files."""
        if self._options.spill_dir is not None:
            try:
                await send_left_behind(self._options.spill_dir, self._name, self._log)
            except OSError as error:
                log.error("spill files cannot be looked for", error=str(error))

    def set_connected(self, connected: bool, error: BaseException | None = None) -> None:
        """Notes, and says once, that Redis is away or back."""
        if connected == self.connected:
            return
        self.connected = connected
        if connected:
            log.info("Redis is back", process=self.recorder.process, waiting=len(self.recorder))
            self.beat_now.set()
        else:
            log.warning(
                "Redis is away, events wait", process=self.recorder.process, error=str(error)
            )

    async def beat(self) -> None:
        """Renews the lease, and compares what Redis has with what it acknowledged."""
        outbox, channel = self.outbox, self.channel
        acknowledged = outbox.acknowledged
        try:
            await channel.beat(self._lease_ms)
        except Fenced as error:
            if outbox is self.outbox:
                await self.go_on_as_new(str(error), "fenced")
            return
        # Asked for after these were acknowledged: they were there, so they were forgotten.
        if outbox is self.outbox and channel.last_seq < min(acknowledged, outbox.acknowledged):
            await self._send_again(channel.last_seq + 1)

    # --- sending --------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Sends events and inventory until nothing is left."""
        while True:
            check_cancelled()
            self._wake.clear()
            self._awake = False
            outbox = self._sending = self.outbox
            if outbox.needs_file:
                await outbox.load()
            first, payloads = outbox.batch()
            whole = len(payloads) == len(outbox) and not outbox.dropped
            publish = whole and self.unpublished
            if not payloads and outbox.needs_file:
                continue
            if not payloads and outbox.dropped:
                await self._end_full()
                continue
            if not payloads and not publish:
                return
            if publish and (wait := self._last_publish + _PUBLISH_SPACING - time.monotonic()) > 0:
                # Under load inventories come every few ms, not with every batch.
                if not payloads:
                    await asyncio.sleep(wait)
                    continue
                publish = False
            if publish:
                await self._send_both(first, payloads)
            else:
                await self._append(first, payloads)

    async def _append(self, first: int, payloads: list[bytes]) -> None:
        if not payloads:
            return
        outbox = self.outbox
        began = time.perf_counter()
        with tracer.start_as_current_span(
            "append events", kind=SpanKind.CLIENT,
            attributes={
                "agent_reconciler.process": outbox.process,
                "agent_reconciler.first_seq": first,
                "agent_reconciler.events": len(payloads),
            },
        ):  # fmt: skip
            await self._send_batch(outbox, first, payloads)
        self._metrics.append_seconds.observe(time.perf_counter() - began)
        self._metrics.sent.inc(len(payloads))
        if first == outbox.acknowledged + 1:  # Else Redis forgot meanwhile, and we went back.
            outbox.acknowledge()
            await outbox.sweep()

    async def _send_batch(self, outbox: Outbox, first: int, payloads: list[bytes]) -> None:
        if len(outbox) > 2 * len(payloads):
            meanwhile(outbox.prepare)
        await self._log.append_encoded(outbox.process, first, payloads, self._confirm or ())

    async def _send_both(self, first: int, payloads: list[bytes]) -> None:
        channel = self.channel
        if channel.publishes_all:
            self._book.put_back_all()
        # Taken here, before anything is awaited: book, seq and the batch are of one tick.
        summary, root, buckets = self._summary(), self._book.root(), self._book.take()
        answers = self.answers
        self.answers, self._report_due = [], False
        self._last_publish = time.monotonic()
        try:
            await self._append(first, payloads)
            if await channel.publish(summary, root, buckets):
                return
        except BaseException:
            self._put_back(buckets, answers)
            raise
        self._put_back(buckets, answers)
        log.info("Redis forgot the inventory, it is sent anew", process=summary.process)

    def _put_back(self, buckets: Iterable[str], answers: list[str]) -> None:
        self._book.put_back(buckets)
        self.answers = answers + self.answers
        self._report_due = True

    # --- when Redis forgot, or refuses, or there was no room --------------------------------------

    async def _send_again(self, expected: int) -> None:
        """Redis has less than it acknowledged, as after a failover: it is sent again."""
        outbox = self.outbox
        if expected > outbox.acknowledged:
            self._wake.set()  # Gone back already.
            return
        try:
            again = outbox.rewind(expected)
        except Forgotten as error:
            await self.go_on_as_new(str(error), "forgotten")
            return
        self._metrics.sent_again.inc(again)
        log.warning(
            "Redis forgot events that it had acknowledged, they are sent again",
            process=outbox.process, expected_seq=expected, events=again,
        )  # fmt: skip
        self._book.put_back_all()
        self._report_due = True
        self._wake.set()
        with contextlib.suppress(*AWAY):
            # It may have forgotten the namespace too.
            await open_namespace(self._store, self._namespace.name, self._namespace.partitions)
            await self.channel.look_back()

    async def _end_full(self) -> None:
        """All that had room was sent: the log of this process ends here, and says why."""
        dropped, channel = self.outbox.dropped, self.channel
        if not self.outbox.ended:
            self.recorder.end(
                f"its outbox was full: {dropped} later events were not kept; the service goes on as a "
                "new process"
            )
            return
        await self.go_on_as_new(f"its outbox was full, {dropped} events were dropped", "full")
        with contextlib.suppress(*AWAY, Fenced):
            await channel.leave()

    async def go_on_as_new(self, why: str, reason: str) -> None:
        """Goes on as a new process, which adopts what this one still holds.

        Args:
            why: in words.
            reason: the same as one of `adapters.metrics.INCARNATIONS`.
        """
        old = self.recorder
        self._metrics.incarnations.labels(reason).inc()
        self._new_recorder()
        self.channel = HostChannel(self._namespace, self.recorder.process)
        log.warning(
            "this process can no longer write to the log; it goes on as a new one",
            process=old.process, now=self.recorder.process, unsent_events=len(old), why=why,
        )  # fmt: skip
        self._reborn(self.recorder)
        self.beat_now.set()
        self._awake = False
        self.wake()
        await old.outbox.close(keep=False)
        await self._open_spill()

    async def close(self) -> None:
        """Lets go; what could not be sent is left in the spill file for the next incarnation."""
        outbox = self.outbox
        stored = len(outbox) == 0 or await outbox.relieve(wholly=True)
        if len(outbox):
            log.warning(
                "not everything was sent at the end",
                process=outbox.process, left=len(outbox),
                kept="in the spill file, for the next start" if stored else "nowhere",
            )  # fmt: skip
        await outbox.close(keep=len(outbox) > 0)

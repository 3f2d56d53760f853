"""The outbox: events of one process from the moment they are recorded until they cannot be forgotten.

Events pass through it in order: *fresh* (recorded, without digest), perhaps the spill file, perhaps
*parked* (meant for the file, which cannot be written now), *ahead* (next to be sent), then *kept*
(acknowledged, in case Redis comes back from a failover without them). Memory has a bound; beyond half
of it events go to the file. When memory and file are both full, later events are counted and dropped:
numbers have no gaps, so the log of this process ends there, and the host goes on as a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from adapters.spill import SPILL_LIMIT, SpillFile
from store.errors import ReconcilerError
from store.event import NO_DIGEST, EventRow, encode_body, seal, seal_all, split_digest
from store.logs import get_logger

log = get_logger("adapters.outbox")
T = TypeVar("T")

BATCH = 500
"""Events sent in one round trip at the most."""
BATCH_BYTES = 1 << 20
OUTBOX_LIMIT = 50_000
"""Events that wait in memory at the most, unless told otherwise."""
READ_TRIES = 5
"""Reads of the spill file that may fail one after the other, before what is in it counts as damaged."""
KEPT_EVENTS = 20_000
KEPT_BYTES = 8 << 20
_EVENT_BYTES = 512
_OVERHEAD = 64  # what Python needs for a bytes object and its place in a deque


class SpillUnreadable(ReconcilerError):
    """The spill file cannot be read now. It is tried again, `READ_TRIES` times."""


class Forgotten(ReconcilerError):
    """Redis forgot events that this process no longer keeps."""


class Outbox:
    """The events of one process incarnation that are not safe yet.

    All methods but `add` belong to the event loop; `add` is called with `lock` held, by any thread.

    Args:
        process: the incarnation.
        limit: events that wait in memory at the most; their bytes are bounded at 512 for each.
        crowded: called when memory is half full, so that somebody calls `relieve`; by any thread.

    Attributes:
        recorded: seq of the last event taken in.
        acknowledged: seq of the last event that Redis has acknowledged, and not forgotten since.
        dropped: events that came when there was no room.
        damaged: events that were lost because their record in the spill file was damaged.
        problem: why the spill file cannot be written now, or empty.
        ended: the last event was taken in; see `add_last`.
    """

    def __init__(
        self, process: str, *, limit: int = OUTBOX_LIMIT, crowded: Callable[[], None] | None = None
    ) -> None:
        self.process = process
        self.lock = threading.Lock()
        self.recorded = self.acknowledged = 0
        self.dropped = self.damaged = 0
        self.problem = ""
        self.ended = False
        self._limit, self._limit_bytes = limit, limit * _EVENT_BYTES
        self._crowded = crowded
        self._told = False
        self._fresh: deque[bytes] = deque()
        self._waiting = self._waiting_bytes = 0  # of fresh and parked
        self._parked: deque[list[bytes]] = deque()
        self._ahead: deque[list[bytes]] = deque()
        self._loaded = 0  # seq of the last event in ahead, or before it
        self._kept: deque[list[bytes]] = deque()
        self._kept_events = self._kept_bytes = 0
        self._digest = self._sent_digest = NO_DIGEST
        self._relink = False
        self._spill: SpillFile | None = None
        self._file_last = 0  # seq of the last event in the file
        self._file = asyncio.Lock()
        self._spilling = False
        self._unread = 0  # reads of the file that failed, one after the other

    def __len__(self) -> int:
        """Events not acknowledged."""
        return self.recorded - self.acknowledged

    @property
    def held(self) -> tuple[int, int]:
        """Events in memory, waiting or kept, and about how many bytes they take."""
        ahead = sum(map(len, self._ahead))
        size = sum(len(payload) + _OVERHEAD for batch in self._ahead for payload in batch)
        events = self._waiting + ahead + self._kept_events
        return events, self._waiting_bytes + size + self._kept_bytes

    @property
    def spilled(self) -> int:
        """Events of the spill file that were not sent yet."""
        return max(0, self._file_last - max(self._loaded, self.acknowledged))

    @property
    def spill_bytes(self) -> int:
        """Size of the spill file; 0 where there is none."""
        return self._spill.size if self._spill is not None else 0

    @property
    def needs_file(self) -> bool:
        """The next events are in the spill file: `load` them."""
        return not self._ahead and (self._spilling or self._file_last > self._loaded)

    def add(self, body: bytes) -> None:
        """Takes an event in; its seq is `recorded + 1`. It is dropped when there is no room."""
        size = len(body) + _OVERHEAD
        if (
            self.dropped
            or self._waiting >= self._limit
            or self._waiting_bytes + size > self._limit_bytes
        ):
            self._drop()
            return
        self._fresh.append(body)
        self.recorded += 1
        self._waiting += 1
        self._waiting_bytes += size
        if not self._told and self._half_full():
            self._told = True
            if self._crowded is not None:
                self._crowded()

    def allow(self, count: int) -> None:
        """Makes room for so many events more: what a service holds is adopted in one tick."""
        self._limit += count
        self._limit_bytes += count * _EVENT_BYTES

    def add_last(self, body: bytes) -> None:
        """Takes in the end of a process whose outbox was full, though there is no room; as `add`."""
        self._fresh.append(body)
        self.recorded += 1
        self._waiting += 1
        self._waiting_bytes += len(body) + _OVERHEAD
        self.ended = True

    def _half_full(self) -> bool:
        return self._waiting * 2 > self._limit or self._waiting_bytes * 2 > self._limit_bytes

    def _drop(self) -> None:
        self.dropped += 1
        if self.dropped == 1:
            log.error(
                "the outbox is full, events are dropped from now on; the service goes on",
                process=self.process, last_kept_seq=self.recorded, waiting=len(self),
                spill=self.problem or ("too slow" if self._spill else "none: no spill_dir is set"),
            )  # fmt: skip

    # --- to Redis -------------------------------------------------------------------------------

    def batch(self) -> tuple[int, list[bytes]]:
        """The next events to send: seq of the first, and the encoded events.

        The same ones again until `acknowledge` is called. Empty when nothing waits, or when
        `needs_file`.
        """
        if not self._ahead and not self.needs_file:
            if self._parked:
                self._put_ahead(self._unpark())
            elif self._fresh:
                if self._relink:
                    self._digest, self._relink = self._sent_digest, False
                self._take_ahead()
        return self.acknowledged + 1, self._ahead[0] if self._ahead else []

    def prepare(self) -> None:
        """Makes the next batch ready while one is on its way, if it is a full one."""
        in_memory = not (self._parked or self._spilling or self._relink)
        if in_memory and self._file_last <= self._loaded and len(self._fresh) >= BATCH:
            self._take_ahead()

    def _take_ahead(self) -> None:
        taken = self._take()
        self._leave(taken)
        self._put_ahead(taken)

    def _take(self) -> list[bytes]:
        """Gives the next fresh events their digests."""
        bodies: list[bytes] = []
        size, fresh = 0, self._fresh
        while fresh and len(bodies) < BATCH and size < BATCH_BYTES:
            body = fresh.popleft()
            bodies.append(body)
            size += len(body)
        batch, self._digest = seal_all(bodies, self._digest)
        return batch

    def _leave(self, batch: list[bytes]) -> None:
        """Events are no longer among those that wait in memory."""
        with self.lock:
            self._waiting -= len(batch)
            if self._waiting == 0:
                self._waiting_bytes = 0
            else:
                sealed = len(batch) * (len(',"digest":""') + 32)
                self._waiting_bytes -= sum(map(len, batch)) - sealed + len(batch) * _OVERHEAD
            if not self._half_full():
                self._told = False

    def _unpark(self) -> list[bytes]:
        batch = self._parked.popleft()
        self._leave(batch)
        return [self._linked(payload) for payload in batch] if self._relink else batch

    def _put_ahead(self, batch: list[bytes]) -> None:
        self._ahead.append(batch)
        self._loaded += len(batch)
        self._sent_digest = split_digest(batch[-1])[1]

    def acknowledge(self) -> None:
        """The batch is in the log. It is kept on for a while, in case Redis forgets it."""
        batch = self._ahead.popleft()
        self.acknowledged += len(batch)
        self._kept.append(batch)
        self._kept_events += len(batch)
        self._kept_bytes += sum(map(len, batch)) + _OVERHEAD * len(batch)
        while self._kept_events > KEPT_EVENTS or self._kept_bytes > KEPT_BYTES:
            oldest = self._kept.popleft()
            self._kept_events -= len(oldest)
            self._kept_bytes -= sum(map(len, oldest)) + _OVERHEAD * len(oldest)

    def rewind(self, expected: int) -> int:
        """Redis expects `expected` next: what it has forgotten will be sent again.

        Returns:
            How many events that are.

        Raises:
            Forgotten: some of them are no longer kept.
        """
        first_kept = self.acknowledged - self._kept_events + 1
        if expected < first_kept:
            raise Forgotten(
                f"the log expects seq {expected} next, and events are kept from {first_kept} on"
            )
        again = self.acknowledged + 1 - expected
        while self.acknowledged >= expected:
            batch = self._kept.pop()
            self.acknowledged -= len(batch)
            self._kept_events -= len(batch)
            self._kept_bytes -= sum(map(len, batch)) + _OVERHEAD * len(batch)
            self._ahead.appendleft(
                batch
            )  # Its first ones may be in the log: they are skipped there.
        return again

    # --- the spill file -------------------------------------------------------------------------

    async def open_spill(self, folder: Path, limit: int = SPILL_LIMIT) -> None:
        """Makes the spill file. When that fails it is said once, and memory is all there is."""
        try:
            self._spill = await _in_thread(SpillFile.create, folder, self.process, limit)
        except OSError as error:
            self.problem = error.strerror or str(error)
            log.error(
                "no spill file can be made; events wait in memory only while Redis is away",
                folder=str(folder), process=self.process, error=self.problem,
            )  # fmt: skip

    def resume(self, spill: SpillFile, *, acknowledged: int, digest: str) -> None:
        """Takes over the spill file of a dead process, to send what is in it."""
        self._spill = spill
        self.acknowledged = self._loaded = acknowledged
        self._sent_digest = digest
        self._file_last = self.recorded = acknowledged + 1  # there is something, until it was read

    async def relieve(self, *, wholly: bool = False) -> bool:
        """Moves what waits in memory into the spill file, when memory is half full.

        Args:
            wholly: whether memory is full or not, and wait for the disk: the process ends.

        Returns:
            False when it cannot be written now; the events stay where they are.
        """
        async with self._file:
            if self._spill is None:
                return False
            if not (wholly or self._parked or self._half_full()):
                return True
            self._spilling = True
            try:
                # From here on the file alone tells the next incarnation what was not sent.
                if self._file_last <= self._loaded:
                    await self._copy_ahead()
                while self._parked or self._fresh:
                    await self._move_one()
                if wholly:
                    await _in_thread(self._spill.sync)
            except OSError as error:
                self._fail(error)
                return False
            finally:
                self._spilling = False
            self.problem = ""
            return True

    async def _copy_ahead(self) -> None:
        assert self._spill is not None
        first = self.acknowledged + 1
        for batch in list(self._ahead):
            await _in_thread(self._spill.append, first, batch)
            first += len(batch)
            self._file_last = first - 1

    async def _move_one(self) -> None:
        assert self._spill is not None
        if not self._parked:
            self._parked.append(self._take())
        batch = self._parked[0]
        first = max(self._file_last, self._loaded) + 1
        await _in_thread(self._spill.append, first, batch)
        self._parked.popleft()
        self._file_last = first + len(batch) - 1
        self._leave(batch)

    def _fail(self, error: OSError) -> None:
        if not self.problem:
            log.error(
                "the spill file cannot be written; events wait in memory",
                process=self.process, waiting=self._waiting, limit=self._limit,
                error=error.strerror or str(error),
            )  # fmt: skip
        self.problem = error.strerror or str(error)

    async def load(self) -> None:
        """Reads the next events from the spill file, so that `batch` has them.

        Raises:
            SpillUnreadable: it cannot be read now.
        """
        async with self._file:
            if self._spill is None:
                return
            skipped = self._spill.skipped
            try:
                found = await _in_thread(self._spill.read, BATCH)
            except OSError as error:
                self._unread += 1
                if self._unread < READ_TRIES:
                    raise SpillUnreadable(
                        f"the spill file {self._spill.path} cannot be read now: {error}"
                    ) from error
                log.error(
                    "the spill file cannot be read, its events are given up",
                    path=str(self._spill.path), process=self.process, error=str(error),
                )  # fmt: skip
                found = []
            self._unread = 0
            if self._spill.skipped > skipped:
                log.error(
                    "the spill file is torn or damaged; the events before and after are sent",
                    path=str(self._spill.path), process=self.process,
                    bytes=self._spill.skipped - skipped,
                )  # fmt: skip
            batch: list[bytes] = []
            for seq, payload in found:
                expected = self._loaded + len(batch) + 1
                batch += [self._stand_in(lost) for lost in range(expected, seq)]
                if seq >= expected:
                    batch.append(self._link(payload))
            if not found:
                # The end. What the file should have had, and has not, was in what is damaged.
                last = self._spill.last_seq
                batch += [self._stand_in(lost) for lost in range(self._loaded + 1, last + 1)]
                self._file_last = self._loaded + len(batch)
                if not self._spill.last_seq:
                    self.recorded = self._file_last
            if batch:
                self._put_ahead(batch)
                if not self._spill.last_seq:  # of a dead process: who knows how many there are
                    self._file_last = self.recorded = self._loaded + 1

    def _link(self, payload: bytes) -> bytes:
        """A payload as read; with a new digest when one before it was lost."""
        if self._relink:
            return self._linked(payload)
        self._sent_digest = split_digest(payload)[1]
        return payload

    def _linked(self, payload: bytes) -> bytes:
        linked, self._sent_digest = seal(split_digest(payload)[0], self._sent_digest)
        return linked

    def _stand_in(self, seq: int) -> bytes:
        """Stands for an event whose record was damaged, so that those after it can be in the log."""
        self.damaged += 1
        self._relink = True
        row = EventRow(
            "cleanup_failed", f"process/{self.process}", self.process, seq, time.time(),
            reason="stands for an event that was lost: damaged in the spill file of its process",
        )  # fmt: skip
        payload, self._sent_digest = seal(encode_body(row), self._sent_digest)
        return payload

    async def sweep(self) -> None:
        """Empties the spill file once everything in it was acknowledged."""
        if self._spill is None or not self._spill.size or self.acknowledged < self._file_last:
            return
        async with self._file:
            if self._spill is not None and self.acknowledged >= self._file_last:
                # What stays when that fails was sent, and is passed over by its seq.
                with contextlib.suppress(OSError):
                    await _in_thread(self._spill.reset)

    async def close(self, *, keep: bool) -> None:
        """Lets the spill file go; it stays for the next incarnation if `keep`."""
        async with self._file:
            spill, self._spill = self._spill, None
            if spill is not None:
                await _in_thread(spill.close if keep else spill.remove)


async def _in_thread(work: Callable[..., T], *args: Any) -> T:
    """Runs `work` in a thread, and does not leave before it has ended, even when cancelled.

    A write that went on after its lock was released would meet the next one, or a closed file.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise

"""The view: the whole fleet, read from Redis and kept up to date while somebody looks.

Workers share the partitions by leases, so what one of them acts for is not the fleet. The view has a
tail of its own over all partitions and reads the inventories, and never writes an order. It is opened
by the first look and dropped `IDLE_SECONDS` after the last one, so a worker that nobody looks at pays
nothing. Judging drift costs time of the worker's own event loop: after each round it rests nine times
as long as the round took.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from math import inf

from reconciler.desired import desired_until
from reconciler.drift import Drift, find_drift
from reconciler.fleet import Fleet, read_workers, recorded_policy
from reconciler.fold_page import Folded
from reconciler.metrics import Metrics
from reconciler.plan import Plan, make_plan
from reconciler.policy import Policy
from reconciler.tail import Tail
from reconciler.web.errors import ApiError
from reconciler.web.lifetimes import Lifetimes
from store.connection import BLOCK_MS
from store.errors import PolicyError
from store.inbox import Inbox
from store.inventories import InventoryReader
from store.lease import holders
from store.log import EventLog, Page
from store.logs import get_logger
from store.messages import Inventory
from store.namespace import Namespace
from store.position import ms_of
from store.refusals import Unavailable
from store.retention import read_covered
from store.tasks import check_cancelled, end_tasks

log = get_logger("reconciler.web")

IDLE_SECONDS = 60.0
SPACING_SECONDS = 0.25
FULL_SECONDS = 5.0
AGAIN_SECONDS = 0.5
OPEN_SECONDS = 5.0
REST = 9
PAST_EVENTS = 500_000
"""Events in the streams that are read again for the lifetimes that ended before a snapshot."""


class FleetView:
    """The fleet of a namespace for whoever looks.

    Args:
        namespace: which.
        policy: to judge by where the namespace records none that can be read.

    Attributes:
        fleet: as of the last round; None before the first.
        leases: partition -> the worker that holds it.
        lifetimes: of all resources, live and ended.
        version: grows with each round that changed something.
        epoch: another one each time the view was opened; numbers of one mean nothing in another.
        trouble: why it is not up to date; empty when it is.
        watchers: how many streams are open.
    """

    def __init__(self, namespace: Namespace, policy: Policy) -> None:
        self.namespace = namespace
        self.watchers = 0
        self.version = 0
        self._default_policy = policy
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._changed = asyncio.Event()
        self._clear()

    def _clear(self) -> None:
        self.epoch = uuid.uuid4().hex[:8]
        self.trouble = ""
        self.fleet: Fleet | None = None
        self.leases: dict[int, str] = {}
        self.lifetimes = Lifetimes()
        self._remembered = False
        self._ready = asyncio.Event()
        self._wake = asyncio.Event()
        self._touched: set[str] = set()
        self._inventories: dict[str, Inventory] = {}
        self._found: dict[str, tuple[Drift, Plan]] = {}
        self._due: dict[str, float] = {}
        self._full_at = 0.0
        self._last_look = time.monotonic()
        self._reader = InventoryReader(self.namespace)
        self._inbox = Inbox(self.namespace)
        self._log = EventLog(self.namespace.store, self.namespace)
        self.tail = Tail(self._log, Metrics(), self._seen)

    # --- for those who look -----------------------------------------------------------------------

    async def look(self) -> Fleet:
        """The fleet now; opens the view if nobody has looked for a while.

        Raises:
            ApiError: 503 while the log is still being read, or Redis is away.
        """
        self._last_look = time.monotonic()
        if self._task is None and not self._closing:
            self._clear()
            self._task = asyncio.create_task(self._run(), name="web view")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPEN_SECONDS):
                await self._ready.wait()
        if self.fleet is None:
            why = self.trouble or f"{self.tail.state.events} events of the log were read so far"
            raise ApiError(
                503, "not_ready", f"the fleet cannot be shown yet: {why}; try again",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        return self.fleet

    async def changed(self, version: int, timeout: float) -> bool:
        """Waits until there is something newer than `version`; False when there was not, or the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.version <= version and not self._closing:
                    await self._changed.wait()
        return self.version > version and not self._closing

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps the view open meanwhile."""
        self.watchers += 1
        try:
            yield
        finally:
            self.watchers -= 1
            self._last_look = time.monotonic()

    async def close(self) -> None:
        """Ends the view, and everybody who waits on it."""
        self._closing = True
        self._announce()
        if self._task is not None:
            await end_tasks([self._task])

    @property
    def closing(self) -> bool:
        return self._closing

    # --- the life of the view -----------------------------------------------------------------------

    async def _run(self) -> None:
        """Follows the fleet until nobody looks. Its faults are its own: the worker goes on."""
        try:
            partitions = self.namespace.all_partitions()
            await self._until_there(lambda: self._inbox.open(list(partitions)))
            await self._until_there(lambda: self.tail.add(partitions))
            await self._until_there(self.tail.catch_up)
            await self._until_there(self._remember)
            async with asyncio.TaskGroup() as group:
                work = [group.create_task(self._follow()), group.create_task(self._listen())]
                while self.watchers or time.monotonic() - self._last_look < IDLE_SECONDS:
                    check_cancelled()
                    await self._round()
                for task in work:
                    task.cancel()
        except Exception:
            log.exception("the view of the page failed; it is opened afresh at the next look")
        finally:
            self._task = None
            self._clear()

    async def _remember(self) -> None:
        """Takes up the lifetimes of before, from what is still in the streams.

        The fold begins with a snapshot, which has nothing of what ended earlier. Where the streams are
        too long to be read again for that, the timeline begins with what is alive now.
        """
        store, keys = self.namespace.store, self.namespace.keys
        self.lifetimes = lifetimes = Lifetimes()
        positions = dict(self.tail.positions)
        lengths = await store.batch([("XLEN", keys.partition(p).log) for p in positions])
        total = sum(length for length in lengths if isinstance(length, int))
        if total > PAST_EVENTS:
            lifetimes.begin(await store.now_ms())
            positions = {}
        for partition, position in positions.items():
            trimmed = (await read_covered(self.namespace, partition)).trimmed
            lifetimes.begin(ms_of(trimmed))
            async for page in self._log.pages(partition, trimmed, until=position):
                for event, at_ms in zip(page.events, page.times, strict=True):
                    lifetimes.see(event, at_ms)
                await asyncio.sleep(0)
        lifetimes.seed(self.tail.state)
        self._remembered = True

    async def _until_there(self, step: Callable[[], Awaitable[object]]) -> None:
        """Does one step of opening; while Redis is away, again and again."""
        while True:
            check_cancelled()
            try:
                await step()
                return
            except Unavailable as error:
                self.trouble = f"Redis is away ({error})"
                await asyncio.sleep(0.5)

    async def _follow(self) -> None:
        while True:
            check_cancelled()
            with contextlib.suppress(*Unavailable):
                await self.tail.wait(block_ms=BLOCK_MS)
                continue
            await asyncio.sleep(0.5)

    async def _listen(self) -> None:
        """Hears which inventories changed."""
        while True:
            check_cancelled()
            with contextlib.suppress(*Unavailable):
                for _, note in await self._inbox.wait():
                    if note.kind == "inventory" and note.process:
                        self._touch(note.process)
                continue
            await asyncio.sleep(0.5)

    def _seen(self, page: Page, folded: Folded) -> None:
        if self._remembered:
            for event, at_ms in zip(page.events, page.times, strict=True):
                self.lifetimes.see(event, at_ms)
        for process in folded.processes:
            self._touch(process)

    def _touch(self, process: str) -> None:
        self._touched.add(process)
        self._wake.set()

    async def _round(self) -> None:
        """Waits for something to happen, brings the fleet up to date, and rests."""
        if self.fleet is not None:
            soonest = min(self._due.values(), default=inf)
            longest = AGAIN_SECONDS if self.trouble else FULL_SECONDS
            delay = max(0.0, min(longest, (soonest - self.fleet.now_ms) / 1000))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._wake.wait()
        self._wake.clear()
        began = time.perf_counter()
        try:
            await self._refresh()
            self.trouble = ""
        except Unavailable as error:
            self.trouble = f"Redis is away ({error}): this is the state of before"
        self._announce()
        took = time.perf_counter() - began
        await asyncio.sleep(max(SPACING_SECONDS, REST * took))

    def _announce(self) -> None:
        self.version += 1
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    # --- one round ----------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        store, state = self.namespace.store, self.tail.state
        now = await store.now_ms()
        policy = await self._policy()
        touched, self._touched = self._touched, set()
        full = time.monotonic() >= self._full_at or (
            self.fleet is not None and policy != self.fleet.policy
        )
        if full:
            touched |= set(state.processes)
            self._full_at = time.monotonic() + FULL_SECONDS
        touched |= {process for process, due in self._due.items() if due <= now}
        try:
            for process in touched:
                await self._judge(process, policy, now)
                await asyncio.sleep(0)  # The worker's own work comes first.
        except BaseException:
            self._touched |= touched
            raise
        for process in [p for p in self._found if p not in state.processes]:
            self._forget(process)
        self.leases = {
            partition: token.rpartition(" ")[0]
            for partition, token in (
                await holders(self.namespace, self.namespace.all_partitions())
            ).items()
            if token
        }
        found = [self._found[p] for p in state.processes if p in self._found]
        summaries = {
            p: summary
            for p in self._inventories
            if (summary := self._reader.summary(p)) is not None
        }
        self.fleet = Fleet(
            state=state,
            inventories=self._inventories,
            summaries=summaries,
            policy=policy,
            drift=Drift(
                tuple(item for drift, _ in found for item in drift.orphans),
                tuple(item for drift, _ in found for item in drift.dangling),
                tuple(item for drift, _ in found for item in drift.ghosts),
                tuple(item for drift, _ in found for item in drift.untracked),
            ),
            plan=Plan(
                tuple(step for _, plan in found for step in plan.steps),
                tuple(waiting for _, plan in found for waiting in plan.waiting),
            ),
            workers=await read_workers(self.namespace),
            quarantined=await self._log.quarantined(),
            now_ms=now,
        )
        self._ready.set()

    async def _judge(self, name: str, policy: Policy, now: int) -> None:
        """Reads one process's inventory, brings the fold up to it, and finds its drift."""
        process = self.tail.state.processes.get(name)
        if process is None:
            self._forget(name)
            return
        inventory = await self._reader.read(name)
        if inventory is None:
            self._inventories.pop(name, None)
        else:
            self._inventories[name] = inventory
            if inventory.as_of > process.seq:
                await self.tail.catch_up([self.namespace.partition_of(name)])
        if name not in self.tail.state.processes:
            self._forget(name)
            return
        state, inventories = self.tail.state, self._inventories
        drift = find_drift(state, inventories, policy, now, processes=[name])
        plan = make_plan(state, drift, inventories, policy, now)
        self._found[name] = drift, plan
        limits = [at for at in desired_until(process, policy).values() if at > now]
        limits += [waiting.until_ms for waiting in plan.waiting if waiting.until_ms > now]
        self._due[name] = min(limits, default=inf)

    def _forget(self, process: str) -> None:
        self._found.pop(process, None)
        self._inventories.pop(process, None)
        self._due.pop(process, None)
        self._reader.forget(process)

    async def _policy(self) -> Policy:
        try:
            return await recorded_policy(self.namespace)
        except PolicyError:
            return self._default_policy

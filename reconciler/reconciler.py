"""The reconciler: follows the log, finds drift, sends orders. The pure core with its I/O around it.

It is level-triggered. Whatever wakes it (an event, a changed inventory, a moment at which something
ceases to be desired, the schedule), it looks at the whole state of the processes concerned, never at
what the event said; a lost wake-up costs a delay, not a leak. What it decides it writes under the
lease of the partition, and it learns of outcomes from the log, like everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Self

from opentelemetry.context import Context
from opentelemetry.trace import use_span

from reconciler.fold_page import Folded
from reconciler.forced import Forced
from reconciler.housekeeping import Housekeeping
from reconciler.listener import Listener
from reconciler.metrics import Metrics
from reconciler.orders import Orders
from reconciler.outlook import Outlook
from reconciler.partitions import Partitions
from reconciler.plan import Plan
from reconciler.policy import Policy
from reconciler.result import Result
from reconciler.rules import guarded
from reconciler.schedule import ARCHIVE_SECONDS, FULL_PASS_SECONDS, by_the_clock
from reconciler.session_retention import SessionRetention
from reconciler.tail import Tail
from reconciler.vitals import Vitals
from reconciler.watch import Watches
from store.connection import BLOCK_MS, Store
from store.errors import Fenced, SequenceGap, UnknownProcess
from store.event import check_name, process_id
from store.inbox import Inbox
from store.lease import Lease
from store.log import EventLog, Page
from store.logs import get_logger
from store.messages import HostPort, Summary
from store.namespace import DEFAULT_NAMESPACE, Namespace, open_namespace
from store.refusals import Unavailable
from store.tasks import check_cancelled, end_tasks
from store.tracing import tracer

log = get_logger("reconciler")

LEASE_SECONDS = 10.0
_PASS_SPACING = 0.002
_AGAIN_SECONDS = 0.2
_FAILED_SECONDS = 5.0
_CLOCK_SECONDS = 1.0


class Reconciler:
    """Acts for the partitions of a namespace whose lease it can get.

    Args:
        store: an open store.
        namespace: of the log.
        policy: what is desired.
        hosts: hosts in this very process, which are reached directly instead of through Redis.
        name: of the worker, as it stands in the log.
        lease_seconds: after so long at the latest another worker acts for what this one held, when it is
            not heard of any more.
        partitions: how many the namespace must have; None takes what is recorded, or the default.
        full_pass_seconds, archive_seconds: see `by_the_clock`.

    Raises:
        TypeError: it is no store, or no policy.
        ValueError: the name cannot be one.

    `async with Reconciler(store, policy=policy):` runs it in the background.

    Attributes:
        outlook: what it knows of each process.
    """

    def __init__(
        self,
        store: Store,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        policy: Policy | None = None,
        hosts: Iterable[HostPort] = (),
        name: str = "worker",
        lease_seconds: float = LEASE_SECONDS,
        partitions: int | None = None,
        full_pass_seconds: float = FULL_PASS_SECONDS,
        archive_seconds: float = ARCHIVE_SECONDS,
    ) -> None:
        if not isinstance(store, Store):
            raise TypeError(
                f"a Reconciler takes an open store: `async with connect(url) as store:`, not {store!r:.80}"
            )
        if not isinstance(policy, Policy | None):
            raise TypeError(f"policy is a Policy(…), not {policy!r:.80}")
        self.policy = guarded(policy or Policy())
        self.metrics = Metrics()
        self.process = process_id(check_name(name))
        self.name = name
        self._store = store
        self._namespace_name = namespace
        self._wanted_partitions = partitions
        self._lease_seconds = lease_seconds
        self._full_pass_seconds, self._archive_seconds = full_pass_seconds, archive_seconds
        self._hosts = tuple(hosts)
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._clock_offset_ms = 0
        self._lag_ms = self._longest_ms = 0
        self._run_id = ""

    # --- life -----------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Opens the namespace.

        Raises:
            NamespaceError: it does not fit.
        """
        self.namespace: Namespace = await open_namespace(
            self._store, self._namespace_name, self._wanted_partitions
        )
        self.log = EventLog(self._store, self.namespace)
        watches = Watches(self.policy)
        self.tail = Tail(self.log, self.metrics, self._seen, watches.fold_page)
        self.outlook = Outlook(self.namespace, self.tail, watches, self.policy, self.now_ms)
        self.housekeeping = Housekeeping(
            self.log, self.tail, self.metrics, lambda: self.leases, self.now_ms
        )
        self.retention = SessionRetention(
            self.namespace, lambda: self._acting.channels, self.policy
        )
        inbox = Inbox(self.namespace)
        self._acting = Partitions(
            self.namespace,
            self.tail,
            inbox,
            name=self.name,
            process=self.process,
            lease_seconds=self._lease_seconds,
            metrics=self.metrics,
            touch=self._touch,
            forget=self._forget,
        )
        acting, tail, outlook = self._acting, self.tail, self.outlook
        self._vitals = Vitals(
            self.namespace, tail, acting, self.metrics, self.now_ms, self._longest_wait
        )
        self._orders = Orders(self.namespace, acting, tail, self.policy, self.metrics, self._hosts)
        self._forced = Forced(tail, outlook, self._orders, acting, self.policy)
        self._listener = Listener(
            self.namespace,
            inbox,
            acting,
            self.housekeeping,
            self.now_ms,
            self.hear_of,
            self.reconcile,
        )
        await self._set_clock()
        self._run_id = await self._store.run_id()
        return self

    async def __aenter__(self) -> Self:
        await self.open()
        await self.record_policy()
        self._running = asyncio.create_task(self.run(), name="reconciler")
        self._running.add_done_callback(_report_end)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end_tasks([self._running])

    async def record_policy(self) -> None:
        """Says in the namespace which policy is in force: for the commands."""
        policy = self.policy.model_dump_json(exclude_unset=True)
        await self._store.redis.set(self.namespace.keys.policy, policy)

    async def run(self) -> None:
        """Takes leases and reconciles, until it is cancelled; then gives the leases back."""
        acting = self._acting
        clock = by_the_clock(
            self,
            full_pass_seconds=self._full_pass_seconds,
            archive_seconds=self._archive_seconds,
        )
        try:
            async with clock, asyncio.TaskGroup() as group:
                for work in (
                    *(acting.keep, acting.open, acting.watch_hosts),
                    *(self._follow, self._listener.listen, self._reconcile_changes),
                    *(self._keep_clock, self._vitals.watch),
                ):
                    group.create_task(work(), name=f"reconciler {work.__name__}")
        finally:
            await self.release()

    async def release(self) -> None:
        """Gives all leases back."""
        await self._acting.release()

    @property
    def partitions(self) -> list[int]:
        """The partitions it acts for."""
        return sorted(self._acting.channels)

    @property
    def leases(self) -> dict[int, Lease]:
        """The leases it holds, by partition."""
        return {partition: channel.lease for partition, channel in self._acting.channels.items()}

    def summaries(self) -> list[Summary]:
        """What the live processes last said of themselves."""
        found = [self.outlook.inventories.summary(p) for p in self.tail.state.processes]
        return [summary for summary in found if summary is not None]

    def lag_seconds(self) -> float:
        """Age of the newest event when it was folded."""
        return self._lag_ms / 1000

    def _longest_wait(self) -> float:
        longest, self._longest_ms = self._longest_ms, 0
        return longest / 1000

    def observe(self) -> None:
        """Brings the gauges of its metrics up to date: before they are read."""
        metrics = self.metrics
        metrics.observe_state(self.tail.state, self.summaries())
        metrics.observe_drift(self.outlook.drift_found.values(), self.outlook.drift_ages())
        metrics.ready.set(not self.unready())

    def unready(self) -> list[str]:
        """Why it cannot be relied on now; empty when it can."""
        reason = self._acting.unready()
        return [reason] if reason else []

    # --- leases ---------------------------------------------------------------------------------

    async def keep_leases(self) -> None:
        """Renews the leases it has, takes its share, and reads the log of what is new."""
        await self._set_clock()
        await self._acting.look()
        await self._acting.open_gained()

    @asynccontextmanager
    async def borrowed(self, partitions: Sequence[int]) -> AsyncIterator[list[int]]:
        """Acts for those of some partitions that no worker holds, for as long as this lasts.

        Yields:
            Those that it got.
        """
        async with self._acting.borrowed(partitions):
            yield self.partitions

    def _partition(self, process: str) -> int:
        return self.namespace.partition_of(process)

    async def _set_clock(self) -> None:
        self._clock_offset_ms = await self._store.now_ms() - int(time.time() * 1000)

    def now_ms(self) -> int:
        """The time of Redis, in ms, as far as known without asking."""
        return int(time.time() * 1000) + self._clock_offset_ms

    # --- the loops ------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            check_cancelled()
            with contextlib.suppress(*Unavailable):
                await self.tail.wait(block_ms=BLOCK_MS)
                continue
            self.metrics.redis_away("log")
            await asyncio.sleep(0.2)

    def _seen(self, page: Page, folded: Folded) -> None:
        """A page was folded."""
        if page.times and page.partition in self._acting.channels:
            now = self.now_ms()
            self._lag_ms = max(0, now - page.times[-1])
            self._longest_ms = max(self._longest_ms, now - page.times[0])
        if folded.told:
            self._touch(folded.told)
        for at_ms, event in folded.settled:
            self._orders.heard(event, at_ms)

    def hear_of(self, processes: Iterable[str]) -> None:
        """The inventories of these may have changed."""
        self.outlook.hear_of(processes)
        self._touch(processes)

    def _touch(self, processes: Iterable[str]) -> None:
        self._changed.update(processes)
        self._wake.set()

    async def _reconcile_changes(self) -> None:
        """Runs a pass over what changed, and over what became due meanwhile."""
        while True:
            check_cancelled()
            delay = (min(self.outlook.due.values(), default=inf) - self.now_ms()) / 1000
            if not self._wake.is_set() and delay > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(delay, 3600)):
                        await self._wake.wait()
            self._wake.clear()
            now = self.now_ms()
            changed, self._changed = self._changed, set()
            changed.update(process for process, due in self.outlook.due.items() if due <= now)
            for some in self._together(changed):
                await self._try_pass(some)
            # Events of one burst belong in one pass.
            await asyncio.sleep(_PASS_SPACING)

    async def full_pass(self) -> None:
        """Looks at every process, whatever has or has not been heard of it."""
        self.hear_of(self.tail.state.processes)

    def _together(self, processes: set[str]) -> list[set[str]]:
        """What one pass looks at: everything; in a cluster, where one node may be away, a partition."""
        if not self._store.is_cluster:
            return [processes]
        by_partition: dict[int, set[str]] = {}
        for process in processes:
            by_partition.setdefault(self._partition(process), set()).add(process)
        return list(by_partition.values())

    async def _try_pass(self, processes: set[str]) -> None:
        try:
            await self.run_pass(processes)
        except (*Unavailable, SequenceGap) as error:
            self.metrics.redis_away("pass")
            log.warning("pass put off: Redis is away, or forgot", error=str(error))
            self._changed |= processes
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._wake.set)
        except Fenced as error:
            # Whoever has that lease now looks at all of it; the other partitions are still ours.
            log.warning("pass given up: the lease is gone", error=str(error))
            self._touch(processes)
        except Exception:
            if len(processes) > 1:
                # What is wrong with one must not hold up the others.
                for process in processes:
                    await self._try_pass({process})
                return
            log.exception("a pass failed; it is tried again", process=next(iter(processes), None))
            later = self.now_ms() + int(_FAILED_SECONDS * 1000)
            self.outlook.due.update(dict.fromkeys(processes, later))

    async def _keep_clock(self) -> None:
        while True:
            check_cancelled()
            await asyncio.sleep(_CLOCK_SECONDS)
            with contextlib.suppress(*Unavailable):
                await self._set_clock()
                await self._fold_afresh()

    async def _fold_afresh(self) -> None:
        """Begins anew with partitions of which Redis forgot what was read, as after a failover.

        When another server answers, or the same one was started again, what it lacks may be hidden
        behind what was written since: everything is folded afresh.
        """
        if self._acting.opening:
            return  # Part of what is being read may be of the old server: it is asked again later.
        async with self._lock:
            run_id = await self._store.run_id()
            before, self._run_id = self._run_id, run_id
            positions = {p: at for p, at in self.tail.positions.items() if p in self.partitions}
            if run_id != before and before:
                gone = list(positions)
            else:
                gone = await self.log.forgotten(positions)
            if gone:
                log.warning("Redis failed over or was restarted; folding afresh", partitions=gone)
                self._acting.begin_anew(gone)

    # --- a pass -----------------------------------------------------------------------------------

    async def run_pass(self, processes: Iterable[str]) -> Plan:
        """Looks at some processes and sends the orders that are due.

        Raises:
            Fenced: a lease is no longer held.
        """
        async with self._lock:
            began, began_ns = time.perf_counter(), time.time_ns()
            chosen = [p for p in processes if self._partition(p) in self._acting.channels]
            await self.outlook.refresh(chosen, self._acting)
            drift, plan = self.outlook.look(chosen)
            if plan.due:  # A pass that finds nothing to do is not worth a span.
                about = {
                    "agent_reconciler.processes": len(chosen),
                    "agent_reconciler.orders": len(plan.due),
                }
                span = tracer.start_span("pass", Context(), attributes=about, start_time=began_ns)
                with use_span(span, end_on_exit=True):
                    await self._orders.send(plan.due)
            self.outlook.take_note(chosen, drift, plan)
            self.metrics.pass_seconds.observe(time.perf_counter() - began)
            return plan

    def _forget(self, processes: Iterable[str]) -> None:
        """These are no longer ours to look at."""
        gone = set(processes)
        for process in gone:
            self.outlook.forget(process)
        self._orders.forget(gone)

    # --- a forced reconciliation --------------------------------------------------------------------

    async def reconcile(
        self,
        processes: Sequence[str] | None = None,
        *,
        dry_run: bool = False,
        partition: int | None = None,
    ) -> Result:
        """Reconciles now, from a fresh inventory, and waits for the outcomes.

        Args:
            processes: only these; None is all that it acts for.
            dry_run: change nothing, list what would be done.
            partition: only processes in this one.

        Raises:
            UnknownProcess: one of the processes is not alive in the log.
            Fenced: the lease was lost meanwhile.
        """
        await self.tail.catch_up()
        alive = self.tail.state.processes
        for process in processes or ():
            if process not in alive:
                raise UnknownProcess(
                    f"process {process} is not alive in namespace {self.namespace.name}"
                )
        chosen = [
            p for p in (processes or alive)
            if self._partition(p) in self._acting.channels and partition in (None, self._partition(p))
        ]  # fmt: skip
        about = {"agent_reconciler.processes": len(chosen), "agent_reconciler.dry_run": dry_run}
        async with self._lock:
            with tracer.start_as_current_span("forced pass", attributes=about):
                result = await self._forced.reconcile(chosen, dry_run=dry_run)
        if not dry_run:
            self._touch(chosen)
        return result


def _report_end(task: asyncio.Task[None]) -> None:
    """A reconciler in the background must not end unnoticed."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the reconciler ended", exc_info=error)

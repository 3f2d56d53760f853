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
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any, Self

import structlog

from reconciler.desired import desired_until
from reconciler.drift import Drift, find_drift
from reconciler.metrics import Metrics
from reconciler.plan import Plan, Step, Waiting, make_plan
from reconciler.policy import Policy
from reconciler.result import Result
from reconciler.tail import Tail
from store.channel import Inbox, InventoryReader, WorkerChannel, answer
from store.connection import BLOCK_MS, Store, Unavailable, check_cancelled
from store.errors import Fenced, ReconcilerError, SequenceGap, UnknownProcess
from store.event import EventRow, Scalar, process_id
from store.lease import HeldByOther, Lease, release_lease, take_lease
from store.log import EventLog
from store.messages import Action, HostPort, Inventory, Note, Order, Summary, encode_message
from store.namespace import DEFAULT_NAMESPACE, Namespace, open_namespace

log = structlog.get_logger("reconciler")

LEASE_SECONDS = 10.0
_FRESH_SECONDS = 3.0
_OUTCOME_GRACE = 5.0
_PASS_SPACING = 0.002
_HOSTS_RETURN_SECONDS = 3.0
"""A host that lives tries every second to be heard again; so long nobody is declared lost after an
outage of Redis, or of this worker."""


class Reconciler:
    """Acts for the partitions of a namespace whose lease it can get.

    Args:
        store: an open store.
        namespace: of the log.
        policy: what is desired.
        hosts: hosts in this very process, which are reached directly instead of through Redis.
        name: of the worker, as it stands in the log.
        lease_seconds: how long a partition stays with a worker that is not heard of.

    `async with Reconciler(store, policy=policy):` runs it in the background.

    Attributes:
        drift_found: what the last pass over each process found, by sort, and how much is `stuck`.
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
    ) -> None:
        self.policy = policy or Policy()
        self.metrics = Metrics()
        self.process = process_id(name)
        self.name = name
        self._store = store
        self._namespace_name = namespace
        self._lease_ms = int(lease_seconds * 1000)
        self._hosts = tuple(hosts)
        self._channels: dict[int, WorkerChannel] = {}
        self._inventories: dict[str, Inventory] = {}
        self._changed: set[str] = set()
        self._due: dict[str, float] = {}
        self.drift_found: dict[str, Counter[str]] = {}
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._sent: dict[str, tuple[Step, asyncio.Future[EventRow]]] = {}
        self._stuck: set[tuple[str, str]] = set()
        self._clock_offset_ms = 0
        self._requests: set[asyncio.Task[None]] = set()
        self._ready = False
        self._lag_ms = 0
        self._watched_at = self._watching_since = -inf
        self._run_id = ""

    # --- life -----------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Opens the namespace.

        Raises:
            NamespaceError: it does not fit.
        """
        self.namespace: Namespace = await open_namespace(self._store, self._namespace_name)
        self.log = EventLog(self._store, self.namespace)
        self.tail = Tail(self.log, self.metrics, self._seen)
        self.inventories = InventoryReader(self.namespace)
        self._inbox = Inbox(self.namespace)
        await self._set_clock()
        self._run_id = await self._store.run_id()
        return self

    async def __aenter__(self) -> Self:
        await self.open()
        self._running = asyncio.create_task(self.run(), name="reconciler")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    async def run(self) -> None:
        """Takes leases and reconciles, until it is cancelled; then gives the leases back."""
        try:
            await self.keep_leases()
            check_cancelled()
            async with asyncio.TaskGroup() as group:
                for work in (self._follow, self._listen, self._reconcile_changes, self._keep):
                    group.create_task(work(), name=f"reconciler {work.__name__}")
        finally:
            for request in self._requests:
                request.cancel()
            await self.release()

    async def release(self) -> None:
        """Gives all leases back."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            with contextlib.suppress(*Unavailable):
                await release_lease(self.namespace, channel.lease)

    @property
    def partitions(self) -> list[int]:
        """The partitions it acts for."""
        return sorted(self._channels)

    def summaries(self) -> list[Summary]:
        """What the live processes last said of themselves."""
        found = [self.inventories.summary(p) for p in self.tail.state.processes]
        return [summary for summary in found if summary is not None]

    def lag_seconds(self) -> float:
        """Age of the newest event when it was folded."""
        return self._lag_ms / 1000

    def unready(self) -> list[str]:
        """Why it cannot be relied on now; empty when it can."""
        reasons = []
        if not self._ready:
            reasons.append("the log has not been read to its end yet")
        elif not self._channels:
            reasons.append("no partition is held: another worker has them, or Redis is away")
        return reasons

    # --- leases ---------------------------------------------------------------------------------

    async def keep_leases(self) -> None:
        """Renews the leases it has, takes those that are free, drops those it has lost."""
        await self._set_clock()
        for partition in self.namespace.all_partitions():
            channel = self._channels.get(partition)
            got = await take_lease(
                self.namespace,
                partition,
                self.process,
                self._lease_ms,
                channel.lease if channel else None,
            )
            if isinstance(got, HeldByOther):
                if channel is not None:
                    self._lose(partition, f"now held by {got.holder}")
            elif channel is None or channel.lease.epoch != got.epoch:
                self._gain(got)
        await self.tail.add(self._channels)
        await self._inbox.open(list(self._channels))
        self.metrics.partitions.set(len(self._channels))
        self._ready = True

    def _gain(self, lease: Lease) -> None:
        writer = process_id(f"{self.name}-p{lease.partition}-e{lease.epoch}")
        self._channels[lease.partition] = WorkerChannel(self.namespace, lease, writer)
        self._touch(p for p in self.tail.state.processes if self._partition(p) == lease.partition)

    def _lose(self, partition: int, why: str) -> None:
        if self._channels.pop(partition, None) is not None:
            log.warning("lease lost", partition=partition, why=why)
            of = {p: self._partition(p) for p in self.tail.state.processes}
            self.tail.drop([partition], of)

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
            await asyncio.sleep(0.2)

    def _seen(self, partition: int, at_ms: int, event: EventRow) -> None:
        """An event was folded."""
        process = event.holder or event.process
        if self._ready:
            self._lag_ms = max(0, self.now_ms() - at_ms)
            self.metrics.lag.set(self._lag_ms / 1000)
        if event.type != "cleanup_requested":
            self._touch([process])
        if event.order_id is not None and event.order_id in self._sent:
            step, outcome = self._sent[event.order_id]
            if event.type in {"cleaned_up", "adopted", "cleanup_failed", "cleanup_refused"}:
                del self._sent[event.order_id]
                self._count(step, event, at_ms)
                if not outcome.done():
                    outcome.set_result(event)

    def _count(self, step: Step, event: EventRow, at_ms: int) -> None:
        outcome = {"cleanup_failed": "failed", "cleanup_refused": "refused"}.get(event.type, "done")
        kind = step.ref.partition("/")[0] if step.registry is None else "index_entry"
        self.metrics.teardowns.labels(kind, step.sort, outcome).inc()
        if outcome == "done":
            self._stuck.discard((step.process, step.target))
            if step.since_ms:
                self.metrics.teardown_seconds.observe(max(0, at_ms - step.since_ms) / 1000)
        elif outcome == "failed":
            log.warning(
                "teardown failed",
                ref=step.ref, process=step.process, order_id=event.order_id, reason=event.reason,
            )  # fmt: skip

    def _touch(self, processes: Iterable[str]) -> None:
        self._changed.update(processes)
        self._wake.set()

    async def _listen(self) -> None:
        """Hears of changed inventories, and of requests."""
        while True:
            check_cancelled()
            try:
                notes = await self._inbox.wait()
            except Unavailable:
                await asyncio.sleep(0.2)
                continue
            if not notes and not self._channels:
                await asyncio.sleep(0.2)
            self._touch({n.process for _, n in notes if n.process and n.kind == "inventory"})
            for partition, note in notes:
                if note.kind == "reconcile" and note.request is not None:
                    task = asyncio.create_task(self._answer(partition, note))
                    self._requests.add(task)
                    task.add_done_callback(self._requests.discard)

    async def _answer(self, partition: int, note: Note) -> None:
        if note.deadline_ms and self.now_ms() > note.deadline_ms:
            return
        assert note.request is not None
        try:
            result = await self.reconcile(
                [note.process] if note.process else None,
                dry_run=note.dry_run,
                partition=partition,
            )
            payload: Any = result.as_dict()
        except ReconcilerError as error:
            payload = {"error": str(error)}
        with contextlib.suppress(*Unavailable):
            await answer(self.namespace, partition, note.request, encode_message(payload))

    async def _reconcile_changes(self) -> None:
        """Runs a pass over what changed, and over what became due meanwhile."""
        while True:
            check_cancelled()
            delay = (min(self._due.values(), default=inf) - self.now_ms()) / 1000
            if not self._wake.is_set() and delay > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(delay, 3600)):
                        await self._wake.wait()
            self._wake.clear()
            now = self.now_ms()
            changed, self._changed = self._changed, set()
            changed.update(process for process, due in self._due.items() if due <= now)
            if not changed:
                continue
            try:
                await self.run_pass(changed)
            except (*Unavailable, SequenceGap) as error:
                log.warning("pass put off: Redis is away, or forgot", error=str(error))
                self._changed |= changed
                await asyncio.sleep(0.2)
            except Fenced as error:
                log.warning("pass given up: the lease is gone", error=str(error))
                self._changed |= changed
                with contextlib.suppress(*Unavailable):
                    await self.keep_leases()
            # Events of one burst belong in one pass.
            await asyncio.sleep(_PASS_SPACING)

    async def full_pass(self) -> None:
        """Looks at every process, whatever has or has not been heard of it."""
        self._touch(self.tail.state.processes)

    async def _keep(self) -> None:
        """Keeps the leases, and closes processes whose own lease has lapsed."""
        while True:
            check_cancelled()
            await asyncio.sleep(min(1.0, self._lease_ms / 3000))
            try:
                await self.close_lost()
                await self.keep_leases()
                await self._fold_afresh()
            except (*Unavailable, SequenceGap) as error:
                log.warning("leases not renewed: Redis is away, or forgot", error=str(error))

    async def _fold_afresh(self) -> None:
        """Begins anew with partitions of which Redis forgot what was read."""
        async with self._lock:
            of = {p: self._partition(p) for p in self.tail.state.processes}
            run_id = await self._store.run_id()
            before, self._run_id = self._run_id, run_id
            gone = await self.tail.start_over(of, new_server=before not in {run_id, ""})
        if gone:
            self._inbox.forget(gone)
            await self._inbox.open(list(self._channels))
            self._touch(p for p in self.tail.state.processes if self._partition(p) in gone)

    def _watches(self) -> bool:
        """Whether it could have heard of every host that lives, were it to renew its lease."""
        now = time.monotonic()
        if now - self._watched_at > _HOSTS_RETURN_SECONDS:
            self._watching_since = now
        return now - self._watching_since >= _HOSTS_RETURN_SECONDS

    async def close_lost(self) -> None:
        """Closes, in the log, the processes whose lease has lapsed.

        While Redis is away every lease lapses; so it must have been there for a while.
        """
        if not self._watches():
            await self._store.now_ms()
            self._watched_at = time.monotonic()
            return
        for channel in list(self._channels.values()):
            for process in await channel.lapsed_hosts():
                reason = "its lease lapsed: the process was not heard of in time"
                event = EventRow(
                    "process_lost", f"process/{process}", "", 0, time.time(), process, reason=reason
                )
                with contextlib.suppress(Fenced):
                    if await channel.close_lost(process, event):
                        self.metrics.lost.inc()
                        log.warning("process lost", process=process)
        self._watched_at = time.monotonic()

    # --- a pass -----------------------------------------------------------------------------------

    async def run_pass(self, processes: Iterable[str]) -> Plan:
        """Looks at some processes and sends the orders that are due.

        Raises:
            Fenced: a lease is no longer held.
        """
        async with self._lock:
            began = time.perf_counter()
            chosen = [p for p in processes if self._partition(p) in self._channels]
            await self._refresh(chosen)
            drift, plan = self._look(chosen)
            await self._send(plan.due)
            self._plan_next(chosen, plan)
            self._report_stuck(plan.waiting)
            self._count_drift(chosen, drift, plan)
            self.metrics.pass_seconds.observe(time.perf_counter() - began)
            return plan

    async def _refresh(self, processes: Iterable[str]) -> None:
        """Brings the inventories of some processes up to date, and then the fold up to them."""
        behind: set[int] = set()
        local = {host.process: host for host in self._hosts}
        for process in processes:
            state = self.tail.state.processes.get(process)
            if state is None:
                self._forget(process)
                continue
            if process in local:
                inventory: Inventory | None = local[process].inventory()
            else:
                inventory = await self.inventories.read(process)
            if inventory is None:
                self._inventories.pop(process, None)
                continue
            self._inventories[process] = inventory
            if inventory.as_of > state.seq:
                behind.add(self._partition(process))
        if behind:
            await self.tail.catch_up(behind & set(self._channels))

    def _count_drift(self, processes: Iterable[str], drift: Drift, plan: Plan) -> None:
        for process in processes:
            self.drift_found[process] = Counter()
        for item in drift:
            self.drift_found[item.process][item.sort] += 1
        for waiting in plan.stuck:
            self.drift_found[waiting.item.process]["stuck"] += 1

    def _forget(self, process: str) -> None:
        self.drift_found.pop(process, None)
        self._inventories.pop(process, None)
        self._due.pop(process, None)
        self.inventories.forget(process)

    def _look(self, processes: Sequence[str], *, force: bool = False) -> tuple[Drift, Plan]:
        now, state = self.now_ms(), self.tail.state
        drift = find_drift(state, self._inventories, self.policy, now, processes=processes)
        return drift, make_plan(state, drift, self._inventories, self.policy, now, force=force)

    async def _send(self, steps: Sequence[Step]) -> list[tuple[Step, asyncio.Future[EventRow]]]:
        """Writes what is requested into the log, and sends the orders, per partition."""
        sent = []
        local = {host.process: host for host in self._hosts}
        by_partition: dict[int, list[tuple[EventRow, Order]]] = {}
        for step in steps:
            order = _order(step, self.policy)
            outcome: asyncio.Future[EventRow] = asyncio.get_running_loop().create_future()
            self._sent[order.id] = (step, outcome)
            sent.append((step, outcome))
            pair = (_request(step, order), order)
            by_partition.setdefault(self._partition(step.process), []).append(pair)
        for partition, pairs in by_partition.items():
            channel = self._channels.get(partition)
            if channel is None:
                raise Fenced(f"partition {partition} is no longer held by {self.process}")
            events = [event for event, _ in pairs]
            away = [order for _, order in pairs if order.process not in local]
            try:
                await channel.write(events, away)
            except Fenced as error:
                self._lose(partition, str(error))
                raise
            for process, host in local.items():
                if mine := [order for _, order in pairs if order.process == process]:
                    host.execute(mine)
            for _, order in pairs:
                self.metrics.orders.labels(order.action).inc()
            # The requests are in the fold before anybody plans again: nothing is asked for twice.
            await self.tail.catch_up([partition])
        return sent

    def _plan_next(self, processes: Iterable[str], plan: Plan) -> None:
        """When to look again although nothing happens: at the next limit, or the next retry."""
        now = self.now_ms()
        for name in processes:
            process = self.tail.state.processes.get(name)
            if process is None:
                self._due.pop(name, None)
                continue
            limits = [at for at in desired_until(process, self.policy).values() if at > now]
            limits += [
                w.until_ms for w in plan.waiting if w.item.process == name and w.until_ms > now
            ]
            if limits and min(limits) < inf:
                self._due[name] = min(limits) + 1
            else:
                self._due.pop(name, None)

    def _report_stuck(self, waiting: Iterable[Waiting]) -> None:
        for one in waiting:
            name = (one.item.process, f"{one.item.ref} {one.item.registry} {one.item.key}")
            if one.stuck and name not in self._stuck:
                self._stuck.add(name)
                log.error(
                    "teardown stuck: somebody should look",
                    ref=one.item.ref, process=one.item.process, failures=one.failures,
                    reason=one.reason,
                )  # fmt: skip

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
            if self._partition(p) in self._channels and partition in (None, self._partition(p))
        ]  # fmt: skip
        result = Result(chosen)
        async with self._lock:
            await self._ask_report(chosen, result)
            _, plan = self._look(chosen, force=True)
            result.found(plan)
            if dry_run:
                return result
            tried: set[tuple[str, str]] = set()
            while True:
                steps = [s for s in plan.due if (s.process, s.target) not in tried]
                if not steps:
                    break
                tried.update((s.process, s.target) for s in steps)
                await self._carry_out(steps, result)
                await self._ask_report(chosen, result)
                _, plan = self._look(chosen, force=True)
                result.found(plan)
            result.settle(plan)
        self._touch(chosen)
        return result

    async def _carry_out(self, steps: Sequence[Step], result: Result) -> None:
        sent = await self._send(steps)
        limit = self.policy.teardown_timeout * (1 + len({s.stage for s in steps})) + _OUTCOME_GRACE
        async with self._watching():
            await asyncio.wait([outcome for _, outcome in sent], timeout=limit)
        for step, outcome in sent:
            if outcome.done():
                event = outcome.result()
                result.outcome(step, event.type, event.reason or "")
            else:
                result.outcome(step, "cleanup_failed", f"no outcome within {limit:g} s")

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Folds new events meanwhile, also where no loop runs in the background."""

        async def follow() -> None:
            while True:
                check_cancelled()
                await self.tail.wait(block_ms=200)

        task = asyncio.create_task(follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _ask_report(self, processes: Sequence[str], result: Result) -> None:
        """Has each host look at its registries themselves, and waits for what they say."""
        local = {host.process for host in self._hosts}
        asked: dict[str, str] = {}
        for process in processes:
            if process in local:
                continue
            order = Order(
                f"r-{uuid.uuid4().hex[:12]}", process, Action.REPORT, f"process/{process}"
            )
            channel = self._channels.get(self._partition(process))
            if channel is not None:
                await channel.write([], [order])
                asked[process] = order.id
        deadline = time.monotonic() + _FRESH_SECONDS
        while True:
            await self._refresh(processes)
            for process, request in list(asked.items()):
                summary = self.inventories.summary(process)
                if process not in self.tail.state.processes or (
                    summary is not None and request in summary.answers
                ):
                    del asked[process]
            if not asked:
                break
            if time.monotonic() > deadline:
                result.silent.update(asked)
                break
            await asyncio.sleep(0.005)
        await self.tail.catch_up()


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
        reason=step.reason, order_id=order.id, attrs=attrs,
    )  # fmt: skip

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
from dataclasses import asdict
from math import inf
from typing import Any, Self

import structlog

from reconciler.drift import Drift, find_drift
from reconciler.fold import ProcessState, target_of
from reconciler.housekeeping import Housekeeping
from reconciler.metrics import Metrics
from reconciler.partitions import Partitions
from reconciler.plan import Plan, Step, Waiting, make_plan
from reconciler.policy import Policy
from reconciler.result import Result
from reconciler.session_retention import SessionRetention
from reconciler.tail import Tail
from reconciler.watch import ProcessWatch, Watches
from store.channel import Inbox, InventoryReader, answer
from store.connection import BLOCK_MS, Store, Unavailable, check_cancelled, end_tasks
from store.errors import Fenced, ReconcilerError, SequenceGap, UnknownProcess
from store.event import EventRow, Scalar, process_id
from store.lease import Lease
from store.log import EventLog
from store.messages import Action, HostPort, Note, Order, Summary, encode_message
from store.namespace import DEFAULT_NAMESPACE, Namespace, open_namespace

log = structlog.get_logger("reconciler")

LEASE_SECONDS = 10.0
_OUTCOMES = frozenset({"cleaned_up", "adopted", "cleanup_failed", "cleanup_refused"})
_FRESH_SECONDS = 3.0
_OUTCOME_GRACE = 5.0
_PASS_SPACING = 0.002
_AGAIN_SECONDS = 0.2
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
        partitions: int | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.metrics = Metrics()
        self.process = process_id(name)
        self.name = name
        self._store = store
        self._namespace_name = namespace
        self._wanted_partitions = partitions
        self._lease_seconds = lease_seconds
        self._hosts = tuple(hosts)
        self._changed: set[str] = set()
        self._news: set[str] = set()
        self._due: dict[str, float] = {}
        self.drift_found: dict[str, Counter[str]] = {}
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._sent: dict[str, tuple[Step, asyncio.Future[EventRow]]] = {}
        self._stuck: set[tuple[str, str]] = set()
        self._clock_offset_ms = 0
        self._requests: set[asyncio.Task[None]] = set()
        self._lag_ms = 0
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
        self.watches = Watches(self.policy)
        self.tail = Tail(self.log, self.metrics, self._seen, self.watches.fold)
        self.inventories = InventoryReader(self.namespace)
        self.housekeeping = Housekeeping(self.log, self.tail, lambda: self.leases, self.now_ms)
        self.retention = SessionRetention(
            self.namespace, lambda: self._acting.channels, self.policy
        )
        self._inbox = Inbox(self.namespace)
        self._acting = Partitions(
            self.namespace,
            self.tail,
            self._inbox,
            name=self.name,
            process=self.process,
            lease_seconds=self._lease_seconds,
            metrics=self.metrics,
            touch=self._touch,
            forget=self._forget_all,
        )
        await self._set_clock()
        self._run_id = await self._store.run_id()
        return self

    async def __aenter__(self) -> Self:
        await self.open()
        self._running = asyncio.create_task(self.run(), name="reconciler")
        self._running.add_done_callback(_report_end)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end_tasks([self._running])

    async def run(self) -> None:
        """Takes leases and reconciles, until it is cancelled; then gives the leases back."""
        acting = self._acting
        try:
            async with asyncio.TaskGroup() as group:
                for work in (
                    *(acting.keep, acting.open, acting.watch_hosts),
                    *(self._follow, self._listen, self._reconcile_changes, self._keep_clock),
                ):
                    group.create_task(work(), name=f"reconciler {work.__name__}")
        finally:
            for request in self._requests:
                request.cancel()
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
        found = [self.inventories.summary(p) for p in self.tail.state.processes]
        return [summary for summary in found if summary is not None]

    def lag_seconds(self) -> float:
        """Age of the newest event when it was folded."""
        return self._lag_ms / 1000

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
            await asyncio.sleep(0.2)

    def _seen(self, partition: int, at_ms: int, event: EventRow) -> None:
        """An event was folded."""
        process = event.holder or event.process
        if partition in self._acting.channels:
            self._lag_ms = max(0, self.now_ms() - at_ms)
            self.metrics.lag.set(self._lag_ms / 1000)
        if event.type != "cleanup_requested":
            self._touch([process])
        if event.order_id is not None and event.order_id in self._sent:
            step, outcome = self._sent[event.order_id]
            # What went along with it carries the order's id, too, and is not its outcome.
            mine = event.ref == step.ref and (event.attrs or {}).get("registry") == step.registry
            if mine and event.type in _OUTCOMES:
                del self._sent[event.order_id]
                self._count(step, event, at_ms)
                if not outcome.done():
                    outcome.set_result(event)

    def _count(self, step: Step, event: EventRow, at_ms: int) -> None:
        outcome = {"cleanup_failed": "failed", "cleanup_refused": "refused"}.get(event.type, "done")
        kind = step.ref.partition("/")[0] if step.registry is None else "index_entry"
        self.metrics.teardowns.labels(kind, step.sort, outcome).inc()
        if outcome == "done":
            if step.since_ms:
                self.metrics.teardown_seconds.observe(max(0, at_ms - step.since_ms) / 1000)
        elif outcome == "failed":
            log.warning(
                "teardown failed",
                ref=step.ref, process=step.process, order_id=event.order_id, reason=event.reason,
            )  # fmt: skip

    def hear_of(self, processes: Iterable[str]) -> None:
        """The inventories of these may have changed."""
        self._news.update(processes)
        self._touch(processes)

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
            news = {n.process for _, n in notes if n.process and n.kind == "inventory"}
            self.hear_of(news)
            for partition, note in notes:
                if note.kind in {"reconcile", "archive"} and note.request is not None:
                    task = asyncio.create_task(self._answer(partition, note))
                    self._requests.add(task)
                    task.add_done_callback(self._requests.discard)

    async def _answer(self, partition: int, note: Note) -> None:
        if note.deadline_ms and self.now_ms() > note.deadline_ms:
            return
        assert note.request is not None
        # Not given back while it is worked on: whoever asked would wait in vain.
        self._acting.busy[partition] += 1
        try:
            if not await self._acting.acts_for(partition):
                return
            payload: Any
            if note.kind == "archive":
                payload = asdict(await self.housekeeping.keep(partition))
            else:
                chosen = [note.process] if note.process else None
                result = await self.reconcile(chosen, dry_run=note.dry_run, partition=partition)
                payload = result.as_dict()
        except (Fenced, *Unavailable):
            return  # Who asked sees that the lease changed hands, and asks again.
        except ReconcilerError as error:
            payload = {"error": str(error)}
        finally:
            self._acting.busy[partition] -= 1
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
            log.warning("pass put off: Redis is away, or forgot", error=str(error))
            self._changed |= processes
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._wake.set)
        except Fenced as error:
            # Whoever has that lease now looks at all of it; the other partitions are still ours.
            log.warning("pass given up: the lease is gone", error=str(error))
            self._touch(processes)

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
            began = time.perf_counter()
            chosen = [p for p in processes if self._partition(p) in self._acting.channels]
            await self._refresh(chosen)
            drift, plan = self._look(chosen)
            await self._send(plan.due)
            self._plan_next(chosen, plan)
            self._report_stuck(plan.stuck)
            self._count_drift(chosen, drift, plan)
            self.metrics.pass_seconds.observe(time.perf_counter() - began)
            return plan

    async def _refresh(self, processes: Iterable[str]) -> None:
        """Brings inventories of which there is news up to date, and then the fold up to them."""
        behind: set[int] = set()
        for process in processes:
            state = self.tail.state.processes.get(process)
            if state is None:
                self._forget(process)
                continue
            if process not in self._news and self.inventories.summary(process) is not None:
                continue
            self._news.discard(process)
            watch = self._watch(state)
            try:
                change = await self.inventories.update(process)
            except BaseException:
                self._news.add(process)
                raise
            if change is not None:
                watch.inventory_changed(change)
                if change.summary.as_of > state.seq:
                    behind.add(self._partition(process))
        if behind:
            await self.tail.catch_up(behind & set(self._acting.channels))

    def _watch(self, state: ProcessState) -> ProcessWatch:
        """The watch of a process; a new one is told the inventory as far as it is known."""
        known = self.watches.of(state)
        if known.fresh and (everything := self.inventories.everything(state.id)) is not None:
            known.inventory_changed(everything)
        known.fresh = False
        return known

    def _count_drift(self, processes: Iterable[str], drift: Drift, plan: Plan) -> None:
        for process in processes:
            self.drift_found[process] = Counter()
        for item in drift:
            self.drift_found[item.process][item.sort] += 1
        for waiting in plan.stuck:
            self.drift_found[waiting.item.process]["stuck"] += 1

    def _forget(self, process: str) -> None:
        self.drift_found.pop(process, None)
        self._news.discard(process)
        self.watches.forget(process)
        self._due.pop(process, None)
        self.inventories.forget(process)

    def _forget_all(self, processes: Iterable[str]) -> None:
        """These are no longer ours to look at."""
        gone = set(processes)
        for process in gone:
            self._forget(process)
        for order_id in [id for id, (step, _) in self._sent.items() if step.process in gone]:
            del self._sent[order_id]

    def _look(self, processes: Iterable[str]) -> tuple[Drift, Plan]:
        """What is to be done about some processes, at the cost of their drift."""
        now, state = self.now_ms(), self.tail.state
        watches = {p: self._watch(state.processes[p]) for p in processes if p in state.processes}
        drift = Drift.of(watch.drift(now) for watch in watches.values())
        graphs = {p: watch.graph for p, watch in watches.items()}
        return drift, make_plan(state, drift, {}, self.policy, now, graphs=graphs)

    def _look_at_everything(self, processes: Sequence[str]) -> Plan:
        """The same from the state and the inventories themselves, and without waiting for retries."""
        now, state = self.now_ms(), self.tail.state
        inventories = {p: i for p in processes if (i := self.inventories.inventory(p)) is not None}
        drift = find_drift(state, inventories, self.policy, now, processes=processes)
        return make_plan(state, drift, inventories, self.policy, now, force=True)

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
            channel = self._acting.channels.get(partition)
            if channel is None:
                raise Fenced(f"partition {partition} is no longer held by {self.process}")
            events = [event for event, _ in pairs]
            away = [order for _, order in pairs if order.process not in local]
            try:
                await channel.write(events, away)
            except Fenced as error:
                self._acting.lose(partition, str(error))
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
            limits = [max(self._watch(process).next_at(), now)]
            limits += [
                w.until_ms for w in plan.waiting if w.item.process == name and w.until_ms > now
            ]
            if min(limits) < inf:
                self._due[name] = min(limits) + 1
            else:
                self._due.pop(name, None)

    def _report_stuck(self, stuck: Iterable[Waiting]) -> None:
        """Says once of each what is stuck, and forgets what has gone since, whoever ended it."""
        processes = self.tail.state.processes
        self._stuck = {
            (process, target)
            for process, target in self._stuck
            if process in processes and target in processes[process].attempts
        }
        for one in stuck:
            item = one.item
            name = (item.process, target_of(item.ref, item.registry, item.key))
            if name not in self._stuck:
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
            if self._partition(p) in self._acting.channels and partition in (None, self._partition(p))
        ]  # fmt: skip
        result = Result(chosen)
        async with self._lock:
            await self._ask_report(chosen, result)
            plan = self._look_at_everything(chosen)
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
                plan = self._look_at_everything(chosen)
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
            await end_tasks([task])

    async def _ask_report(self, processes: Sequence[str], result: Result) -> None:
        """Has each host look at its registries themselves, and waits for what they say."""
        local = {host.process: host for host in self._hosts}
        asked: dict[str, str] = {}
        for process in processes:
            order = Order(
                f"r-{uuid.uuid4().hex[:12]}", process, Action.REPORT, f"process/{process}"
            )
            channel = self._acting.channels.get(self._partition(process))
            if process in local:
                local[process].execute([order])
                asked[process] = order.id
            elif channel is not None:
                await channel.write([], [order])
                asked[process] = order.id
        deadline = time.monotonic() + _FRESH_SECONDS
        while True:
            self._news.update(processes)
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


def _report_end(task: asyncio.Task[None]) -> None:
    """A reconciler in the background must not end unnoticed."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the reconciler ended", exc_info=error)


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

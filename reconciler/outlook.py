"""What the reconciler knows of each process, and when it has to look at it again.

State comes from the tail, inventories from the hosts; a watch per process keeps the drift of the two,
so that a look costs what changed. A look at everything works from state and inventories themselves,
for a pass that somebody forces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf

from reconciler.drift import Drift, Sort, find_drift
from reconciler.fold import ProcessState, target_of
from reconciler.partitions import Partitions
from reconciler.plan import Plan, make_plan
from reconciler.policy import Policy
from reconciler.stuck import Stuck, find_stuck
from reconciler.tail import Tail
from reconciler.watch import ProcessWatch, Watches
from store.inventories import InventoryReader
from store.logs import get_logger
from store.namespace import Namespace

log = get_logger("reconciler.outlook")


class Outlook:
    """Looks at the processes of the partitions that a worker acts for.

    Args:
        namespace: of the log.
        tail: keeps the state.
        watches: of the processes; they see each event as it is folded.
        policy: what is desired.
        now_ms: the time of Redis, in ms.

    Attributes:
        inventories: what hosts say they hold.
        drift_found: what the last pass over each process found, by sort, and how much is `stuck`.
        due: process -> Redis time in ms at which to look at it although nothing happens.
        stuck: (process, target) of teardowns that were reported as stuck and have not gone.
    """

    def __init__(
        self,
        namespace: Namespace,
        tail: Tail,
        watches: Watches,
        policy: Policy,
        now_ms: Callable[[], int],
    ) -> None:
        self.inventories = InventoryReader(namespace)
        self.drift_found: dict[str, Counter[str]] = {}
        self.due: dict[str, float] = {}
        self.stuck: set[tuple[str, str]] = set()
        self._since: dict[str, dict[tuple[Sort, str], int]] = {}
        self._namespace = namespace
        self._tail = tail
        self._watches = watches
        self._policy = policy
        self._now_ms = now_ms
        self._news: set[str] = set()

    def hear_of(self, processes: Iterable[str]) -> None:
        """The inventories of these may have changed."""
        self._news.update(processes)

    async def refresh(self, processes: Iterable[str], acting: Partitions) -> None:
        """Brings inventories of which there is news up to date, and then the fold up to them."""
        behind: set[int] = set()
        for process in processes:
            state = self._tail.state.processes.get(process)
            if state is None:
                self.forget(process)
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
                    behind.add(self._namespace.partition_of(process))
        if behind:
            await self._tail.catch_up(behind & set(acting.channels))

    def _watch(self, state: ProcessState) -> ProcessWatch:
        """The watch of a process; a new one is told the inventory as far as it is known."""
        known = self._watches.of(state)
        if known.fresh and (everything := self.inventories.everything(state.id)) is not None:
            known.inventory_changed(everything)
        known.fresh = False
        return known

    def look(self, processes: Iterable[str]) -> tuple[Drift, Plan]:
        """What is to be done about some processes, at the cost of their drift."""
        now, state = self._now_ms(), self._tail.state
        watches = {p: self._watch(state.processes[p]) for p in processes if p in state.processes}
        drift = Drift.of(watch.drift(now) for watch in watches.values())
        graphs = {p: watch.graph for p, watch in watches.items()}
        return drift, make_plan(state, drift, {}, self._policy, now, graphs=graphs)

    def look_at_everything(self, processes: Sequence[str]) -> Plan:
        """The same from the state and the inventories themselves, and without waiting for retries."""
        now, state = self._now_ms(), self._tail.state
        inventories = {p: i for p in processes if (i := self.inventories.inventory(p)) is not None}
        drift = find_drift(state, inventories, self._policy, now, processes=processes)
        return make_plan(state, drift, inventories, self._policy, now, force=True)

    def take_note(self, processes: Iterable[str], drift: Drift, plan: Plan) -> None:
        """Keeps what a pass found, reports what is stuck, and notes when to look again."""
        alive = self._tail.state.processes
        stuck = [*find_stuck((alive[p] for p in processes if p in alive), self._policy)]
        self._count(processes, drift, stuck)
        self._report_stuck(stuck)
        self._plan_next(processes, plan)

    def _count(self, processes: Iterable[str], drift: Drift, stuck: Iterable[Stuck]) -> None:
        now, before = (
            self._now_ms(),
            {process: self._since.get(process, {}) for process in processes},
        )
        for process in before:
            self.drift_found[process] = Counter()
            self._since[process] = {}
        for item in drift:
            self.drift_found[item.process][item.sort] += 1
            found = item.sort, target_of(item.ref, item.registry, item.key)
            # Of an orphan it is known since when it is one; of others, when they were first seen.
            known = item.since_ms if item.cause != "evicted" else 0
            self._since[item.process][found] = known or before[item.process].get(found, now)
        for one in stuck:
            self.drift_found[one.process]["stuck"] += 1

    def drift_ages(self) -> dict[Sort, float]:
        """How long the oldest drift of each sort has been there, in seconds, as of the last passes."""
        oldest: dict[Sort, int] = {}
        for of_process in self._since.values():
            for (sort, _), since in of_process.items():
                oldest[sort] = min(since, oldest.get(sort, since))
        now = self._now_ms()
        return {sort: max(0, now - since) / 1000 for sort, since in oldest.items()}

    def _plan_next(self, processes: Iterable[str], plan: Plan) -> None:
        """When to look again although nothing happens: at the next limit, or the next retry."""
        now = self._now_ms()
        for name in processes:
            process = self._tail.state.processes.get(name)
            if process is None:
                self.due.pop(name, None)
                continue
            limits = [max(self._watch(process).next_at(), now)]
            limits += [
                w.until_ms for w in plan.waiting if w.item.process == name and w.until_ms > now
            ]
            if min(limits) < inf:
                self.due[name] = min(limits) + 1
            else:
                self.due.pop(name, None)

    def _report_stuck(self, stuck: Iterable[Stuck]) -> None:
        """Says once of each what is stuck, and forgets what has gone since, whoever ended it."""
        processes = self._tail.state.processes
        self.stuck = {
            (process, target)
            for process, target in self.stuck
            if process in processes and target in processes[process].attempts
        }
        for one in stuck:
            if (one.process, one.target) not in self.stuck:
                self.stuck.add((one.process, one.target))
                log.error(
                    "teardown stuck: somebody should look",
                    ref=one.ref, process=one.process, failures=one.failures,
                    reason=one.reason,
                )  # fmt: skip

    def forget(self, process: str) -> None:
        """It is no longer ours to look at, or it has ended."""
        self.drift_found.pop(process, None)
        self._since.pop(process, None)
        self._news.discard(process)
        self._watches.forget(process)
        self.due.pop(process, None)
        self.inventories.forget(process)

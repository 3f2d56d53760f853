"""The tail: one reader of the log, which folds what it reads, partition by partition.

It begins with the newest snapshot of a partition that is whole, and goes on from there. Whoever reads,
the state is folded exactly once: an entry at or before the position of its partition is passed over.
So the loop that waits for new entries and a pass that catches up at once can share one state.

Each partition has a state of its own, because snapshots are of partitions; `state` is all of them as
one, and shares the processes with them. No process is in two partitions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from reconciler.fold import Event, FleetState, ProcessState
from reconciler.fold_page import Folded, fold_page
from reconciler.history import nearest_snapshot
from reconciler.metrics import Metrics
from store.log import EventLog, Page, parse_page
from store.logs import get_logger
from store.position import id_key
from store.refusals import Unavailable

log = get_logger("reconciler.tail")

_BEGINS = frozenset({"created", "adopted"})

Hook = Callable[[Page, Folded], None]
"""Called for each page after it was folded, with what that did."""

Fold = Callable[[FleetState, Sequence[Event], Sequence[int]], Folded]
"""(state, events, Redis times in ms) -> what they did; folds the events into the state."""


class Tail:
    """Follows some partitions and keeps the state.

    Attributes:
        state: the fold of everything read.
        parts: the same, by partition.
        positions: partition -> id of the last entry folded.
        begun: partition -> events in the snapshot that it began with, 0 without one.
    """

    def __init__(
        self, event_log: EventLog, metrics: Metrics, hook: Hook, fold: Fold = fold_page
    ) -> None:
        self._fold_page = fold
        self.state = FleetState()
        self.parts: dict[int, FleetState] = {}
        self.positions: dict[int, str] = {}
        self.begun: dict[int, int] = {}
        self._log = event_log
        self._metrics = metrics
        self._hook = hook
        self._opening: set[int] = set()
        self._unfinished: set[int] = set()

    async def add(self, partitions: Iterable[int]) -> list[str]:
        """Follows these partitions too, from snapshot and log, to the present end.

        Returns:
            The processes that are alive in those that are new.
        """
        new = [p for p in partitions if p not in self.positions or p in self._unfinished]
        namespace = await self._log.namespace()
        self._opening.update(new)
        try:
            for partition in new:
                part, position = await nearest_snapshot(namespace, partition)
                if partition not in self.positions:
                    self.parts[partition], self.positions[partition] = part, position
                    self.begun[partition] = part.events
                    self.state.take(part)
            await self.catch_up(new)
            self._unfinished.difference_update(new)
        except Unavailable:
            self._unfinished.update(
                p for p in new if p in self.positions
            )  # On from there next time.
            raise
        except BaseException:
            self.drop(new)  # Half read, it would look as if it were read.
            raise
        finally:
            self._opening.difference_update(new)
        if new:
            self._log.interrupt()  # The wait that is going on does not know of them.
        return [p for one in new if one in self.parts for p in self.parts[one].processes]

    async def catch_up(self, partitions: Iterable[int] | None = None) -> None:
        """Folds everything up to the present end."""
        for partition in list(self.positions if partitions is None else partitions):
            if partition not in self.positions:
                continue
            async for page in self._log.pages(partition, self.positions[partition]):
                await self._absorb(page)

    async def wait(self, *, block_ms: int) -> bool:
        """Waits for new entries and folds them; False when none came."""
        asked = dict(self.positions)
        answer = await self._log.wait(asked, block_ms=block_ms)
        for partition, raw in answer:
            await self._absorb(parse_page(partition, raw, asked[partition]))
        return bool(answer)

    async def _absorb(self, page: Page) -> None:
        partition = page.partition
        if partition not in self.positions:
            return  # Given up while the page was read.
        position = id_key(self.positions[partition])
        if id_key(page.position) <= position or id_key(page.after) > position:
            return  # Folded already, or given up and taken again meanwhile.
        fresh = page.since(position)
        self._fold(fresh)
        self.positions[partition] = page.position
        if fresh.malformed:
            self._metrics.quarantined.inc(len(fresh.malformed))
            for entry_id, reason in fresh.malformed:
                log.warning(
                    "entry quarantined: it is not an event; folding goes on",
                    entry_id=entry_id, partition=partition, reason=reason,
                )  # fmt: skip
            await self._log.quarantine(partition, fresh.malformed)

    def _fold(self, page: Page) -> None:
        """Folds a page without a pause: the state is of one instant."""
        part, everyone = self.parts[page.partition], self.state.processes
        events, lost, stopped = part.events, part.lost, part.stopped
        folded = self._fold_page(part, page.events, page.times)
        ended: dict[str, ProcessState | None] = {}
        for name in folded.processes:
            process = part.processes.get(name)
            if process is None:
                ended[name] = everyone.pop(name, None)
            else:
                everyone[name] = process
        self.state.events += part.events - events
        self.state.lost += part.lost - lost
        self.state.stopped += part.stopped - stopped
        self._metrics.count_events(folded.types)
        if page.partition not in self._opening:  # What is history was counted by somebody else.
            self._metrics.count_resources(*_come_and_gone(page.events, ended))
        self._hook(page, folded)

    def drop(self, partitions: Iterable[int]) -> None:
        """Gives partitions up: their processes leave the state."""
        for partition in partitions:
            self.positions.pop(partition, None)
            self._unfinished.discard(partition)
            part = self.parts.pop(partition, None)
            if part is not None:
                self.state.leave(part)
        self._log.interrupt()


def _come_and_gone(
    events: Sequence[Event], ended: Mapping[str, ProcessState | None]
) -> tuple[Counter[str], Counter[str]]:
    """How many resources were created, and how many ended, by kind.

    Args:
        events: of a page.
        ended: processes that ended in it, as they were then; None where they also began in it.
    """
    created: Counter[str] = Counter()
    gone: Counter[str] = Counter()
    held: Counter[str] = Counter()  # by processes that began and ended here
    brief = {name for name, process in ended.items() if process is None}
    for event in events:
        if event.type in _BEGINS:
            kind = event.ref.partition("/")[0]
            created[kind] += 1
            held[kind] += event.process in brief
        elif event.type == "cleaned_up" and "registry" not in (event.attrs or ()):
            kind = event.ref.partition("/")[0]
            gone[kind] += 1
            held[kind] -= event.process in brief
    for process in ended.values():
        if process is not None:
            gone.update(resource.kind for resource in process.resources.values())
    gone.update(+held)
    return created, gone

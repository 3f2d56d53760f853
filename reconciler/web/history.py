"""Questions about the past: the fleet at a moment, and the chain of events of one resource.

Both read the log itself, as `replay` and `log` do. Past moments do not change, so the last few are
remembered; only one is folded at a time, and whoever would be the fifth in the queue is told to come
back.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable

from reconciler.describe import describe_resource
from reconciler.fleet import fold_log
from reconciler.fold import FleetState
from reconciler.web.errors import ApiError
from reconciler.web.shapes import Alive, Chain, Event, FleetThen, ProcessThen
from store.event import EventRow
from store.log import EventLog
from store.namespace import Namespace
from store.position import id_key

SCAN_LIMIT = 100_000
"""Log entries that one request looks through; whoever wants more goes on from `next`."""
_REMEMBERED = 4
_QUEUE = 4
_SETTLED_MS = 1000
_LAST = 2**64 - 1


class History:
    """The past of one namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._log = EventLog(namespace.store, namespace)
        self._folds: OrderedDict[tuple[int, int], FleetState] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0

    async def at(
        self, until: tuple[int, int], now_ms: int, process: str | None, limit: int, offset: int
    ) -> FleetThen:
        """The fleet at a moment, with a page of what was alive.

        Raises:
            ApiError: 503 when too many ask at once.
        """
        state = await self._fold(until, now_ms)
        chosen = [p for p in state.processes.values() if process in (None, p.id)]
        alive = [(p.id, r) for p in chosen for r in p.resources.values()]
        return FleetThen(
            at_ms=until[0],
            events=state.events,
            processes=[
                ProcessThen(p.id, p.started_ms, dict(Counter(r.kind for r in p.resources.values())))
                for p in chosen
            ],
            resources=dict(Counter(r.kind for _, r in alive)),
            total=len(alive),
            offset=offset,
            alive=[
                Alive(**describe_resource(name, r)) for name, r in alive[offset : offset + limit]
            ],
        )

    async def _fold(self, until: tuple[int, int], now_ms: int) -> FleetState:
        if self._waiting >= _QUEUE:
            raise ApiError(
                503, "busy", "too many past moments are asked for at once; try again",
                headers={"Retry-After": "2"},
            )  # fmt: skip
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                state = self._folds.get(until)
                if state is None:
                    state = await fold_log(self._log, until=until)
                    if until[0] < now_ms - _SETTLED_MS:  # Later ones may still get an entry.
                        self._folds[until] = state
                        while len(self._folds) > _REMEMBERED:
                            self._folds.popitem(last=False)
                return state
        finally:
            self._waiting -= 1

    async def chain(
        self, resource: str, process: str | None, after: str, limit: int, since_ms: int = 0
    ) -> Chain:
        """The events of a resource in the order of the log, a page of them.

        Args:
            resource: kind/id.
            process: only the one in this process; None is every one of that name.
            after: an entry id; the entry itself is not read.
            limit: of events.
            since_ms: nothing of it is older than this.
        """
        partitions: Iterable[int] = self._namespace.all_partitions()
        if process is not None:
            partitions = [self._namespace.partition_of(process)]
        begin = max(id_key(after), (since_ms - 1, _LAST) if since_ms > 0 else (0, 0))
        found: list[Event] = []
        stops: list[str] = []
        for partition in partitions:
            stop = await self._scan(partition, begin, resource, process, limit, found)
            if stop is not None:
                stops.append(stop)
        found.sort(key=lambda event: id_key(event.id))
        # Beyond the earliest stop a partition may be missing: that part comes with the next page.
        end = min(map(id_key, stops), default=None)
        kept = [event for event in found if end is None or id_key(event.id) <= end][:limit]
        if len(kept) < len(found) and len(kept) == limit:
            end = id_key(kept[-1].id)
        return Chain(resource, kept, None if end is None else f"{end[0]}-{end[1]}")

    async def _scan(
        self,
        partition: int,
        begin: tuple[int, int],
        resource: str,
        process: str | None,
        limit: int,
        found: list[Event],
    ) -> str | None:
        """Looks through one partition; the answer is where it stopped before the end, if it did."""
        position = f"{begin[0]}-{begin[1]}"
        taken = scanned = 0
        while True:
            page = await self._log.page(partition, position)
            for entry_id, row in page.rows:
                if not _speaks_of(row, resource, process):
                    continue
                found.append(_event(entry_id, partition, row))
                taken += 1
                if taken == limit:
                    return entry_id
            if page.end:
                return None
            position = page.position
            scanned += page.entries
            if scanned >= SCAN_LIMIT:
                return position
            await asyncio.sleep(0)


def _speaks_of(row: EventRow, resource: str, process: str | None) -> bool:
    """The event is about the resource, or about the end of the process that holds it."""
    holder = row.holder or row.process
    if process is None:
        return row.ref == resource
    ends = row.type in {"process_lost", "process_stopped"}
    return holder == process and (ends or row.ref == resource)


def _event(entry_id: str, partition: int, row: EventRow) -> Event:
    return Event(
        id=entry_id,
        at_ms=id_key(entry_id)[0],
        partition=partition,
        type=row.type,
        ref=row.ref,
        process=row.process,
        seq=row.seq,
        holder=row.holder,
        uses=row.uses,
        owned_by=row.owned_by,
        reason=row.reason,
        order_id=row.order_id,
        attrs=row.attrs,
        trace_id=row.trace_id,
    )

"""Reads a stretch of the log once, and shows each event to whoever looks back.

Partition by partition, as fast as the fold reads, because no event speaks of a process in another
partition. Only a page is in memory at a time. Entries that are not events are passed over; the fold
is what sets them aside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing

from reconciler.fleet import Progress
from store.errors import BadMoment
from store.event import EventRow
from store.log import EventLog
from store.position import START, id_key

See = Callable[[str, EventRow], object]
"""(entry id, event) -> anything; called for each event, in the order of its partition."""

END = 2**63
"""Larger than the counter in any entry id: `(ms, END)` is after all entries of that millisecond."""


def entry_id(key: tuple[int, int]) -> str:
    """The entry id of a value that `id_key` made."""
    return f"{key[0]}-{key[1]}"


async def scan(
    event_log: EventLog,
    see: Iterable[See],
    *,
    after: str = START,
    until: str = "+",
    partition: int | None = None,
    progress: Progress = lambda count: None,
) -> None:
    """Shows the events of a stretch to all of `see`.

    Args:
        event_log: the log.
        see: called for each event.
        after: an entry id; the entry itself is not read.
        until: an entry id, read inclusively, or `+`.
        partition: only this one; None is all, one after the other.
        progress: told how many entries were read.
    """
    namespace = await event_log.namespace()
    watchers = tuple(see)
    for number in namespace.all_partitions() if partition is None else (partition,):
        async for name, row in _rows(event_log, number, after, until, progress):
            for watcher in watchers:
                watcher(name, row)


async def _rows(
    event_log: EventLog, partition: int, after: str, until: str, progress: Progress
) -> AsyncIterator[tuple[str, EventRow]]:
    async with aclosing(event_log.pages(partition, after, until=until)) as pages:  # type: ignore[type-var]
        async for page in pages:
            progress(page.entries)
            for name, row in page.rows:
                yield name, row


async def check_entry(event_log: EventLog, key: tuple[int, int], what: str = "--at") -> None:
    """Checks that an entry of the log has this id, in whichever partition.

    Args:
        event_log: the log.
        key: as `parse_moment` gave it; a time is not an id, and passes.
        what: it was given as, for the message.

    Raises:
        BadMoment: there is none; the message offers the nearest before and after.
    """
    if key[1] >= END:
        return
    wanted = entry_id(key)
    namespace = await event_log.namespace()
    before: list[str] = []
    after: list[str] = []
    for partition in namespace.all_partitions():
        page = await event_log.page(partition, _just_before(key), count=1)
        if page.position == wanted:
            return
        if page.rows:
            after.append(page.rows[0][0])
        before += [entry] if (entry := await event_log.latest_before(partition, wanted)) else []
    near = [max(before, key=id_key)] if before else []
    near += [min(after, key=id_key)] if after else []
    offer = f"the nearest are {' and '.join(near)}" if near else "the log is empty"
    raise BadMoment(f"{what} {wanted}: no entry of the log has this id; {offer}, or give a time")


def _just_before(key: tuple[int, int]) -> str:
    ms, number = key
    return f"{ms}-{number - 1}" if number else f"{max(ms - 1, 0)}-{END}"

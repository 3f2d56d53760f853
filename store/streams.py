"""Waiting for entries of several streams: one XREAD for all, or in a cluster one for each.

A cluster refuses a read over two slots, and each partition has a slot of its own. There one read per
stream is kept pending; what comes first is handed on while the others go on waiting, and a node that
is away delays nobody but its own streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import Any

from store.connection import Store
from store.position import RawEntry
from store.refusals import Unavailable
from store.tasks import end_tasks

_PAGE = 1000
_AGAIN_SECONDS = 0.2
_LOST_SECONDS = 0.02

Answer = list[tuple[bytes, list[RawEntry]]]


async def read_streams(store: Store, positions: Mapping[str, str], block_ms: int) -> Answer:
    """XREAD on streams of one slot, with raw replies: [(key, [(id, [field, value, …]), …]), …]."""
    command = ("XREAD", "COUNT", _PAGE, "BLOCK", block_ms, "STREAMS")
    # redis-py would ask a cluster where the keys of an XREAD stand, each time: it is told the node.
    node = {"target_nodes": store.redis.get_node_from_key(next(iter(positions)))} if (
        store.is_cluster
    ) else {}  # fmt: skip
    answer = await store.redis.execute_command(*command, *positions, *positions.values(), **node)
    return answer or []


class Streams:
    """The reads of one reader."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: dict[str, asyncio.Task[Answer]] = {}
        self._asked: dict[str, str] = {}
        self._changed: asyncio.Future[None] | None = None

    def interrupt(self) -> None:
        """Ends the wait that is going on: the next one may be for other streams."""
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)

    async def read(self, positions: Mapping[str, str], block_ms: int) -> Answer:
        """Waits for entries after `positions` (key -> entry id); empty when none came.

        In a cluster entries may come that are not after the position, when it has moved on meanwhile.

        Raises:
            Unavailable: Redis is away. In a cluster the streams of that node are passed over.
        """
        changed = self._changed
        if changed is None:
            changed = self._changed = asyncio.get_running_loop().create_future()
        if len(positions) > 1 and self._store.is_cluster:
            return await self._read_each(positions, block_ms, changed)
        if not positions:
            await asyncio.wait({changed}, timeout=block_ms / 1000)
            return []
        read = self._own(read_streams(self._store, positions, block_ms))
        try:
            waiting: set[asyncio.Future[Any]] = {read, changed}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else []
        finally:
            # A cancellation that comes while the command goes out can be lost, and the read would wait on.
            await end_tasks([read], again=_LOST_SECONDS)

    async def _read_each(
        self, positions: Mapping[str, str], block_ms: int, changed: asyncio.Future[None]
    ) -> Answer:
        for key in list(self._pending):
            # A read that goes on from a later entry than is wanted would leave a hole.
            if key not in positions or _order(positions[key]) < _order(self._asked[key]):
                self._pending.pop(key).cancel()
        for key, position in positions.items():
            if key not in self._pending:
                self._asked[key] = position
                self._pending[key] = self._own(self._read_one(key, position, block_ms))
        waiting: set[asyncio.Future[Any]] = {changed, *self._pending.values()}
        done, _ = await asyncio.wait(
            waiting, timeout=block_ms / 1000, return_when=asyncio.FIRST_COMPLETED
        )
        answer: Answer = []
        for key in [key for key, read in self._pending.items() if read in done]:
            read = self._pending.pop(key)
            if not read.cancelled():
                answer += read.result()
        return answer

    async def _read_one(self, key: str, position: str, block_ms: int) -> Answer:
        with contextlib.suppress(*Unavailable):
            return await read_streams(self._store, {key: position}, block_ms)
        await asyncio.sleep(_AGAIN_SECONDS)
        return []

    def _own(self, reading: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
        """The store ends what is still waiting when it is closed."""
        task = asyncio.create_task(reading)
        self._store.reading.add(task)
        task.add_done_callback(self._store.reading.discard)
        return task


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, number = entry_id.partition("-")
    return int(ms), int(number or 0)

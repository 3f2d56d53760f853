"""Notes to whoever acts for a partition, and the answers to those that ask for something.

A note only wakes a worker up: whoever misses one loses nothing but time. A request is asked again until
somebody answers or its time is over.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

import msgspec

from store.connection import BLOCK_MS
from store.errors import MalformedEntry
from store.log import START
from store.messages import (
    Note,
    decode_note,
    encode_message,
)
from store.namespace import Namespace
from store.streams import Streams

_ASK_SECONDS = 0.5


class Inbox:
    """Reads the notes of some partitions."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._positions: dict[int, str] = {}
        self._streams = Streams(namespace.store)

    async def open(self, partitions: Sequence[int]) -> None:
        """Begins at the present end of these partitions; others are given up."""
        before = set(self._positions)
        for partition in partitions:
            if partition not in self._positions:
                key = self._namespace.keys.partition(partition).inbox
                last = await self._namespace.store.redis.xrevrange(key, count=1)
                self._positions[partition] = last[0][0].decode() if last else START
        self.forget(set(self._positions) - set(partitions))
        if before != set(self._positions):
            self._streams.interrupt()

    def forget(self, partitions: Iterable[int]) -> None:
        """Gives partitions up; `open` begins with them anew."""
        for partition in partitions:
            self._positions.pop(partition, None)

    async def wait(self, *, block_ms: int = BLOCK_MS) -> list[tuple[int, Note]]:
        """Waits for notes: (partition, note). What is malformed is passed over."""
        keys = {self._namespace.keys.partition(p).inbox: p for p in self._positions}
        answer = await self._streams.read(
            {key: self._positions[p] for key, p in keys.items()}, block_ms
        )
        notes = []
        for key, raw in answer:
            partition = keys.get(key.decode(), -1)
            if partition not in self._positions:
                continue
            for entry_id, fields in raw:
                self._positions[partition] = entry_id.decode()
                try:
                    notes.append((partition, decode_note((fields or [b"", b""])[1])))
                except MalformedEntry:
                    continue
        return notes


async def ask(namespace: Namespace, partition: int, note: Note, timeout: float) -> bytes | None:
    """Puts a request into a partition's inbox and waits for the answer of the worker that acts for it.

    Args:
        namespace: where.
        partition: whose worker is asked.
        note: the request; its `request` is filled in here.
        timeout: seconds to wait.

    Returns:
        The answer; None when none came, or when the partition changed hands meanwhile.
    """
    keys = namespace.keys.partition(partition)
    request = uuid.uuid4().hex
    redis = namespace.store.redis
    asked = await redis.get(keys.lease)
    now = await namespace.store.now_ms()
    filled = msgspec.structs.replace(note, request=request, deadline_ms=now + int(timeout * 1000))
    await redis.xadd(keys.inbox, {"m": encode_message(filled)}, maxlen=10000)
    waited = 0.0
    while waited < timeout:
        step = min(_ASK_SECONDS, timeout - waited)
        answer = await redis.blpop([keys.reply(request)], timeout=step)
        if answer:
            return bytes(answer[1])
        if await redis.get(keys.lease) != asked:
            return None
        waited += step
    return None


async def answer(namespace: Namespace, partition: int, request: str, payload: bytes) -> None:
    """Answers a request; the answer is kept for a minute."""
    key = namespace.keys.partition(partition).reply(request)
    # Not a transaction: a cluster has none over its connections, and who asks needs only the first.
    async with namespace.store.redis.pipeline(transaction=False) as pipe:
        pipe.rpush(key, payload)
        pipe.pexpire(key, 60_000)
        await pipe.execute()

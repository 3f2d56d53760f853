"""A namespace: what is recorded in it, and who is turned away."""

from __future__ import annotations

import asyncio

import pytest

from store import EventLog, NamespaceError, Store
from store.event import SCHEMA
from store.keys import Keys
from store.namespace import DEFAULT_PARTITIONS, open_namespace


class TestOpenNamespace:
    """Made by whoever comes first, checked by the others."""

    async def test_new(self, store: Store, namespace: str):
        """A new one gets the default number of partitions and the present schema."""
        made = await open_namespace(store, namespace)
        assert (made.name, made.partitions) == (namespace, DEFAULT_PARTITIONS)
        meta = await store.redis.hgetall(Keys(namespace).meta)
        assert meta[b"schema"] == str(SCHEMA).encode()
        assert list(made.all_partitions()) == list(range(DEFAULT_PARTITIONS))

    async def test_recorded_partitions_are_taken(self, store: Store, namespace: str):
        """Whoever does not ask for a number takes what is recorded."""
        await open_namespace(store, namespace, 4)
        assert (await open_namespace(store, namespace)).partitions == 4
        assert (await open_namespace(store, namespace, 4)).partitions == 4

    async def test_other_number_is_refused(self, store: Store, namespace: str):
        """Another number of partitions is refused; the message names both."""
        await open_namespace(store, namespace, 4)
        with pytest.raises(NamespaceError, match="has 4 partitions, not 8"):
            await open_namespace(store, namespace, 8)

    async def test_newer_schema_is_refused(self, store: Store, namespace: str):
        """A namespace of a newer schema is refused: upgrade."""
        await open_namespace(store, namespace)
        await store.redis.hset(Keys(namespace).meta, "schema", SCHEMA + 1)
        with pytest.raises(NamespaceError, match=f"schema {SCHEMA + 1}.*upgrade"):
            await EventLog(store, namespace).last()

    async def test_unreadable_record_is_refused(self, store: Store, namespace: str):
        """A record that is not a number is an error of the namespace, not a crash."""
        await store.redis.hset(Keys(namespace).meta, "schema", "banana")
        with pytest.raises(NamespaceError, match="banana"):
            await open_namespace(store, namespace)

    @pytest.mark.parametrize("count", [0, -1, 4097])
    async def test_impossible_number(self, store: Store, namespace: str, count: int):
        """A number of partitions that cannot be is refused, and nothing is made."""
        with pytest.raises(NamespaceError, match="from 1 to 4096"):
            await open_namespace(store, namespace, count)
        assert not await store.redis.exists(Keys(namespace).meta)

    async def test_two_at_once(self, store: Store, namespace: str):
        """Of two that make it at the same time with other numbers, one is turned away."""
        both = await asyncio.gather(
            open_namespace(store, namespace, 4),
            open_namespace(store, namespace, 8),
            return_exceptions=True,
        )
        assert sorted(type(one).__name__ for one in both) == ["Namespace", "NamespaceError"]

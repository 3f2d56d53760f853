"""A namespace: what is recorded in it, and who is turned away."""

from __future__ import annotations

import asyncio

import pytest

from store import EventLog, NamespaceError, Store, connect
from store.event import SCHEMA
from store.keys import Keys
from store.namespace import DEFAULT_PARTITIONS, find_namespace, open_namespace
from tests.support import RedisProcess


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


class TestFindNamespace:
    """For whoever looks: a namespace is found or it is not, and never made."""

    async def test_found(self, store: Store, namespace: str):
        """One that exists is the same as when it is opened."""
        assert await open_namespace(store, namespace, 4) == await find_namespace(store, namespace)

    async def test_mistyped(self, own_redis: RedisProcess):
        """One that does not exist is refused with those that do, and is not there afterwards."""
        async with connect(own_redis.url) as store:
            await open_namespace(store, "default")
            await open_namespace(store, "staging")
            with pytest.raises(NamespaceError, match=r"'nothere'.*there are: default, staging"):
                await find_namespace(store, "nothere")
            assert not await store.redis.exists(Keys("nothere").meta)

    async def test_nothing_yet(self, own_redis: RedisProcess):
        """Where there is none at all, the message says what to start."""
        async with connect(own_redis.url) as store:
            await store.redis.set("ar:{a/0}:meta", "a key that is none of ours")
            with pytest.raises(NamespaceError, match=r"nothing has been recorded.*start a service"):
                await find_namespace(store, "default")

    async def test_user_who_may_not_list_keys(self, own_redis: RedisProcess):
        """Who may only read some keys is told that it does not exist, without the others."""
        async with connect(own_redis.url) as store:
            await open_namespace(store, "default")
            words = ("ACL", "SETUSER", "reader", "on", ">pw", "~ar:*", "+hmget", "+info", "+client")
            await store.redis.execute_command(*words)
        url = own_redis.url.replace("unix://", "unix://reader:pw@")
        async with connect(url) as store:
            with pytest.raises(NamespaceError, match="'nothere'") as caught:
                await find_namespace(store, "nothere")
        assert "default" not in str(caught.value)

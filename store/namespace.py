"""A namespace: one log, its number of partitions, and the policy its workers run with.

The number of partitions is fixed when the namespace is made, because it decides in which partition
the events of a process are. It is recorded with the schema version, and whoever opens the namespace
is checked against both.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from redis.exceptions import NoPermissionError

from store.connection import Store
from store.errors import NamespaceError
from store.event import SCHEMA
from store.keys import ANY_META, Keys, PartitionKeys, namespace_of, partition_of

DEFAULT_NAMESPACE = "default"
DEFAULT_PARTITIONS = 16
_LISTED = 20
_LISTING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Namespace:
    """An opened namespace.

    Attributes:
        store: where it is.
        keys: its keys.
        partitions: how many it has.
    """

    store: Store
    keys: Keys
    partitions: int

    @property
    def name(self) -> str:
        return self.keys.namespace

    def partition_of(self, process: str) -> int:
        return partition_of(process, self.partitions)

    def partition_keys(self, process: str) -> PartitionKeys:
        return self.keys.partition(self.partition_of(process))

    def all_partitions(self) -> range:
        return range(self.partitions)


async def open_namespace(
    store: Store, name: str = DEFAULT_NAMESPACE, partitions: int | None = None
) -> Namespace:
    """Opens a namespace, and makes it if it does not exist.

    Args:
        store: where.
        name: of the namespace.
        partitions: how many it must have; None takes what is recorded, or the default for a new one.

    Raises:
        NamespaceError: it was written by a newer schema, or has another number of partitions.
    """
    keys = Keys(name)
    wanted = DEFAULT_PARTITIONS if partitions is None else partitions
    if not 1 <= wanted <= 4096:
        raise NamespaceError(f"{wanted} partitions cannot be: give a number from 1 to 4096")
    found = await _read(store, keys)
    if found is None:  # Who may only read opens those that exist.
        created = await store.now_ms()
        for field, value in (("schema", SCHEMA), ("partitions", wanted), ("created_at", created)):
            await store.redis.hsetnx(keys.meta, field, str(value))
        found = await _read(store, keys)
        assert found is not None
    if partitions is not None and found.partitions != partitions:
        raise NamespaceError(
            f"namespace {name} at {store.url} has {found.partitions} partitions, not {partitions}: "
            "the number is fixed when a namespace is made; leave it out, or use another --namespace"
        )
    return found


async def find_namespace(store: Store, name: str) -> Namespace:
    """Opens a namespace that exists: for whoever looks, or acts on what is there.

    Raises:
        NamespaceError: it does not exist, or was written by a newer schema.
    """
    found = await _read(store, Keys(name))
    if found is not None:
        return found
    others = await _names(store)
    if others:
        raise NamespaceError(
            f"there is no namespace {name!r} at {store.url}; there are: {', '.join(others)}"
        )
    raise NamespaceError(
        f"nothing has been recorded in namespace {name!r} at {store.url} yet: start a service with a "
        "Host, or `agent-reconciler worker`, with this address and namespace"
    )


async def _read(store: Store, keys: Keys) -> Namespace | None:
    """A namespace as it is recorded; None where it is not."""
    name = keys.namespace
    schema, recorded = await store.redis.hmget(keys.meta, ["schema", "partitions"])
    if schema is None or recorded is None:
        return None
    if not (schema.isdigit() and recorded.isdigit()):
        raise NamespaceError(
            f"namespace {name} at {store.url} has a record that cannot be read: schema {schema!r}, "
            f"partitions {recorded!r}; use another --namespace"
        )
    if int(schema) > SCHEMA:
        raise NamespaceError(
            f"namespace {name} at {store.url} was written by schema {int(schema)}, this program "
            f"knows schema {SCHEMA}: upgrade agent-reconciler, or use another --namespace"
        )
    return Namespace(store, keys, int(recorded))


async def _names(store: Store) -> list[str]:
    """Some namespaces: what is found in a moment, and nothing where the user may not list keys."""
    found: set[str] = set()
    # A Redis may have millions of keys, and who has mistyped a name is not to wait for them.
    with suppress(NoPermissionError, TimeoutError):
        async with asyncio.timeout(_LISTING_SECONDS):
            async for key in store.redis.scan_iter(match=ANY_META, count=1000):
                if (name := namespace_of(key.decode())) is not None:
                    found.add(name)
                if len(found) == _LISTED:
                    break
    return sorted(found)

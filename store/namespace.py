"""A namespace: one log, its number of partitions, and the policy its workers run with.

The number of partitions is fixed when the namespace is made, because it decides in which partition
the events of a process are. It is recorded with the schema version, and whoever opens the namespace
is checked against both.
"""

from __future__ import annotations

from dataclasses import dataclass

from store.connection import Store
from store.errors import NamespaceError
from store.event import SCHEMA
from store.keys import Keys, PartitionKeys, partition_of

DEFAULT_NAMESPACE = "default"
DEFAULT_PARTITIONS = 16


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
    redis = store.redis
    wanted = DEFAULT_PARTITIONS if partitions is None else partitions
    if not 1 <= wanted <= 4096:
        raise NamespaceError(f"{wanted} partitions cannot be: give a number from 1 to 4096")
    fields = ["schema", "partitions"]
    schema, recorded = await redis.hmget(keys.meta, fields)
    if schema is None or recorded is None:  # Who may only read opens those that exist.
        created = await store.now_ms()
        for field, value in (("schema", SCHEMA), ("partitions", wanted), ("created_at", created)):
            await redis.hsetnx(keys.meta, field, str(value))
        schema, recorded = await redis.hmget(keys.meta, fields)
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
    if partitions is not None and int(recorded) != partitions:
        raise NamespaceError(
            f"namespace {name} at {store.url} has {int(recorded)} partitions, not {partitions}: "
            "the number is fixed when a namespace is made; leave it out, or use another --namespace"
        )
    return Namespace(store, keys, int(recorded))

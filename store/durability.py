"""Durability: what has happened to an event when Redis says that it has it. Honest names, no more.

`memory`: it is in the memory of the server; on disk when the server gets round to it. `fsync`: its disk
has it. `replicated`: at least one replica has it in memory. The confirmation travels on the connection
of the append, in the same round trip, because WAIT (Redis 3.0) and WAITAOF (7.2) speak of the last write
of their own connection. What a server cannot give is refused when the host starts, not discovered later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from redis.exceptions import RedisError

from store.connection import Store
from store.errors import DurabilityError

CONFIRM_MS = 5000
"""How long a confirmation is waited for; then the events count as not acknowledged, and are sent again."""


class Durability(StrEnum):
    """What is true of an event when it is acknowledged."""

    MEMORY = "memory"
    FSYNC = "fsync"
    REPLICATED = "replicated"


Confirmation = tuple[str, ...]
"""A command that is answered when the last write of its connection is as durable as was asked."""


async def confirmation(store: Store, wanted: str | Durability | None) -> Confirmation | None:
    """What is to be sent after each append, None when the append's own answer says enough.

    Args:
        store: an open store.
        wanted: None takes what the URL says (`?durability=`), or `memory`.

    Raises:
        DurabilityError: there is no such durability, or this server cannot give it.
    """
    name = str(wanted or store.durability or Durability.MEMORY)
    try:
        durability = Durability(name)
    except ValueError:
        known = ", ".join(Durability)
        raise DurabilityError(f"durability {name!r} is not known: choose of {known}") from None
    if durability is Durability.MEMORY:
        return None
    servers = await store.infos()
    if durability is Durability.FSYNC:
        needed = [await _fsync(store, node, info) for node, info in servers.items()]
        return next((command for command in needed if command is not None), None)
    for node, info in servers.items():
        if not int(info.get("connected_slaves", 0)):
            raise DurabilityError(
                f"durability=replicated needs a replica, and {_at(store, node)} has none connected: "
                "connect one (REPLICAOF), or use memory or fsync"
            )
    return ("WAIT", "1", str(CONFIRM_MS))


def _at(store: Store, node: str) -> str:
    return f"node {node} of {store.url}" if store.is_cluster else f"Redis at {store.url}"


async def _fsync(store: Store, node: str, info: Mapping[str, Any]) -> Confirmation | None:
    version = str(info.get("redis_version", "0"))
    if not info.get("aof_enabled"):
        raise DurabilityError(
            f"durability=fsync needs an append-only file, and {_at(store, node)} has none: start "
            "it with --appendonly yes, or use memory"
        )
    try:
        always = await store.setting(node, "appendfsync") == "always"
        setting = "appendfsync always" if always else "another appendfsync than always"
    except RedisError:
        always, setting = False, "its configuration hidden"
    if always:
        return None  # The server answers after it has flushed.
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (7, 2):
        raise DurabilityError(
            f"durability=fsync needs appendfsync always, or Redis 7.2 (WAITAOF); {_at(store, node)} "
            f"is {version} with {setting}: set appendfsync always, or use memory"
        )
    return ("WAITAOF", "1", "0", str(CONFIRM_MS))


def confirmed(reply: Any) -> bool:
    """Whether the answer to a confirmation says that it is as durable as was asked."""
    first = reply[0] if isinstance(reply, list) else reply
    return isinstance(first, int) and first >= 1

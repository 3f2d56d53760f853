"""What a Redis must be to hold a log, and the one line that says so when it is not.

Each of these would be found out later, and worse: a replica at the first write, a full memory at the
first burst, an eviction policy on the day it drops the log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OLDEST_SERVER = (6, 2)


def objection(info: Mapping[str, Any], at: str, *, cluster: bool) -> str | None:
    """Why a server cannot hold the log, and what to do about it; None when it can.

    Args:
        info: its answer to INFO.
        at: its address, as it may be shown.
        cluster: it was addressed as a node of a cluster.
    """
    version = str(info.get("redis_version", "0"))
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        return (
            f"Redis at {at} is version {version}: {oldest} or newer is needed, upgrade the server"
        )
    mode = info.get("redis_mode")
    if mode == "cluster" and not cluster:
        return (
            f"Redis at {at} is a node of a cluster: write redis+cluster://host:port"
            "[,host:port…] instead"
        )
    if mode == "sentinel":
        return (
            f"{at} is a sentinel: write redis+sentinel://host:port[,host:port…]/name-of-the-master "
            "instead"
        )
    if info.get("role") in {"slave", "replica"}:
        master = f"{info.get('master_host')}:{info.get('master_port')}"
        return (
            f"Redis at {at} is a replica and cannot be written to: give the address of its master, "
            f"{master}, or redis+sentinel://…"
        )
    return _about_memory(info, at)


def _about_memory(info: Mapping[str, Any], at: str) -> str | None:
    limit = int(info.get("maxmemory") or 0)
    policy = info.get("maxmemory_policy", "noeviction")
    if limit and policy != "noeviction":
        return (
            f"Redis at {at} would drop the log when its memory is full (maxmemory-policy {policy}): "
            "run `CONFIG SET maxmemory-policy noeviction`, or use a Redis of its own"
        )
    used = int(info.get("used_memory") or 0)
    if limit and used >= limit:
        return (
            f"Redis at {at} is out of memory ({used} of {limit} bytes used): raise it with "
            "`CONFIG SET maxmemory <bytes>`, or archive and trim the log"
        )
    return None

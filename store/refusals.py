"""What a failure of Redis means: away for now, refused for now, or a word of our own scripts.

Whoever gets one of `Unavailable` may try again later: appends are idempotent, and whatever a worker
writes names its lease.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from redis.exceptions import (
    BusyLoadingError,
    ClusterError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from store.errors import Fenced, RedisBusy, SequenceGap

Unavailable = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ClusterError,
    RedisClusterException,
    TryAgainError,
    ReadOnlyError,
    MasterDownError,
    OutOfMemoryError,
    RedisBusy,
    OSError,
)
"""What is raised while Redis is away, fails over, or cannot take a write for now. Whoever sees one of
these may try again later."""

# How Redis begins the refusal of what it may well do later. A script passes it on within its own
# message, so that redis-py does not know it again.
_FOR_NOW = re.compile(
    r"\b(READONLY|OOM|MISCONF|NOREPLICAS|CLUSTERDOWN|MASTERDOWN|TRYAGAIN|LOADING|UNBLOCKED|NOTREADY)\b"
)


_ADVICE = {
    "OOM": "its memory is full, raise maxmemory",
    "MISCONF": "it cannot write to its disk, see its log",
    "NOREPLICAS": "too few replicas are connected",
    "READONLY": "it is a replica now",
}


def meaning(name: str, args: Sequence[Any], error: ResponseError, url: str) -> Exception:
    """What the refusal of a script means; the error itself when it means nothing of ours.

    Args:
        name, args: of the script.
        error: the answer.
        url: of Redis, as it may be shown.
    """
    message = str(error)
    if message.startswith("FENCED"):
        return Fenced(f"{name} refused: {args[0]!s} may no longer write")
    if message.startswith("SEQGAP"):
        # A worker's writes name the lease first, then writer and seq as an append does.
        writer, first = args[:2] if name == "append" else args[1:3]
        return SequenceGap(str(writer), int(first), int(message.split()[1]))
    if isinstance(error, Unavailable):
        return error
    if (found := _FOR_NOW.search(message)) is not None:
        return RedisBusy(
            f"Redis at {url} cannot take {name} for now ({found[1]}): "
            f"{_ADVICE.get(found[1], 'it fails over')}; trying again is safe"
        )
    return error

"""What a Redis must be to hold a log, and the one line that says so when it is not.

Each of these would be found out later, and worse: a replica at the first write, a full memory at the
first burst, an eviction policy on the day it drops the log.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
)

from store.client import PLAIN, SENTINEL, is_cluster
from store.errors import RedisUnavailable
from store.refusals import Unavailable

OLDEST_SERVER = (6, 2)
_LISTENS_SECONDS = 2.0


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


async def check_servers(client: Any, url: str) -> None:
    """Asks each server that is written to whether it can hold a log.

    Args:
        client: of redis-py.
        url: as it may be shown.

    Raises:
        RedisUnavailable: nothing answers, or the server cannot hold a log; the message says what to do.
    """
    try:
        said = await infos(client, url)
    except (AuthenticationError, AuthorizationError) as error:
        raise RedisUnavailable(
            f"Redis at {url} refused the login ({error}): give user and password in the "
            "URL, redis://user:password@host:port or redis://user@host:port?password_file=PATH"
        ) from None
    except NoPermissionError as error:
        raise RedisUnavailable(
            f"Redis at {url} lets this user do too little ({error}): give it the rights of "
            "deploy/redis/users.acl"
        ) from None
    except MasterNotFoundError as error:
        raise RedisUnavailable(await _no_master(error, url, client)) from None
    except RedisClusterException as error:
        if "not enabled" in str(error):
            raise RedisUnavailable(
                f"{url} is not a cluster: write redis://host:port instead"
            ) from None
        if re.search("NOAUTH|WRONGPASS|AUTH", str(error)):
            raise RedisUnavailable(
                f"the cluster at {url} refused the login: give user and password in the "
                "URL, redis+cluster://user:password@host:port"
            ) from None
        raise RedisUnavailable(await _nobody_there(error, url)) from None
    except Unavailable as error:
        message = _node_away(error, url) if is_cluster(client) else None
        raise RedisUnavailable(message or await _nobody_there(error, url)) from None
    except RedisError as error:
        if "unknown command `SENTINEL`" in str(error):
            raise RedisUnavailable(f"{url} is not a sentinel: write redis://host:port") from None
        raise RedisUnavailable(f"{url} does not answer like Redis: {error}") from None
    for node, info in said.items():
        at = f"{node} of {url}" if is_cluster(client) else url
        if (message := objection(info, at, cluster=is_cluster(client))) is not None:
            raise RedisUnavailable(message)


async def infos(client: Any, url: str) -> dict[str, dict[str, Any]]:
    """What each server that is written to says of itself, by its address."""
    if not is_cluster(client):
        return {url: await client.info()}
    await client.initialize()
    nodes = client.get_primaries()
    answers = await asyncio.gather(*(_info_of(client, node) for node in nodes))
    return {node.name: info for node, info in zip(nodes, answers, strict=True)}


async def _info_of(client: Any, node: Any) -> dict[str, Any]:
    try:
        info: dict[str, Any] = await client.execute_command("INFO", target_nodes=node)
    except Unavailable as error:
        error.add_note(node.name)
        raise
    return info


def _node_away(error: BaseException, url: str) -> str | None:
    """Which node of a cluster does not answer, where others do; None where the error tells of none."""
    # redis-py asks one node for its commands before anything else, and says where it failed.
    said = re.search(r"(?:connecting to|reading from) (\S+:\d+)", str(error))
    node = said[1] if said else getattr(error, "__notes__", [None])[0]
    if node is None:
        return None
    return (
        f"node {node} of the cluster at {url} does not answer ({_cause(error)}): start it, or wait "
        "for its replica to take over; the others tell, `redis-cli -p <port> CLUSTER NODES`"
    )


async def _no_master(error: BaseException, url: str, client: Any) -> str:
    # The error has the sentinels that failed, with all their settings, and not why.
    for sentinel in client.connection_pool.sentinel_manager.sentinels:
        try:
            await sentinel.ping()
            break
        except RedisError as why:
            error_of_one = why
    else:
        return _no_node(error_of_one, url)
    return (
        f"the sentinels at {url} name no master ({_cause(error)}): see "
        "`redis-cli -p 26379 SENTINEL masters` for its name and state"
    )


def _no_node(error: BaseException, url: str) -> str:
    scheme = url.partition("://")[0]
    what, ask = ("sentinel", "SENTINEL masters") if scheme in SENTINEL else (
        "cluster", "CLUSTER NODES"
    )  # fmt: skip
    tls = ", and have TLS" if scheme.startswith("rediss") else ""
    return (
        f"no {what} answers at {url} ({_cause(error)}): see whether its nodes run{tls}, with "
        f"`redis-cli -p <port> {ask}`"
    )


async def _nobody_there(error: BaseException, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in PLAIN and parts.scheme != "embedded":
        return _no_node(error, url)
    cause = _cause(error)
    if parts.scheme in {"redis", "rediss"} and await _listens(parts.hostname, parts.port or 6379):
        if "certificate verify failed" in str(error).lower():
            return (
                f"the certificate of {url} does not hold ({cause}): give its authority, "
                "?ssl_ca_certs=PATH, and the host name that it was made for"
            )
        other = "write redis:// if it has no TLS" if parts.scheme == "rediss" else (
            "write rediss:// if it has TLS"
        )  # fmt: skip
        speaks = "TLS" if parts.scheme == "rediss" else "Redis"
        return (
            f"something listens at {url} and does not answer as {speaks} does ({cause}): {other}, or "
            "see what it is"
        )
    if parts.scheme == "unix":
        start = f"redis-server --port 0 --unixsocket {parts.path} --appendonly yes"
    else:
        start = f"redis-server --port {parts.port or 6379} --appendonly yes"
    return f"no Redis answers at {url} ({cause}): start one with `{start}`, or use embedded://PATH"


async def _listens(host: str | None, port: int) -> bool:
    """Somebody takes connections there, whatever is spoken."""
    try:
        async with asyncio.timeout(_LISTENS_SECONDS):
            _, writer = await asyncio.open_connection(host or "localhost", port)
    except OSError:
        return False
    writer.close()
    return True


def _cause(error: BaseException) -> str:
    """The shortest true name of what went wrong, without the address, which is said already."""
    text = str(error).lower()
    for known in (
        "connection refused",
        "timeout",
        "no such file or directory",
        "name or service not known",
    ):
        if known in text:
            return known
    if "certificate verify failed" in text:
        return text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
    if number := re.search(r"err(?:or|no) (\d+)", text):
        return os.strerror(int(number[1])).lower()
    return str(error).splitlines()[0] if str(error) else type(error).__name__

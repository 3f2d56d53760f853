"""From an address to a client of redis-py: one server, a cluster, or what the sentinels name as master.

The three answer to the same commands, so that nothing above this file knows which one it has, but for
two things that a cluster cannot do in one call: a read of streams in several slots (`store.streams`),
and many commands at once when one node is away (`Store.batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, ClusterPipeline, PipelineCommand, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from store.address import BadPart, check_parts

PLAIN = ("redis", "rediss", "unix")
CLUSTER = ("redis+cluster", "rediss+cluster")
SENTINEL = ("redis+sentinel", "rediss+sentinel")
SCHEMES = (*PLAIN, *CLUSTER, *SENTINEL)

SOCKET_TIMEOUT = 10.0
_CONNECT_TIMEOUT = 5.0
_SENTINEL_TIMEOUT = 1.0
# A blocked read holds a connection, and in a cluster there is one for each partition.
_CONNECTIONS_PER_NODE = 20_000
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")


def make_client(address: str) -> Any:
    """The client for an address; it is not connected yet.

    Raises:
        ValueError: the address cannot be used; the message says why, in words for its user.
    """
    check_parts(address)
    scheme = address.partition("://")[0]
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": _CONNECT_TIMEOUT,
        "health_check_interval": 30,
        "client_name": "agent-reconciler",
        "protocol": 2,
        "max_connections": _CONNECTIONS_PER_NODE,
    }
    if scheme in PLAIN:
        client: Any = Redis.from_url(address, retry=_retry(), **options)
    elif scheme in CLUSTER:
        client = _cluster(address, options)
    else:
        client = _behind_sentinels(address, options)
    _try_to_construct(client)
    # Raw replies of the stream reads, [id, [field, value, …]]: redis-py would build a dict for
    # every entry, which costs as much as reading it.
    for command in ("XRANGE", "XREVRANGE", "XREAD"):
        client.set_response_callback(command, _raw)
    return client


def _try_to_construct(client: Any) -> None:
    """Makes a connection without connecting it: redis-py looks at the values of options only then."""
    if is_cluster(client):
        node = next(iter(client.nodes_manager.startup_nodes.values()))
        of, options = node.connection_class, node.connection_kwargs
    else:
        pool = client.connection_pool
        of, options = pool.connection_class, pool.connection_kwargs
    try:
        made = of(**options)
        if isinstance(made, SSLConnection):
            made.ssl_context.get()
    except OSError as error:
        files = ", ".join(f"{name} {options[name]}" for name in _FILES if options.get(name))
        raise BadPart(f"{files} cannot be used: {error.strerror or error}") from None
    except (RedisError, TypeError) as error:
        raise ValueError(f"an option has a value that cannot be: {error}") from None


async def close_client(client: Any) -> None:
    """Closes its connections, and those to the sentinels."""
    await client.aclose()
    sentinels = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    if sentinels is not None:
        await sentinels.aclose()


def is_cluster(client: Any) -> bool:
    """The client speaks to a cluster, where what is in two slots cannot be asked for at once."""
    return isinstance(client, RedisCluster)


_ELSEWHERE = (MovedError, AskError, ClusterDownError, RedisConnectionError, RedisTimeoutError)
"""What a node answers, or does not, that is no longer the one to ask."""


async def on_one_node(client: Any, command: Sequence[Any], confirm: Sequence[str]) -> list[Any]:
    """Runs a script in a cluster and then a command that speaks of its connection, as WAIT does.

    Both go to the node of the script's first key on one connection. Where that node is another one by
    now, the script is run the usual way, which finds it, and both once more: so the script must be
    one that may run twice.

    Args:
        client: of the cluster.
        command: EVALSHA or EVAL, with its arguments.
        confirm: the other command.

    Returns:
        Both answers; each may be an exception.
    """
    try:
        answers = await _pair(client, command, confirm)
    except (RedisConnectionError, RedisTimeoutError) as error:
        answers = [error, error]
    if not isinstance(answers[0], _ELSEWHERE):
        return answers
    await client.execute_command(*command)
    return await _pair(client, command, confirm)


async def _pair(client: Any, command: Sequence[Any], confirm: Sequence[str]) -> list[Any]:
    pair = [PipelineCommand(0, *command), PipelineCommand(1, *confirm)]
    with _connections_closed():
        await client.get_node_from_key(command[3]).execute_pipeline(pair)
    return [one.result for one in pair]


def _raw(reply: Any, **_: Any) -> Any:
    return reply


class _Cluster(RedisCluster):
    """RedisCluster whose failures are all failures of Redis.

    When it learns of a failover it closes all its connections, also those that other tasks are just
    opening; these find no stream to write to, and redis-py 8.1 lets the AttributeError through (on
    Python 3.12 a TypeError: its issue 4287).
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _connections_closed():
            return await super().execute_command(*args, **options)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> ClusterPipeline:
        return _Pipeline(self, transaction)  # type: ignore[abstract]


class _Pipeline(ClusterPipeline):
    async def execute(self, *args: Any, **options: Any) -> list[Any]:
        with _connections_closed():
            return await super().execute(*args, **options)


@contextmanager
def _connections_closed() -> Iterator[None]:
    try:
        yield
    except (AttributeError, TypeError) as error:
        if not str(error).startswith("'NoneType' object"):
            raise
        raise RedisConnectionError("the connection was closed while it was opened") from error


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=0.5, base=0.02), 3)


def _cluster(address: str, options: dict[str, Any]) -> Any:
    hosts, path, options = _parse(address, options, 6379)
    if path.strip("/") not in {"", "0"}:
        raise ValueError("a cluster has no databases: leave out what follows the hosts")
    nodes = [ClusterNode(host, port) for host, port in hosts]
    return _Cluster(startup_nodes=nodes, retry=_retry(), **options)


def _behind_sentinels(address: str, options: dict[str, Any]) -> Any:
    hosts, path, options = _parse(address, options, 26379)
    name, _, database = path.strip("/").partition("/")
    if not name or not (database or "0").isdigit():
        raise ValueError(
            "write redis+sentinel://host:port[,host:port…]/name-of-the-master[/database]"
        )
    asking: dict[str, Any] = {
        "socket_timeout": _SENTINEL_TIMEOUT,
        "socket_connect_timeout": _SENTINEL_TIMEOUT,
        # The next sentinel is asked instead, and all of them again with each try to reach the master:
        # with redis-py's ten tries each, a wrong address would take half a minute.
        "retry": Retry(NoBackoff(), 1),
    }
    for option in ("username", "password"):
        if (value := options.pop(f"sentinel_{option}", None)) is not None:
            asking[option] = value
    sentinels: Any = Sentinel(hosts, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    return sentinels.master_for(name, db=int(database or 0), retry=_retry(), **options)


def _parse(
    address: str, options: dict[str, Any], default_port: int
) -> tuple[list[tuple[str, int]], str, dict[str, Any]]:
    """Hosts, path, and the options with those of the address.

    redis-py knows addresses with one host; user, password and query are left to it.
    """
    scheme, _, rest = address.partition("://")
    rest, _, query = rest.partition("?")
    rest, slash, path = rest.partition("/")
    login, at, names = rest.rpartition("@")
    hosts = [_host(name, default_port) for name in names.split(",") if name]
    if not hosts:
        raise ValueError("it names no host")
    own: dict[str, str] = {}
    passed = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in {"sentinel_username", "sentinel_password"}:
            own[name] = value
        else:
            passed.append((name, value))
    single = f"{scheme.partition('+')[0]}://{login}{at}x"
    parsed = dict(parse_url(f"{single}?{urlencode(passed)}" if passed else single))
    parsed.pop("host", None)
    if parsed.pop("connection_class", None) is not None:
        parsed["ssl"] = True
    return hosts, slash + path, {**options, **parsed, **own}


def _host(text: str, default_port: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(default_port)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("a port is not a number from 1 to 65535")
    return host.strip("[]"), int(port)

"""`connect(url)`: from an address to a Redis that has been checked and can hold the log.

A `Store` is a thin handle: the client, the scripts, and the address as it may be shown (without a
password). What stands on it (log, channel, leases) never makes a connection of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Generator, Iterable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha1
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from store import scripts
from store.client import PLAIN, SCHEMES, SENTINEL, close_client, is_cluster, make_client
from store.embedded import EmbeddedServer
from store.errors import BadAddress, Fenced, RedisBusy, RedisUnavailable, SequenceGap
from store.server_check import objection

BLOCK_MS = 2000
"""How long a blocking read waits at most, in ms; below the socket's time limit."""
_AT_ONCE = 64
"""Commands on their way to a cluster side by side, at most."""

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

# What a script is told whose user may not do, or not there, what the script does: Redis 6.2, and 7.
_NOT_ALLOWED = re.compile(r"The user executing the script can't|ACL failure in script|NOPERM")


def check_cancelled() -> None:
    """Raises CancelledError if the running task was told to end.

    On Python 3.11 `asyncio.wait_for`, which redis-py uses, can swallow a cancellation that comes in
    the same tick as a reply. A task that loops for ever asks at each turn.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended.

    It asks again when a task goes on: its cancellation can have been swallowed, see
    `check_cancelled`.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)


_SCHEMES = "redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// or embedded://PATH"


def _take_option(url: str, name: str) -> tuple[str, str | None]:
    """The URL without an option of its query, and the option's value."""
    option = re.search(rf"[?&]{name}=([^&]*)", url)
    if option is None:
        return url, None
    rest = url[option.end() :]
    return url[: option.start()] + (re.sub("^&", "?", rest) if option[0][0] == "?" else rest), option[1]


def shown(url: str) -> str:
    """The URL without its password, for messages and logs; also one that cannot be parsed."""
    if url.startswith("embedded://"):
        return url
    hidden = re.sub(r"(://[^:@/?#]*:).*@", r"\1***@", url, count=1)
    return re.sub(r"([?&](?:sentinel_)?password=)[^&]*", r"\1***", hidden)


class Store:
    """A connection to Redis that has been checked. Made by `connect`.

    Attributes:
        url: the address, without a password.
        redis: the client; replies are bytes, and stream entries are not parsed.
        durability: as the URL asks for it (`?durability=`); see `store.durability`.
        reading: reads that wait (see `store.streams`); they end with the store.
    """

    def __init__(self, url: str) -> None:
        # What the project adds to a URL is taken out before redis-py sees it.
        url, self.durability = _take_option(url, "durability")
        url, password_file = _take_option(url, "password_file")
        self._password_file = Path(unquote(password_file)) if password_file else None
        self.url = shown(url)
        self._address = url
        self._embedded: EmbeddedServer | None = None
        self._redis: Any = None
        self.reading: set[asyncio.Task[Any]] = set()

    @property
    def is_cluster(self) -> bool:
        """It is a cluster: keys with different hash tags cannot be asked for in one call."""
        return is_cluster(self._redis)

    @property
    def redis(self) -> Any:  # redis-py types every reply as bytes or str; here it is always bytes
        if self._redis is None:
            raise RedisUnavailable(f"{self.url} is not connected; use `async with connect(url)`")
        return self._redis

    @property
    def owns_server(self) -> bool:
        """True when this handle started an embedded server, which ends with it."""
        return self._embedded is not None and self._embedded.owned

    async def open(self) -> Self:
        """Connects and checks the server.

        Raises:
            BadAddress: the URL cannot be used.
            RedisUnavailable: nothing answers there, or the server cannot hold a log: it is too old, a
                replica, out of memory, or would evict.
        """
        if self._redis is not None:
            return self
        if "://" not in self._address:
            raise BadAddress(f"{self.url!r} is not an address: write {_SCHEMES}")
        scheme, rest = self._address.split("://", 1)
        if scheme == "embedded":
            if not rest:
                raise BadAddress("embedded:// needs a folder: write embedded://PATH")
            self._embedded = EmbeddedServer(Path(rest))
            await self._embedded.start()
            address = f"unix://{self._embedded.socket}"
        elif scheme in SCHEMES:
            address = self._with_password()
        else:
            raise BadAddress(f"{self.url!r} has an unknown scheme: write {_SCHEMES}")
        try:
            self._redis = make_client(address)
        except ValueError as error:
            # The error may quote a part of the address, and the password with it.
            cause = str(error) if self.url == address else "it cannot be parsed"
            raise BadAddress(f"{self.url!r} is not a Redis address: {cause}") from None
        try:
            await self._check()
        except BaseException:
            await self.close()
            raise
        return self

    def _with_password(self) -> str:
        """The address as the client takes it: with the password from the file that it names."""
        file = self._password_file
        if file is None:
            return self._address
        scheme, _, rest = self._address.partition("://")
        host = re.split(r"[/?]", rest, maxsplit=1)[0]
        login, _, _ = host.rpartition("@")
        if ":" in login:
            raise BadAddress(f"{self.url} has a password and a password_file: give one of them")
        try:
            password = file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise BadAddress(f"password_file {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BadAddress(f"password_file {file} is not text") from None
        if not password:
            raise BadAddress(f"password_file {file} is empty: one line with the password is needed")
        rest = rest.removeprefix(f"{login}@")
        return f"{scheme}://{login}:{quote(password, safe='')}@{rest}"

    async def _check(self) -> None:
        try:
            infos = await self._infos()
        except (AuthenticationError, AuthorizationError) as error:
            raise RedisUnavailable(
                f"Redis at {self.url} refused the login ({error}): give user and password in the "
                "URL, redis://user:password@host:port, or redis://user@host:port?password_file=PATH"
            ) from None
        except NoPermissionError as error:
            raise RedisUnavailable(
                f"Redis at {self.url} lets this user do too little ({error}): give it the rights of "
                "deploy/redis/users.acl"
            ) from None
        except MasterNotFoundError as error:
            raise RedisUnavailable(
                f"the sentinels at {self.url} name no master ({_cause(error)}): see "
                "`redis-cli -p 26379 SENTINEL masters` for its name and state"
            ) from None
        except RedisClusterException as error:
            if "not enabled" in str(error):
                raise RedisUnavailable(
                    f"{self.url} is not a cluster: write redis://host:port instead"
                ) from None
            if re.search("NOAUTH|WRONGPASS|AUTH", str(error)):
                raise RedisUnavailable(
                    f"the cluster at {self.url} refused the login: give user and password in the "
                    "URL, redis+cluster://user:password@host:port"
                ) from None
            raise RedisUnavailable(self._nobody_there(error)) from None
        except Unavailable as error:
            raise RedisUnavailable(self._nobody_there(error)) from None
        except RedisError as error:
            raise RedisUnavailable(f"{self.url} does not answer like Redis: {error}") from None
        for node, info in infos.items():
            at = f"{node} of {self.url}" if self.is_cluster else self.url
            if (message := objection(info, at, cluster=self.is_cluster)) is not None:
                raise RedisUnavailable(message)

    async def _infos(self) -> dict[str, dict[str, Any]]:
        """What each server that is written to says of itself, by its address."""
        if not self.is_cluster:
            return {self.url: await self.redis.info()}
        await self.redis.initialize()
        nodes = self.redis.get_primaries()
        answers = await asyncio.gather(
            *(self.redis.execute_command("INFO", target_nodes=node) for node in nodes)
        )
        return {node.name: info for node, info in zip(nodes, answers, strict=True)}

    def _nobody_there(self, error: BaseException) -> str:
        scheme = self._address.partition("://")[0]
        if scheme not in PLAIN and scheme != "embedded":
            what = "sentinel" if scheme in SENTINEL else "cluster"
            return (
                f"no {what} answers at {self.url} ({_cause(error)}): see whether its nodes run, with "
                f"`redis-cli -p <port> {'SENTINEL masters' if what == 'sentinel' else 'CLUSTER NODES'}`"
            )
        parts = urlsplit(self._address)
        if parts.scheme == "unix":
            start = f"redis-server --port 0 --unixsocket {parts.path} --appendonly yes"
        else:
            start = f"redis-server --port {parts.port or 6379} --appendonly yes"
        return (
            f"no Redis answers at {self.url} ({_cause(error)}): start one with `{start}`, "
            "or give --url embedded://PATH"
        )

    async def close(self) -> None:
        """Closes the connections, and stops an embedded server that this handle owns."""
        for read in self.reading:
            read.cancel()
        await asyncio.gather(*self.reading, return_exceptions=True)
        redis, self._redis = self._redis, None
        if redis is not None:
            await close_client(redis)
        embedded, self._embedded = self._embedded, None
        if embedded is not None:
            embedded.stop()

    async def script(
        self, name: str, keys: Sequence[str], args: Sequence[Any], confirm: Sequence[str] = ()
    ) -> Any:
        """Runs a script of `store.scripts`.

        Args:
            name: of the script.
            keys, args: see its head.
            confirm: a command to send after it, on the same connection; the answer is then the pair
                of both answers.

        Raises:
            Fenced: the script found that the caller may no longer write.
            SequenceGap: the batch starts beyond the next sequence number.
            RedisBusy: Redis cannot take a write for now: a failover, a full memory, a full disk.
            redis.exceptions.RedisError: Redis is away, or refused the command.
        """
        text = scripts.source(name)
        try:
            try:
                return await self._call(("EVALSHA", _sha(text), len(keys), *keys, *args), confirm)
            except NoScriptError:
                return await self._call(("EVAL", text, len(keys), *keys, *args), confirm)
        except ResponseError as error:
            told = self._told(name, args, error)
            if told is error:
                raise
            if isinstance(told, RedisBusy):
                await self._look_for_the_master()
            raise told from None

    async def scripts(
        self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]
    ) -> list[Any]:
        """Runs one script many times, at the cost of one round trip; see `script`.

        Each answer may be an exception of those that `script` raises.
        """
        text = scripts.source(name)
        sha = _sha(text)
        answers = await self.batch(
            [("EVALSHA", sha, len(keys), *keys, *args) for keys, args in calls]
        )
        for number, (keys, args) in enumerate(calls):
            if isinstance(answers[number], NoScriptError):
                answers[number] = await _outcome(self.script(name, keys, args))
            elif isinstance(answers[number], ResponseError):
                answers[number] = self._told(name, args, answers[number])
        return answers

    async def batch(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Sends commands together, each for itself; an answer may be an exception.

        In a cluster they go side by side, so that a node that is away takes only its own with it.

        Raises:
            Unavailable: Redis is away; not in a cluster.
        """
        if not self.is_cluster:
            pipe = self.redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
            return answers
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(command: Sequence[Any]) -> Any:
            async with gate:
                return await _outcome(self.redis.execute_command(*command))

        return list(await asyncio.gather(*map(one, commands)))

    def _told(self, name: str, args: Sequence[Any], error: ResponseError) -> Exception:
        """What the refusal of a script means; the error itself when it means nothing of ours."""
        message = str(error)
        if message.startswith("FENCED"):
            return Fenced(f"{name} refused: {args[0]!s} may no longer write")
        if message.startswith("SEQGAP"):
            # A worker's writes name the lease first, then writer and seq as an append does.
            writer, first = args[:2] if name == "append" else args[1:3]
            return SequenceGap(str(writer), int(first), int(message.split()[1]))
        if isinstance(error, Unavailable):
            return error
        if _NOT_ALLOWED.search(message) is not None:
            return NoPermissionError(f"the script {name} may not do for this user what it does")
        if (found := _FOR_NOW.search(message)) is not None:
            return RedisBusy(
                f"Redis at {self.url} cannot take {name} for now ({found[1]}): "
                f"{_ADVICE.get(found[1], 'it fails over')}; trying again is safe"
            )
        return error

    async def _look_for_the_master(self) -> None:
        # A connection to a master that became a replica would be used for ever: its refusal, within a
        # script, is not known to redis-py. Idle connections ask the sentinels anew when they reconnect.
        pool = getattr(self.redis, "connection_pool", None)
        if pool is not None and hasattr(pool, "sentinel_manager"):
            await pool.disconnect(inuse_connections=False)

    async def _call(self, command: Sequence[Any], confirm: Sequence[str]) -> Any:
        if not confirm:
            return await self.redis.execute_command(*command)
        pipe = self.redis.pipeline(transaction=False)
        pipe.execute_command(*command)
        pipe.execute_command(*confirm)
        answer, confirmed = await pipe.execute(raise_on_error=False)
        for part in (answer, confirmed):
            if isinstance(part, Exception):
                raise part
        return answer, confirmed

    async def run_id(self) -> str:
        """Which server answers, and since which start of it; the same for ever on a cluster."""
        if self.is_cluster:
            return "cluster"
        return str((await self.redis.info("server")).get("run_id", ""))

    async def now_ms(self) -> int:
        """The time of Redis, in ms since 1970: the clock of every decision.

        In a cluster each node has a clock; this is that of whoever has slot 0. What must be exact, the
        end of a lease, is decided by scripts on the node that holds it.
        """
        options = (
            {"target_nodes": self.redis.nodes_manager.get_node_from_slot(0)}
            if self.is_cluster
            else {}
        )
        answer = await self.redis.execute_command("TIME", **options)
        seconds, micros = next(iter(answer.values())) if isinstance(answer, dict) else answer
        return int(seconds) * 1000 + int(micros) // 1000

    def __await__(self) -> Generator[Any, None, Store]:
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


_ADVICE = {
    "OOM": "its memory is full, raise maxmemory",
    "MISCONF": "it cannot write to its disk, see its log",
    "NOREPLICAS": "too few replicas are connected",
    "READONLY": "it is a replica now",
}


def _sha(text: str) -> str:
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


async def _outcome(work: Awaitable[Any]) -> Any:
    """The result, or the exception as a value."""
    try:
        return await work
    except Exception as error:
        return error


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
    if "111" in text or "connect call failed" in text:
        return "connection refused"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def connect(url: str) -> Store:
    """An address becomes a store: `store = await connect(url)`, or `async with connect(url) as store`.

    Args:
        url: `redis://[user:password@]host[:port][/db]`, `rediss://…` (TLS), `unix://PATH`,
            `redis+cluster://[user:password@]host:port[,host:port…]`,
            `redis+sentinel://[user:password@]host:port[,host:port…]/master-name[/db]`
            (`?sentinel_password=…` for the sentinels themselves), or
            `embedded://PATH`: a redis-server that is started in that folder if none runs there,
            lives as long as the process that started it, and keeps its data. `?durability=` says
            when a host's events count as acknowledged: `memory`, `fsync` or `replicated`.
            `?password_file=PATH` takes the password from a file (a mounted secret), so that it is
            in no command line and no environment.

    Raises:
        BadAddress, RedisUnavailable: when it is opened; see `Store.open`.
    """
    return Store(url)


@asynccontextmanager
async def opened(where: str | Store) -> AsyncIterator[Store]:
    """A store from a URL, closed at the end, or one that is open already, left open."""
    if isinstance(where, Store):
        yield where
    else:
        async with connect(where) as store:
            yield store

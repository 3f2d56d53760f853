"""`connect(url)`: from an address to a Redis that has been checked and can hold the log.

A `Store` is a thin handle: the client, the scripts, and the address as it may be shown (without a
password). What stands on it (log, channel, leases) never makes a connection of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha1
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from store import scripts
from store.embedded import EmbeddedServer
from store.errors import BadAddress, Fenced, RedisUnavailable, SequenceGap

OLDEST_SERVER = (6, 2)
BLOCK_MS = 2000
"""How long a blocking read waits at most, in ms; below the socket's time limit."""
_SOCKET_TIMEOUT = 10.0

Unavailable = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ReadOnlyError,  # A failover is under way: the master has become a replica.
    MasterDownError,
    OutOfMemoryError,
    OSError,
)
"""What a client raises while Redis is away. Whoever sees one of these may try again later."""


def check_cancelled() -> None:
    """Raises CancelledError if the running task was told to end.

    On Python 3.11 `asyncio.wait_for`, which redis-py uses, can swallow a cancellation that comes in
    the same tick as a reply. A task that loops for ever asks at each turn.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


_SCHEMES = "redis://, rediss://, unix:// or embedded://PATH"


def shown(url: str) -> str:
    """The URL without its password, for messages and logs; also one that cannot be parsed."""
    if url.startswith("embedded://"):
        return url
    hidden = re.sub(r"(://[^:@/?#]*:).*@", r"\1***@", url, count=1)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", hidden)


def _raw(reply: Any, **_: Any) -> Any:
    return reply


class Store:
    """A connection to Redis that has been checked. Made by `connect`.

    Attributes:
        url: the address, without a password.
        redis: the client; replies are bytes, and stream entries are not parsed.
        durability: as the URL asks for it (`?durability=`); see `store.durability`.
    """

    def __init__(self, url: str) -> None:
        # What the project adds to a URL is taken out before redis-py sees it.
        option = re.search(r"[?&]durability=([^&]*)", url)
        self.durability = option[1] if option else None
        if option:
            url = url[: option.start()] + re.sub("^&", "?", url[option.end() :])
        self.url = shown(url)
        self._address = url
        self._embedded: EmbeddedServer | None = None
        self._redis: Any = None

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
            RedisUnavailable: nothing answers there, or the server is too old.
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
        elif scheme in {"redis", "rediss", "unix"}:
            address = self._address
        else:
            raise BadAddress(f"{self.url!r} has an unknown scheme: write {_SCHEMES}")
        try:
            self._redis = Redis.from_url(
                address,
                socket_timeout=_SOCKET_TIMEOUT,
                socket_connect_timeout=5,
                health_check_interval=30,
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 3),
                client_name="agent-reconciler",
                protocol=2,
            )
        except ValueError as error:
            # The error may quote a part of the address, and the password with it.
            cause = str(error) if self.url == self._address else "it cannot be parsed"
            raise BadAddress(f"{self.url!r} is not a Redis address: {cause}") from None
        # Raw replies of the stream reads, [id, [field, value, …]]: redis-py would build a dict for
        # every entry, which costs as much as reading it.
        for command in ("XRANGE", "XREVRANGE", "XREAD"):
            self._redis.set_response_callback(command, _raw)
        try:
            await self._check()
        except BaseException:
            await self.close()
            raise
        return self

    async def _check(self) -> None:
        try:
            info = await self.redis.info("server")
        except (AuthenticationError, AuthorizationError) as error:
            raise RedisUnavailable(
                f"Redis at {self.url} refused the login ({error}): give user and password in the "
                "URL, redis://user:password@host:port"
            ) from None
        except Unavailable as error:
            raise RedisUnavailable(self._nobody_there(error)) from None
        except RedisError as error:
            raise RedisUnavailable(f"{self.url} does not answer like Redis: {error}") from None
        version = str(info.get("redis_version", "0"))
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers < OLDEST_SERVER:
            raise RedisUnavailable(
                f"Redis at {self.url} is version {version}: 6.2 or newer is needed"
            )

    def _nobody_there(self, error: BaseException) -> str:
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
        redis, self._redis = self._redis, None
        if redis is not None:
            await redis.aclose()
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
            redis.exceptions.RedisError: Redis is away, or refused the command.
        """
        text = scripts.source(name)
        sha = sha1(text.encode(), usedforsecurity=False).hexdigest()
        try:
            try:
                return await self._call(("EVALSHA", sha, len(keys), *keys, *args), confirm)
            except NoScriptError:
                return await self._call(("EVAL", text, len(keys), *keys, *args), confirm)
        except ResponseError as error:
            message = str(error)
            if message.startswith("FENCED"):
                raise Fenced(f"{name} refused: {args[0]!s} may no longer write") from None
            if message.startswith("SEQGAP"):
                # A worker's writes name the lease first, then writer and seq as an append does.
                writer, first = args[:2] if name == "append" else args[1:3]
                raise SequenceGap(str(writer), int(first), int(message.split()[1])) from None
            raise

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
        if not hasattr(self.redis, "connection_pool"):
            return "cluster"
        return str((await self.redis.info("server")).get("run_id", ""))

    async def now_ms(self) -> int:
        """The time of Redis, in ms since 1970: the clock of every decision."""
        seconds, micros = await self.redis.time()
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
        url: `redis://[user:password@]host[:port][/db]`, `rediss://…` (TLS), `unix://PATH`, or
            `embedded://PATH`: a redis-server that is started in that folder if none runs there,
            lives as long as the process that started it, and keeps its data. `?durability=` says
            when a host's events count as acknowledged: `memory`, `fsync` or `replicated`.

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

"""`connect(url)`: from an address to a Redis that has been checked and can hold the log.

A `Store` is a thin handle: the client, the scripts, and the address as it may be shown (without a
password). What stands on it (log, channel, leases) never makes a connection of its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Generator, Sequence
from hashlib import sha1
from pathlib import Path
from typing import Any, Self

from redis.exceptions import (
    NoScriptError,
    ResponseError,
)

from store import scripts
from store.address import BadPart, take_option, with_password
from store.client import (
    SCHEMES,
    close_client,
    is_cluster,
    make_client,
    on_one_node,
)
from store.embedded import EmbeddedServer
from store.errors import BadAddress, RedisBusy, RedisUnavailable
from store.refusals import meaning
from store.server_check import check_servers, infos

BLOCK_MS = 2000
"""How long a blocking read waits at most, in ms; below the socket's time limit."""
_AT_ONCE = 64
"""Commands on their way to a cluster side by side, at most."""

_SCHEMES = "redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// or embedded://PATH"


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
        url, self.durability = take_option(url, "durability")
        url, self._password_file = take_option(url, "password_file")
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
        self._check_form()
        address = self._address
        if self._folder is not None:
            self._embedded = EmbeddedServer(self._folder)
            await self._embedded.start()
            address = f"unix://{self._embedded.socket}"
        self._redis = self._client(address)
        try:
            await check_servers(self._redis, self.url)
        except UnicodeError:
            await self.close()
            raise BadAddress(
                f"{self.url!r} has a host name that cannot be one: a part of it is empty or too long"
            ) from None
        except BaseException:
            await self.close()
            raise
        return self

    def check(self) -> None:
        """Looks at the address, without connecting.

        Raises:
            BadAddress: the URL cannot be used.
        """
        self._check_form()
        if self._folder is None:
            self._client(self._address)

    def _check_form(self) -> None:
        scheme, separator, rest = self._address.partition("://")
        if not separator:
            raise BadAddress(f"{self.url!r} is not an address: write {_SCHEMES}")
        if scheme == "embedded":
            if not rest:
                raise BadAddress("embedded:// needs a folder: write embedded://PATH")
            if "?" in rest:
                raise BadAddress(
                    f"{self.url!r}: embedded:// has no option but durability: leave out what follows "
                    "the question mark"
                )
        elif scheme not in SCHEMES:
            raise BadAddress(f"{self.url!r} has an unknown scheme: write {_SCHEMES}")

    @property
    def _folder(self) -> Path | None:
        scheme, _, rest = self._address.partition("://")
        return Path(rest) if scheme == "embedded" else None

    def _client(self, address: str) -> Any:
        """A client that is not connected yet; the password is read from its file each time."""
        if self._folder is None:
            address = with_password(address, self._password_file)
        try:
            return make_client(address)
        except BadPart as error:
            # Without the options: one whose name is mistyped may hold a password.
            without = self.url.partition("?")[0]
            raise BadAddress(f"{without!r} is not a Redis address: {error}") from None
        except ValueError as error:
            # The error may quote a part of the address, and the password with it.
            cause = str(error) if self.url == address else "it cannot be parsed"
            raise BadAddress(f"{self.url!r} is not a Redis address: {cause}") from None

    async def infos(self) -> dict[str, dict[str, Any]]:
        """What each server that is written to says of itself, by its address."""
        return await infos(self.redis, self.url)

    async def setting(self, node: str, name: str) -> str:
        """A setting of one server, of those that `infos` names.

        Raises:
            redis.exceptions.RedisError: Redis is away, or does not tell.
        """
        options = {"target_nodes": self.redis.get_node(node_name=node)} if self.is_cluster else {}
        found = await self.redis.config_get(name, **options)
        value = {_text(key): _text(value) for key, value in found.items()}.get(name)
        return str(value)

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
            told = meaning(name, args, error, self.url)
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
                answers[number] = meaning(name, args, answers[number], self.url)
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

    async def _look_for_the_master(self) -> None:
        # A connection to a master that became a replica would be used for ever: its refusal, within a
        # script, is not known to redis-py. Idle connections ask the sentinels anew when they reconnect.
        pool = getattr(self.redis, "connection_pool", None)
        if pool is not None and hasattr(pool, "sentinel_manager"):
            await pool.disconnect(inuse_connections=False)

    async def _call(self, command: Sequence[Any], confirm: Sequence[str]) -> Any:
        if not confirm:
            return await self.redis.execute_command(*command)
        if self.is_cluster:
            answer, confirmed = await on_one_node(self.redis, command, confirm)
        else:
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

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _sha(text: str) -> str:
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


async def _outcome(work: Awaitable[Any]) -> Any:
    """The result, or the exception as a value."""
    try:
        return await work
    except Exception as error:
        return error


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
            Other options are settings of a connection, as redis-py has them (`socket_timeout`,
            `ssl_ca_certs`, …); one that there is not is refused.

    Raises:
        BadAddress, RedisUnavailable: when it is opened; see `Store.open`.
    """
    return Store(url)

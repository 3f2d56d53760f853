"""Clients of vector databases, and anything else with `aclose` or `close`: owned, and closed once.

`VectorClients.own` takes any client. For Qdrant there is more: one client per owner and server, made
when it is first asked for, and only if it fits the server.

The one thing to know: qdrant-client checks versions in a thread of its own and only warns, so people
switch the check off. Here it is made before the client is handed out, and a misfit is an error that
says which side to change.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

from adapters.host import Host
from adapters.owned import CLOSE_SECONDS, Owned
from store.errors import ReconcilerError

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, QdrantClient

C = TypeVar("C")
_Key = tuple[str | None, str, tuple[tuple[str, str], ...]]

MINOR_APART = 1
"""Qdrant keeps client and server compatible while their minor versions are at most so far apart
(https://github.com/qdrant/qdrant-client, README, "Versioning")."""


class VersionMismatch(ReconcilerError):
    """Client and server of a database do not fit; the message says which one to change."""


class VectorClients(Owned[Any]):
    """The database clients of a service: `async with VectorClients(host) as clients:`.

    Args:
        host: that shows them to the reconciler, kind `vector_client`; None does without one.
        close_timeout: seconds that closing one may take.
    """

    def __init__(self, host: Host | None = None, *, close_timeout: float = CLOSE_SECONDS) -> None:
        super().__init__("vector_client", host=host, close_timeout=close_timeout)
        self._opening: dict[_Key, asyncio.Task[Any]] = {}
        self._ready: dict[_Key, tuple[str, Any]] = {}

    def own(self, client: C, owner: object = None) -> C:
        """Takes over a client that the service made; it is closed with its owner, once.

        Args:
            client: anything with `aclose` or `close`.
            owner: a reference, or an object; None is whoever closes these clients.

        Raises:
            NotAlive: these clients were closed, or the host knows no such owner.
            TypeError: the client can be closed by neither.
        """
        if not any(callable(getattr(client, name, None)) for name in ("aclose", "close")):
            raise TypeError(f"a {type(client).__name__} has neither aclose nor close")
        for held in self.things():
            if held is client:
                return client  # Owned already: it must not be closed twice.
        self.add(client, owner)
        return client

    async def qdrant(self, owner: object = None, **options: Any) -> AsyncQdrantClient:
        """The asynchronous Qdrant client of an owner, made and checked when there is none yet.

        Args:
            owner: as for `own`.
            options: as for `qdrant_client.AsyncQdrantClient`.

        Raises:
            NotAlive: as for `own`.
            VersionMismatch: client and server do not fit; the client was closed.
            Exception: the server cannot be reached, as qdrant-client says it.
        """
        key = self._key("async", owner, options)
        ready = self._ready.get(key)
        if ready is not None:
            return ready[1]  # type: ignore[no-any-return]
        task = self._opening.get(key)
        if task is None:
            task = asyncio.create_task(self._open(key, owner, options))
            self._opening[key] = task
            task.add_done_callback(lambda _: self._opening.pop(key, None))
        # Shielded: one of several who wait may be cancelled, the others still want the client.
        return await asyncio.shield(task)

    async def _open(self, key: _Key, owner: object, options: dict[str, Any]) -> Any:
        from qdrant_client import AsyncQdrantClient

        client = AsyncQdrantClient(**options, check_compatibility=False)
        try:
            if not _is_local(options):
                check_version(version("qdrant-client"), (await client.info()).version, client)
            self._ready[key] = (self.add(client, owner), client)
        except BaseException:
            await client.close()
            raise
        return client

    def qdrant_sync(self, owner: object = None, **options: Any) -> QdrantClient:
        """The synchronous Qdrant client of an owner; it blocks while it asks the server's version.

        Arguments and errors as for `qdrant`.
        """
        from qdrant_client import QdrantClient

        key = self._key("sync", owner, options)
        ready = self._ready.get(key)
        if ready is not None:
            return ready[1]  # type: ignore[no-any-return]
        client = QdrantClient(**options, check_compatibility=False)
        try:
            if not _is_local(options):
                check_version(version("qdrant-client"), client.info().version, client)
            self._ready[key] = (self.add(client, owner), client)
        except BaseException:
            client.close()
            raise
        return client

    def _key(self, sort: str, owner: object, options: dict[str, Any]) -> _Key:
        self.check_open()
        described = tuple(sorted((name, repr(value)) for name, value in options.items()))
        return self.owner_ref(owner), sort, described

    def drop(self, id: str) -> None:
        super().drop(id)
        for key, (held, _) in list(self._ready.items()):
            if held == id:
                del self._ready[key]

    async def aclose(self) -> None:
        for task in list(self._opening.values()):
            task.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        await super().aclose()


def _is_local(options: dict[str, Any]) -> bool:
    """The database runs inside the client: there is no server to differ from."""
    return options.get("path") is not None or options.get("location") == ":memory:"


def check_version(client: str, server: str, where: object = None) -> None:
    """Checks that a Qdrant client and server fit.

    Args:
        client, server: their versions, `major.minor.patch`.
        where: the client, or the address, for the message.

    Raises:
        VersionMismatch: they are too far apart; the older of the two is the one to change.
    """
    ours, theirs = _numbers(client, "client"), _numbers(server, "server")
    if ours[0] == theirs[0] and abs(ours[1] - theirs[1]) <= MINOR_APART:
        return
    address = getattr(getattr(where, "_client", None), "rest_uri", where)
    at = f" at {address}" if address else ""
    if ours > theirs:
        advice = (
            f"change the server: upgrade it to {ours[0]}.{max(ours[1] - MINOR_APART, 0)} or newer "
            f"(the client, {client}, is the newer of the two)"
        )
    else:
        least = f"{theirs[0]}.{max(theirs[1] - MINOR_APART, 0)}"
        advice = (
            f"change the client: pip install 'qdrant-client>={least},"
            f"<{theirs[0]}.{theirs[1] + MINOR_APART + 1}' (the server, {server}, is the newer)"
        )
    raise VersionMismatch(
        f"qdrant-client {client} and the server{at}, {server}, do not fit: {advice}"
    )


def _numbers(text: str, whose: str) -> tuple[int, int]:
    try:
        major, minor, *_ = text.split(".")
        return int(major), int(minor)
    except ValueError:
        raise VersionMismatch(
            f"the Qdrant {whose} says that its version is {text!r}, which is not major.minor.patch"
        ) from None

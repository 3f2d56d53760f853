"""Clients of vector databases are owned and closed once; Qdrant's must fit its server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from adapters import Host
from adapters.vector_clients import VectorClients, VersionMismatch, check_version
from reconciler import Reconciler
from store import NotAlive

Eventually = Callable[..., Awaitable[None]]


class Client:
    """Anything with a close."""

    def __init__(self) -> None:
        self.closed = 0

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed += 1


class TestAnything:
    async def test_it_is_closed_once_whoever_asks(self) -> None:
        """Owned twice, closed by its owner and with everything: one close."""
        async with VectorClients() as clients:
            client = clients.own(clients.own(Client(), "component/a"), "component/b")
            await asyncio.gather(
                clients.close_owned("component/a"), clients.close_owned("component/a")
            )
            await clients.close_owned("component/b")
        await clients.aclose()
        assert client.closed == 1

    async def test_one_that_cannot_be_closed_is_refused(self) -> None:
        """There would be nothing to do with it."""
        async with VectorClients() as clients:
            with pytest.raises(TypeError, match="neither aclose nor close"):
                clients.own(object())

    async def test_one_that_fails_keeps_no_other_open(self) -> None:
        """Errors are gathered, and name what failed."""

        class Broken:
            def close(self) -> None:
                raise OSError("connection reset")

        class Hanging:
            async def aclose(self) -> None:
                await asyncio.Event().wait()

        clients = VectorClients(close_timeout=0.1)
        clients.own(Broken(), "component/a")
        clients.own(Hanging())
        good = clients.own(Client())
        with pytest.raises(ExceptionGroup, match="2 of 3") as caught:
            await clients.aclose()
        notes = [note for error in caught.value.exceptions for note in error.__notes__]
        assert notes[0].startswith("closing vector_client/component/a#")
        assert good.closed == 1

    async def test_the_reconciler_closes_it_with_its_owner(
        self, host: Host, reconciler: Reconciler, eventually: Eventually
    ) -> None:
        """And the end of everything does not close it again."""
        async with VectorClients(host) as clients:
            host.record("created", "component/search")
            client = clients.own(Client(), "component/search")
            host.record("cleaned_up", "component/search")
            await eventually(lambda: client.closed)
        assert client.closed == 1


@pytest.fixture
async def qdrant_server() -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Starts what answers as Qdrant does when it is asked for its version."""
    runners = []

    async def start(version: str) -> str:
        async def root(request: web.Request) -> web.Response:
            return web.json_response({"title": "qdrant", "version": version, "commit": "0"})

        app = web.Application()
        app.router.add_get("/", root)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


class TestQdrant:
    async def test_a_fitting_client_is_made_once_and_closed_with_its_owner(
        self, qdrant_server: Callable[[str], Awaitable[str]]
    ) -> None:
        """However many ask at once."""
        pytest.importorskip("qdrant_client")
        from importlib.metadata import version

        url = await qdrant_server(version("qdrant-client"))
        async with VectorClients() as clients:
            many = await asyncio.gather(
                *(clients.qdrant("component/a", url=url) for _ in range(20))
            )
            assert len({id(client) for client in many}) == 1
            sync = await asyncio.to_thread(clients.qdrant_sync, "component/a", url=url)
            assert clients.qdrant_sync("component/a", url=url) is sync
            await clients.close_owned("component/a")
            assert many[0]._client.closed
            assert sync._client.closed
            assert len(clients) == 0
        with pytest.raises(NotAlive):
            await clients.qdrant("component/a", url=url)

    async def test_a_server_that_does_not_fit_is_an_error_and_leaves_nothing(
        self, qdrant_server: Callable[[str], Awaitable[str]]
    ) -> None:
        """The check is made, not switched off; the message says which side to change."""
        pytest.importorskip("qdrant_client")
        url = await qdrant_server("1.1.0")
        async with VectorClients() as clients:
            with pytest.raises(VersionMismatch, match=r"change the server: upgrade it to 1\."):
                await clients.qdrant(url=url)
            with pytest.raises(VersionMismatch, match=url):
                await asyncio.to_thread(clients.qdrant_sync, url=url)
            newer = await qdrant_server("99.3.0")
            with pytest.raises(VersionMismatch, match=r"change the client: pip install 'qdrant-c"):
                await clients.qdrant(url=newer)
            assert len(clients) == 0

    async def test_a_database_inside_the_client_has_no_version_to_check(self) -> None:
        """`:memory:` works, sync and async."""
        pytest.importorskip("qdrant_client")
        async with VectorClients() as clients:
            client = await clients.qdrant(location=":memory:")
            assert (await client.get_collections()).collections == []
            assert clients.qdrant_sync(location=":memory:").get_collections().collections == []
            assert len(clients) == 2

    @pytest.mark.parametrize(
        ("client", "server", "advice"),
        [
            ("1.12.1", "1.11.5", None),
            ("1.12.1", "1.13.0", None),
            ("1.12.1", "1.10.0", "change the server: upgrade it to 1.11 or newer"),
            ("1.12.1", "1.14.2", "change the client: pip install 'qdrant-client>=1.13,<1.16'"),
            ("1.12.1", "2.0.0", "change the client: pip install 'qdrant-client>=2.0,<2.2'"),
            ("1.12.1", "dev", "says that its version is 'dev'"),
        ],
    )
    def test_the_older_of_the_two_is_the_one_to_change(
        self, client: str, server: str, advice: str | None
    ) -> None:
        """Same major version, minor versions one apart at the most."""
        if advice is None:
            check_version(client, server)
        else:
            with pytest.raises(VersionMismatch) as caught:
                check_version(client, server)
            assert advice in str(caught.value)

"""HttpClients: one session per owner and configuration, closed with its owner."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from adapters import Host
from adapters.aiohttp_client import HttpClients, HttpConfig
from reconciler import Reconciler
from store import NotAlive

Eventually = Callable[..., Awaitable[None]]


class Search:
    """A component of a service."""


class TestOneSession:
    async def test_many_who_ask_at_once_get_one_session(self) -> None:
        """However many ask concurrently, one session is made."""
        async with HttpClients() as clients:

            async def ask() -> aiohttp.ClientSession:
                await asyncio.sleep(0)
                return clients.session("component/search")

            sessions = await asyncio.gather(*(ask() for _ in range(200)))
            assert len({id(session) for session in sessions}) == 1
            assert clients.traffic.sessions == 1

    async def test_another_owner_or_configuration_is_another_session(self) -> None:
        """Owner and configuration together name a session."""
        async with HttpClients() as clients:
            first = clients.session("component/a")
            assert clients.session("component/b") is not first
            assert clients.session("component/a", HttpConfig(total=5)) is not first
            assert clients.session("component/a", HttpConfig()) is first

    async def test_limits_and_timeouts_come_from_the_configuration(self) -> None:
        """Connector limits and time limits stand in one place."""
        config = HttpConfig(total=7, connect=3, limit=9, limit_per_host=4)
        async with HttpClients(config=config) as clients:
            session = clients.session()
            assert (session.timeout.total, session.timeout.connect) == (7, 3)
            assert session.connector is not None
            assert (session.connector.limit, session.connector.limit_per_host) == (9, 4)

    async def test_connections_are_reused(self, server: str) -> None:
        """A hundred calls one after the other open one connection."""
        async with HttpClients() as clients:
            for _ in range(100):
                async with clients.session("component/a").get(server) as answer:
                    await answer.read()
            assert clients.traffic.requests == 100
            assert clients.traffic.connections == 1
            assert clients.traffic.reused == 99

    async def test_ten_thousand_calls_from_fifty_components_make_fifty_sessions(
        self, server: str
    ) -> None:
        """Each component has one session, however often it calls."""
        async with HttpClients() as clients:

            async def component(number: int) -> None:
                for _ in range(200):
                    async with clients.session(f"component/{number}").get(server) as answer:
                        assert await answer.text() == "hello"

            await asyncio.gather(*(component(number) for number in range(50)))
            assert clients.traffic.requests == 10_000
            assert clients.traffic.sessions == 50
            assert clients.traffic.connections == 50
        assert len(clients) == 0


class TestEnd:
    async def test_a_session_that_the_service_closed_is_let_go(self) -> None:
        """Who closes each session after its use holds one at most, and gets an open one."""
        async with HttpClients() as clients:
            for _ in range(5):
                async with clients.session("component/search") as session:
                    assert not session.closed
            assert len(clients) == 1

    async def test_use_after_close_is_a_clear_error(self) -> None:
        """Closed clients say so, and what to do."""
        async with HttpClients() as clients:
            session = clients.session()
        assert session.closed
        with pytest.raises(NotAlive, match="HttpClients was closed"):
            clients.session()

    async def test_closing_an_owner_closes_its_sessions_only(self) -> None:
        """What others own stays open."""
        async with HttpClients() as clients:
            mine, other = clients.session("component/a"), clients.session("component/b")
            await clients.close_owned("component/a")
            assert mine.closed
            assert not other.closed
            assert clients.session("component/a") is not mine

    async def test_an_owner_that_is_collected_takes_its_session_along(
        self, eventually: Eventually
    ) -> None:
        """Without a host an object that is no more has its session closed in the background."""
        async with HttpClients() as clients:
            owner = Search()
            session = clients.session(owner)
            assert clients.session(owner) is session
            del owner
            await eventually(lambda: session.closed)
            assert len(clients) == 0

    def test_a_closed_event_loop_is_survived(self, server_in_thread: str) -> None:
        """A new loop gets a new session; the old one's sockets are closed, without a warning."""
        clients = HttpClients()

        async def call() -> aiohttp.ClientSession:
            async with clients.session("component/a").get(server_in_thread) as answer:
                assert await answer.text() == "hello"
            return clients.session("component/a")

        fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        first = asyncio.run(call())
        second = asyncio.run(call())
        assert first is not second
        assert first.closed

        async def end() -> None:
            await clients.aclose()

        asyncio.run(end())
        assert second.closed
        del first, second
        gc.collect()
        if fds is not None:
            # The server is in this process too, in a thread: its ends of the connections go as well.
            deadline = time.monotonic() + 5
            while len(os.listdir("/proc/self/fd")) != fds and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(os.listdir("/proc/self/fd")) == fds

    def test_no_warning_at_exit_with_warnings_as_errors(self) -> None:
        """A program that uses them ends without an "Unclosed client session"."""
        program = """
            import asyncio
            from aiohttp import web
            from adapters.aiohttp_client import HttpClients

            async def main():
                app = web.Application()
                async def hello(request):
                    return web.Response(text="hello")
                app.router.add_get("/", hello)
                runner = web.AppRunner(app)
                await runner.setup()
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                async with HttpClients() as clients:
                    async def component(n):
                        for _ in range(200):
                            async with clients.session(f"component/{n}").get(url) as answer:
                                await answer.read()
                    await asyncio.gather(*(component(n) for n in range(50)))
                    print(clients.traffic.sessions, clients.traffic.requests)
                await runner.cleanup()

            asyncio.run(main())
        """
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout.split() == ["50", "10000"]
        assert done.stderr == ""
        assert done.returncode == 0


@pytest.fixture
def server_in_thread():
    """A server on a loop of its own, for tests that run several loops."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> tuple[aiohttp.web.AppRunner, str]:
        async def hello(request: aiohttp.web.Request) -> aiohttp.web.Response:
            return aiohttp.web.Response(text="hello")

        app = aiohttp.web.Application()
        app.router.add_get("/", hello)
        runner = aiohttp.web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    yield url
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


class TestWithAHost:
    async def test_a_session_goes_with_its_owner(
        self, host: Host, reconciler: Reconciler, eventually: Eventually
    ) -> None:
        """The reconciler closes what belonged to a component that is gone."""
        async with HttpClients(host) as clients:
            host.record("created", "component/search")
            session = clients.session("component/search")
            ref = next(ref for ref in host.entries if ref.startswith("http_client/"))
            assert host.entries[ref].owned_by == "component/search"
            host.record("cleaned_up", "component/search")
            await eventually(lambda: session.closed)
            assert ref not in host.entries

    async def test_an_owner_that_is_collected_is_gone_in_the_log_too(
        self, host: Host, reconciler: Reconciler, eventually: Eventually
    ) -> None:
        """An object is a resource while it lives; its end is an event."""
        async with HttpClients(host) as clients:
            owner = Search()
            session = clients.session(owner)
            assert any(ref.startswith("object/Search-") for ref in host.entries)
            del owner
            await eventually(lambda: session.closed)
            assert not any(ref.startswith("object/") for ref in host.entries)

    async def test_an_owner_that_is_not_alive_is_refused(self, host: Host) -> None:
        """Nothing would ever close what it owned."""
        async with HttpClients(host) as clients:
            with pytest.raises(NotAlive, match="component/nobody is not alive"):
                clients.session("component/nobody")

    async def test_a_session_with_calls_under_way_is_not_closed(
        self, host: Host, reconciler: Reconciler, server: str, eventually: Eventually
    ) -> None:
        """An order for a session that is busy is refused, and tried again when it is not."""
        async with HttpClients(host) as clients:
            host.record("created", "component/search")
            session = clients.session("component/search")
            call = asyncio.create_task(_text(session, f"{server}/slow"))
            await eventually(lambda: clients.traffic.connections == 1)
            host.record("cleaned_up", "component/search")
            ref = next(ref for ref in host.entries if ref.startswith("http_client/"))
            await eventually(lambda: _refused(reconciler, host, ref))
            assert not session.closed
            async with clients.session().get(f"{server}/go") as answer:
                await answer.read()
            assert await call == "at last"
            await eventually(lambda: session.closed)


def _refused(reconciler: Reconciler, host: Host, ref: str) -> bool:
    process = reconciler.tail.state.processes.get(host.process)
    attempt = process.attempts.get(ref) if process is not None else None
    return attempt is not None and attempt.refused and "under way" in attempt.reason


async def _text(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as answer:
        return await answer.text()


class Service:
    """Makes its own session and never closes it."""

    def __init__(self) -> None:
        self.session = aiohttp.ClientSession()


class TestSessionsOfTheService:
    async def test_one_that_nobody_has_any_more_is_closed(self, eventually: Eventually) -> None:
        """Without a host, in the background."""
        async with HttpClients(watch=True) as clients:
            service = Service()
            connector = service.session.connector
            assert clients.sweep() == []
            del service
            assert len(clients.sweep()) == 1
            assert connector is not None
            await eventually(lambda: connector.closed)
            assert len(clients) == 0

    async def test_with_a_host_the_reconciler_closes_it(
        self, host: Host, reconciler: Reconciler, eventually: Eventually
    ) -> None:
        """It is an orphan with a reason in the log."""
        async with HttpClients(host, watch=True):
            service = Service()
            connector = service.session.connector
            assert connector is not None
            del service
            await eventually(lambda: connector.closed)
            await eventually(
                lambda: not [ref for ref in host.entries if ref.startswith("http_client/")]
            )

    async def test_one_that_somebody_still_has_is_left_alone(self) -> None:
        """It is the service's own to close, at the end too."""
        async with HttpClients(watch=True) as clients:
            service = Service()
            kept = service.session
            del service
            assert clients.sweep() == []
        assert not kept.closed
        await kept.close()

    @pytest.mark.leaks_on_purpose
    async def test_watching_ends_without_a_trace(self) -> None:
        """The constructor of aiohttp is its own again."""
        before = aiohttp.ClientSession.__init__
        async with HttpClients(watch=True):
            assert aiohttp.ClientSession.__init__ is not before
        assert aiohttp.ClientSession.__init__ is before

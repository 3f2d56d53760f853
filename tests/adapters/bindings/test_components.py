"""Components: started in order, closed in reverse, each in its time, all of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp.test_utils
import pytest
from aiohttp import web
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from adapters import Host
from adapters.aiohttp_client import HttpClients
from adapters.components import ComponentError, Components

Trail = list[str]


def part(trail: Trail, name: str) -> Callable[..., Any]:
    """A component that notes its start and its close."""

    @asynccontextmanager
    async def make(**needs: Any) -> AsyncIterator[str]:
        trail.append(f"+{name}({','.join(needs)})")
        yield name
        trail.append(f"-{name}")

    return make


class TestOrder:
    async def test_start_follows_dependencies_and_close_reverses_it(self) -> None:
        """What is needed starts first and closes last; what is shared is made once."""
        trail: Trail = []
        components = Components()
        components.add("api", part(trail, "api"), needs=["search", "db"])
        components.add("search", part(trail, "search"), needs=["db"])
        components.add("db", part(trail, "db"))
        async with components as running:
            assert running["search"] == "search"
            assert trail == ["+db()", "+search(db)", "+api(search,db)"]
        assert trail[3:] == ["-api", "-search", "-db"]

    def test_a_circle_and_a_missing_need_are_told(self) -> None:
        """The message names them."""
        with pytest.raises(ValueError, match="db, which nobody added"):
            Components().add("a", dict, needs=["db"]).order()
        circle = Components().add("a", dict, needs=["b"]).add("b", dict, needs=["a"])
        with pytest.raises(ValueError, match=r"need each other: .*a"):
            circle.order()

    async def test_functions_coroutines_and_objects_with_close_are_components(self) -> None:
        """The shapes that a service already has."""

        class Client:
            closed = 0

            async def aclose(self) -> None:
                self.closed += 1

        async def connect() -> Client:
            return Client()

        ended: list[Any] = []
        components = Components().add("plain", Client).add("async", connect)
        components.add("own", lambda: "x", close=ended.append)
        async with components:
            plain, made = components["plain"], components["async"]
        assert (plain.closed, made.closed, ended) == (1, 1, ["x"])

    async def test_enter_and_exit_run_in_one_task(self) -> None:
        """What insists on its task, as anyio's cancel scopes do, works."""
        tasks = []

        @asynccontextmanager
        async def scoped() -> AsyncIterator[None]:
            tasks.append(asyncio.current_task())
            async with asyncio.timeout(60):
                yield
            tasks.append(asyncio.current_task())

        components = await Components().add("scoped", scoped).start()
        await asyncio.create_task(components.close())
        assert tasks[0] is tasks[1]


class TestFailures:
    async def test_one_that_hangs_and_one_that_raises_keep_nobody_open(self) -> None:
        """Shutdown ends in its time, the others are closed, both are reported by name."""
        trail: Trail = []

        async def hang(_: Any) -> None:
            while True:  # It ignores its cancellation, too.
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if trail[-1:] == ["over"]:
                        raise

        def fail(_: Any) -> None:
            raise OSError("disk is gone")

        components = Components(close_timeout=5)
        components.add("first", part(trail, "first"))
        components.add("hanging", object, needs=[], close=hang, close_timeout=0.1)
        components.add("broken", object, close=fail)
        components.add("last", part(trail, "last"), needs=["first", "hanging", "broken"])
        await components.start()
        began = time.monotonic()
        with pytest.raises(ExceptionGroup) as caught:
            await components.close()
        assert time.monotonic() - began < 2
        assert trail[-2:] == ["-last", "-first"]
        told = {error.name: str(error) for error in caught.value.exceptions}  # type: ignore[attr-defined]
        assert told == {
            "hanging": "component hanging was not closed within 0.1 s",
            "broken": "component broken failed to close: OSError: disk is gone",
        }
        assert "hanging" in str(caught.value)
        assert "broken" in str(caught.value)
        trail.append("over")
        for task in asyncio.all_tasks():
            if task.get_name() == "component hanging":
                task.cancel()
                await asyncio.wait({task})

    async def test_one_that_does_not_start_has_the_others_closed(self) -> None:
        """The error names it, and nothing is left open."""
        trail: Trail = []

        async def broken(**needs: Any) -> None:
            raise OSError("no route to host")

        components = Components().add("db", part(trail, "db"))
        components.add("search", broken, needs=["db"])
        with pytest.raises(ExceptionGroup) as caught:
            await components.start()
        assert isinstance(caught.value.exceptions[0], ComponentError)
        assert "component search did not start: OSError: no route" in str(
            caught.value.exceptions[0]
        )
        assert trail == ["+db()", "-db"]

    async def test_they_are_not_started_twice(self) -> None:
        """The second start is refused, and what is not running is not handed out."""
        components = Components().add("db", object)
        with pytest.raises(KeyError, match="component db is not running"):
            components["db"]
        async with components:
            with pytest.raises(RuntimeError, match="running already"):
                await components.start()
            assert components["db"] is not None
        with pytest.raises(KeyError, match="component cache was never added"):
            components["cache"]

    async def test_they_can_be_started_again(self) -> None:
        """After a close nothing is left of the first round."""
        trail: Trail = []
        components = Components().add("db", part(trail, "db"))
        for _ in range(2):
            async with components:
                pass
        assert trail == ["+db()", "-db"] * 2


PROGRAMS = {
    "serve": """
        asyncio.run(components.add("up", up, needs=["api"]).serve())
        print("behind", flush=True)
    """,
    "async with": """
        async def main():
            async with components:
                up()
                await asyncio.Event().wait()
            print("behind", flush=True)
        asyncio.run(main())
    """,
    "uvicorn": """
        import uvicorn
        from fastapi import FastAPI
        app = FastAPI(lifespan=components.add("up", up, needs=["api"]).lifespan)
        uvicorn.run(app, port=0, log_level="error")
    """,
    "aiohttp": """
        from aiohttp import web
        app = web.Application()
        app.cleanup_ctx.append(components.cleanup_ctx)
        # It is up when it listens: aiohttp leaves a socket open when a signal comes as it begins to.
        web.run_app(app, host="127.0.0.1", port=0, print=lambda _: up())
        print("behind", flush=True)
    """,
}
"""Programs with a component `api` that needs `db`, as a service would run them."""


def program(text: str) -> subprocess.Popen[str]:
    """Starts a program in a process of its own; its parts say when they are opened and closed."""
    head = """
        import asyncio
        from contextlib import asynccontextmanager
        from adapters.components import Components

        def part(name):
            @asynccontextmanager
            async def make(**needs):
                print("+" + name, flush=True)
                yield name
                print("-" + name, flush=True)
            return make

        def up(api=None):
            print("up", flush=True)

        components = Components().add("api", part("api"), needs=["db"]).add("db", part("db"))
    """
    code = textwrap.dedent(head) + textwrap.dedent(text)
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_a_signal_leads_through_the_shutdown(self, number: signal.Signals) -> None:
        """The body is interrupted wherever it is, all is closed, the program goes on behind it."""
        trail: Trail = []
        before = signal.getsignal(number)
        async with Components().add("db", part(trail, "db")):
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        assert trail == ["+db()", "-db"]
        assert signal.getsignal(number) is before

    async def test_a_body_that_takes_the_interruption_is_cancelled_no_more(self) -> None:
        """The task goes on behind the `async with` as if nobody had ever cancelled it."""
        async with Components().add("db", part([], "db")) as components:
            components.stop()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    async def test_a_cancellation_by_others_passes_through(self) -> None:
        """Only the interruption of its own ends at the `async with`."""
        trail: Trail = []
        inside = asyncio.Event()

        async def body() -> None:
            async with Components().add("db", part(trail, "db")):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert trail == ["+db()", "-db"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
    @pytest.mark.parametrize("way", PROGRAMS)
    def test_a_program_ends_well_on_a_signal(self, way: str, number: signal.Signals) -> None:
        """A real process, a real signal: everything is closed, in reverse, and the program goes on."""
        with program(PROGRAMS[way]) as running:
            assert running.stdout is not None
            assert [running.stdout.readline() for _ in range(3)] == ["+db\n", "+api\n", "up\n"]
            running.send_signal(number)
            out, err = running.communicate(timeout=30)
        assert (out.splitlines()[:2], err) == (["-api", "-db"], "")
        if way == "uvicorn":  # Once all is closed it raises the signal again that it had caught.
            assert running.returncode == (-number if number == signal.SIGTERM else 0)
        else:
            assert (out.splitlines()[2:], running.returncode) == (["behind"], 0)

    @pytest.mark.parametrize(
        ("main", "status"),
        [("components.serve()", 0), ("within()", 128 + signal.SIGTERM)],
        ids=["serve", "async with"],
    )
    def test_a_signal_while_they_start_closes_what_has_started(
        self, main: str, status: int
    ) -> None:
        """The one that starts is given up, the one before it closed; no traceback."""
        with program(
            f"""
            async def hang(db):
                print("starting", flush=True)
                await asyncio.Event().wait()
            components = Components().add("db", part("db")).add("api", hang, needs=["db"])
            async def within():
                async with components:
                    print("never reached", flush=True)
            asyncio.run({main})
            """
        ) as running:
            assert running.stdout is not None
            assert [running.stdout.readline() for _ in range(2)] == ["+db\n", "starting\n"]
            running.send_signal(signal.SIGTERM)
            out, err = running.communicate(timeout=30)
        assert (out, err, running.returncode) == ("-db\n", "", status)

    def test_a_second_signal_ends_a_program_whose_close_hangs(self) -> None:
        """Who does not want to wait for the time limit signals again."""
        with program(
            """
            async def hang(value):
                print("closing", flush=True)
                await asyncio.Event().wait()
            components = Components(close_timeout=60).add("db", object, close=hang)
            components.add("up", lambda db: print("up", flush=True), needs=["db"])
            asyncio.run(components.serve())
            """
        ) as running:
            assert running.stdout is not None
            assert running.stdout.readline() == "up\n"
            running.send_signal(signal.SIGTERM)
            assert running.stdout.readline() == "closing\n"
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == -signal.SIGTERM


class TestFrameworks:
    def test_fastapi_lifespan(self) -> None:
        """The components are in the state of each request, and closed with the app."""
        trail: Trail = []
        components = Components().add("db", part(trail, "db"))
        app = FastAPI(lifespan=components.lifespan)

        @app.get("/")
        async def read(request: Request) -> str:
            return str(request.state.db)

        with TestClient(app) as client:
            assert client.get("/").json() == "db"
        assert trail == ["+db()", "-db"]

    async def test_aiohttp_cleanup_ctx(self) -> None:
        """They start and end with the application."""
        trail: Trail = []
        components = Components().add("db", part(trail, "db"))
        app = web.Application()
        app.cleanup_ctx.append(components.cleanup_ctx)
        async with aiohttp.test_utils.TestServer(app):
            assert trail == ["+db()"]
        assert trail == ["+db()", "-db"]


async def test_with_a_host_components_own_clients(host: Host) -> None:
    """A component is a resource: what it owns goes with it."""
    components = Components(host).add("db", dict).add("search", dict, needs=["db"])
    components.order()
    async with HttpClients(host) as clients:
        components = Components(host).add("db", object)
        async with components:
            clients.session("component/db")
            assert [e.owned_by for r, e in host.entries.items() if r.startswith("http_client")] == [
                "component/db"
            ]
        assert "component/db" not in host.entries

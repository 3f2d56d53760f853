"""Fixtures of the bindings' tests: a reconciler next to the host, a small HTTP server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from adapters import Host
from reconciler import Policy, Reconciler
from store import Store


@pytest.fixture
async def reconciler(store: Store, namespace: str, host: Host) -> AsyncIterator[Reconciler]:
    """A reconciler that runs in the background, next to the host."""
    async with Reconciler(store, namespace=namespace, policy=Policy()) as running:
        yield running


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    """Waits for a condition, with a deadline."""

    async def wait(condition: Callable[[], object], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            await asyncio.sleep(0.005)

    return wait


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """The URL of an HTTP server on this machine; `/slow` answers when `/go` was called."""
    go = asyncio.Event()

    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def slow(request: web.Request) -> web.Response:
        await go.wait()
        return web.Response(text="at last")

    async def release(request: web.Request) -> web.Response:
        go.set()
        return web.Response(text="ok")

    app = web.Application()
    app.add_routes([web.get("/", hello), web.get("/slow", slow), web.get("/go", release)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    go.set()
    await runner.cleanup()

"""A worker's HTTP side on a free port, with a client; the reconciler runs as it does in a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from reconciler import Policy, Reconciler
from reconciler.web import Access, serve
from reconciler.web.app import VIEW
from reconciler.web.view import FleetView
from store import Store
from tests.support import eventually

TOKEN = "a-token-for-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Worker:
    """A worker within reach: its address, and what is inside."""

    address: str
    reconciler: Reconciler
    view: FleetView
    session: aiohttp.ClientSession

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.send("GET", path, headers=headers)

    async def post(self, body: object, headers: dict[str, str] = BEARER, **more: Any) -> Answer:
        return await self.send("POST", "/api/reconcile", json=body, headers=headers, **more)

    async def send(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, self.address + path, **options) as answer:
            body = await answer.json() if "json" in answer.content_type else await answer.text()
            return Answer(answer.status, body, dict(answer.headers))


Start = Callable[..., Any]


@pytest.fixture
async def start(store: Store, namespace: str) -> AsyncIterator[Start]:
    """Starts workers with an HTTP side."""
    async with AsyncExitStack() as stack:

        async def start_one(policy: Policy | None = None, **options: Any) -> Worker:
            return await stack.enter_async_context(worker(store, namespace, policy, **options))

        yield start_one


@asynccontextmanager
async def worker(
    store: Store, namespace: str, policy: Policy | None = None, acts: bool = True, **options: Any
) -> AsyncIterator[Worker]:
    reconciler = Reconciler(store, namespace=namespace, policy=policy or Policy())
    await reconciler.open()
    await reconciler.record_policy()
    work = asyncio.create_task(reconciler.run()) if acts else None
    runner = None
    try:
        if work is not None:
            await eventually(lambda: not reconciler.unready())
        runner, address = await serve(reconciler, Access(**{"token": TOKEN, **options}))
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=False)
        ) as session:
            assert runner.app is not None
            yield Worker(address, reconciler, runner.app[VIEW], session)
    finally:
        if runner is not None:
            await runner.cleanup()
        if work is not None:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


@pytest.fixture
async def web(start: Start) -> Worker:
    """One worker."""
    started: Worker = await start()
    return started

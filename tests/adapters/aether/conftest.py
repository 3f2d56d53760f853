"""A real Redis for the module, a host in it, and a frame that is new for each test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from adapters import Host
from reconciler import Policy, Reconciler
from store import Store, connect
from tests.adapters.aether.frame import AdkFrameworkAdapter, Connection

QUICK = Policy(
    session_idle_timeout=0.2, runner_idle_timeout=0.1, agent_idle_timeout=0.1, backoff=0.05
)
"""Everything that nobody uses goes within half a second."""

PATIENT = Policy()
"""Nothing is idle for long enough while a test lasts."""


@pytest.fixture(scope="session")
def redis_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture
async def store(redis_folder: Path) -> AsyncIterator[Store]:
    async with connect(f"embedded://{redis_folder}") as opened:
        yield opened


@pytest.fixture
def namespace() -> str:
    return f"aether-{uuid4().hex[:8]}"


@pytest.fixture
async def host(store: Store, namespace: str) -> AsyncIterator[Host]:
    async with Host.connect(store, name="chat-api", namespace=namespace) as running:
        yield running


@pytest.fixture
def reconciling(store: Store, namespace: str) -> Callable[[Policy], Reconciler]:
    """Makes a reconciler: `async with reconciling(QUICK):` runs it."""
    return lambda policy: Reconciler(store, namespace=namespace, policy=policy)


@pytest.fixture
def frame() -> AdkFrameworkAdapter:
    Connection.open = 0
    return AdkFrameworkAdapter()


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Waits until a condition holds, but not longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.005)


async def one_pass(worker: Reconciler) -> dict[str, Any]:
    """One forced reconciliation by a worker that does nothing else; what it found and did."""
    await worker.open()
    await worker.keep_leases()
    try:
        return (await worker.reconcile()).as_dict()
    finally:
        await worker.release()

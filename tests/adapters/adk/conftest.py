"""One real redis-server for all tests of this folder; a namespace of its own for each test."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.adk.platform import time as platform_time
from google.adk.platform import uuid as platform_uuid
from google.adk.sessions import BaseSessionService, InMemorySessionService

from adapters import Host
from adapters.adk import AdkRuntime, RedisSessionService
from store import Store
from store.embedded import EmbeddedServer
from store.namespace import open_namespace
from store.retention import Retention, write_retention
from tests.adapters.adk.keeping import Place
from tests.adapters.adk.talk import Workshop

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedServer(tmp_path_factory.mktemp("redis"))
    asyncio.run(server.start())
    yield f"unix://{server.socket}"
    server.stop()


@pytest.fixture
def namespace() -> str:
    return f"test-{next(_numbers)}"


@pytest.fixture
async def make_service(
    redis_url: str, namespace: str
) -> AsyncIterator[Callable[..., RedisSessionService]]:
    """Makes services of one namespace, each with a cache of its own, as processes would."""
    made: list[RedisSessionService] = []

    def make(**options: Any) -> RedisSessionService:
        made.append(RedisSessionService(redis_url, namespace, **options))
        return made[-1]

    yield make
    for service in made:
        await service.close()


@pytest.fixture
def service(make_service: Callable[..., RedisSessionService]) -> RedisSessionService:
    return make_service()


class SteadyWorld:
    """ADK's clock and its source of ids, made to repeat, so that two runs can be compared."""

    def __init__(self) -> None:
        self.restart()
        platform_time.set_time_provider(lambda: 1_700_000_000.0 + next(self._ticks) / 1000)
        platform_uuid.set_id_provider(lambda: f"id-{next(self._ids)}")

    def restart(self) -> None:
        self._ticks = itertools.count()
        self._ids = itertools.count()


@pytest.fixture
def steady_world() -> Iterator[SteadyWorld]:
    yield SteadyWorld()
    platform_time.reset_time_provider()
    platform_uuid.reset_id_provider()


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture(params=["redis", "memory"])
def sessions(
    request: pytest.FixtureRequest, make_service: Callable[..., RedisSessionService]
) -> BaseSessionService:
    """Both services; the runtime behaves the same on them."""
    return make_service() if request.param == "redis" else InMemorySessionService()


@pytest.fixture
async def make_runtime(
    host: Host, sessions: BaseSessionService, workshop: Workshop
) -> AsyncIterator[Callable[..., AdkRuntime]]:
    made: list[AdkRuntime] = []

    def make(**options: Any) -> AdkRuntime:
        made.append(AdkRuntime(host, sessions, workshop, **options))
        return made[-1]

    yield make
    for runtime in made:
        await runtime.close(grace=0.5)


@pytest.fixture
def runtime(make_runtime: Callable[..., AdkRuntime]) -> AdkRuntime:
    return make_runtime()


@pytest.fixture
async def place(store: Store, namespace: str, tmp_path: Path) -> Place:
    space = await open_namespace(store, namespace, 1)
    await write_retention(space, Retention(str(tmp_path / "archive")))
    return Place(space, tmp_path / "archive")

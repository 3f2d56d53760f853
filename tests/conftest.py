"""One real redis-server per test session (per xdist worker), and a namespace of its own per test."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from adapters import Host
from store import EventLog, Store, connect
from tests.support import RedisProcess, remove_folder, short_folder

settings.register_profile(
    "quick",
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize=True,  # What CI tests is the same each time; `thorough` looks for more.
    # Without `explain`, which traces every line and takes minutes for graphs.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
)
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=2000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


WIDE = (
    "adapters/adk",
    "adapters/aether",
    "adapters/bindings",
    *(f"adapters/test_{name}.py" for name in ("outages", "failover", "killed_host")),
    "browser",
    "monitoring/test_alerts.py",
    "reconciler/web",
    "store/test_cluster.py",
    *(f"e2e/test_{name}.py" for name in ("adk_command_line", "cluster", "doctor", "explain")),
    *(f"e2e/test_{name}.py" for name in ("history", "lookback", "session_retention")),
    *(f"e2e/test_{name}.py" for name in ("status", "traces", "workers")),
)
"""What stands around the core: `make test` stays under three minutes, `make wide` runs these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what stands around the core as `wide`."""
    places = tuple(str(Path(__file__).parent / place) for place in WIDE)
    for item in items:
        if str(item.path).startswith(places):
            item.add_marker(pytest.mark.wide)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The address of a Redis that lives as long as the test session."""
    folder = short_folder()
    url = f"embedded://{folder}"
    with asyncio.Runner() as runner:
        store = runner.run(connect(url).open())
        yield url
        runner.run(store.close())
    remove_folder(folder)


@pytest.fixture
def namespace() -> str:
    """A namespace that nobody else has."""
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    """An open store."""
    async with connect(redis_url) as opened:
        yield opened


@pytest.fixture
def log(store: Store, namespace: str) -> EventLog:
    """The log of the test's namespace."""
    return EventLog(store, namespace)


@pytest.fixture
async def host(store: Store, namespace: str) -> AsyncIterator[Host]:
    """A host in the test's namespace."""
    async with Host.connect(store, name="svc", namespace=namespace) as opened:
        yield opened


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path."""
    made = short_folder()
    yield made
    remove_folder(made)


@pytest.fixture
def own_redis(folder: Path) -> Iterator[RedisProcess]:
    """A redis-server that the test may kill and start again."""
    server = RedisProcess(folder)
    server.start()
    yield server
    server.kill()

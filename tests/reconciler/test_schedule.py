"""What a reconciler does by the clock, in a service that embeds it: no worker process is needed for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from adapters import Host
from reconciler import Policy, Reconciler, schedule
from reconciler.fleet import fold_log
from store import EventLog, Store
from store.retention import Retention, write_retention
from store.snapshots import snapshot_positions
from tests.history import begin
from tests.support import eventually


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The periods that nobody can set, shortened."""
    for name in ("HEARTBEAT_SECONDS", "SNAPSHOT_CHECK_SECONDS", "RETENTION_CHECK_SECONDS"):
        monkeypatch.setattr(schedule, name, 0.05)


def segments(folder: Path) -> list[Path]:
    return list(folder.rglob("*.index.json"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"store": "embedded://./data"}, "takes an open store"),
        ({"policy": {"session_idle_timeout": 5}}, "is a Policy"),
        ({"name": "a b"}, "cannot be a name"),
    ],
)
async def test_arguments_that_cannot_be_meant(store: Store, wrong: dict[str, Any], says: str):
    """They are told at once, in one line."""
    with pytest.raises((TypeError, ValueError), match=says):
        Reconciler(**{"store": store, **wrong})


async def test_history_is_kept(store: Store, namespace: str, tmp_path: Path):
    """What was written is put into a snapshot and the archive, trimmed, and still is one log."""
    story = await begin(store, namespace)
    await story.write(300)
    whole = await fold_log(story.log)
    await write_retention(story.namespace, Retention(archive=str(tmp_path), keep_seconds=0))
    async with Reconciler(store, namespace=namespace, archive_seconds=0.05):

        async def trimmed() -> bool:
            return len(await story.raw()) <= 1

        await eventually(trimmed)
        assert await snapshot_positions(story.namespace, 0) != []
    assert segments(tmp_path) != []
    assert await fold_log(EventLog(store, story.namespace)) == whole


async def test_known_to_the_commands(store: Store, namespace: str):
    """It stands among the workers, and its policy is the one in force, until it ends."""
    async with Reconciler(
        store, namespace=namespace, policy=Policy(runner_idle_timeout=77)
    ) as running:
        keys = running.namespace.keys

        async def told() -> dict[str, Any]:
            return json.loads(await store.redis.hget(keys.workers, running.process) or "{}")

        async def ready() -> bool:
            return bool((await told()).get("ready"))

        await eventually(ready)
        assert (await told())["partitions"] == running.partitions
        recorded = Policy.model_validate_json(await store.redis.get(keys.policy))
        assert recorded.runner_idle_timeout == 77
    assert await told() == {}


async def test_quiet(store: Store, namespace: str, caplog: pytest.LogCaptureFixture):
    """It says nothing of what it does each second, nor of a job that is cut short at the end."""
    caplog.set_level("DEBUG", "apscheduler")
    async with Reconciler(store, namespace=namespace) as running:
        under_way = asyncio.Event()

        async def look() -> None:
            under_way.set()
            await asyncio.Event().wait()

        running.retention.look = look  # type: ignore[method-assign]
        await under_way.wait()
    assert [one.getMessage() for one in caplog.records if one.levelname != "INFO"] == []
    assert "apscheduler" not in {one.name.partition(".")[0] for one in caplog.records}


async def test_a_job_that_fails(store: Store, namespace: str, caplog: pytest.LogCaptureFixture):
    """It is said, and done again in its time."""
    async with Reconciler(store, namespace=namespace, full_pass_seconds=0.05) as running:
        tried: list[bool] = []

        def fails(_: object) -> None:
            tried.append(True)
            raise LookupError("not expected")

        running.hear_of = fails  # type: ignore[method-assign]
        await eventually(lambda: len(tried) > 1)
    assert "a job failed" in caplog.text


async def test_everything_is_looked_at(store: Store, namespace: str):
    """Every process is looked at again and again, although nothing is heard of it."""
    async with (
        Host.connect(store, name="svc", namespace=namespace) as host,
        Reconciler(store, namespace=namespace, full_pass_seconds=0.05) as running,
    ):
        looked: list[str] = []
        hear_of = running.hear_of
        running.hear_of = lambda found: looked.extend(found) or hear_of(found)  # type: ignore[method-assign,func-returns-value]
        await eventually(lambda: looked.count(host.process) >= 3)

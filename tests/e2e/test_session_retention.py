"""Conversations past their time, with real workers: they are archived once, whoever is killed meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.adk")

from google.adk.events.event import Event

from adapters.adk import RedisSessionService
from store import connect
from store.conversation_archive import read_archived
from store.keys import Keys
from tests.e2e.programs import NAMESPACE, PATIENT_POLICY, Cli, Program, eventually

APPS, OLD = ("one", "two", "three"), 200


async def _fill(url: str) -> None:
    """Conversations of three apps: most were not used for 40 days, ten of each were just now."""
    async with RedisSessionService(url, NAMESPACE) as service, connect(url) as store:
        for app in APPS:
            keys = Keys(NAMESPACE).app_sessions(app)
            for number in range(OLD + 10):
                name = {"app_name": app, "user_id": f"u{number % 5}", "session_id": f"s{number}"}
                session = await service.create_session(**name, state={"n": number})
                await service.append_event(session, Event(author="user"))
            at = await store.now_ms() - 40 * 86400_000
            old = {keys.session(f"u{n % 5}", f"s{n}").member: at for n in range(OLD)}
            await store.redis.zadd(keys.used, old)


async def _left(url: str) -> Counter[str]:
    async with RedisSessionService(url, NAMESPACE) as service:
        return Counter(
            {app: len((await service.list_sessions(app_name=app)).sessions) for app in APPS}
        )


def _conversations(cli: Cli) -> list[dict[str, Any]]:
    return [event for event in cli.log() if event["ref"].startswith("conversation/")]


def test_a_worker_is_killed_while_it_archives(
    url: str, cli: Cli, start_worker: Callable[..., Program], tmp_path: Path
) -> None:
    """Without an archive they stay, and the doctor says so. With one, three workers end each of them
    once, though one is killed in the middle; those in use stay, and the log can be verified."""
    asyncio.run(_fill(url))
    workers = [start_worker(policy=PATIENT_POLICY) for _ in range(3)]
    (found,) = [one for one in cli.json("doctor")["findings"] if one["check"] == "conversations"]
    assert found["what"].startswith(f"{3 * OLD} of {3 * (OLD + 10)} conversations are older")
    assert asyncio.run(_left(url)) == dict.fromkeys(APPS, OLD + 10)

    cli.json("archive", "--to", str(tmp_path / "archive"))
    folder = tmp_path / "archive" / NAMESPACE / "conversations"
    eventually(lambda: len(list(folder.glob("*/*/*.gz"))) > 20, "some are archived", 60)
    workers[0].stop(signal.SIGKILL)
    eventually(
        lambda: asyncio.run(_left(url)) == dict.fromkeys(APPS, 10), "those in use are left", 120
    )

    def told() -> bool:
        return len({event["ref"] for event in _conversations(cli)}) == 3 * OLD

    eventually(told, "all are told", 60)
    events = _conversations(cli)
    assert {event["reason"] for event in events} == {"retention: not used for 30 d; archived"}
    # What the killed one had told and not noted as told is told again, and is the same.
    assert len({(event["ref"], event["attrs"]["incarnation"]) for event in events}) == 3 * OLD
    assert len(events) <= 3 * OLD + 100
    for event in events:
        about, lines = read_archived(Path(event["attrs"]["archived"]).read_bytes())
        assert event["ref"] == f"conversation/{about['app']}/{about['user']}/{about['id']}"
        assert len(lines) == 1
    explained = cli.run("explain", events[0]["ref"])
    assert explained.returncode == 0
    assert "deleted as data" in explained.stdout
    assert "retention: not used for 30 d; archived" in explained.stdout
    assert cli.run("verify").returncode == 0
    assert not [one for one in cli.json("doctor")["findings"] if one["check"] == "conversations"]
    assert cli.json("status")["processes"] == []


def test_a_retention_that_cannot_be_meant(cli: Cli) -> None:
    """Too short a time is refused in one line, which says what is possible."""
    done = cli.run("worker", "--set", "session_retention=5")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "session_retention: must be 60 seconds at least" in done.stderr

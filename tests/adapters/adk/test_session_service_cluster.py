"""The session service on a real cluster, by its address."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions

from adapters.adk import RedisSessionService
from reconciler import Reconciler
from store import EventLog, connect
from store.namespace import open_namespace
from store.retention import Retention, write_retention
from tests.redis_processes import RedisCluster, running
from tests.support import story


@pytest.mark.slow
async def test_sessions_of_several_apps(tmp_path: Path) -> None:
    """Apps are on different nodes; events, state and lists read back in another process's service."""
    with running(RedisCluster(tmp_path)) as cluster:
        address = f"agent-reconciler+{cluster.url}/?namespace=chat"
        writer, reader = RedisSessionService(address), RedisSessionService(address)
        for app in ("one", "two", "three", "four"):
            session = await writer.create_session(app_name=app, user_id="u", state={"app:a": app})
            for turn in range(3):
                event = Event(author="user", actions=EventActions(state_delta={"turn": turn}))
                await writer.append_event(session, event)
            found = await reader.get_session(app_name=app, user_id="u", session_id=session.id)
            assert found is not None
            assert [e.id for e in found.events] == [e.id for e in session.events]
            assert found.state == {"app:a": app, "turn": 2}
            listed = await reader.list_sessions(app_name=app, user_id="u")
            assert [one.id for one in listed.sessions] == [session.id]
        for service in (writer, reader):
            await service.close()


@pytest.mark.slow
async def test_conversations_end(tmp_path: Path) -> None:
    """On whichever node an app is, its conversations are archived, deleted and told by the worker that acts
    for its partition, which is on another."""
    apps = ("one", "two", "three", "four", "five")
    with running(RedisCluster(tmp_path)) as cluster:
        async with (
            connect(cluster.url) as store,
            RedisSessionService(cluster.url, "chat") as service,
        ):
            space = await open_namespace(store, "chat", 4)
            await write_retention(space, Retention(str(tmp_path / "archive")))
            for app in apps:
                session = await service.create_session(app_name=app, user_id="u", session_id="s")
                await service.append_event(session, Event(author="user"))
                await store.redis.zadd(space.keys.app_sessions(app).used, {"u/s": 1000})
            worker = Reconciler(store, namespace="chat")
            await worker.open()
            await worker.keep_leases()
            await worker.retention.look()
            for app in apps:
                assert (await service.list_sessions(app_name=app)).sessions == []
            told = [ref for _, ref in await story(EventLog(store, "chat")) if "conversation" in ref]
            assert sorted(told) == sorted(f"conversation/{app}/u/s" for app in apps)
            await worker.release()

"""The session service on a real cluster, by its address."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions

from adapters.adk import RedisSessionService
from tests.redis_processes import RedisCluster, running


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

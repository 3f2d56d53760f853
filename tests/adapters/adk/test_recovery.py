"""Archiving ADK sessions and bringing them back, through the facade."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions import BaseSessionService, InMemorySessionService
from google.genai import types

from adapters import Host
from adapters.adk import (
    RedisSessionService,
    archive_session,
    get_recovery_store,
    load_archived_session,
    purge_archived_session,
)
from store import Store
from store.errors import NotJson

NAME = {"app_name": "app", "user_id": "u", "session_id": "s"}


def event(text: str, **changes: Any) -> Event:
    content = types.Content(role="user", parts=[types.Part(text=text)])
    return Event(author="user", content=content, actions=EventActions(state_delta=changes))


async def conversation(service: BaseSessionService) -> list[Event]:
    session = await service.create_session(**NAME, state={"a": 1, "app:x": "old"})
    await service.append_event(session, event("one", **{"user:name": "Ann", "temp:t": 1}))
    await service.append_event(session, event("two", a=2))
    return session.events


async def test_back_into_another_memory(host: Host) -> None:
    """Events and state are there again, equal to what they were, and in their order."""
    recovery = get_recovery_store(host)
    here, there = InMemorySessionService(), InMemorySessionService()
    events = await conversation(here)
    record = await archive_session(recovery, here, **NAME, agent="cook")
    assert record is not None
    assert record.transcript is not None
    assert len(record.transcript) == 2
    session = await load_archived_session(recovery, there, **NAME)
    assert session is not None
    full = await there.get_session(**NAME)
    assert full is not None
    assert [e.model_dump() for e in full.events] == [e.model_dump() for e in events]
    assert full.state == {"a": 2, "app:x": "old", "user:name": "Ann"}
    before = await here.get_session(**NAME)
    assert before is not None
    assert full.last_update_time == before.last_update_time


async def test_newer_shared_state_wins(host: Host) -> None:
    """What user and app have come to know meanwhile is not overwritten by an old session."""
    recovery = get_recovery_store(host)
    service = InMemorySessionService()
    await conversation(service)
    await archive_session(recovery, service, **NAME)
    await service.delete_session(**NAME)
    await service.create_session(
        app_name="app", user_id="u", state={"user:name": "Anna", "app:x": "new"}
    )
    session = await load_archived_session(recovery, service, **NAME)
    assert session is not None
    assert session.state == {"a": 2, "app:x": "new", "user:name": "Anna"}


async def test_from_memory_into_redis(
    host: Host, make_service: Callable[..., RedisSessionService]
) -> None:
    """A service that moves to Redis takes its archived sessions along."""
    recovery = get_recovery_store(host)
    here, there = InMemorySessionService(), make_service()
    await conversation(here)
    await archive_session(recovery, here, **NAME)
    await load_archived_session(recovery, there, **NAME)
    full = await there.get_session(**NAME)
    assert full is not None
    assert [e.content.parts[0].text for e in full.events] == ["one", "two"]
    assert full.state == {"a": 2, "app:x": "old", "user:name": "Ann"}


async def test_a_service_that_keeps_conversations(
    store: Store, namespace: str, make_service: Callable[..., RedisSessionService]
) -> None:
    """The record has no transcript, and what the service has is what comes back."""
    recovery = get_recovery_store(store, namespace)
    service = make_service()
    await conversation(service)
    record = await archive_session(recovery, service, **NAME)
    assert record is not None
    assert record.transcript is None
    assert record.state == {}
    assert await load_archived_session(recovery, make_service(), **NAME) is not None
    await service.delete_session(**NAME)
    assert await load_archived_session(recovery, service, **NAME) is None


async def test_nothing_to_archive_and_nothing_to_load(host: Host) -> None:
    """A session that is not there gives None, not an empty record."""
    recovery = get_recovery_store(host)
    service = InMemorySessionService()
    assert await archive_session(recovery, service, **NAME) is None
    assert await load_archived_session(recovery, service, **NAME) is None
    assert not await purge_archived_session(recovery, **NAME)


async def test_purge(host: Host) -> None:
    """What was purged does not come back."""
    recovery = get_recovery_store(host)
    service = InMemorySessionService()
    await conversation(service)
    await archive_session(recovery, service, **NAME)
    assert await purge_archived_session(recovery, **NAME)
    await service.delete_session(**NAME)
    assert await load_archived_session(recovery, service, **NAME) is None


async def test_state_that_json_cannot_hold(host: Host) -> None:
    """In memory a state value may be anything; one that cannot be saved is named, and nothing is."""
    recovery = get_recovery_store(host)
    service = InMemorySessionService()
    await service.create_session(**NAME, state={"fine": 1, "lock": object()})
    with pytest.raises(NotJson, match="'lock'"):
        await archive_session(recovery, service, **NAME)
    assert await recovery.load("app", "u", "s") is None

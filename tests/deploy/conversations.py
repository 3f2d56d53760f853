"""Keeps conversations and recovery records in every way, as the user `host`, once."""

from __future__ import annotations

import asyncio
import sys

from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types

from adapters.adk import RedisSessionService
from store import connect
from store.keys import Keys
from store.recovery import RecoveryRecord, RecoveryStore
from tests.support import eventually

NAME = {"app_name": "app", "user_id": "u", "session_id": "s"}


def said(text: str, **state: int) -> Event:
    content = types.Content(role="user", parts=[types.Part(text=text)])
    return Event(author="user", content=content, actions=EventActions(state_delta=state))


async def main(url: str) -> None:
    for retention in (600, None):
        async with RedisSessionService(url, ttl=retention) as one:
            session = await one.create_session(**NAME, state={"app:a": 1, "user:b": 2, "c": 3})
            for number in range(5):
                await one.append_event(session, said(str(number), **{"app:a": number, "c": number}))
            async with RedisSessionService(url, ttl=retention) as other:
                assert len((await other.get_session(**NAME)).events) == 5
                config = GetSessionConfig(num_recent_events=2)
                assert len((await other.get_session(**NAME, config=config)).events) == 2
                assert (await other.list_sessions(app_name="app")).sessions
                assert (await other.list_sessions(app_name="app", user_id="u")).sessions
                await other.delete_session(**NAME)
    async with connect(url) as store:
        for retention in (600.0, None):
            records = RecoveryStore(store, "default", retention=retention)
            await records.save(RecoveryRecord("app", "u", "s", 1.0))
            assert await records.load("app", "u", "s")
            assert await records.purge("app", "u", "s")


async def leave_behind(url: str) -> None:
    """What a worker ends: a conversation that was not used for long, one of a time when uses were not
    noted; and, for the service itself, one that has expired."""
    async with RedisSessionService(url) as service, connect(url) as store:
        keys = Keys("default").app_sessions("app")
        for name in ("old", "unnoted"):
            session = await service.create_session(**NAME | {"session_id": name})
            await service.append_event(session, said(name))
        at = await store.now_ms() - 40 * 86_400_000
        await store.redis.zadd(keys.used, {keys.session("u", "old").member: at})
        await store.redis.zrem(keys.used, keys.session("u", "unnoted").member)
    async with RedisSessionService(url, ttl=0.2) as service, connect(url) as store:
        await service.create_session(**NAME | {"session_id": "brief"})

        async def expired() -> bool:
            # Asked for by its key: a look by the service would begin its time anew.
            return not await store.redis.exists(keys.session("u", "brief").session)

        await eventually(expired)
        await service.create_session(**NAME | {"session_id": "brief"})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
    asyncio.run(leave_behind(sys.argv[1]))

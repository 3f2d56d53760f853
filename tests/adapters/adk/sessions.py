"""What the tests of the session service share: events to append, sessions to fill, a way to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions import Session
from google.genai import types

from adapters.adk import RedisSessionService
from store.connection import Store

MakeService = Callable[..., RedisSessionService]
NAME: dict[str, str] = {"app_name": "app", "user_id": "user", "session_id": "s"}


def said(text: str, **more: Any) -> Event:
    state = more.pop("state", {})
    return Event(
        author="user",
        content=types.Content(role="user", parts=[types.Part(text=text)]),
        actions=EventActions(state_delta=state),
        **more,
    )


def texts(session: Session | None) -> list[str]:
    assert session is not None
    return [event.content.parts[0].text for event in session.events]  # type: ignore[union-attr,index,misc]


async def filled(service: RedisSessionService, count: int, **name: str) -> Session:
    session = await service.create_session(**(NAME | name))
    for number in range(count):
        await service.append_event(session, said(str(number), timestamp=100.0 + number))
    return session


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    """Waits until it holds: Redis expires keys by its own clock and tells nobody."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class CountedCommands:
    """How many commands Redis served, and how many bytes it sent, between two looks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def look(self) -> tuple[int, int]:
        info = await self._store.redis.info("all")
        scripts = info.get("cmdstat_evalsha", {}).get("calls", 0)
        return int(scripts), int(info["total_net_output_bytes"])

"""`to_mcp_server` on our service: a session for each connection, and all of them go."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from store import EventLog
from tests.support import eventually, story

sys.path.insert(0, str(Path(__file__).parent.parent.parent.parent / "examples"))

from mcp_agent import serving

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


async def ask(client: Any, text: str) -> str:
    result = await client.call_tool("echo", {"request": text})
    return str(result.content[0].text)


async def test_sessions_of_connections_go(redis_url: str, namespace: str, log: EventLog) -> None:
    """Each connection is one conversation while it lasts; afterwards nothing of it is left."""
    async with serving(redis_url, namespace, 1.0) as (server, host):

        async def connection(number: int) -> None:
            async with Client(server, mode="legacy") as client:
                await ask(client, f"I am {number}")
                answer = await ask(client, "who am I?")
                assert answer == f"You said 2 things: I am {number}; who am I?"

        await asyncio.gather(*(connection(number) for number in range(5)))
        begun = [ref for type, ref in await story(log) if type == "created"]
        await eventually(lambda: not any(ref.startswith("session/") for ref in host.entries))
        keys = [
            key async for key in host.store.redis.scan_iter(f"ar:{{{namespace}/adk/*:session:*")
        ]
        assert keys == []
    assert len([ref for ref in begun if ref.startswith("session/")]) == 5


async def test_sessions_of_single_requests_go(redis_url: str, namespace: str) -> None:
    """In the newer protocol each request stands alone, and ADK makes a session for each; they go."""
    async with serving(redis_url, namespace, 0.1) as (server, host), Client(server) as client:
        for _ in range(3):
            assert await ask(client, "hello") == "You said 1 things: hello"
        await eventually(lambda: not any(ref.startswith("session/") for ref in host.entries))
        keys = [
            key async for key in host.store.redis.scan_iter(f"ar:{{{namespace}/adk/*:session:*")
        ]
        assert keys == []


async def test_a_silent_connection_goes_on(redis_url: str, namespace: str) -> None:
    """A connection whose session went begins a new one with its next call."""
    async with (
        serving(redis_url, namespace, 0.1) as (server, host),
        Client(server, mode="legacy") as client,
    ):
        await ask(client, "hello")
        await eventually(lambda: not any(ref.startswith("session/") for ref in host.entries))
        assert await ask(client, "still there?") == "You said 1 things: still there?"

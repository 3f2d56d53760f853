"""docs/adk.md: nothing in it that does not work."""

from __future__ import annotations

import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from google.adk.cli.service_registry import ServiceRegistry, _register_services_from_yaml_config
from google.adk.events.event import Event
from google.adk.sessions import InMemorySessionService
from google.genai import types

from adapters import Host
from adapters.adk import RedisSessionService
from tests.adapters.adk.talk import Workshop, text_of

DOCS = Path(__file__).parent.parent.parent.parent / "docs"
PAGE = (DOCS / "adk.md").read_text()


def blocks(language: str) -> list[str]:
    return [
        text
        for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
        if name == language
    ]


@pytest.fixture
def scope() -> dict[str, Any]:
    """What the Python of the page defines."""
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
    return names


async def test_runtime(scope: dict[str, Any], redis_url: str) -> None:
    """The snippet serves requests, and its other calls do what is said beside them."""
    replies: list[Event] = []

    async def requests() -> AsyncIterator[Any]:
        for text in ("hello", "again"):

            async def reply(event: Event) -> None:
                replies.append(event)

            yield SimpleNamespace(
                chat_id="docs", user_id="u", agent_config={"name": "cook"}, text=text, reply=reply
            )

    await scope["serve"](redis_url, Workshop(), requests())
    assert "hello" in text_of(replies)


async def test_the_rest(scope: dict[str, Any], host: Host) -> None:
    """Heartbeat, stay, close button and deletion."""
    async with scope["AdkRuntime"](host, InMemorySessionService(), Workshop()) as runtime:
        async with runtime.chat("c", "u", {"name": "cook"}):
            pass
        sizes = await scope["the_rest"](runtime, "c", "u")
        assert sizes["chat chats"] == 0
        assert sizes["runners"] == 1


async def test_by_hand(scope: dict[str, Any], host: Host) -> None:
    """Archive, delete, load and purge."""
    service = InMemorySessionService()
    await service.create_session(app_name="a", user_id="u", session_id="s", state={"x": 1})
    session = await scope["by_hand"](host, service, "a", "u", "s")
    assert session.state == {"x": 1}


async def test_plugin(scope: dict[str, Any], host: Host) -> None:
    """The runner of the snippet is looked after."""
    agent = await Workshop()({"name": "cook"})
    runner = scope["make_runner"](host, agent, InMemorySessionService())
    content = types.Content(role="user", parts=[types.Part(text="hello")])
    run = runner.run_async(user_id="u", session_id="s", new_message=content)
    assert "hello" in text_of([event async for event in run])
    assert "session/s" in host.entries
    await runner.close()


def test_command_line() -> None:
    """ADK's registry takes the YAML, and makes our service from every address of the page."""
    registry = ServiceRegistry()
    for block in blocks("yaml"):
        _register_services_from_yaml_config(yaml.safe_load(block), registry)
    addresses = [
        words[words.index("--session_service_uri") + 1]
        for block in blocks("console")
        for words in map(shlex.split, block.splitlines())
    ]
    assert len(addresses) == 2
    for address in addresses:
        service = registry.create_session_service(address, agents_dir="agents")
        assert isinstance(service, RedisSessionService)


def test_links() -> None:
    """Every linked file is there, and every linked heading."""
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("#")
    }
    for link in links:
        path, _, heading = link.partition("#")
        assert not path or (DOCS / path).exists(), link
        assert not heading or path or heading in headings, link

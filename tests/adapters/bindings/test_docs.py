"""The documentation of the bindings: every snippet in it runs as it stands."""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import test_utils, web
from fastapi import FastAPI
from fastapi.testclient import TestClient

from adapters import Host
from adapters.aiohttp_client import HttpClients
from adapters.components import Components
from adapters.leak_probe import LeakProbe

PAGE = Path(__file__).parents[3] / "docs" / "bring-it-into-your-service.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


class Search:
    """Stands for a component of the reader's."""

    runs = 0

    def __init__(self, db: Any = None) -> None:
        self.db = db

    async def run(self) -> None:
        Search.runs += 1

    async def __aenter__(self) -> Search:
        return self

    async def __aexit__(self, *exc: object) -> None: ...


class SomeOtherClient:
    closed = 0

    async def aclose(self) -> None:
        SomeOtherClient.closed += 1


async def serve() -> None: ...


def snippet(having: str) -> str:
    found = [text for text in SNIPPETS if having in text]
    assert len(found) == 1, f"{len(found)} snippets with {having!r}"
    return str(found[0])


async def run(code: str, **given: Any) -> dict[str, Any]:
    """Runs a snippet as it stands, with what the page says is there."""
    scope: dict[str, Any] = {"asyncio": asyncio, "logging": logging, "serve": serve, **given}
    compiled = compile(code, PAGE.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, scope)
    if inspect.isawaitable(result):
        await result
    return scope


async def test_http_clients(host: Host, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A call is answered, and the session closed at the end."""
    scope = await run(snippet("component/search"), host=host, url=server)
    assert capsys.readouterr().out == "hello\n"
    assert len(scope["clients"]) == 0


async def test_watching_sessions_of_the_service(host: Host) -> None:
    """The snippet runs."""
    await run(snippet("watch=True"), host=host, HttpClients=HttpClients)


@pytest.mark.parametrize(
    ("having", "file", "lines"), [("run-42", "run-42.log", 2), ("run-43", "executions.log", 1)]
)
async def test_execution_logs(
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    having: str,
    file: str,
    lines: int,
) -> None:
    """The file is where the page says, with the lines that it says."""
    monkeypatch.chdir(tmp_path)
    await run(snippet(having), host=host)
    assert len((tmp_path / "logs" / file).read_text().splitlines()) == lines


async def test_handlers_of_the_service(host: Host) -> None:
    """The snippet runs."""
    await run(snippet("LogHandlers(host"), host=host)


async def test_vector_clients(host: Host) -> None:
    """Both clients are closed at the end."""
    pytest.importorskip("qdrant_client")
    before = SomeOtherClient.closed
    service = Search()
    await run(snippet("VectorClients"), host=host, SomeOtherClient=SomeOtherClient, service=service)
    assert SomeOtherClient.closed == before + 1


async def test_components(host: Host) -> None:
    """What is needed is given by its name."""
    before = Search.runs
    scope = await run(snippet("close_timeout=10"), host=host, open_db=dict, Search=Search)
    assert Search.runs == before + 1
    assert "component/search" not in host.entries
    assert scope["components"].order() == ["db", "search"]


def test_components_in_fastapi() -> None:
    """They live as long as the application."""
    components = Components().add("search", Search)
    scope: dict[str, Any] = {"FastAPI": FastAPI, "components": components}
    exec(snippet("FastAPI(lifespan"), scope)
    with TestClient(scope["app"]):
        assert isinstance(components["search"], Search)
    with pytest.raises(KeyError):
        components["search"]


async def test_components_in_aiohttp() -> None:
    """They live as long as the application."""
    components = Components().add("search", Search)
    scope = await run(snippet("cleanup_ctx"), web=web, components=components)
    async with test_utils.TestServer(scope["app"]):
        assert isinstance(components["search"], Search)
    with pytest.raises(KeyError):
        components["search"]


async def test_leak_probe(host: Host) -> None:
    """The snippet runs."""
    await run(snippet("sessions by user"), host=host, sessions_by_user={})


async def test_the_fixture() -> None:
    """The test on the page passes, and leaves nothing behind."""
    scope = await run(snippet("async def test_search"), Search=Search)
    with LeakProbe(tracing=True) as probe:
        probe.begin()
        await scope["test_search"](probe)
        assert probe.look() == []


def test_every_snippet_has_its_test() -> None:
    """A new one on the page wants one here."""
    assert len(SNIPPETS) == 11

"""A real redis-server for each test, and the processes around it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from store.embedded import EmbeddedServer
from tests.e2e.programs import Cli, HostProgram, Program, running, worker


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a redis-server of this test's own."""
    with tempfile.TemporaryDirectory(prefix="ar-e2e-") as folder:
        server = EmbeddedServer(Path(folder))
        asyncio.run(server.start())
        yield f"unix://{server.socket}"
        server.stop()


@pytest.fixture
def cli(url: str) -> Cli:
    return Cli(url)


@pytest.fixture
def chat(url: str, tmp_path: Path) -> Iterator[HostProgram]:
    """The leaky chat service as a process."""
    with running(HostProgram(url, tmp_path / "host.log")) as program:
        yield program


@pytest.fixture
def start_worker(url: str, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts worker processes; they are stopped at the end."""
    started: list[Program] = []

    def start(*options: str, **settings: Any) -> Program:
        log = tmp_path / f"worker-{len(started)}.log"
        program = worker(
            url, log, *([settings["policy"]] if "policy" in settings else []), *options
        )
        started.append(program)
        return program

    yield start
    for program in started:
        if program.process.poll() is None:
            program.stop()

"""`adk api_server` from the example: two real processes on one Redis are one service."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.programs import NAMESPACE, ROOT, Cli, eventually

ADK = Path(sys.executable).parent / "adk"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One `adk api_server`, or `adk web`; ended by its pid."""

    def __init__(self, url: str, log: Path, command: str = "api_server") -> None:
        self.port = free_port()
        self._log = log
        self._file = log.open("wb")
        address = f"agent-reconciler+{url}?name=echo-api&namespace={NAMESPACE}"
        self.process = subprocess.Popen(
            [
                str(ADK), command, "--port", str(self.port), "--no-reload",
                "--session_service_uri", address, str(ROOT / "examples" / "adk_agents"),
            ],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    @property
    def logged(self) -> str:
        return self._log.read_text(errors="replace")

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def say(self, session: str, text: str) -> str:
        body = {
            "appName": "echo", "userId": "u", "sessionId": session,
            "newMessage": {"role": "user", "parts": [{"text": text}]},
        }  # fmt: skip
        events = self.ask("/run", body)
        return str(events[-1]["content"]["parts"][0]["text"])

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.logged[-2000:]
        try:
            return bool(self.ask("/list-apps"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end: {self.logged[-2000:]}") from None
        finally:
            self._file.close()


@pytest.fixture
def servers(url: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    with ExitStack() as stack:
        made = []
        for number in range(2):
            made.append(Server(url, tmp_path / f"api-{number}.log"))
            stack.callback(made[-1].stop)
        for server in made:
            eventually(server.is_up, "the server answers", 60)
        yield made[0], made[1]


def test_two_instances_are_one_conversation(servers: tuple[Server, Server], cli: Cli) -> None:
    """Requests that alternate between two instances speak in one session, and both are in the log."""
    session = servers[0].ask("/apps/echo/users/u/sessions", {})["id"]
    said = []
    for turn in range(6):
        said.append(f"thing {turn}")
        answer = servers[turn % 2].say(session, said[-1])
        assert answer == f"You said {turn + 1} things: " + "; ".join(said)
    for server in servers:
        stored = server.ask(f"/apps/echo/users/u/sessions/{session}")
        assert len(stored["events"]) == 12

    processes = {
        row["process"] for row in cli.log("--resource", f"session/{session}") if row.get("process")
    }
    assert len({name for name in processes if name.startswith("echo-api@")}) == 2
    found = cli.json("reconcile", "--dry-run")
    assert not found["orphans"]
    # The session is let go by both, and the conversation stays.
    done = cli.json("reconcile", "--set", "session_idle_timeout=0.001")
    assert {row["ref"] for row in done["torn_down"]} == {f"session/{session}"}
    assert len(done["torn_down"]) == 2
    assert servers[1].say(session, "again").startswith("You said 7 things: thing 0;")

    for server, number in zip(servers, (signal.SIGINT, signal.SIGTERM), strict=True):
        server.stop(number)
    ended = [row for row in cli.log() if row["type"] == "process_stopped"]
    assert len(ended) == 2


def test_adk_web_takes_the_address_too(url: str, cli: Cli, tmp_path: Path) -> None:
    """`adk web` from the same folder speaks in a session of ours, which another server goes on with."""
    with ExitStack() as stack:
        servers = []
        for command in ("web", "api_server"):
            servers.append(Server(url, tmp_path / f"{command}.log", command))
            stack.callback(servers[-1].stop)
        for server in servers:
            eventually(server.is_up, "the server answers", 60)
        session = servers[0].ask("/apps/echo/users/u/sessions", {})["id"]
        assert servers[0].say(session, "from web") == "You said 1 things: from web"
        assert servers[1].say(session, "on") == "You said 2 things: from web; on"
    assert cli.log("--resource", f"session/{session}")


def test_the_readme_shows_the_services_yaml() -> None:
    """What the README shows is what the example has."""
    shown = re.search(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert shown is not None
    example = yaml.safe_load((ROOT / "examples/adk_agents/services.yaml").read_text())
    (wanted,) = yaml.safe_load(shown[1])["services"]
    assert wanted in example["services"]

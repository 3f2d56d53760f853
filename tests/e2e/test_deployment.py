"""The container files: valid by schema, and their commands are ones that really run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.e2e.programs import ROOT, Program, eventually, running


@pytest.fixture
def services() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return loaded


class TestCompose:
    def test_valid_by_schema(self) -> None:
        """compose.yaml passes the Compose specification's schema."""
        command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
        tool = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
        done = subprocess.run(
            [tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_commands_run(self, services: dict[str, Any], url: str, tmp_path: Path) -> None:
        """The worker's and the host's commands, with only the address changed, do their work."""

        def local(service: str, *more: str) -> list[str]:
            words = [w.replace("redis://redis:6379", url) for w in services[service]["command"]]
            start = {"agent-reconciler": ["-m", "reconciler"], "python": []}[words[0]]
            return [sys.executable, *start, *words[1:], *more]

        with (
            running(Program(local("worker", "--http", "127.0.0.1:0"), tmp_path / "w")) as worker,
            running(Program(local("chat", "--chats", "5"), tmp_path / "c")) as chat,
        ):
            assert "pid" in json.loads(chat.process.stdout.readline())
            started = eventually(
                lambda: [x for x in worker.log_lines() if x["event"] == "worker started"],
                "it starts",
            )
            with urllib.request.urlopen(started[0]["http"] + "/readyz", timeout=5) as answer:
                assert json.loads(answer.read())["ready"] is True
            assert (chat.stop(), worker.stop()) == (0, 0)

    def test_health_check_asks_where_the_worker_listens(self, services: dict[str, Any]) -> None:
        """The health check names the worker's default address and a path that exists."""
        from reconciler.cli.worker import worker

        (option,) = [p for p in worker.params if p.name == "http"]
        assert f"http://{option.default}/readyz" in services["worker"]["healthcheck"]["test"][-1]


class TestDockerfile:
    def test_builds_from_files_that_exist(self) -> None:
        """Every file that is copied exists and is not ignored; the container does not run as root."""
        parser = DockerfileParser(str(ROOT / "Dockerfile"))
        kept = {
            line[1:]
            for line in (ROOT / ".dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        copied = [
            source
            for step in parser.structure
            if step["instruction"] == "COPY" and "--from" not in step["value"]
            for source in step["value"].split()[:-1]
        ]
        assert copied
        assert all((ROOT / source).exists() for source in copied)
        assert set(copied) <= kept
        (user,) = [s["value"] for s in parser.structure if s["instruction"] == "USER"]
        assert user not in {"root", "0"}
        assert json.loads(parser.cmd) == ["agent-reconciler", "worker"]

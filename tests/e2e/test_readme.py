"""The README, and the page of evidence: nothing in them that does not work."""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reconciler.cli import cli
from store import connect
from store.namespace import open_namespace
from tests.e2e.programs import ROOT, Cli, eventually

EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in found if name == language]


class Closed:
    def __init__(self) -> None:
        self.closed = False

    async def close(self) -> None:
        self.closed = True

    runner_id = "r1"

    async def send(self, message: str) -> str:
        return message.upper()


class TestSnippets:
    async def test_service_is_looked_after(self, url: str) -> None:
        """The fifteen lines, and the reconciler in the same process: a stale entry goes."""
        scope: dict[str, Any] = {}
        for block in blocks("python"):
            exec(block, scope)
        said = []

        async def run(host: Any) -> None:
            service.runners["r1"] = Closed()
            service._agent_runners["a1"] = "r1"
            service.sessions["s1"] = Closed()
            said.append(await scope["answer"](host, "s1", "hello"))
            service.runners.pop("r1")
            await asyncio.to_thread(eventually, lambda: not service._agent_runners, "it goes")

        service = SimpleNamespace(runners={}, sessions={}, _agent_runners={}, run=run)
        await scope["with_everything_in_one_process"](
            SimpleNamespace(run=lambda host: look_in(scope, service, host)), url
        )
        assert said == ["HELLO"]
        assert service._agent_runners == {}

    def test_snippet_is_fifteen_lines(self) -> None:
        """The part that goes into a service is short."""
        first = [line for line in blocks("python")[0].splitlines() if line.strip()]
        assert len(first) <= 15


async def look_in(scope: dict[str, Any], service: Any, host: Any) -> None:
    """The body of the README's `look_after`, with the host of the other snippet."""
    scope = {**scope, "Host": SimpleNamespace(connect=lambda *_, **__: _Given(host))}
    exec(blocks("python")[0].replace("from adapters import Host", ""), scope)
    await scope["look_after"](service, "unused")


class _Given:
    def __init__(self, host: Any) -> None:
        self._host = host

    async def __aenter__(self) -> Any:
        return self._host

    async def __aexit__(self, *exc: object) -> None:
        return None


class TestCommands:
    def commands(self) -> list[list[str]]:
        lines = [
            line.partition("  #")[0]
            for block in blocks("")
            for line in block.replace("\\\n", "").splitlines()
            if line.startswith("agent-reconciler")
        ]
        return [shlex.split(line) for line in lines]

    def test_every_command_is_understood(self) -> None:
        """Each `agent-reconciler` line of the README parses: command, options and values."""
        assert len(self.commands()) >= 8
        for words in self.commands():
            command = cli.commands[words[1]]
            with command.make_context(words[1], words[2:], resilient_parsing=False):
                pass

    async def test_looking_commands_run(self, cli: Cli) -> None:
        """Those that look, and end, do so with status 0 on an empty log that was opened once."""
        async with connect(cli.url) as store:
            await open_namespace(store, cli.namespace)
        for words in self.commands():
            if words[1] in {"status", "reconcile", "log", "replay", "verify"}:
                if {"-f", "--process", "--at", "--from", "--export", "--watch"} & set(words):
                    continue
                if words[1] == "replay" and "--resource" in words:
                    continue  # Nothing is known of it in an empty log.
                done = await asyncio.to_thread(cli.run, *words[1:])
                assert done.returncode == 0, words

    def test_make_targets_and_files_exist(self) -> None:
        """Each `make` target and each linked file is there."""
        targets = set(re.findall(r"make (\w+)", README)) - {"and"}
        text = (ROOT / "Makefile").read_text()
        assert targets
        assert [t for t in targets if not re.search(rf"^{t}:", text, re.M)] == []
        links = re.findall(r"\]\(([^)#]+)\)", README)
        assert [link for link in links if not (ROOT / link).exists()] == []

    @pytest.mark.skipif(not Path("/usr/bin/make").exists(), reason="make is not installed")
    def test_make_help(self) -> None:
        """`make help` lists the targets, without setting anything up."""
        done = subprocess.run(
            ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert {"demo", "test", "check"} <= {line.split()[0] for line in done.stdout.splitlines()}


class TestEvidence:
    """docs/evidence.md: the tests that it names are there."""

    def test_every_test_exists(self) -> None:
        """Each file, class and function, by the words they begin with."""
        named = re.findall(r"`(tests/[\w/.]+\.py)((?:::\w+)*)`", EVIDENCE)
        assert len(named) > 30
        missing = []
        for file, names in named:
            path = ROOT / file
            body: list[ast.stmt] = ast.parse(path.read_text()).body if path.exists() else []
            for name in names.split("::")[1:]:
                found = [node for node in body if getattr(node, "name", "") == name]
                body = list(getattr(found[0], "body", [])) if found else []
            if not body:
                missing.append(file + names)
        assert missing == []

    def test_every_benchmark_is_listed(self) -> None:
        """No more and no fewer than there are."""
        listed = set(re.findall(r"^\| `(\w+\.py)` \|", EVIDENCE, re.M))
        assert listed == {path.name for path in (ROOT / "benchmarks").glob("*.py")}

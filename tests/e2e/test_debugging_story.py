"""docs/debugging.md: its commands, run in their order against a service that leaks, print what it says.

`python -m tests.e2e.test_debugging_story` writes what they print into the document.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.programs import ROOT, Program, eventually
from tests.support import free_port

DOCUMENT = ROOT / "docs/debugging.md"
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
_PROGRAMS = ("agent-reconciler worker", "python examples/")
_SHOWN = 12
"""Lines of a table that the document shows; the others are `…`."""


@dataclass
class Terminals:
    """Where the commands of the document are typed.

    Attributes:
        folder: for logs and the data of Redis.
        variables: set by the commands.
        worker, chat: what runs in the other terminals.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    worker: Program | None = None
    chat: Program | None = None

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        for name, words in (("agent-reconciler", "-m reconciler"), ("python", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            (programs / name).chmod(0o755)

    def environment(self) -> dict[str, str]:
        own = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "COLUMNS": "100"}
        return {**os.environ, "PYTHONPATH": str(ROOT), **own, **self.variables}

    def type(self, command: str) -> str:
        """Types a command; what it printed, when it has ended or is at its work."""
        if command.startswith(_PROGRAMS):
            self._start(command)
            return ""
        name, equals, _ = command.removeprefix("export ").partition("=")
        if equals and name.isidentifier():
            shell = f'{command.replace("./data", str(self.folder / "data"))}; printf %s "${name}"'
            self.variables[name] = self._run(shell)
            return ""
        return self._run(command)

    def _run(self, shell: str) -> str:
        done = subprocess.run(
            ["bash", "-c", shell], cwd=ROOT, env=self.environment(),
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode in {0, 1}, (shell, done.stderr)
        assert done.stderr == "", (shell, done.stderr)
        return done.stdout

    def _start(self, command: str) -> None:
        words = [sys.executable, *command.split()[1:]]
        if command.startswith("python"):
            words += ["--http", f"127.0.0.1:{free_port()}"]
            self.chat = self._program(words, "chat.log")
            eventually(lambda: self.alive("session") >= 100, "chats are open", 120)
            return
        if self.worker is not None:
            assert self.worker.stop() == 0
        words[1:1] = ["-m", "reconciler"]
        self.worker = self._program([*words, "--http", "127.0.0.1:0", "--lease", "2"], "worker.log")
        started = self.worker
        eventually(lambda: "worker started" in started.logged, "the worker starts", 60)
        if "SESSION" in self.variables:  # The cure: it works as soon as the limit is over.
            gone = f"agent-reconciler explain {self.variables['SESSION']}"
            eventually(lambda: "outcome cleaned_up" in self._run(gone), "the session goes", 150)

    def _program(self, words: list[str], log: str) -> Program:
        (self.folder / log).unlink(missing_ok=True)
        os.environ["AGENT_RECONCILER_URL"] = self.variables["AGENT_RECONCILER_URL"]
        try:
            return Program(words, self.folder / log)
        finally:
            del os.environ["AGENT_RECONCILER_URL"]

    def alive(self, kind: str) -> int:
        found: dict[str, Any] = json.loads(self._run("agent-reconciler status --json"))
        return int(found["resources"].get(kind, 0))

    def close(self) -> None:
        for program in (self.chat, self.worker):
            if program is not None and program.process.poll() is None:
                program.stop()


@pytest.fixture
def terminals() -> Iterator[Terminals]:
    yield from opened()


def opened() -> Iterator[Terminals]:
    """Terminals; whatever runs in them is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="ar-story-") as name:
        made = Terminals(Path(name))
        try:
            yield made
        finally:
            made.close()


def typed(block: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a block, each with the lines that it prints."""
    command, lines = "", list[str]()
    for line in block.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, lines
            command, lines = line[2:], []
        else:
            lines.append(line)
    yield command, lines


def shape(line: str) -> str:
    """A line without what is different every time: times, numbers, ids, widths."""
    line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", line)
    line = re.sub(r"\S+@\S+:\d+(:\d+)?", "PROCESS", line)
    line = re.sub(r"\bo-[0-9a-f]{12}\b", "ORDER", line)
    line = re.sub(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?|\b\d\d:\d\d:\d\d(\.\d+)?\b", "TIME", line
    )
    line = re.sub(r"\b\d+(\.\d+)? (ms|s|min|h|d)\b", "SPAN", line)
    line = re.sub(r"\b(runner|agent|config_lock)/\S+", r"\1/NAME", line)
    line = re.sub(r"\d+(\.\d+)?", "N", line)
    line = re.sub(r"N \w+(, N \w+)+", "KINDS", line)  # In the order of their numbers.
    line = re.sub(r"\bonce\b|\bN times\b|\bnever\b", "COUNT", line)
    return re.sub(r"\s+", " ", line).strip()


def shows(printed: str, wanted: list[str]) -> bool:
    """All the wanted lines are in what was printed, in their order."""
    lines = iter([shape(line) for line in printed.splitlines()])
    return all(line in lines for line in wanted)


class TestStory:
    @pytest.mark.timeout(450)
    def test_followed(self, terminals: Terminals) -> None:
        """Every command runs, in order, and prints the lines of the document, in their order."""
        blocks = _BLOCK.findall(DOCUMENT.read_text())
        compared = 0
        for block in blocks:
            for command, lines in typed(block):
                wanted = [shaped for line in lines if (shaped := shape(line)) not in {"", "…"}]
                compared += len(wanted)
                printed = terminals.type(command)
                deadline = time.monotonic() + 60
                # What is about to be torn down is drift for a moment: then it is looked at again.
                while not shows(printed, wanted) and time.monotonic() < deadline:
                    printed = terminals.type(command)
                assert shows(printed, wanted), (command, wanted, printed)
        assert compared > 30

    def test_the_turning_points(self) -> None:
        """The document shows what its text points to."""
        text = DOCUMENT.read_text()
        for words in (
            "no drift", "As things are, no time limit ends it.", "session_idle_timeout is off",
            "outcome cleaned_up", "sent order",
        ):  # fmt: skip
            assert words in text.replace("\n", " "), words

    def test_links(self) -> None:
        """Every file that operations, debugging and architecture link to exists, and every heading."""
        for name in ("debugging", "operations", "architecture"):
            text = (ROOT / f"docs/{name}.md").read_text()
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                file, _, anchor = target.partition("#")
                path = ROOT / "docs" / file if file else ROOT / f"docs/{name}.md"
                assert path.exists(), (name, target)
                if anchor:
                    assert anchor in anchors(path.read_text()), (name, target)


def anchors(text: str) -> set[str]:
    """What the headings of a document can be linked to by."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def rewrite() -> None:
    """Runs the story and puts what was printed into the document."""
    text = DOCUMENT.read_text()
    for terminals in opened():
        parts = []
        for part in re.split(r"(^```console\n.*?^```$)", text, flags=re.M | re.S):
            if not part.startswith("```console"):
                parts.append(part)
                continue
            block = _BLOCK.findall(part)[0]
            lines = []
            for command, _ in typed(block):
                printed = [line.rstrip() for line in terminals.type(command).splitlines()]
                shown = printed[:_SHOWN] + (["…"] if len(printed) > _SHOWN else [])
                lines += [f"$ {command}", *shown]
            parts.append("```console\n" + "\n".join(lines) + "\n```")
        DOCUMENT.write_text("".join(parts))


if __name__ == "__main__":
    rewrite()

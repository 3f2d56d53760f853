"""Real processes for the end-to-end tests: redis-server, host and worker share nothing but Redis."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
NAMESPACE = "test"
WAIT = 20.0


def eventually(condition: Callable[[], Any], what: str, timeout: float = WAIT) -> Any:
    """Asks until the condition gives something true; the answer is that. Fails after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)


@dataclass
class Cli:
    """The command line against one Redis."""

    url: str
    namespace: str = NAMESPACE

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reconciler", *arguments]
        command += ["--url", self.url, "--namespace", self.namespace]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
        )

    def json(self, *arguments: str) -> Any:
        """What a command prints with --json; its exit status must be 0 or 1."""
        done = self.run(*arguments, "--json")
        assert done.returncode in {0, 1}, done.stderr
        return json.loads(done.stdout)

    def log(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.run("log", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


class Program:
    """A child process; ended by its pid, never by name."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    @property
    def logged(self) -> str:
        return self._log.read_text(errors="replace")

    def log_lines(self) -> list[dict[str, Any]]:
        """The structured log, one object a line."""
        lines = []
        for text in self.logged.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not end on signal {number}: {self.logged[-2000:]}") from None


class HostProgram(Program):
    """A host told what to do line by line: the chat service of examples/leaky_chat.py, or another.

    Args:
        url, namespace: of the log.
        log: file that its standard error goes to.
        module: the program; see `tests.e2e.obey`.
        options: of that program, on its command line.
        by: what runs it instead of Python itself.

    Attributes:
        greeting: what it said first.
        id: of its process in the log, at its start.
    """

    def __init__(
        self,
        url: str,
        log: Path,
        namespace: str = NAMESPACE,
        *options: str,
        module: str = "tests.e2e.chat_host",
        by: Sequence[str] = (),
    ) -> None:
        super().__init__([*by, sys.executable, "-m", module, url, namespace, *options], log)
        self.greeting = self._answer(60)
        self.id: str = self.greeting["process"]

    def do(self, code: str, **values: Any) -> Any:
        """Runs the body of an async function in the host, with `service`, `host` and the values.

        The result is what it returns.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self.process.stdin.flush()
        answer = self._answer(30)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def counts(self) -> dict[str, int]:
        """How full each registry is."""
        counts: dict[str, int] = self.do(
            "return {r.name: len(r) for r in [*host.registries, *host.indexes.values()]}"
        )
        return counts

    def _answer(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else ""
        assert line, f"the host said nothing: {self.logged[-2000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


FAST_POLICY = {
    "session_idle_timeout": 1,
    "runner_idle_timeout": 1,
    "agent_idle_timeout": 1,
    "owner_timeout": 10,
    "idle_timeouts.recovery_record": 1,
    "backoff": 0.2,
}
PATIENT_POLICY = {"session_idle_timeout": 3600}


@contextlib.contextmanager
def running(program: Program) -> Iterator[Any]:
    """A program, stopped at the end."""
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.stop()


def worker(url: str, log: Path, policy: dict[str, Any] = FAST_POLICY, *options: str) -> Program:
    """A worker process, once it acts."""
    settings = [part for name, value in policy.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "reconciler", "worker", "--url", url, "--namespace", NAMESPACE]
    program = Program([*command, "--http", "127.0.0.1:0", "--lease", "2", *settings, *options], log)

    def started() -> bool:
        assert program.process.poll() is None, program.logged[-2000:]
        return any(line["event"] == "worker started" for line in program.log_lines())

    eventually(started, "the worker starts")
    return program


def http_of(program: Program) -> str:
    """Where a worker listens."""
    for line in program.log_lines():
        if line["event"] == "worker started":
            return str(line["http"])
    raise AssertionError("the worker has not started")

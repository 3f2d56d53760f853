"""The command line as its user meets it: what it prints, its exit status, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from tests.e2e.programs import (
    FAST_POLICY,
    NAMESPACE,
    PATIENT_POLICY,
    ROOT,
    Cli,
    HostProgram,
    Program,
    eventually,
    http_of,
)
from tests.e2e.test_leaks import OPEN_CHATS

Start = Callable[..., Program]

LEAK = """
await service.forget_chat(next(iter(service.chats)))
service.runners.pop(service._agent_runners['agent-birds'])
return host.process
"""


def keys_of(rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
    return {
        (row["process"], row["ref"], row.get("registry", ""), row.get("key", "")) for row in rows
    }


def leak(chat: HostProgram) -> None:
    chat.do(OPEN_CHATS, topics=["chess", "birds", "chess"])
    eventually(
        lambda: chat.do("return all(e.owned_by for e in host.entries.values() "
                        "if e.ref.startswith('config_lock/'))"),
        "the locks have owners",
    )  # fmt: skip
    chat.do(LEAK)


class TestReconcile:
    @pytest.mark.parametrize("with_worker", [False, True])
    def test_dry_run_lists_exactly_what_a_run_does(
        self, chat: HostProgram, cli: Cli, start_worker: Start, with_worker: bool
    ) -> None:
        """--dry-run changes nothing and lists what reconcile then does, with a worker and without."""
        if with_worker:
            # A worker that is busy with nothing: what it finds by itself is gone before we look.
            start_worker(policy=PATIENT_POLICY)
        leak(chat)
        before = chat.counts()
        dry = cli.run("reconcile", "--dry-run", "--json")
        found = json.loads(dry.stdout)
        listed = [*found["orphans"], *found["dangling"], *found["ghosts"], *found["untracked"]]
        if not with_worker:
            assert chat.counts() == before
            assert dry.returncode == 1
            assert {row["ref"].partition("/")[0] for row in listed} == {
                "unclosed_runner", "config_lock", "runner", "session",
            }  # fmt: skip
            assert all(row["reason"] for row in listed)
            assert all("key" in row for row in found["dangling"])
        real = cli.run("reconcile", "--json")
        done = json.loads(real.stdout)
        assert real.returncode == 0
        if not with_worker:
            assert keys_of(done["torn_down"]) == keys_of(listed)
        assert (done["refused"], done["failed"], done["waiting"]) == ([], [], [])
        again = cli.run("reconcile", "--dry-run", "--json")
        assert again.returncode == 0
        assert json.loads(again.stdout)["processes"] == [chat.id]
        counts = chat.counts()
        assert (counts["_agent_runners"], counts["_config_locks"]) == (1, 1)

    def test_tables_on_request(self, chat: HostProgram, cli: Cli) -> None:
        """Without --json there are tables, and a word when there is nothing to do."""
        leak(chat)
        shown = cli.run("reconcile", "--dry-run")
        assert shown.returncode == 1
        assert "_agent_runners[agent-birds]" in shown.stdout
        done = cli.run("reconcile", "--process", "chat")
        assert done.returncode == 0
        assert "torn down" in done.stdout
        assert "nothing to do" in cli.run("reconcile").stdout

    def test_failed_teardown_is_something_left(self, chat: HostProgram, cli: Cli) -> None:
        """A teardown that fails is listed as failed, the resource stays, the status is 1."""
        chat.do(
            """
            chats = next(r for r in host.registries if r.name == 'chats')
            async def fail(id, chat):
                raise RuntimeError('the disk is full')
            chats.teardown = fail
            """
        )
        chat.do(OPEN_CHATS, topics=["chess"])
        settings = ["--set", "session_idle_timeout=0.001", "--set", "runner_idle_timeout=off"]
        done = cli.run("reconcile", "--json", *settings)
        assert done.returncode == 1
        (failed,) = json.loads(done.stdout)["failed"]
        assert "the disk is full" in failed["reason"]
        assert chat.counts()["chats"] == 1

    def test_unknown_process(self, chat: HostProgram, cli: Cli) -> None:
        """A process that is not alive is named, with those that are; status 2."""
        done = cli.run("reconcile", "--process", "nobody@nowhere:1:1")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "nobody@nowhere:1:1" in done.stderr
        assert chat.id in done.stderr


class TestStatusAndReplay:
    def test_status_and_replay_agree_with_the_host(self, chat: HostProgram, cli: Cli) -> None:
        """status shows what is alive now, replay what was alive then, replay --at ID inclusive."""
        chat.do(OPEN_CHATS, topics=["chess", "birds"])
        eventually(lambda: cli.json("status")["resources"].get("session") == 2, "both are known")
        (process,) = cli.json("status")["processes"]
        assert process["process"] == chat.id
        assert process["registries"]["chats"] == 2
        then = cli.log()[-1]["id"]
        chat.do("for id in list(service.chats): await service.forget_chat(id)")
        eventually(lambda: "session" not in cli.json("status")["resources"], "both are gone")

        def sessions(*at: str) -> int:
            alive = cli.json("replay", *at)["alive"]
            return sum(1 for r in alive if r["ref"].startswith("session/"))

        assert sessions() == 0
        assert sessions("--at", then) == 2
        assert "processes" in cli.run("status").stdout
        assert "alive at" in cli.run("replay", "--at", then).stdout

    def test_log_follows(self, chat: HostProgram, cli: Cli, url: str) -> None:
        """log -f goes on with events as they come."""
        command = [sys.executable, "-m", "reconciler", "log", "-f", "--json"]
        command += ["--url", url, "--namespace", NAMESPACE]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as follower:
            assert follower.stdout is not None
            assert json.loads(follower.stdout.readline())["type"] == "process_started"
            chat.do(OPEN_CHATS, topics=["chess"])
            seen = {json.loads(follower.stdout.readline())["ref"] for _ in range(4)}
            assert "agent/agent-chess" in seen
            follower.terminate()


class TestWorker:
    def test_http_side(self, chat: HostProgram, start_worker: Start) -> None:
        """/healthz, /readyz and /metrics answer, and the metrics tell what happened."""
        # Idle for long enough that a busy machine sees it alive, too.
        program = start_worker(policy=FAST_POLICY | {"session_idle_timeout": 4})
        chat.do(OPEN_CHATS, topics=["chess"])
        base = http_of(program)

        def get(path: str) -> str:
            with urllib.request.urlopen(base + path, timeout=5) as answer:
                return str(answer.read().decode())

        assert json.loads(get("/healthz")) == {"status": "ok"}
        assert json.loads(get("/readyz")) == {"ready": True, "reasons": []}
        assert 'agent_reconciler_live_resources{kind="session"} 1.0' in eventually(
            lambda: next((p for p in [get("/metrics")] if 'kind="session"} 1' in p), None),
            "is seen",
        )
        done = 'agent_reconciler_teardowns_total{kind="session",outcome="done",reason="idle"} 1.0'
        eventually(lambda: done in get("/metrics"), "the teardown is counted")
        for name in ("drift", "log_lag_seconds", "outbox_events", "quarantined_entries_total"):
            assert f"agent_reconciler_{name}" in get("/metrics")

    def test_malformed_entry_is_quarantined(
        self, chat: HostProgram, start_worker: Start, cli: Cli, url: str
    ) -> None:
        """An entry written by hand is set aside, counted and shown; folding goes on."""
        program = start_worker(policy=PATIENT_POLICY)
        client = redis.Redis.from_url(url)
        (log_key,) = client.keys("ar:{test/*}:log")
        bad = client.xadd(log_key, {"e": '{"type": "created"'}).decode()
        worse = client.xadd(log_key, {"x": "y"}).decode()
        chat.do(OPEN_CHATS, topics=["chess"])
        eventually(lambda: cli.json("status")["resources"].get("session") == 1, "folding goes on")
        quarantined = eventually(lambda: cli.json("status")["quarantined"], "it is set aside")
        assert set(quarantined) == {bad, worse}

        def warned() -> set[str]:
            lines = [x for x in program.log_lines() if "quarantined" in x["event"]]
            return {line["entry_id"] for line in lines}

        # `status` sets it aside, too, and may have been first.
        eventually(lambda: warned() == {bad, worse}, "the worker says so")
        with urllib.request.urlopen(http_of(program) + "/metrics", timeout=5) as answer:
            assert "agent_reconciler_quarantined_entries_total 2.0" in answer.read().decode()
        raw = client.xrange(log_key, bad, bad)
        assert raw[0][1] == {b"e": b'{"type": "created"'}


class TestBadInput:
    """One line on standard error, status 2, no traceback."""

    def refused(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "reconciler", *arguments],
            capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    @pytest.mark.parametrize("command", ["status", "log", "replay", "reconcile", "worker"])
    def test_no_redis_at_the_address(self, command: str) -> None:
        """The address is named, and what to start."""
        message = self.refused(command, "--url", "redis://:secret@127.0.0.1:1/0")
        assert "127.0.0.1:1" in message
        assert "redis-server --port 1" in message
        assert "secret" not in message

    @pytest.mark.parametrize(
        ("arguments", "needle"),
        [
            (["status", "--url", "mysql://x"], "unknown scheme"),
            (["status", "--url", "embedded://"], "embedded://PATH"),
            (["status", "--url", "redis://a..b:6379"], "host name that cannot be one"),
            (["status", "--namespace", "a b"], "namespace 'a b'"),
            (["worker", "--set", "session_idle_timeout=0"], "`off`"),
            (["worker", "--set", "sesion_idle_timeout=5"], "there is no such setting"),
            (["worker", "--set", "nonsense"], "name=value"),
            (["worker", "--policy", "/nowhere/policy.toml"], "/nowhere/policy.toml"),
            (["worker", "--http", "nonsense"], "host:port"),
            (["worker", "--partitions", "0"], "--partitions"),
            (["worker", "--name", "a b@:"], "cannot be a name"),
            (["worker", "--http-name", "a b"], "not a host name"),
            (["status", "--url", "redis+sentinel://host"], "name-of-the-master"),
            (["replay", "--at", "yesterday-ish"], "yesterday-ish"),
            (["replay", "--resource", "nonsense"], "kind/id"),
            (["frobnicate"], "No such command"),
            (["log", "--lines", "x"], "--lines"),
            (["log", "--resource", "nonsense"], "kind/id"),
        ],
    )
    def test_arguments_that_cannot_be_meant(self, arguments: list[str], needle: str) -> None:
        """What is wrong is named, with what can be written instead."""
        assert needle in self.refused(*arguments)

    def test_namespace_of_a_newer_schema(self, url: str) -> None:
        """A namespace written by a newer version is refused, and left as it is."""
        client = redis.Redis.from_url(url)
        client.hset("ar:{future}:meta", mapping={"schema": "99", "partitions": "4"})
        message = self.refused("status", "--url", url, "--namespace", "future")
        assert "schema 99" in message
        assert "upgrade" in message
        assert client.hget("ar:{future}:meta", "schema") == b"99"

    @pytest.mark.parametrize(
        "command",
        [
            "status", "status --watch", "doctor", "log", "log -f", "replay", "replay --step",
            "explain session/s", "verify", "reconcile", "reconcile --dry-run", "archive --to off",
        ],
    )  # fmt: skip
    def test_mistyped_namespace(self, url: str, command: str) -> None:
        """A namespace that does not exist is refused with those that do, and is not made."""
        client = redis.Redis.from_url(url)
        client.hset("ar:{right}:meta", mapping={"schema": "1", "partitions": "4"})
        message = self.refused(*command.split(), "--url", url, "--namespace", "wrong")
        assert "there is no namespace 'wrong'" in message
        assert "there are: right" in message
        assert client.keys("*") == [b"ar:{right}:meta"]

    def test_nothing_recorded_yet(self, url: str) -> None:
        """On a Redis that nobody has used yet, the answer says what to start."""
        assert "start a service with a Host" in self.refused("status", "--url", url)

    @pytest.mark.parametrize("there", [False, True])
    def test_looking_makes_no_embedded_server(self, tmp_path: Path, there: bool) -> None:
        """A command that looks starts no Redis in a folder that holds no data."""
        folder = tmp_path / "nothere"
        if there:
            folder.mkdir()
        message = self.refused("status", "--url", f"embedded://{folder}")
        assert f"nothing has been recorded at embedded://{folder} yet" in message
        assert list(folder.parent.rglob("*")) == ([folder] if there else [])

    def test_another_number_of_partitions(self, url: str) -> None:
        """A worker that asks for another number than is recorded is refused, with both numbers."""
        client = redis.Redis.from_url(url)
        client.hset("ar:{four}:meta", mapping={"schema": "1", "partitions": "4"})
        message = self.refused(
            "worker", "--url", url, "--namespace", "four", "--partitions", "8", "--http", "off"
        )
        assert "has 4 partitions, not 8" in message
        assert "leave it out" in message
        assert client.keys("ar:{four}*") == [b"ar:{four}:meta"]

    def test_redis_that_cannot_hold_a_log(self, url: str) -> None:
        """A Redis that would drop the log is refused, with the command that mends it."""
        client = redis.Redis.from_url(url)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", "100mb")
        assert "CONFIG SET maxmemory-policy noeviction" in self.refused("status", "--url", url)

    def test_time_in_the_future(self, url: str) -> None:
        """A moment that has not come is refused, and the present one is told."""
        client = redis.Redis.from_url(url)
        client.hset("ar:{default}:meta", mapping={"schema": "1", "partitions": "4"})
        assert "in the future" in self.refused("replay", "--at", "2999-01-01", "--url", url)


class TestHelp:
    def help(self, *words: str) -> str:
        command = [sys.executable, "-m", "reconciler", *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        return done.stdout

    def test_every_command_in_a_whole_sentence(self) -> None:
        """The list of commands cuts no sentence off, and options tell their variables."""
        assert "..." not in self.help().partition("Commands:")[2]
        assert "AGENT_RECONCILER_URL" in self.help("status")
        assert "AGENT_RECONCILER_TOKEN_FILE" in self.help("worker")


class TestDemo:
    @pytest.mark.timeout(120)
    def test_demo_ends_with_nothing_left(self) -> None:
        """The demo ends by itself with status 0 and an object that says so."""
        done = subprocess.run(
            [sys.executable, "-m", "reconciler", "demo", "--json", "--chats", "60"],
            capture_output=True, text=True, timeout=110, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["left"] == 0
        assert report["before"]["chats"] == 60
        assert not any(report["after"].values())
        assert set(report["before"]) == set(report["after"])
        assert report["torn_down"]["unclosed_runner"] > 0
        assert report["file_descriptors"]["after"] < report["file_descriptors"]["before"]

"""The users of Redis: each may do what it does, and nothing more."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.deploy.http import get, post
from tests.deploy.local import Machine
from tests.deploy.usage import Usage, Watch
from tests.e2e.programs import ROOT, Cli, eventually

RULES = ROOT / "deploy/redis/users.acl"
# The first test waits for all of `live`, and the others look at what it left.
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("redis-acl")]

Watched = tuple[Machine, Usage, list[dict[str, Any]]]
TESTER = "user tester on nopass ~* &* +@all\n"

SELDOM: dict[str, tuple[set[str], set[str]]] = {
    # PING: after 30 s of silence. CLIENT: Redis 6.2 does not tell of it.
    # A new namespace is made by whoever opens it first. A host reads back from log and archive where
    # it must chain to what an earlier process left.
    # HDEL: of a part of the inventory that has become empty between two looks.
    "host": (
        {"ping", "client|setname", "hsetnx", "hdel", "xrevrange"},
        {"history"},
    ),
    # PEXPIREAT: of the lists of an app all of whose conversations expire.
    "worker": ({"ping", "client|setname", "pexpireat"}, set()),
    # The scripts are known by SHA already, unless Redis has just started.
    "reader": ({"ping", "client|setname", "eval"}, set()),
}
"""What is granted and needed, but not seen in this test: commands, and kinds of keys."""

OPERATOR = {"config|get", "bgsave", "bgrewriteaof", "lastsave", "acl|log"}

NOT_ALLOWED = "no permission|The user executing the script can't|ACL failure in script"

REFUSED = [
    ("host", ["SET", "ar:{default/0}:lease", "me 99"]),
    ("host", ["HGETALL", "ar:{default/0}:snapshots"]),
    ("host", ["SET", "ar:{default}:policy", "{}"]),
    ("host", ["KEYS", "*"]),
    ("host", ["FLUSHALL"]),
    ("host", ["GET", "somebody-elses"]),
    ("worker", ["GET", "somebody-elses"]),
    ("worker", ["CONFIG", "SET", "maxmemory", "1"]),
    ("worker", ["FLUSHDB"]),
    ("worker", ["SCRIPT", "FLUSH"]),
    ("reader", ["XADD", "ar:{default/0}:log", "*", "e", "{}"]),
    ("reader", ["DEL", "ar:{default/0}:log"]),
    ("reader", ["EVAL", "return redis.call('DEL', KEYS[1])", "1", "ar:{default/0}:log"]),
    ("reader", ["HGETALL", "ar:{default/adk/app}:session:u/s"]),
    ("reader", ["XRANGE", "ar:{default/adk/app}:session:u/s:events", "-", "+"]),
    ("admin", ["FLUSHALL"]),
    ("admin", ["CONFIG", "SET", "dir", "/tmp"]),
    ("admin", ["ACL", "SETUSER", "me", "on", "nopass", "~*", "+@all"]),
    ("admin", ["MODULE", "LIST"]),
    ("admin", ["REPLICAOF", "somewhere.example", "6379"]),
    ("probe", ["INFO"]),
    ("probe", ["XADD", "ar:{default/0}:log", "*", "e", "{}"]),
]


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """The services under the rules, everything done once, and what Redis says of it."""
    with tempfile.TemporaryDirectory(prefix="ar-acl-") as name:
        folder = Path(name)
        rules = folder / "users.acl"
        rules.write_text(RULES.read_text() + TESTER)
        machine = Machine(folder, rules)
        try:
            machine.start("redis")
            port = machine.port("redis", 6379)
            watch = Watch(port, "tester", "any")
            try:
                for service in ("worker-1", "worker-2", "chat"):
                    machine.start(service)
                live(machine)
            finally:
                usage = watch.close()
            with redis.Redis(port=port, username="tester", password="any") as tester:
                yield machine, usage, tester.acl_log()
        finally:
            machine.stop_all()


def live(machine: Machine) -> None:
    """All that host, workers and people do, once."""
    chat = f"http://127.0.0.1:{machine.port('chat', 8000)}"
    made = post(f"{chat}/chats", {"user": "ada", "topic": "chess"})["chat"]
    assert "e4" in post(f"{chat}/chats/{made}", {"text": "e4"})["answer"]
    subprocess.run(
        [sys.executable, "-m", "tests.deploy.conversations", machine.url("host")],
        cwd=ROOT, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    page = f"http://127.0.0.1:{machine.port('worker-1', 8080)}"
    for path in ("/api/fleet", "/api/timeline", "/api/drift", f"/api/events?resource=session/{made}",
                 "/api/moment?at=2026-01-01"):  # fmt: skip
        eventually(lambda path=path: get(page + path), path)
    bearer = {"Authorization": f"Bearer {machine.secret('token')}"}
    assert post(f"{page}/api/reconcile", {"dry_run": True}, bearer)["processes"]
    for words in (
        ["status"], ["doctor"], ["log"], ["verify"], ["replay"], ["replay", "--from", "2026-01-01"],
        ["replay", "--resource", f"session/{made}"], ["explain", f"session/{made}"],
    ):  # fmt: skip
        for user in ("reader", "admin"):
            done = machine.cli(*words, "--json", user=user)
            assert done.returncode in {0, 1}, (user, words, done.stderr)
    # With workers they are asked; without, the command itself acts for the partitions.
    archive = "/archive"
    for words in (["reconcile", "--json"], ["archive", "--to", archive, "--keep", "0", "--json"]):
        done = machine.cli(*[machine.here("cli", word) for word in words])
        assert done.returncode in {0, 1}, (words, done.stderr)
    eventually(
        lambda: any(row["ref"] == "conversation/app/u/old" for row in events(machine)),
        "a conversation that was not used for long is archived and deleted", 150,
    )  # fmt: skip
    for service in ("worker-1", "worker-2"):
        machine.stop(service)
    follow_the_log(machine)
    for words in (["reconcile", "--json"], ["archive", "--json"], ["verify", "--json"]):
        done = machine.cli(*words)
        assert done.returncode in {0, 1}, (words, done.stderr)
    machine.stop("chat", signal.SIGKILL)
    for service in ("worker-1", "worker-2"):
        machine.start(service)
    eventually(
        lambda: any(row["type"] == "process_lost" for row in events(machine)),
        "the killed chat is declared lost", 60,
    )  # fmt: skip


def events(machine: Machine) -> list[dict[str, Any]]:
    """The log, as a reader sees it."""
    printed = machine.cli("log", "--json", user="reader").stdout
    return [json.loads(line) for line in printed.splitlines()]


def follow_the_log(machine: Machine) -> None:
    """`log -f`, until the chat has said something new."""
    command = machine.words("cli", ["agent-reconciler", "log", "-f", "-n", "0", "--json"])
    environment = {**machine.environment("cli"), "AGENT_RECONCILER_URL": machine.url("reader")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as following:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["process"].startswith("leaky-chat@")
        following.terminate()


def granted() -> dict[str, tuple[set[str], set[str]]]:
    """User -> commands and kinds of keys, as users.acl grants them."""
    text = re.sub(r"\n +", " ", re.sub(r"^#.*\n", "", RULES.read_text(), flags=re.M))
    found = {}
    for line in text.splitlines():
        if not line.startswith("user "):
            continue
        words = line.split()
        commands = {word[1:] for word in words if word.startswith("+")}
        keys = {
            word.rpartition("}:")[2]
            for word in words
            if word.startswith("~") and "/adk/" not in word
        }
        keys |= {"adk" for word in words if word.startswith("~") and "/adk/" in word}
        found[words[1]] = (commands, keys)
    return found


class TestRights:
    def test_everything_works_and_nothing_was_refused(self, watched: Watched) -> None:
        """Host, workers and every command did their work as these users; Redis refused none of them."""
        # By CLIENT SETINFO redis-py tells its version; that it is refused does not matter.
        refused = [row for row in watched[2] if not str(row["object"]).startswith("client")]
        assert refused == []

    @pytest.mark.parametrize("user", SELDOM)
    def test_nothing_is_granted_that_is_not_used(self, watched: Watched, user: str) -> None:
        """Each command and each kind of key that a user may use was used by it."""
        commands, keys = granted()[user]
        usage, (seldom, seldom_keys) = watched[1], SELDOM[user]
        # A connection that had gone before it was asked who it is.
        unknown, unknown_keys = usage.commands["?"], usage.keys["?"]
        assert commands - usage.commands[user] - unknown - seldom == set()
        assert keys - usage.keys[user] - unknown_keys - seldom_keys == set()

    def test_admin_has_the_rights_of_worker_and_reader(self) -> None:
        """Who steps in may do what workers and readers may, a few things about Redis itself, no more."""
        users = granted()
        commands, keys = users["admin"]
        assert commands == users["worker"][0] | users["reader"][0] | OPERATOR
        assert keys == users["worker"][1] | users["reader"][1]

    @pytest.mark.parametrize(
        ("user", "command"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else v
    )
    def test_refused(self, watched: Watched, user: str, command: list[str]) -> None:
        """What is not a user's business is refused by Redis."""
        machine = watched[0]
        password = "any" if user == "probe" else machine.secret(f"redis_{user}")
        port = machine.port("redis", 6379)
        with (
            redis.Redis(port=port, username=user, password=password) as client,
            pytest.raises(redis.exceptions.ResponseError, match=NOT_ALLOWED),
        ):
            client.execute_command(*command)

    def test_nobody_without_a_name(self, watched: Watched) -> None:
        """Without a user, or with a wrong password, one line says what to give."""
        port = watched[0].port("redis", 6379)
        for url in (f"redis://127.0.0.1:{port}", f"redis://worker:wrong@127.0.0.1:{port}"):
            done = Cli(url, "default").run("status")
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "give user and password" in done.stderr
            assert "wrong@" not in done.stderr

    def test_commands_that_a_reader_may_not_run(self, watched: Watched) -> None:
        """A reader who tries to change something is told so in one line, and nothing changes."""
        done = watched[0].cli("archive", "--to", "off", user="reader")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "does not let this user do that" in done.stderr


class TestStart:
    @pytest.mark.parametrize("change", ["missing", "empty"])
    def test_no_secret_no_start(self, tmp_path: Path, change: str) -> None:
        """Without a password Redis does not start, and one line says what makes it."""
        secrets = tmp_path / "secrets"
        subprocess.run([ROOT / "deploy/make-secrets.sh", secrets], check=True, timeout=30)
        (secrets / "redis_worker").unlink()
        if change == "empty":
            (secrets / "redis_worker").touch()
        done = subprocess.run(
            ["sh", ROOT / "deploy/redis/start.sh", "echo", "started"],
            env={**os.environ, "SECRETS": str(secrets), "ACL_TEMPLATE": str(RULES),
                 "ACL_FILE": str(tmp_path / "users.acl")},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert "redis_worker is missing or empty" in done.stderr

    def test_secrets_stay_as_they_are(self, tmp_path: Path) -> None:
        """Making the secrets again changes none, and makes what is missing."""
        for _ in range(2):
            subprocess.run(
                [ROOT / "deploy/make-secrets.sh", tmp_path / "s"], check=True, timeout=30
            )
            made = {file.name: file.read_text() for file in (tmp_path / "s").iterdir()}
            (tmp_path / "s/token").unlink()
        again = {file.name: file.read_text() for file in (tmp_path / "s").iterdir()}
        assert set(made) - set(again) == {"token"}
        assert all(made[name] == text for name, text in again.items())
        assert all(len(text) == 64 for text in made.values())
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700

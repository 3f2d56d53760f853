"""`doctor`: each fault of a deployment is found and named with what to do; a sound one passes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapters import Host
from reconciler import Policy
from reconciler.doctor import Clock, Facts, diagnose, host_of
from reconciler.stuck import Stuck
from store import EventLog, LifecycleEvent, Store, connect
from store.lease import take_lease
from store.namespace import Namespace, open_namespace
from store.retention import Retention, write_retention
from tests.e2e.programs import ROOT
from tests.redis_processes import RedisCluster, Server, until
from tests.redis_processes import running as running_redis


async def doctor(url: str, namespace: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit status, and the findings by check."""
    command = [sys.executable, "-m", "reconciler", "doctor", "--json"]
    command += ["--url", url, "--namespace", namespace]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["sound"] == (done.returncode == 0)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        assert finding["what"]
        assert finding["do"]
        found.setdefault(finding["check"], []).append(finding)
    return done.returncode, found


@pytest.fixture
async def sound(store: Store, namespace: str, host: Host) -> AsyncIterator[Namespace]:
    """A deployment that is as it should be: a worker, a host, an archive, an honest Redis."""
    space = await open_namespace(store, namespace)
    keys = space.keys
    await write_retention(space, Retention(archive="file:///srv/archive"))
    await store.redis.set(keys.policy, Policy().model_dump_json(exclude_unset=True))
    beat = {"at_ms": await store.now_ms() + 60_000, "partitions": [], "lag_seconds": 0.0}
    await store.redis.hset(keys.workers, "worker@host:1:1", json.dumps(beat))
    for partition in space.all_partitions():
        await take_lease(space, partition, "worker@host:1:1", 60_000)
    yield space
    await store.redis.config_set("maxmemory-policy", "noeviction")
    await store.redis.config_set("appendonly", "yes")


def flags(asked: Server, about: Server) -> str:
    """What a node of a cluster says of another."""
    nodes = asked.client.cluster("NODES")
    return str(nodes[f"127.0.0.1:{about.port}"]["flags"])


class TestCommand:
    async def test_sound(self, sound: Namespace, redis_url: str) -> None:
        """A deployment without fault: nothing is found, status 0."""
        assert await doctor(redis_url, sound.name) == (0, {})

    async def test_everything_at_once(self, sound: Namespace, redis_url: str) -> None:
        """Each fault is a finding of its own, with names and numbers; status 1."""
        redis, keys = sound.store.redis, sound.keys
        policy = Policy.read({"session_idle_timeout": "off", "stuck_after": 1}, "test")
        await redis.set(keys.policy, policy.model_dump_json(exclude_unset=True))
        await redis.hdel(keys.meta, "retention")
        await redis.delete(keys.workers)
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        await redis.config_set("appendonly", "no")
        await redis.zadd(keys.partition(3).hosts, {"svc@gone:1:1": 1})
        await redis.xadd(keys.partition(0).log, {"x": "not an event"})
        log = EventLog(sound.store, sound)
        ahead = time.time() + 90
        fast = "svc@fast-clock:7:1"
        await log.append(
            [
                LifecycleEvent(type="created", ref="runner/r", process=fast, seq=1, at=ahead),
                LifecycleEvent(
                    type="cleanup_requested", ref="runner/r", process=fast, seq=2, at=ahead,
                    order_id="o-1", attrs={"expected_seq": 1},
                ),
                LifecycleEvent(
                    type="cleanup_failed", ref="runner/r", process=fast, seq=3, at=ahead,
                    order_id="o-1", reason="no permission",
                ),
            ]
        )  # fmt: skip
        policy = policy.model_copy(update={"runner_idle_timeout": 0.001})
        await redis.set(keys.policy, policy.model_dump_json(exclude_unset=True))
        status, found = await doctor(redis_url, sound.name)
        assert status == 1
        assert set(found) == {
            "workers", "redis", "policy", "processes", "stuck teardowns", "quarantine", "clocks",
            "archive",
        }  # fmt: skip
        assert "session_idle_timeout is off" in found["policy"][0]["what"]
        text = " ".join(finding["what"] for finding in found["redis"])
        assert "allkeys-lru" in text
        assert "appendonly is off" in text
        assert "svc@gone:1:1" in found["processes"][0]["what"]
        assert "host fast-clock is 90.0 s ahead" in found["clocks"][0]["what"]
        assert "no permission" in found["stuck teardowns"][0]["what"]
        assert "explain runner/r" in found["stuck teardowns"][0]["do"]

    async def test_partitions_that_nobody_holds(self, sound: Namespace, redis_url: str) -> None:
        """With a worker alive, partitions without a lease are named."""
        for partition in (2, 5):
            await sound.store.redis.delete(sound.keys.partition(partition).lease)
        status, found = await doctor(redis_url, sound.name)
        assert (status, set(found)) == (1, {"partitions"})
        assert "partitions 2, 5" in found["partitions"][0]["what"]

    def test_a_cluster_with_a_node_away(self, tmp_path: Path) -> None:
        """A replica away is a finding; a master away without a replica is one line, status 2."""

        def run() -> tuple[int, str, str]:
            command = [sys.executable, "-m", "reconciler", "doctor", "--json", "--url", cluster.url]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            return done.returncode, done.stdout, done.stderr

        async def begin() -> None:
            async with connect(cluster.url) as store:
                await open_namespace(store)

        with running_redis(RedisCluster(tmp_path)) as cluster:
            asyncio.run(begin())
            status, said, error = run()
            assert (status, error) == (1, "")
            assert "does not answer the others" not in said
            assert said.count("appendonly is off") == 3
            master = cluster.nodes[0]
            replica = cluster.replica_of(master)
            replica.kill()
            until(lambda: "fail" in flags(master, replica), "the others miss the replica")
            status, said, error = run()
            assert (status, error) == (1, "")
            assert f"node 127.0.0.1:{replica.port} (a replica) of the cluster does not" in said
            master.kill()
            status, said, error = run()
            assert (status, said) == (2, "")
            assert error.count("\n") == 1
            assert f"node 127.0.0.1:{master.port} of the cluster" in error
            assert "start it" in error
            master.start()
            until(lambda: master.client.cluster("INFO")["cluster_state"] == "ok", "it is back")
            master.signal(signal.SIGSTOP)
            try:
                status, said, error = run()
            finally:
                master.signal(signal.SIGCONT)
            assert (status, said, error.count("\n")) == (2, "", 1)
            assert "(timeout)" in error

    def test_could_not_run(self) -> None:
        """Without Redis: one line, status 2."""
        command = [sys.executable, "-m", "reconciler", "doctor", "--url", "redis://127.0.0.1:1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


class TestChecks:
    def found(self, **facts: Any) -> list[str]:
        values: dict[str, Any] = {
            "policy": Policy(),
            "workers": {"w": {"at_ms": 1_000_000}},
            "archive": "file:///srv",
            **facts,
        }
        return [finding.what for finding in diagnose(Facts(now_ms=1_000_000, **values))]

    def test_nothing_found(self) -> None:
        """Facts without fault give no finding."""
        assert self.found() == []

    def test_worker_that_went_silent(self) -> None:
        """A heartbeat that is old counts as no worker; a slow worker is named."""
        assert "no worker is alive" in self.found(workers={"w": {"at_ms": 900_000}})[0]
        slow = {"w": {"at_ms": 1_000_000, "lag_seconds": 75.0}}
        assert "75 s after" in self.found(workers=slow)[0]

    def test_outboxes(self) -> None:
        """An outbox that grows, or is deep, is found; one that drains is not."""
        assert self.found(outboxes={"a": (500, 3), "b": (0, 400)}) == []
        assert "900 events waiting" in self.found(outboxes={"a": (500, 900)})[0]
        assert "20000 events waiting" in self.found(outboxes={"a": (30000, 20000)})[0]
        assert "spill file" in self.found(spilled={"a": 7})[0]
        assert "lost 7 events" in self.found(dropped={"a": 7})[0]

    def test_clock_behind_needs_several_events(self) -> None:
        """An event that waited looks like a clock that is behind; several that agree are one."""
        process = "svc@web-1:7:1"
        assert self.found(clocks=[Clock(process, -9000.0, 1)]) == []
        assert "web-1 is 9.0 s behind" in self.found(clocks=[Clock(process, -9000.0, 3)])[0]
        assert host_of(process) == "web-1"

    def test_every_finding_says_what_to_do(self) -> None:
        """The faults that the command is for, each with the command or the setting that mends it."""
        stuck = Stuck("runner/r", "svc@web:1:1", "runner/r", None, 5, "no permission", 0)
        facts = Facts(
            now_ms=1_000_000,
            policy=Policy.read({"session_idle_timeout": "off"}, "test"),
            servers={"Redis": {"maxmemory_policy": "allkeys-lru", "aof_enabled": 1}},
            clocks=[Clock("svc@web:1:1", 9000.0, 1)],
            stuck=[stuck],
        )
        assert {finding.check: finding.do.partition("`")[2] for finding in diagnose(facts)} == {
            "workers": "agent-reconciler worker`; two, so that one takes over from the other",
            "policy": "agent-reconciler worker --set session_idle_timeout=3600`",
            "redis": "CONFIG SET maxmemory-policy noeviction`, and in its configuration file",
            "stuck teardowns": "agent-reconciler explain runner/r`; mend the cause, then "
            "`agent-reconciler reconcile`",
            "archive": "agent-reconciler archive --to URL`",
            "clocks": "",
        }

    def test_memory(self) -> None:
        """A Redis that is nearly full, or cannot write its file, is found."""
        full = {"Redis": {"maxmemory": 100, "used_memory": 95, "aof_enabled": 1}}
        assert "95%" in self.found(servers=full)[0]
        broken = {"Redis": {"aof_enabled": 1, "aof_last_write_status": "err"}}
        assert "append-only file" in self.found(servers=broken)[0]

    def test_conversations(self) -> None:
        """Conversations that are kept for ever, that no archive takes, or that a worker cannot end."""
        off, on = Policy(session_retention="off"), Policy()
        assert self.found(policy=off) == []
        assert "session_retention is off: 7 conv" in self.found(policy=off, conversations=7)[0]
        stay = self.found(policy=on, conversations=7, overdue=2, archive=None)
        assert any("2 of 7 conversations are older" in one for one in stay)
        assert self.found(policy=on, conversations=7, overdue=2, overdue_ms=20_000) == []
        late = self.found(policy=on, conversations=7, overdue=2, overdue_ms=3_600_000)
        assert "2 of 7 conversations are older than session_retention, the oldest for" in late[0]

    def test_archive_off(self) -> None:
        """History that is dropped on purpose is told all the same."""
        assert "archive is off" in self.found(archive="off")[0]

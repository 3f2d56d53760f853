"""Snapshots, archive and verify as processes: what the command line says, and what a kill leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reconciler.fleet import fold_log
from reconciler.fold import FleetState
from reconciler.history import nearest_snapshot, save_snapshot
from reconciler.metrics import Metrics
from reconciler.tail import Tail
from store import EventLog, connect
from store.event import NO_DIGEST, EventRow, encode
from store.lease import Lease, take_lease
from store.namespace import open_namespace
from tests.e2e.programs import NAMESPACE, PATIENT_POLICY, ROOT, Cli, Program, eventually

Start = Callable[..., Program]


async def write(url: str, count: int, process: str = "svc@h:1:1", first: int = 1) -> None:
    """Appends events of one process: resources are created and used, and nine of ten end."""
    async with connect(url) as store:
        log = EventLog(store, NAMESPACE)
        digest = NO_DIGEST
        payloads: list[bytes] = []
        begin = first
        for seq in range(1, first + count):
            ref = f"session/{process}-{seq // 10 if seq % 10 == 0 else seq - 9}"
            type = "created" if seq % 10 == 0 or seq < 10 else "cleaned_up"
            payload, digest = encode(EventRow(type, ref, process, seq, uses=("runner/r",)), digest)
            if seq < first:
                continue
            payloads.append(payload)
            if len(payloads) == 500:
                await log.append_encoded(process, begin, payloads)
                begin, payloads = seq + 1, []
        if payloads:
            await log.append_encoded(process, begin, payloads)


def fill(url: str, count: int, process: str = "svc@h:1:1", first: int = 1) -> None:
    asyncio.run(write(url, count, process, first))


async def whole_fold(url: str) -> tuple[FleetState, float]:
    """A fold of everything, without snapshots, and the seconds it took."""
    async with connect(url) as store:
        log = EventLog(store, NAMESPACE)
        state = FleetState()
        began = time.perf_counter()
        for partition in (await log.namespace()).all_partitions():
            part = FleetState()
            async for page in log.pages(partition):
                for entry_id, row in page.rows:
                    part.apply(row, int(entry_id.partition("-")[0]))
            state.take(part)
        return state, time.perf_counter() - began


class TestArchive:
    @pytest.mark.parametrize("with_worker", [False, True])
    def test_replay_to_before_the_trim(
        self, url: str, cli: Cli, tmp_path: Path, start_worker: Start, with_worker: bool
    ) -> None:
        """After archive and trim, replay, log and verify say what they said before."""
        for number in range(4):
            fill(url, 400, f"svc{number}@h:1:{number}")
        entries = cli.log()
        middle = entries[700]["id"]
        before = cli.json("replay", "--at", middle)
        if with_worker:
            start_worker(policy=PATIENT_POLICY)
        done = cli.json("archive", "--to", str(tmp_path / "archive"), "--keep", "0")
        assert done["archived"] >= 1500
        assert done["trimmed"] >= 1500
        assert done["silent"] == []
        assert cli.json("replay", "--at", middle) == before
        assert cli.log()[: len(entries)] == entries
        found = cli.json("verify")
        assert (found["whole"], found["problems"]) == (True, [])
        assert found["events"] >= 1600
        assert cli.run("verify").stdout.startswith("the log is whole")

    def test_tables(self, url: str, cli: Cli, tmp_path: Path) -> None:
        """Without --json there is a table; the settings stay; a second run finds nothing to do."""
        fill(url, 100)
        shown = cli.run("archive", "--to", str(tmp_path), "--keep", "0")
        assert shown.returncode == 0
        assert "99" in shown.stdout
        again = cli.run("archive")
        assert "nothing is older than it is kept" in again.stdout
        assert str(tmp_path) in again.stdout

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_whoever_reads_has_enough(self, url: str, options: list[str]) -> None:
        """`log | head -1` ends quietly, with status 0: that nobody reads on is no fault."""
        for first in range(1, 4000, 500):
            fill(url, 500, first=first)
        command = [sys.executable, "-m", "reconciler", "log", *options]
        command += ["--url", url, "--namespace", NAMESPACE]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as reading:
            assert reading.stdout is not None
            assert reading.stderr is not None
            assert "session/" in reading.stdout.readline()
            reading.stdout.close()
            assert (reading.wait(60), reading.stderr.read()) == (0, "")

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ([], "has no archive: name one with --to"),
            (["--to", "{file}/x"], "nothing was trimmed"),
            (["--to", "/proc/nowhere"], "nothing was trimmed"),
            (["--to", "nosuch://bucket"], "Protocol not known"),
            (["--to", "off", "--keep", "-1"], "--keep"),
            (["--to", ""], "is no place for an archive"),
            (["--to", " "], "is no place for an archive"),
        ],
    )
    def test_bad_input(
        self, url: str, cli: Cli, tmp_path: Path, options: list[str], says: str
    ) -> None:
        """A place that cannot be used is one clear line, status 2, and nothing changes."""
        fill(url, 100)
        (tmp_path / "file").write_text("")
        words = [word.format(file=tmp_path / "file") for word in options]
        done = cli.run("archive", *words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert says in done.stderr
        assert "[Errno" not in done.stderr
        assert len(cli.log()) == 100
        assert "has no archive" in cli.run("archive").stderr

    def test_worker_says_once_that_it_cannot_write(
        self, url: str, cli: Cli, tmp_path: Path, start_worker: Start
    ) -> None:
        """The folder goes away under a worker: an error for the command, and nothing is trimmed."""
        place = tmp_path / "archive"
        fill(url, 100)
        assert cli.json("archive", "--to", str(place), "--keep", "0")["trimmed"] == 99
        fill(url, 100, first=101)
        start_worker(policy=PATIENT_POLICY)
        place.rename(tmp_path / "gone")
        place.write_text("a file")
        done = cli.run("archive")
        assert done.returncode == 2
        assert "nothing was trimmed" in done.stderr
        place.unlink()
        (tmp_path / "gone").rename(place)
        assert len([e for e in cli.log() if e["process"].startswith("svc")]) == 200

    def test_damage_is_status_1(self, url: str, cli: Cli) -> None:
        """A damaged log: status 1, and a table that names the event."""
        fill(url, 20)

        async def damage() -> None:
            async with connect(url) as store:
                space = await open_namespace(store, NAMESPACE)
                key = space.partition_keys("svc@h:1:1").log
                entry = (await store.redis.xrange(key))[7]
                await store.redis.xdel(key, entry[0])

        asyncio.run(damage())
        done = cli.run("verify")
        assert done.returncode == 1
        assert "DAMAGED" in done.stdout
        assert "removed" in done.stdout

    def test_killed_at_any_time(self, url: str, cli: Cli, tmp_path: Path) -> None:
        """kill -9 in the middle of archiving, again and again: nothing is missing, nothing doubled."""
        fill(url, 12_000)
        entries = [entry["id"] for entry in cli.log()]
        command = [sys.executable, "-m", "tests.e2e.slow_archive", url, NAMESPACE, str(tmp_path)]
        for stop in ("data", "index", "record", "trim"):
            child = subprocess.Popen([*command, stop], stdout=subprocess.PIPE, cwd=ROOT)
            assert child.stdout is not None
            assert child.stdout.readline() == b"now\n"
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
            assert [entry["id"] for entry in cli.log()] == entries
            eventually(lambda: not leases(url), "the lease of who was killed lapses")
        done = cli.json("archive", "--to", str(tmp_path), "--keep", "0")
        assert done["silent"] == []
        assert [entry["id"] for entry in cli.log()] == entries
        assert cli.json("verify")["whole"]
        assert not list(tmp_path.rglob("*.tmp"))


def leases(url: str) -> list[Any]:
    """Leases that are held."""

    async def look() -> list[Any]:
        async with connect(url) as store:
            return [key async for key in store.redis.scan_iter(match="*:lease")]

    return asyncio.run(look())


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestStart:
    def test_million_events(self, url: str) -> None:
        """1,000,000 events, snapshot, 1,000 more, restart: equal to a fold of everything, and faster."""
        fill(url, 1_000_000)

        async def snapshot() -> None:
            async with connect(url) as store:
                log = EventLog(store, NAMESPACE)
                space = await log.namespace()
                partition = space.partition_of("svc@h:1:1")
                lease = await take_lease(space, partition, "w@h:1:1", 60_000)
                assert isinstance(lease, Lease)
                state, _ = await nearest_snapshot(space, partition)
                async for page in log.pages(partition):
                    for entry_id, row in page.rows:
                        state.apply(row, int(entry_id.partition("-")[0]))
                await save_snapshot(space, lease, state, (await log.last())[partition])

        async def restart() -> tuple[FleetState, float]:
            async with connect(url) as store:
                log = EventLog(store, NAMESPACE)
                space = await log.namespace()
                began = time.perf_counter()
                tail = Tail(log, Metrics(), lambda *_: None)
                await tail.add(space.all_partitions())
                return tail.state, time.perf_counter() - began

        asyncio.run(snapshot())
        fill(url, 1000, first=1_000_001)
        whole, full_seconds = asyncio.run(whole_fold(url))
        state, seconds = asyncio.run(restart())
        print(json.dumps({"start_seconds": seconds, "full_fold_seconds": full_seconds,
                          "events": state.events, "alive": state.size}))  # fmt: skip
        assert state == whole
        assert state.events == 1_001_000
        assert seconds < full_seconds

        async def at_end() -> FleetState:
            async with connect(url) as store:
                return await fold_log(EventLog(store, NAMESPACE))

        assert asyncio.run(at_end()) == whole

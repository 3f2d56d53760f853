"""`replay --at` on a long log: from the nearest snapshot, in seconds, and in memory for what was alive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reconciler.fold import FleetState
from store import EventLog, connect
from store.event import NO_DIGEST, EventRow, encode
from store.namespace import open_namespace
from store.position import ms_of
from tests.e2e.programs import NAMESPACE, ROOT, Cli

EVENTS = 1_000_000
ROUNDS = 10
"""The log is written in so many parts; after all but the last two, what there is is archived."""
PROCESSES = [f"svc-{number}@h:{number}:1" for number in range(4)]
ALIVE = 5_000
"""Sessions of each process that are alive at a time."""
MOMENTS = 5
MOST_MEMORY = 60 * 1024 * 1024
"""Bytes that a look at a past moment may take beyond what the command takes on an empty log: 20,000 live
resources, as objects and as the JSON that is printed, and a page of the log."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def life(process: str, state: dict[str, Any]) -> Iterator[EventRow]:
    """A service for ever: sessions begin, are used twice, and end when `ALIVE` younger ones are there."""
    alive: deque[str] = deque()
    while True:
        state["made"] += 1
        if state["made"] % 100 == 1:
            runner = f"runner/{state['made'] // 100:08x}"
            yield _row(process, state, "created", runner)
        ref = f"session/{state['made']:032x}"
        alive.append(ref)
        yield _row(process, state, "created", ref, uses=(runner,), attrs={"user": f"u{len(alive)}"})
        for _ in range(2):
            yield _row(process, state, "reused", ref, attrs={"in_use": 0})
        if len(alive) > ALIVE:
            reason = "idle for 3600.0 s, the limit is 3600 s"
            yield _row(process, state, "cleaned_up", alive.popleft(), reason=reason)


def _row(process: str, state: dict[str, Any], type: str, ref: str, **more: Any) -> EventRow:
    state["seq"] += 1
    return EventRow(type, ref, process, state["seq"], time.time(), **more)


class Writer:
    """Appends the life of one process."""

    def __init__(self, process: str) -> None:
        self.process = process
        self._state = {"seq": 0, "made": 0}
        self._life = life(process, self._state)
        self._digest, self._sent = NO_DIGEST, 0

    async def write(self, log: EventLog, count: int) -> None:
        while count > 0:
            batch = []
            for row in (next(self._life) for _ in range(min(count, 500))):
                payload, self._digest = encode(row, self._digest)
                batch.append(payload)
            await log.append_encoded(self.process, self._sent + 1, batch)
            self._sent += len(batch)
            count -= len(batch)


@dataclass(frozen=True)
class Ran:
    """A command that ran: what it printed, how long it took (s), and its largest resident memory (B)."""

    answer: Any
    seconds: float
    memory: int


def run(*command: str) -> Ran:
    """Runs a program, and watches what it takes.

    The system's own account (`ru_maxrss`) would do, but that it begins with what the parent had.
    """
    began, memory = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as printed:
        with subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=printed,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as process:  # fmt: skip
            status = Path(f"/proc/{process.pid}/status")
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
                    memory = int(found[1]) * 1024 if found else memory
                time.sleep(0.005)
        seconds = time.perf_counter() - began
        assert process.returncode == 0
        printed.seek(0)
        return Ran(json.load(printed), seconds, memory)


async def make(namespace: str, url: str) -> None:
    async with connect(url) as store:
        await open_namespace(store, namespace)


async def fold_all(url: str, until: str) -> None:
    """Folds every event from the first up to an entry, without a snapshot, and prints what is alive."""
    async with connect(url) as store:
        log = EventLog(store, NAMESPACE)
        alive = []
        for partition in (await log.namespace()).all_partitions():
            state = FleetState()
            async for page in log.pages(partition, until=until):
                for entry_id, row in page.rows:
                    state.apply(row, ms_of(entry_id))
            alive += [
                [process.id, one.ref, one.created_ms, one.used_ms, one.seq]
                for process in state.processes.values()
                for one in process.resources.values()
            ]
        print(json.dumps(sorted(alive)))


async def write(url: str, archive: Path) -> tuple[int, int]:
    """Writes the log, archives the older part; the times (ms) of its first and its last entry."""
    cli = Cli(url)
    async with connect(url) as store:
        log = EventLog(store, NAMESPACE, partitions=4)
        writers = [Writer(process) for process in PROCESSES]
        bounds = [await store.now_ms()]
        for number in range(ROUNDS):
            await asyncio.gather(*(w.write(log, EVENTS // ROUNDS // len(writers)) for w in writers))
            bounds.append(await store.now_ms())
            if number < ROUNDS - 2:
                done = await asyncio.to_thread(
                    cli.run, "archive", "--to", str(archive), "--keep", "0", "--json", timeout=300
                )
                assert done.returncode == 0, done.stderr
        assert await log.length() == EVENTS
        return bounds[0], bounds[-1]


class TestReplayAt:
    def test_million_events(self, url: str, tmp_path: Path) -> None:
        """At random moments `replay --at` gives what a fold of everything gives, faster, and with memory
        for what was alive, not for what had been."""
        first, last = asyncio.run(write(url, tmp_path / "archive"))
        options = ("-m", "reconciler", "replay", "--url", url, "--json")
        asyncio.run(make("empty", url))
        empty = run(*options, "--namespace", "empty")
        chance = random.Random(time.time_ns())
        print(f"\n{EVENTS:,} events in {(last - first) / 1000:.0f} s; an empty log takes the command "
              f"{empty.seconds:.1f} s and {empty.memory >> 20} MB")  # fmt: skip
        rows = []
        for at in sorted(chance.randint(first + 1000, last) for _ in range(MOMENTS)):
            looked = run(*options, "--namespace", NAMESPACE, "--at", f"{at / 1000:.3f}")
            whole = run("-m", "tests.e2e.test_replay_scale", url, f"{at}-{2**63}")
            alive = sorted(
                [one["process"], one["ref"], one["created_ms"], one["used_ms"], one["seq"]]
                for one in looked.answer["alive"]
            )
            assert alive == whole.answer
            assert looked.memory - empty.memory < MOST_MEMORY
            rows.append((looked, whole))
            print(f"  at {at}, after {looked.answer['events']:9,} events, {len(alive):6,} alive: "
                  f"replay --at {looked.seconds:5.1f} s, {looked.memory >> 20} MB; "
                  f"full fold {whole.seconds:5.1f} s, {whole.memory >> 20} MB")  # fmt: skip
        assert max(looked.seconds for looked, _ in rows) < 60, "seconds, not minutes"
        # Late moments are what a snapshot is for; early ones are near to the beginning anyway.
        late, whole = rows[-1]
        assert late.seconds < whole.seconds


if __name__ == "__main__":
    asyncio.run(fold_all(*sys.argv[1:]))

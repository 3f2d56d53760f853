"""How fast the log is replayed, how much memory a resource takes, and how soon a worker is ready.

Replay is read, decode, fold, in one process, as every command and a starting worker do it. It is held
against the same XRANGE reads alone (a socket and hiredis, nothing decoded, nothing kept), and against
the `eventsourcing` library, which reads as many events from SQLite, decodes them with its own mapper
and folds them into aggregates that keep what this fold keeps of a session: uses, last use, user. All in
one run, turn by turn; what counts are the ratios. The peer gets a virtual environment of its own.

    python benchmarks/replay.py [--quick] [--events N] [--no-peer] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis
import psutil

from reconciler.fold import FleetState
from reconciler.fold_page import fold_page
from reconciler.history import save_snapshot
from reconciler.metrics import Metrics
from reconciler.tail import Tail
from store import EventLog, connect
from store.event import NO_DIGEST, EventRow, encode
from store.lease import Lease, take_lease
from store.namespace import Namespace, open_namespace

ROOT = Path(__file__).resolve().parent.parent
PEER = "eventsourcing==9.4.6"
PAGE = 1000
HOLD = {
    "replay_to_reads": 0.55,
    "replay_to_peer": 4.0,
    "bytes_per_resource": 400,
    "ready_seconds": 5.0,
}


def life(count: int, process: str = "svc@host:1:1") -> Iterator[EventRow]:
    """A chat service: runners, and sessions that are created, used three times and cleaned up."""
    seq, session = 0, 0
    while seq < count:
        if session % 100 == 0:
            seq += 1
            runner = f"runner/{session // 100:08x}"
            yield EventRow("created", runner, process, seq, time.time(), uses=("agent/one",))
        session += 1
        ref = f"session/{session:032x}"
        seq += 1
        yield EventRow(
            "created", ref, process, seq, time.time(), uses=(runner,),
            attrs={"user": f"user-{session % 1000}"},
        )  # fmt: skip
        for _ in range(3):
            seq += 1
            yield EventRow("reused", ref, process, seq, time.time(), attrs={"in_use": 0})
        if session % 10:
            seq += 1
            yield EventRow("cleaned_up", ref, process, seq, time.time(), reason="idle for 3600.0 s")


async def fill(log: EventLog, count: int) -> None:
    digest, batch, first = NO_DIGEST, list[bytes](), 1
    for row in life(count):
        payload, digest = encode(row, digest)
        batch.append(payload)
        if len(batch) == 500:
            await log.append_encoded("svc@host:1:1", first, batch)
            first, batch = first + 500, []
    if batch:
        await log.append_encoded("svc@host:1:1", first, batch)


def reads_alone(path: str, key: str) -> tuple[int, float]:
    """The same pages by XRANGE, over a socket with hiredis, one after the other."""
    count, position = 0, b"0-0"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        reader = hiredis.Reader()
        began = time.perf_counter()
        while True:
            words = [b"XRANGE", key.encode(), b"(" + position, b"+", b"COUNT", str(PAGE).encode()]
            connection.sendall(
                b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)
            )
            while (answer := reader.gets()) is False:
                reader.feed(connection.recv(65536))
            if not answer:
                return count, time.perf_counter() - began
            count += len(answer)
            position = answer[-1][0]


async def replay(log: EventLog) -> tuple[int, float]:
    """Read, decode, fold; no snapshot."""
    state = FleetState()
    began = time.perf_counter()
    async for page in log.pages(0):
        fold_page(state, page.events, page.times)
    return state.events, time.perf_counter() - began


async def ready(namespace: Namespace) -> tuple[float, int]:
    """A worker begins: from snapshot and tail."""
    tail = Tail(EventLog(namespace.store, namespace), Metrics(), lambda *_: None)
    began = time.perf_counter()
    await tail.add([0])
    return time.perf_counter() - began, tail.state.size


def memory(count: int) -> float:
    """Bytes of a worker per session that is alive, folded from what was decoded."""
    from store.event import decode_row

    def payloads() -> Iterator[bytes]:
        for seq in range(1, count + 1):
            ref, runner = f"session/{seq:032x}", f"runner/{seq // 100:08x}"
            attrs: dict[str, Any] = {"user": f"user-{seq % 1000}"}
            row = EventRow("created", ref, "p", seq, 1.5, uses=(runner,), attrs=attrs)
            yield encode(row, NO_DIGEST)[0]

    state, own = FleetState(), psutil.Process()
    gc.collect()
    before = own.memory_info().rss
    for number, payload in enumerate(payloads()):
        state.apply(decode_row(payload), 1_763_733_780_000 + number // 10)
    gc.collect()
    return (own.memory_info().rss - before) / state.size


# --- the peer ---------------------------------------------------------------------------------------

PEER_PROGRAM = """
import os, sys, time, json
os.environ.update(PERSISTENCE_MODULE="eventsourcing.sqlite", SQLITE_DBNAME=sys.argv[1])
from uuid import uuid5, NAMESPACE_URL
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

class Session(Aggregate):
    @event("Created")
    def __init__(self, ref, uses, user):
        self.ref, self.uses, self.user, self.alive, self.in_use = ref, uses, user, True, 0
    @event("Reused")
    def reuse(self, in_use): self.in_use = in_use
    @event("CleanedUp")
    def clean_up(self, reason): self.alive = False
    @staticmethod
    def create_id(ref, uses=None, user=None): return uuid5(NAMESPACE_URL, ref)

app = Application()
events = 0
batch = []
count = int(sys.argv[2])
number = 0
while events < count:
    number += 1
    uses, user = [f"runner/{number // 100:08x}"], f"user-{number % 1000}"
    one = Session(ref=f"session/{number:032x}", uses=uses, user=user)
    for _ in range(3): one.reuse(in_use=0)
    if number % 10: one.clean_up(reason="idle for 3600.0 s")
    events += one.pending_events.__len__()
    batch.append(one)
    if len(batch) == 200:
        app.save(*batch); batch = []
if batch: app.save(*batch)
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    alive, seen, start = {}, 0, 1
    while True:
        page = app.recorder.select_notifications(start=start, limit=1000)
        if not page: break
        for notification in page:
            domain_event = app.mapper.to_domain_event(notification)
            aggregate = domain_event.mutate(alive.get(domain_event.originator_id))
            if aggregate is not None and aggregate.alive: alive[aggregate.id] = aggregate
            else: alive.pop(domain_event.originator_id, None)
            seen += 1
        start = page[-1].id + 1
    print(json.dumps([seen, time.perf_counter() - began]), flush=True)
"""


class Peer:
    """The peer as a child that replays when it is told to."""

    def __init__(self, folder: Path, events: int) -> None:
        home = ROOT / ".venv" / "peers" / "eventsourcing"
        python = home / "bin" / "python"
        if not python.exists():
            print(f"setting up {home.name} (once) …", file=sys.stderr)
            venv.create(home, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
        self.process = subprocess.Popen(
            [python, "-c", PEER_PROGRAM, str(folder / "peer.sqlite"), str(events)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer ended before its time")
        return line

    def replay(self) -> tuple[int, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        count, seconds = json.loads(self._line())
        return count, seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


async def measure(events: int, tail: int, with_peer: bool) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"reads": [], "replay": [], "peer": []}
    with tempfile.TemporaryDirectory(prefix="ar-bench-") as folder:
        async with connect(f"embedded://{folder}") as store:
            namespace = await open_namespace(store, "bench", 1)
            log = EventLog(store, namespace)
            await fill(log, events)
            path = store.redis.connection_pool.connection_kwargs["path"]
            peer = Peer(Path(folder), min(events, 100_000)) if with_peer else None
            for _ in range(5):
                count, seconds = reads_alone(path, namespace.keys.partition(0).log)
                rates["reads"].append(count / seconds)
                count, seconds = await replay(log)
                rates["replay"].append(count / seconds)
                if peer is not None:
                    count, seconds = peer.replay()
                    rates["peer"].append(count / seconds)
            if peer is not None:
                peer.close()
            began, alive = await _snapshot_and_start(namespace, log, events, tail)
    best = {name: max(values) for name, values in rates.items() if values}
    result: dict[str, Any] = {
        "events": events,
        "per_second": {name: round(rate) for name, rate in best.items()},
        "replay_to_reads": best["replay"] / best["reads"],
        "ready_seconds": began,
        "ready_alive": alive,
    }
    if "peer" in best:
        result["replay_to_peer"] = best["replay"] / best["peer"]
    return result


async def _snapshot_and_start(
    namespace: Namespace, log: EventLog, events: int, tail: int
) -> tuple[float, int]:
    state = FleetState()
    async for page in log.pages(0):
        fold_page(state, page.events, page.times)
    lease = await take_lease(namespace, 0, "bench@host:1:1", 60_000)
    assert isinstance(lease, Lease)
    await save_snapshot(namespace, lease, state, (await log.last())[0])
    digest, payloads = NO_DIGEST, []
    for seq in range(1, tail + 1):
        payload, digest = encode(EventRow("created", f"session/t{seq}", "t", seq), digest)
        payloads.append(payload)
    for at in range(0, tail, 500):
        await log.append_encoded("t", at + 1, payloads[at : at + 500])
    return await ready(namespace)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 events instead of 1,000,000")
    parser.add_argument("--events", type=int)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    gc.set_threshold(50_000, 50, 50)  # As the command line does.
    events = options.events or (100_000 if options.quick else 1_000_000)
    result = {"bytes_per_resource": memory(100_000 if options.quick else 1_000_000)}
    result |= asyncio.run(measure(events, 20_000, not options.no_peer))
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            limit = HOLD.get(name)
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            print(f"{name:<20} {shown}" + (f"   (to hold: {limit:g})" if limit else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())

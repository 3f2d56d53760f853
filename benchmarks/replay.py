"""How fast the log is replayed, how much memory a resource takes, and how soon a worker is ready.

Replay is read, decode, fold, on one core: once as the commands do it (`fold_partition`), once as a
starting worker does it (`Tail`, with the drift watch that folds). It is held against the same XRANGE
reads alone (a socket and hiredis, page after page, nothing decoded, nothing kept), and against the
`eventsourcing` library, which reads as many events from SQLite, decodes them with its own mapper and
folds them into aggregates that keep what this fold keeps of a session: uses, last use, user. Turn by
turn in one run; what counts are the ratios of the best turns. Two more are shown for comparison:
`reads_ahead` asks for the next page before it takes the one that came, as replay does; `redis_py` are
the same reads by the asyncio client of redis-py, which parses with hiredis too. `parts` says where the
time of one event goes. Memory is that of a worker: state, watch, agenda, and its copy of the
inventory. The peer gets a virtual environment of its own.

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
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import hiredis
import psutil
import redis.asyncio

from reconciler.fleet import fold_partition
from reconciler.fold import FleetState
from reconciler.fold_page import fold_page
from reconciler.history import save_snapshot
from reconciler.metrics import Metrics
from reconciler.policy import Policy
from reconciler.tail import Tail
from reconciler.watch import Watches
from store import EventLog, connect
from store.connection import Store
from store.event import NO_DIGEST, EventRow, encode
from store.lease import Lease, take_lease
from store.log import START, parse_page
from store.messages import BUCKETS, Bucket, InventoryMirror, Summary, encode_message
from store.namespace import Namespace, open_namespace

ROOT = Path(__file__).resolve().parent.parent
PEER = "eventsourcing==9.4.6"
PAGE = 1000
REPLAYED = 200_000
"""Events of which the rates are taken, however long the history is that a worker starts on."""
TURNS = 9
HOLD = {
    "replay_to_reads": 0.55,
    "worker_to_reads": 0.55,
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
            if first % 50_000 == 1:
                progress(
                    f"writing the history: {first // 1000:,} of {count // 1000:,} thousand events"
                )
    if batch:
        await log.append_encoded("svc@host:1:1", first, batch)


def progress(text: str) -> None:
    """One changing line on a terminal; nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def reads_alone(path: str, key: str, *, ahead: bool = False) -> float:
    """Entries a second by XRANGE, over a socket with hiredis."""
    count, position = 0, b"0-0"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        reader = hiredis.Reader()

        def ask() -> None:
            words = [b"XRANGE", key.encode(), b"(" + position, b"+", b"COUNT", b"%d" % PAGE]
            connection.sendall(
                b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)
            )

        began = time.perf_counter()
        ask()
        while True:
            while (answer := reader.gets()) is False:
                reader.feed(connection.recv(65536))
            if not answer:
                return count / (time.perf_counter() - began)
            position = answer[-1][0]
            if ahead:
                ask()
            count += len(answer)
            if not ahead:
                ask()


async def redis_py(path: str, key: str) -> float:
    """Entries a second by XRANGE of redis-py, as a service on asyncio would read them."""
    count, position = 0, "0-0"
    async with redis.asyncio.Redis(unix_socket_path=path) as client:
        began = time.perf_counter()
        while page := await client.xrange(key, f"({position}", "+", PAGE):
            count += len(page)
            position = page[-1][0].decode()
        return count / (time.perf_counter() - began)


async def replay(log: EventLog) -> float:
    """Events a second as a command reads them: no snapshot, no watch."""
    began = time.perf_counter()
    state = await fold_partition(log, 0)
    return state.events / (time.perf_counter() - began)


async def worker(log: EventLog) -> float:
    """Events a second as a worker reads them that has no snapshot."""
    tail = Tail(log, Metrics(), lambda *_: None, Watches(Policy()).fold_page)
    began = time.perf_counter()
    await tail.add([0])
    return tail.state.events / (time.perf_counter() - began)


async def parts(log: EventLog) -> dict[str, float]:
    """Microseconds for one event: to read it as the log does, to decode it, to fold it."""
    best: dict[str, list[float]] = {"read": [], "decode": [], "fold": []}
    for _ in range(TURNS):
        taken, state, count = dict.fromkeys(best, 0.0), FleetState(), 0
        began = time.process_time()
        async for raw in log.raw_pages(0):
            read = time.process_time()
            page = parse_page(0, raw, START)
            decoded = time.process_time()
            fold_page(state, page.events, page.times)
            folded = time.process_time()
            taken["read"] += read - began
            taken["decode"] += decoded - read
            taken["fold"] += folded - decoded
            began, count = folded, count + len(raw)
        for name, seconds in taken.items():
            best[name].append(seconds / count * 1e6)
    return {name: round(min(values), 3) for name, values in best.items()}


async def ready(namespace: Namespace) -> tuple[float, int]:
    """A worker begins: from snapshot and tail."""
    watches = Watches(Policy())
    tail = Tail(EventLog(namespace.store, namespace), Metrics(), lambda *_: None, watches.fold_page)
    began = time.perf_counter()
    await tail.add([0])
    for process in tail.state.processes.values():
        watches.of(process).drift(process.last_ms)
    return time.perf_counter() - began, tail.state.size


def memory(count: int) -> float:
    """Bytes of a worker per session that is alive, after its first look at all of them.

    The sessions came within an hour, a hundred to a runner, and the process holds them all.
    """
    name = "svc@host:1:1"

    def page(first: int) -> list[tuple[bytes, list[bytes]]]:
        raw = []
        for seq in range(first, first + PAGE):
            ref, runner = f"session/{seq:032x}", f"runner/{seq // 100:08x}"
            attrs: dict[str, Any] = {"user": f"user-{seq % 1000}"}
            row = EventRow("created", ref, name, seq, 1.5, uses=(runner,), attrs=attrs)
            at_ms = 1_763_733_780_000 + seq * 3_600_000 // count
            raw.append((b"%d-0" % at_ms, [b"e", encode(row, NO_DIGEST)[0]]))
        return raw

    state, watches, own = FleetState(), Watches(Policy()), psutil.Process()
    parse_page(0, page(1), START)
    refs: list[list[str]] = [[] for _ in range(BUCKETS)]
    for seq in range(1, count + 1):
        refs[crc32(b"%d" % seq) % BUCKETS].append(f"session/{seq:032x}")
    published = [encode_message(Bucket(held, [])) for held in refs]
    del refs
    gc.collect()
    before = own.memory_info().rss
    for first in range(1, count + 1, PAGE):
        read = parse_page(0, page(first), START)
        watches.fold_page(state, read.events, read.times)
        progress(f"memory: {first // 1000:,} of {count // 1000:,} thousand resources")
    mirror, watch = InventoryMirror(name), watches.of(state.processes[name])
    # Copies, as what comes from a socket is.
    buckets = {str(n): ("digest", bytes(bytearray(text))) for n, text in enumerate(published)}
    watch.inventory_changed(mirror.update(Summary(name, count, ("session",)), "", buckets))
    drift = watch.drift(read.times[-1])
    assert not drift.orphans
    assert not drift.ghosts
    del read, drift, buckets
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
    with tempfile.TemporaryDirectory(prefix="ar-bench-") as folder:
        async with connect(f"embedded://{folder}") as store:
            # Nothing here is about what survives the end of the server.
            await store.redis.config_set("appendonly", "no")
            await store.redis.config_set("save", "")
            short = await open_namespace(store, "short", 1)
            log = EventLog(store, short)
            replayed = min(events, REPLAYED)
            await fill(log, replayed)
            peer = Peer(Path(folder), min(replayed, 100_000)) if with_peer else None
            best = await _turns(store, log, short.keys.partition(0).log, peer)
            if peer is not None:
                peer.close()
            of_one_event = await parts(log)
            long, state = short, await fold_partition(log, 0)
            if events > replayed:
                long = await open_namespace(store, "long", 1)
                await fill(EventLog(store, long), events)
                state = await fold_partition(EventLog(store, long), 0, progress=_folded(events))
            began, alive = await _snapshot_and_start(long, state, tail)
            progress("")
    result: dict[str, Any] = {
        "events": events,
        "per_second": {name: round(rate) for name, rate in best.items()},
        "parts": of_one_event,
        "replay_to_reads": best["replay"] / best["reads"],
        "worker_to_reads": best["worker"] / best["reads"],
        "replay_to_reads_ahead": best["replay"] / best["reads_ahead"],
        "replay_to_redis_py": best["replay"] / best["redis_py"],
        "ready_seconds": began,
        "ready_alive": alive,
    }
    if "peer" in best:
        result["replay_to_peer"] = best["replay"] / best["peer"]
    return result


async def _turns(store: Store, log: EventLog, key: str, peer: Peer | None) -> dict[str, float]:
    """The best rate of each contender, in events a second."""
    path = store.redis.connection_pool.connection_kwargs["path"]

    async def reads(ahead: bool) -> float:
        return reads_alone(path, key, ahead=ahead)

    async def of_peer(peer: Peer) -> float:
        count, seconds = peer.replay()
        return count / seconds

    contenders: dict[str, Callable[[], Awaitable[float]]] = {
        "reads": lambda: reads(False),
        "reads_ahead": lambda: reads(True),
        "redis_py": lambda: redis_py(path, key),
        "replay": lambda: replay(log),
        "worker": lambda: worker(log),
    }
    if peer is not None:
        contenders["peer"] = lambda: of_peer(peer)
    best = dict.fromkeys(contenders, 0.0)
    for turn in range(TURNS):
        for name, run in contenders.items():
            progress(f"turn {turn + 1} of {TURNS}: {name}")
            best[name] = max(best[name], await run())
    return best


def _folded(events: int) -> Callable[[int], None]:
    done = 0

    def show(count: int) -> None:
        nonlocal done
        done += count
        progress(
            f"folding for the snapshot: {done // 1000:,} of {events // 1000:,} thousand events"
        )

    return show


async def _snapshot_and_start(
    namespace: Namespace, state: FleetState, tail: int
) -> tuple[float, int]:
    log = EventLog(namespace.store, namespace)
    lease = await take_lease(namespace, 0, "bench@host:1:1", 60_000)
    assert isinstance(lease, Lease)
    await save_snapshot(namespace, lease, state, (await log.last())[0])
    digest, payloads = NO_DIGEST, []
    for seq in range(1, tail + 1):
        payload, digest = encode(EventRow("created", f"session/t{seq}", "t", seq), digest)
        payloads.append(payload)
    for at in range(0, tail, 500):
        await log.append_encoded("t", at + 1, payloads[at : at + 500])
    state.processes.clear()
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
    result = {"bytes_per_resource": memory(200_000 if options.quick else 1_000_000)}
    result |= asyncio.run(measure(events, 20_000, not options.no_peer))
    if options.json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        limit = HOLD.get(name)
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        print(f"{name:<22} {shown}" + (f"   (to hold: {limit:g})" if limit else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What one partition carries, what it costs the server, and how leases and passes grow with the fleet.

Each figure stands beside a physical limit of the same run: appending beside a blast of plain XADDs that
are packed already, reading and folding beside the same XRANGEs parsed by hiredis alone. What a node of
a cluster carries is the server's own processor time per operation; a redis-server has one thread.

    python benchmarks/partition.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters import Host  # noqa: E402
from reconciler import Policy, Reconciler  # noqa: E402
from reconciler.leases import Leases  # noqa: E402
from reconciler.metrics import Metrics  # noqa: E402
from reconciler.tail import Tail  # noqa: E402
from store import EventLog, Store, connect  # noqa: E402
from store.channel import HostChannel, WorkerChannel  # noqa: E402
from store.event import NO_DIGEST, EventRow, encode, process_id  # noqa: E402
from store.inventories import InventoryReader  # noqa: E402
from store.lease import Lease, take_lease  # noqa: E402
from store.log import PAGE, START  # noqa: E402
from store.messages import Action, Order, Summary  # noqa: E402
from store.namespace import Namespace, open_namespace  # noqa: E402
from tests.redis_processes import RedisCluster, running  # noqa: E402

BATCH = 500
ON_THE_WAY = 2
"""Batches on their way at once, for ours and for the limit."""

Figures = dict[str, dict[str, float]]


def payloads(process: str, count: int) -> list[bytes]:
    """Events of a chat service, as they stand in the log."""
    digest, made = NO_DIGEST, []
    for number in range(count):
        row = EventRow(
            ("created", "reused", "reused", "cleaned_up")[number % 4], f"session/s{number // 4}",
            process, number + 1, time.time(), None, (f"runner/r{number % 50}",),
        )  # fmt: skip
        payload, digest = encode(row, digest)
        made.append(payload)
    return made


async def server_cpu(store: Store) -> float:
    """Seconds of processor time that the server has used; in a cluster, all masters together."""
    if not store.is_cluster:
        infos = [await store.redis.info("cpu")]
    else:
        infos = [
            await store.redis.execute_command("INFO", "cpu", target_nodes=node)
            for node in store.redis.get_primaries()
        ]
    return sum(float(info["used_cpu_user"]) + float(info["used_cpu_sys"]) for info in infos)


async def timed(store: Store, count: int, work: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Runs work of `count` operations: rate, and processor time of server and client for each."""
    cpu, own, began = await server_cpu(store), time.process_time(), time.perf_counter()
    await work()
    took = time.perf_counter() - began
    return {
        "per_second": count / took,
        "server_us": (await server_cpu(store) - cpu) / count * 1e6,
        "client_us": (time.process_time() - own) / count * 1e6,
    }


async def xadd_limit(store: Store, events: list[bytes]) -> dict[str, float]:
    """XADDs that are packed beforehand, sent in batches over a raw socket; only the replies are counted."""
    socket = Path(store.redis.connection_pool.connection_kwargs["path"])
    batches = []
    for begin in range(0, len(events), BATCH):
        some = events[begin : begin + BATCH]
        batches.append(
            (len(some), b"".join(
                b"*5\r\n$4\r\nXADD\r\n$5\r\nlimit\r\n$1\r\n*\r\n$1\r\ne\r\n$%d\r\n%b\r\n" % (len(e), e)
                for e in some
            ))
        )  # fmt: skip

    async def send() -> None:
        reader, writer = await asyncio.open_unix_connection(str(socket))
        for _, packed in batches[:ON_THE_WAY]:
            writer.write(packed)
        for number, (count, _) in enumerate(batches):
            for _ in range(2 * count):
                await reader.readline()
            if number + ON_THE_WAY < len(batches):
                writer.write(batches[number + ON_THE_WAY][1])
        writer.close()

    return await timed(store, len(events), send)


async def append(log: EventLog, process: str, events: list[bytes]) -> dict[str, float]:
    """Through EventLog, in batches of one process, as a host's outbox drains."""

    async def send() -> None:
        for begin in range(0, len(events), BATCH):
            await log.append_encoded(process, begin + 1, events[begin : begin + BATCH])

    return await timed(log._store, len(events), send)


async def append_many(space: Namespace, hosts: int, each: int) -> dict[str, float]:
    """Many hosts of one partition at once, each with small batches: ten events a call."""
    log = EventLog(space.store, space)
    work = {f"many@h:{n}:{n}": payloads(f"many@h:{n}:{n}", each) for n in range(hosts)}

    async def one(process: str, events: list[bytes]) -> None:
        for begin in range(0, len(events), 10):
            await log.append_encoded(process, begin + 1, events[begin : begin + 10])

    return await timed(
        space.store, hosts * each,
        lambda: asyncio.gather(*(one(p, events) for p, events in work.items())),
    )  # fmt: skip


async def read_limit(store: Store, key: str, count: int) -> dict[str, float]:
    """The same XRANGEs, parsed by hiredis and thrown away."""

    async def read() -> None:
        after = START
        while raw := await store.redis.execute_command(
            "XRANGE", key, f"({after}", "+", "COUNT", PAGE
        ):
            after = raw[-1][0].decode()

    return await timed(store, count, read)


async def fold(log: EventLog, partition: int, count: int) -> dict[str, float]:
    """As a worker does when it takes a partition: read, decode, fold."""
    tail = Tail(log, Metrics(), lambda *_: None)
    figures = await timed(log._store, count, lambda: tail.add([partition]))
    assert tail.state.events == count
    return figures


async def orders(space: Namespace, process: str, count: int, at_once: int) -> dict[str, float]:
    """Orders with the events that announce them, written under a lease, `at_once` in a write."""
    lease = await take_lease(space, space.partition_of(process), "bench", 600_000)
    assert isinstance(lease, Lease)
    channel = WorkerChannel(space, lease, process_id("bench"))

    async def send() -> None:
        for begin in range(0, count, at_once):
            refs = [f"session/s{n}" for n in range(begin, begin + at_once)]
            events = [
                EventRow("cleanup_requested", ref, "", 0, time.time(), process, reason="idle")
                for ref in refs
            ]
            sent = [Order(f"o-{ref}", process, Action.TEARDOWN, ref, seq=1) for ref in refs]
            await channel.write(events, sent)

    figures = await timed(space.store, count, send)
    await space.store.redis.delete(space.keys.partition(lease.partition).lease)
    return figures


async def teardowns(store: Store, count: int) -> dict[str, float]:
    """From orphans to empty registries: a host and a reconciler, through Redis, in this one process."""
    async with Host.connect(store, name="bench", namespace="loop", partitions=1) as host:
        sessions = host.registry("session")
        for number in range(count):
            sessions[f"s{number}"] = object()
        await asyncio.sleep(1.5)  # They are idle long enough now: all become orphans at once.
        policy = Policy(session_idle_timeout=1)

        async def reconcile() -> None:
            async with Reconciler(store, namespace="loop", policy=policy):
                while sessions:
                    await asyncio.sleep(0.005)

        return await timed(store, count, reconcile)


async def lease_round(store: Store, partitions: int, times: int) -> dict[str, float]:
    """One look at all leases of a worker that holds every partition; per partition."""
    space = await open_namespace(store, f"leases-{partitions}", partitions)
    leases = Leases(space, "bench", 60)
    await leases.look()

    async def look() -> None:
        for _ in range(times):
            await leases.look()

    figures = await timed(store, times * partitions, look)
    await leases.leave()
    return figures


async def quiet_hosts(space: Namespace, hosts: int) -> dict[str, dict[str, float]]:
    """What hosts cost that do nothing: the heartbeat with its summary, and a pass over their inventories."""
    channels = [HostChannel(space, f"quiet@h:{n}:{n}") for n in range(hosts)]
    digests = {str(bucket): "0123456789abcdef" for bucket in range(20)}

    async def beat() -> None:
        for n, channel in enumerate(channels):
            await channel.beat(15_000)
            await channel.publish(Summary(f"quiet@h:{n}:{n}", 1, digests), "", {})

    reader = InventoryReader(space)

    async def read() -> None:
        for n in range(hosts):
            await reader.read(f"quiet@h:{n}:{n}")

    beats = await timed(space.store, hosts, beat)
    await read()
    before = reader.bytes_moved
    passes = await timed(space.store, hosts, read)
    passes["bytes"] = (reader.bytes_moved - before) / hosts
    return {"heartbeat and summary of a quiet host": beats, "its inventory in a pass": passes}


async def on_a_cluster(count: int) -> Figures:
    """Sixteen partitions on three masters, each with a replica; all on this machine."""
    with (
        tempfile.TemporaryDirectory(prefix="ar-b-") as folder,
        running(RedisCluster(Path(folder))) as cluster,
    ):
        async with connect(cluster.url) as store:
            space = await open_namespace(store, "cluster")
            log = EventLog(store, space)
            work: dict[int, tuple[str, list[bytes]]] = {}
            for number in range(10_000):
                process = f"cluster@h:{number}:{number}"
                if (partition := space.partition_of(process)) not in work:
                    work[partition] = process, payloads(process, count // 16)

            async def send(process: str, events: list[bytes]) -> None:
                for begin in range(0, len(events), BATCH):
                    await log.append_encoded(process, begin + 1, events[begin : begin + BATCH])

            return {
                "3 masters, 16 partitions: append": await timed(
                    store, count // 16 * 16,
                    lambda: asyncio.gather(*(send(p, events) for p, events in work.values())),
                ),
                "3 masters: lease round, 16 partitions, each": await lease_round(store, 16, 100),
            }  # fmt: skip


@contextlib.asynccontextmanager
async def fresh() -> AsyncIterator[Store]:
    with tempfile.TemporaryDirectory(prefix="ar-b-") as folder:
        async with connect(f"embedded://{folder}") as store:
            yield store


async def measure(count: int) -> Figures:
    figures: Figures = {}
    async with fresh() as store:
        process = "bench@h:1:1"
        events = payloads(process, count)
        rounds = []
        for number in range(3):  # Turn by turn: what else runs on the machine hits both.
            space = await open_namespace(store, f"one-{number}", 1)
            log = EventLog(store, space)
            limit = await xadd_limit(store, events)
            await store.redis.delete("limit")
            ours = await append(log, process, events)
            key = space.keys.partition(0).log
            reading = await read_limit(store, key, count)
            folding = await fold(log, 0, count)
            rounds.append((limit, ours, reading, folding))
            if number < 2:
                await store.redis.delete(key)
        names = (
            "XADD, packed beforehand: the limit", "append, batches of 500",
            "XRANGE with hiredis alone: the limit", "read, decode, fold",
        )  # fmt: skip
        for name, runs in zip(names, zip(*rounds, strict=True), strict=True):
            figures[name] = {key: median(run[key] for run in runs) for key in runs[0]}
        info = await store.redis.memory_usage(space.keys.partition(0).log, samples=0)
        figures["memory of an event in the log, bytes"] = {"bytes": info / count}
        space = await open_namespace(store, "more", 1)
        figures["append, 100 hosts, batches of 10"] = await append_many(space, 100, count // 200)
        for at_once in (1, 50):
            figures[f"orders, {at_once} in a write"] = await orders(
                space, process, count // 40 * at_once // (at_once // 10 or 1), at_once
            )
        figures["orphan to teardown, host and worker on one core"] = await teardowns(
            store, count // 20
        )
        for partitions in (16, 256, 4096):
            figures[f"lease round, {partitions} partitions, each"] = await lease_round(
                store, partitions, max(1, 2000 // partitions)
            )
        figures |= await quiet_hosts(space, count // 100)
    return figures | await on_a_cluster(count)


def ratios(figures: Figures) -> dict[str, float]:
    def rate(name: str) -> float:
        return figures[name]["per_second"]

    return {
        "append against packed XADD": rate("append, batches of 500")
        / rate("XADD, packed beforehand: the limit"),
        "read, decode, fold against XRANGE alone": rate("read, decode, fold")
        / rate("XRANGE with hiredis alone: the limit"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tenth of the events")
    parser.add_argument("--json", action="store_true", help="one object, for machines")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    figures = asyncio.run(measure(20_000 if options.quick else 200_000))
    if options.json:
        print(json.dumps({"figures": figures, "ratios": ratios(figures)}))
        return 0
    print(f"{'':<52}{'per second':>12}{'server us':>12}{'client us':>12}{'bytes':>12}")
    for name, row in figures.items():
        cells = [f"{row['per_second']:,.0f}" if "per_second" in row else ""]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("server_us", "client_us")]
        cells += [f"{row['bytes']:.0f}" if "bytes" in row else ""]
        print(f"{name:<52}" + "".join(f"{cell:>12}" for cell in cells))
    print("\nratios, each within this run")
    for name, ratio in ratios(figures).items():
        print(f"  {name:<50}{ratio:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

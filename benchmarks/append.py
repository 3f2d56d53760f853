"""What it costs to record an event, and how fast events reach the log, against pipelined XADD.

All in one run on one redis-server of its own, on the same payloads, turn by turn; what counts are the
ratios. The peers are redis-py pipelines of XADD, synchronous and asyncio, with the batch size of the
host, each run encoding its payloads as the host has to. Two numbers must hold: `Host.record` with group
commit is 3 times as fast as the asyncio pipeline (what a service on asyncio would use; the synchronous
one, which would stop it, is shown beside it), and takes 5 microseconds from its caller (median).

    python benchmarks/append.py [--events N] [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

import redis
import redis.asyncio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters import Host  # noqa: E402
from adapters.outbox import BATCH  # noqa: E402
from store import EventLog, connect  # noqa: E402
from store.connection import Store  # noqa: E402
from store.embedded import socket_of  # noqa: E402
from store.event import NO_DIGEST, EventRow, encode  # noqa: E402

RATIO, MICROSECONDS = 3.0, 5.0
TURN = 100
"""Events recorded in one tick of the event loop."""


def payloads(count: int) -> list[bytes]:
    """The bytes that a host sends for the same events."""
    made, digest = [], NO_DIGEST
    for seq in range(1, count + 1):
        row = EventRow(
            "reused", f"session/s{seq % 100}", "bench@localhost:1:1795000000000", seq, time.time(),
            uses=(f"runner/r{seq % 10}",), attrs={"in_use": 1},
        )  # fmt: skip
        payload, digest = encode(row, digest)
        made.append(payload)
    return made


async def by_host(store: Store, count: int) -> float:
    """Events a second through `Host.record`, from the first call to the last acknowledgement."""
    async with Host.connect(store, name="bench", namespace="bench", outbox_limit=count + 1) as host:
        start = time.perf_counter()
        for number in range(count):
            host.record(
                "reused", f"session/s{number % 100}",
                uses=(f"runner/r{number % 10}",), attrs={"in_use": 1},
            )  # fmt: skip
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
        while len(host.recorder):
            await asyncio.sleep(0.001)
        took = time.perf_counter() - start
        if await EventLog(store, "bench").last_seq(host.process) != host.recorder.seq:
            raise SystemExit("events are missing in the log")
        return count / took


async def by_pipeline(socket: Path, count: int) -> float:
    """Events a second through an asyncio pipeline of XADD."""
    async with redis.asyncio.Redis(unix_socket_path=str(socket)) as client:
        start = time.perf_counter()
        made = payloads(count)
        for first in range(0, count, BATCH):
            pipe = client.pipeline(transaction=False)
            for payload in made[first : first + BATCH]:
                pipe.xadd("bench:async", {"e": payload})
            await pipe.execute()
        took = time.perf_counter() - start
        await client.delete("bench:async")
        return count / took


def by_sync_pipeline(socket: Path, count: int) -> float:
    """Events a second through a synchronous pipeline of XADD."""
    with redis.Redis(unix_socket_path=str(socket)) as client:
        start = time.perf_counter()
        made = payloads(count)
        for first in range(0, count, BATCH):
            pipe = client.pipeline(transaction=False)
            for payload in made[first : first + BATCH]:
                pipe.xadd("bench:sync", {"e": payload})
            pipe.execute()
        took = time.perf_counter() - start
        client.delete("bench:sync")
        return count / took


async def record_times(store: Store, count: int) -> list[float]:
    """Microseconds that each `Host.record` took from its caller, while the sender works."""
    async with Host.connect(store, name="timed", namespace="bench", outbox_limit=count + 1) as host:
        host.record("created", "session/s")
        took = []
        for number in range(count):
            start = time.perf_counter_ns()
            host.record("reused", "session/s", attrs={"in_use": 1})
            took.append((time.perf_counter_ns() - start) / 1000)
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
        return took


async def measure(events: int, rounds: int) -> dict[str, float]:
    """All contenders, turn by turn; medians over the rounds."""
    with tempfile.TemporaryDirectory(prefix="ar-") as folder:
        async with connect(f"embedded://{folder}") as store:
            socket = socket_of(Path(folder))

            async def sync() -> float:
                return by_sync_pipeline(socket, events)

            contenders: dict[str, Callable[[], Awaitable[float]]] = {
                "host": lambda: by_host(store, events),
                "pipeline": lambda: by_pipeline(socket, events),
                "sync_pipeline": sync,
            }
            rates: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(rounds):
                for name, run in contenders.items():
                    progress(f"round {turn + 1} of {rounds}: {name}")
                    rates[name].append(await run())
            progress("record, call by call")
            took = sorted(await record_times(store, events))
            progress("")
    found = {f"{name}_per_second": round(median(rate)) for name, rate in rates.items()}
    host = rates["host"]
    found["ratio_to_pipeline"] = median(a / b for a, b in zip(host, rates["pipeline"], strict=True))
    found["ratio_to_sync_pipeline"] = median(
        a / b for a, b in zip(host, rates["sync_pipeline"], strict=True)
    )
    found["record_median_us"] = took[len(took) // 2]
    found["record_p99_us"] = took[len(took) * 99 // 100]
    return found


def progress(text: str) -> None:
    """One changing line on a terminal; nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(measure(options.events, options.rounds))
    held = {
        f"at least {RATIO:g} x pipelined XADD (asyncio)": found["ratio_to_pipeline"] >= RATIO,
        f"record takes at most {MICROSECONDS:g} us (median)": found["record_median_us"]
        <= MICROSECONDS,
    }
    if options.json:
        print(json.dumps({**found, "held": all(held.values())}))
    else:
        for name, value in found.items():
            print(f"{name:28} {value:>12,.2f}")
        for name, holds in held.items():
            print(f"{'holds' if holds else 'MISSED':8} {name}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

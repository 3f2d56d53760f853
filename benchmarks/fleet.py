"""A pass over a fleet in sync: bytes moved and seconds, against the size of the fleet and of the drift.

    python benchmarks/fleet.py [--processes 100] [--resources 1000000]

Real hosts with real registries record everything into a real Redis; a reconciler follows. Then single
passes are measured: with nothing to do, and with 1, 100 and 1,000 stale index entries. To hold: a
pass over 1,000,000 resources in sync moves less than 1 MB, and seconds grow with the drift.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass, field

from adapters import Host, Index
from reconciler import Policy, Reconciler
from store import Store, connect

BOUND = 1_000_000
DRIFTS = (0, 1, 100, 1000)


@dataclass
class Pass:
    """One measured pass."""

    drift: int
    seconds: float
    bytes_moved: int


@dataclass
class Report:
    """What one run gave; sizes in bytes, times in seconds."""

    resources: int
    processes: int
    first_bytes: int = 0
    first_seconds: float = 0.0
    full_look_seconds: float = 0.0
    passes: list[Pass] = field(default_factory=list)

    def lines(self) -> list[str]:
        head = f"{self.resources:,} resources in {self.processes} processes"
        first = f"  first reading      {self.first_bytes:>12,} bytes  {self.first_seconds:8.3f} s"
        full = f"  a look at all      {'':>12}        {self.full_look_seconds:8.3f} s"
        return [head, first, full] + [
            f"  pass, drift {p.drift:>5}  {p.bytes_moved:>12,} bytes  {p.seconds:8.4f} s"
            for p in self.passes
        ]


async def measure(store: Store, processes: int, resources: int) -> Report:
    """Builds the fleet and measures; see the module."""
    report = Report(resources, processes)
    each = resources // processes
    hosts: list[Host] = []
    indexes: list[Index] = []
    try:
        for number in range(processes):
            _progress(f"host {number + 1} of {processes}")
            host = await Host.connect(store, name=f"host-{number}", lease_seconds=600)
            hosts.append(host)
            registry = host.registry("session", teardown=lambda id, obj: None)
            indexes.append(host.index("stale", "session"))
            for n in range(each):
                registry[f"{number}-{n}"] = host
                if n % 1000 == 999:
                    await asyncio.sleep(0)
            while len(host.recorder) or host.unpublished:
                await asyncio.sleep(0.01)
        _progress("the reconciler reads the log")
        reconciler = await Reconciler(
            store, policy=Policy(session_idle_timeout="off"), lease_seconds=600
        ).open()
        await reconciler.keep_leases()
        names = [host.process for host in hosts]
        await _pass(reconciler, names, report, 0)
        first = report.passes.pop()
        report.first_bytes, report.first_seconds = first.bytes_moved, first.seconds
        began = time.perf_counter()
        reconciler.outlook.look_at_everything(names)
        report.full_look_seconds = time.perf_counter() - began
        for drift in DRIFTS:
            for n in range(drift):
                indexes[n % processes][f"k{n}"] = f"never-{n}"
            while any(host.unpublished or len(host.recorder) for host in hosts):
                await asyncio.sleep(0.01)
            _progress(f"pass with drift {drift}")
            await _pass(reconciler, names, report, drift)
            while any(indexes):
                await asyncio.sleep(0.01)
            await reconciler.run_pass(names)
        await reconciler.release()
    finally:
        for host in hosts:
            await host.close()
    return report


async def _pass(reconciler: Reconciler, names: list[str], report: Report, drift: int) -> None:
    await reconciler.tail.catch_up()
    before = reconciler.outlook.inventories.bytes_moved
    reconciler.hear_of(names)
    began = time.perf_counter()
    plan = await reconciler.run_pass(names)
    seconds = time.perf_counter() - began
    assert len(plan.due) == drift, f"{len(plan.due)} steps for a drift of {drift}"
    moved = reconciler.outlook.inventories.bytes_moved - before
    report.passes.append(Pass(drift, seconds, moved))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


async def main() -> int:
    parser = argparse.ArgumentParser(description="A pass over a fleet in sync.")
    parser.add_argument("--processes", type=int, default=100)
    parser.add_argument("--resources", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ar-fleet-") as folder:
        async with connect(f"embedded://{folder}") as store:
            report = await measure(store, options.processes, options.resources)
    _progress("")
    print("\n".join(report.lines()))
    in_sync = report.passes[0].bytes_moved
    held = in_sync < BOUND
    print(f"in sync: {in_sync:,} bytes, to hold: below {BOUND:,}: {'held' if held else 'NOT HELD'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

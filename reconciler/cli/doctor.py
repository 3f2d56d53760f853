"""`agent-reconciler doctor`: checks a deployment, and says what to do about what it finds."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import console, emit, reading, table
from reconciler.doctor import CHECKS, Clock, Facts, Finding, diagnose
from reconciler.fleet import Fleet, read_fleet
from reconciler.stuck import find_stuck
from store.connection import Store
from store.conversations import count_conversations
from store.inventories import InventoryReader
from store.log import EventLog
from store.namespace import Namespace
from store.retention import read_retention

_CLOCK_EVENTS = 500
"""Latest events of a partition that tell of clocks."""
_LOOK_AGAIN_SECONDS = 1.0


@click.command(short_help="Check a deployment.")
@common
def doctor(url: str, namespace: str, as_json: bool) -> int:
    """Check a deployment. Status 0 sound, 1 something was found, 2 it could not run."""
    findings = asyncio.run(_examine(url, namespace))
    if as_json:
        emit(
            {
                "sound": not findings,
                "checked": list(CHECKS),
                "findings": [{"check": f.check, "what": f.what, "do": f.do} for f in findings],
            }
        )
    else:
        _show(findings)
    return int(bool(findings))


async def _examine(url: str, name: str) -> list[Finding]:
    async with opened(url, name) as (store, namespace):
        with reading(await EventLog(store, namespace).length()) as tell:
            fleet = await read_fleet(store, namespace, progress=tell)
        return diagnose(await look_up(store, namespace, fleet))


async def look_up(store: Store, namespace: Namespace, fleet: Fleet) -> Facts:
    """Everything that the checks need to know."""
    keys = namespace.keys
    recorded = await store.redis.exists(keys.policy)
    partitions, lapsed = await _leases(namespace, fleet.now_ms)
    retention = fleet.policy.session_retention
    counted = await count_conversations(
        namespace, None if retention is None else round(retention * 1000), fleet.now_ms
    )
    return Facts(
        now_ms=fleet.now_ms,
        policy=fleet.policy if recorded else None,
        workers=fleet.workers,
        partitions=partitions,
        processes={process: namespace.partition_of(process) for process in fleet.state.processes},
        lapsed=lapsed,
        servers=await _servers(store),
        nodes_away=await _nodes_away(store),
        clocks=await _clocks(namespace),
        stuck=list(find_stuck(fleet.state.processes.values(), fleet.policy)),
        quarantined=fleet.quarantined,
        outboxes=await _outboxes(namespace, fleet),
        # Hosts of other versions say more, or less, of their outbox.
        spilled={p: getattr(s, "spilled", 0) for p, s in fleet.summaries.items()},
        dropped={p: getattr(s, "dropped", 0) for p, s in fleet.summaries.items()},
        archive=(await read_retention(namespace)).archive,
        conversations=counted.kept,
        overdue=counted.overdue,
        overdue_ms=counted.oldest_ms,
    )


async def _leases(
    namespace: Namespace, now_ms: int
) -> tuple[dict[int, str | None], dict[str, float]]:
    """Who holds each partition, and which host processes have a lease that lapsed."""
    redis = namespace.store.redis
    partitions: dict[int, str | None] = {}
    lapsed: dict[str, float] = {}
    for partition in namespace.all_partitions():
        keys = namespace.keys.partition(partition)
        lease = await redis.get(keys.lease)
        partitions[partition] = None if lease is None else lease.decode().rpartition(" ")[0]
        for process, at in await redis.zrangebyscore(keys.hosts, "-inf", now_ms, withscores=True):
            lapsed[process.decode()] = now_ms - at
    return partitions, lapsed


async def _servers(store: Store) -> dict[str, Any]:
    """INFO of each server that is written to."""
    found = await store.infos()
    return found if store.is_cluster else {"Redis": found[store.url]}


async def _nodes_away(store: Store) -> list[str]:
    """Nodes of a cluster that the others cannot reach, with their part."""
    if not store.is_cluster:
        return []
    nodes = await store.redis.cluster_nodes()
    flags = {address: set(node["flags"].split(",")) for address, node in nodes.items()}
    return [
        f"{address} (a {'master' if 'master' in its else 'replica'})"
        for address, its in flags.items()
        if its & {"fail", "fail?", "noaddr"}
    ]


async def _clocks(namespace: Namespace) -> list[Clock]:
    """What the latest events say of the clocks of their writers."""
    ahead: dict[str, list[float]] = defaultdict(list)
    for partition in namespace.all_partitions():
        key = namespace.keys.partition(partition).log
        async for at_ms, process, host_ms in _latest(namespace, key):
            ahead[process].append(host_ms - at_ms)
    return [Clock(process, max(values), len(values)) for process, values in ahead.items()]


async def _latest(namespace: Namespace, key: str) -> Any:
    answer = await namespace.store.redis.xrevrange(key, count=_CLOCK_EVENTS)
    for entry_id, fields in answer:
        try:
            event = json.loads(fields[1])
            yield int(entry_id.split(b"-")[0]), str(event["process"]), float(event["at"]) * 1000
        except (ValueError, KeyError, TypeError, IndexError):
            continue  # Not an event, or of a writer that does not tell the time.


async def _outboxes(namespace: Namespace, fleet: Fleet) -> dict[str, tuple[int, int]]:
    """Events waiting in each host at two looks; one look is enough where nothing waits."""
    first = {process: summary.outbox for process, summary in fleet.summaries.items()}
    if not any(first.values()):
        return {process: (count, count) for process, count in first.items()}
    await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    reader = InventoryReader(namespace)
    both: dict[str, tuple[int, int]] = {}
    for process, count in first.items():
        await reader.update(process)
        summary = reader.summary(process)
        both[process] = (count, summary.outbox if summary is not None else 0)
    return both


def _show(findings: list[Finding]) -> None:
    out = console()
    if not findings:
        out.print(f"sound: {', '.join(CHECKS)}")
        return
    rows = [(finding.check, finding.what, finding.do) for finding in findings]
    title = f"{len(findings)} {'finding' if len(findings) == 1 else 'findings'}"
    out.print(table(title, ["check", "what is wrong", "what to do"], rows))

"""What a running reconciler does by the clock, beside what it does when something happens.

In a worker process and in a service that embeds the reconciler alike: a log that nobody takes snapshots
of, archives and trims would be one more thing that only grows. A look that takes longer than its period
is not begun a second time; whatever fails is said, counted, and tried again at the next.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from store.refusals import Unavailable

if TYPE_CHECKING:
    from reconciler.reconciler import Reconciler

log = structlog.get_logger("reconciler.schedule")

FULL_PASS_SECONDS = 30.0
ARCHIVE_SECONDS = 300.0
SNAPSHOT_CHECK_SECONDS = 5.0
RETENTION_CHECK_SECONDS = 15.0
HEARTBEAT_SECONDS = 2.0
WORKER_FORGOTTEN_SECONDS = 60.0


@asynccontextmanager
async def by_the_clock(
    reconciler: Reconciler, *, full_pass_seconds: float, archive_seconds: float
) -> AsyncIterator[None]:
    """Runs the schedule of a reconciler for as long as this lasts.

    Args:
        reconciler: open.
        full_pass_seconds: how often every process is looked at although nothing was heard.
        archive_seconds: how often what is older than it is kept is archived and trimmed.
    """
    keeping = reconciler.housekeeping
    schedule = AsyncIOScheduler(timezone="UTC")
    schedule.add_job(reconciler.full_pass, "interval", seconds=full_pass_seconds)
    schedule.add_job(_beat, "interval", seconds=HEARTBEAT_SECONDS, args=[reconciler])
    schedule.add_job(keeping.snapshots, "interval", seconds=SNAPSHOT_CHECK_SECONDS)
    schedule.add_job(keeping.archive, "interval", seconds=archive_seconds)
    # Archiving may take longer than that; the next call then finds it at work.
    schedule.add_job(
        reconciler.retention.look, "interval", seconds=RETENTION_CHECK_SECONDS, max_instances=2
    )
    schedule.start()
    try:
        yield
    finally:
        schedule.shutdown(wait=False)
        space = reconciler.namespace
        with contextlib.suppress(*Unavailable):
            await space.store.redis.hdel(space.keys.workers, reconciler.process)


async def _beat(reconciler: Reconciler) -> None:
    """Says in the namespace that the worker is there, and forgets workers that were not for long."""
    redis, key = reconciler.namespace.store.redis, reconciler.namespace.keys.workers
    now = reconciler.now_ms()
    beat = {
        "at_ms": now,
        "partitions": reconciler.partitions,
        "processes": len(reconciler.tail.state.processes),
        "lag_seconds": reconciler.lag_seconds(),
        "ready": not reconciler.unready(),
    }
    try:
        await redis.hset(key, reconciler.process, json.dumps(beat))
        for worker, value in (await redis.hgetall(key)).items():
            if json.loads(value).get("at_ms", 0) < now - WORKER_FORGOTTEN_SECONDS * 1000:
                await redis.hdel(key, worker)
    except Unavailable as error:
        reconciler.metrics.redis_away("heartbeat")
        log.warning("heartbeat not written: Redis is away", error=str(error))

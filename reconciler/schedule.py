"""What a running reconciler does by the clock, beside what it does when something happens.

In a worker process and in a service that embeds the reconciler alike: a log that nobody takes snapshots
of, archives and trims would be one more thing that only grows. A look that takes longer than its period
is not begun a second time; whatever fails is said, counted, and tried again at the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from apscheduler.executors.asyncio import AsyncIOExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from store.logs import Trouble, get_logger
from store.refusals import Unavailable
from store.tasks import end_tasks

if TYPE_CHECKING:
    from reconciler.reconciler import Reconciler

log = get_logger("reconciler.schedule")

_NAME = "agent_reconciler"
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
    keeping, beat = reconciler.housekeeping, _Beat(reconciler)
    jobs: list[tuple[Callable[[], Awaitable[None]], float]] = [
        (reconciler.full_pass, full_pass_seconds),
        (beat, HEARTBEAT_SECONDS),
        (keeping.snapshots, SNAPSHOT_CHECK_SECONDS),
        (keeping.archive, archive_seconds),
        (reconciler.retention.look, RETENTION_CHECK_SECONDS),
    ]
    # What it has to say of each run would fill the log of a service.
    logging.getLogger(f"apscheduler.executors.{_NAME}").setLevel(logging.WARNING)
    quiet = logging.getLogger(f"apscheduler.{_NAME}")
    quiet.setLevel(logging.ERROR)
    schedule = AsyncIOScheduler(timezone="UTC", logger=quiet, executors={_NAME: AsyncIOExecutor()})
    at_work: dict[asyncio.Task[None], asyncio.Task[Any] | None] = {}

    async def do(job: Callable[[], Awaitable[None]]) -> None:
        # In a task of its own: a job that is cancelled is an error to the scheduler.
        task = asyncio.ensure_future(_said(job))
        at_work[task] = asyncio.current_task()
        await asyncio.wait({task})
        del at_work[task]

    for job, seconds in jobs:
        schedule.add_job(
            do, "interval", seconds=seconds, args=[job], executor=_NAME, misfire_grace_time=None
        )
    schedule.start()
    try:
        yield
    finally:
        schedule.pause()
        doing = [task for task in at_work.values() if task is not None]
        await end_tasks(list(at_work))
        await asyncio.gather(*doing)
        schedule.shutdown(wait=False)
        with contextlib.suppress(*Unavailable):
            await beat.forget()


async def _said(job: Callable[[], Awaitable[None]]) -> None:
    """A job; what nobody expected in it is said, and it is done again in its time."""
    try:
        await job()
    except Exception:
        log.exception("a job failed; it is tried again in its time", job=repr(job))


class _Beat:
    """Says in the namespace that the worker is there, and forgets workers that were not for long."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._key = reconciler.namespace.keys.workers
        self._redis = reconciler.namespace.store.redis
        self._trouble = Trouble(log, "heartbeat not written: Redis is away")

    async def __call__(self) -> None:
        reconciler, redis, key = self._reconciler, self._redis, self._key
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
            self._trouble.over()
        except Unavailable as error:
            reconciler.metrics.redis_away("heartbeat")
            self._trouble.say(error=str(error))

    async def forget(self) -> None:
        """The worker is there no longer."""
        await self._redis.hdel(self._key, self._reconciler.process)

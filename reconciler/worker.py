"""The worker process: a reconciler with a schedule, an HTTP side and signals around it.

`run_worker` reads as the story of its day: connect, say which policy is in force, take leases,
reconcile until told to stop, give the leases back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from reconciler.policy import Policy
from reconciler.reconciler import Reconciler
from reconciler.web import Access, serve
from store.connection import connect
from store.namespace import Namespace
from store.refusals import Unavailable

log = structlog.get_logger("reconciler.worker")

HEARTBEAT_SECONDS = 2.0
WORKER_FORGOTTEN_SECONDS = 60.0
SNAPSHOT_CHECK_SECONDS = 5.0
ARCHIVE_SECONDS = 300.0
RETENTION_CHECK_SECONDS = 15.0


async def run_worker(
    url: str,
    *,
    namespace: str,
    policy: Policy,
    http: Access | None = None,
    full_pass_seconds: float = 30.0,
    lease_seconds: float = 10.0,
    archive_seconds: float = ARCHIVE_SECONDS,
    name: str = "worker",
    partitions: int | None = None,
) -> None:
    """Runs a worker until SIGTERM or SIGINT.

    Args:
        url: of Redis.
        namespace: of the log.
        policy: what is desired; it is recorded in the namespace for the other commands.
        http: where to listen, and for whom; None does not listen.
        full_pass_seconds: how often every process is looked at although nothing was heard.
        lease_seconds: after so long at the latest others act for what this one held, when it is not
            heard of any more.
        archive_seconds: how often what is older than it is kept is archived and trimmed.
        name: of the worker, as it stands in the log.
        partitions: how many the namespace must have; None takes what is recorded, or the default.

    Raises:
        ReconcilerError: it cannot run; the message says why and what to do.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with connect(url) as store:
        reconciler = Reconciler(
            store,
            namespace=namespace,
            policy=policy,
            name=name,
            lease_seconds=lease_seconds,
            partitions=partitions,
        )
        await reconciler.open()
        space = reconciler.namespace
        await store.redis.set(space.keys.policy, policy.model_dump_json(exclude_unset=True))
        runner, listening = await serve(reconciler, http) if http else (None, None)
        schedule = AsyncIOScheduler(timezone="UTC")
        schedule.add_job(reconciler.full_pass, "interval", seconds=full_pass_seconds)
        schedule.add_job(_beat, "interval", seconds=HEARTBEAT_SECONDS, args=[space, reconciler])
        keeping = reconciler.housekeeping
        schedule.add_job(keeping.snapshots, "interval", seconds=SNAPSHOT_CHECK_SECONDS)
        schedule.add_job(keeping.archive, "interval", seconds=archive_seconds)
        # Archiving may take longer than that; the next call then finds it at work.
        schedule.add_job(
            reconciler.retention.look,
            "interval",
            seconds=RETENTION_CHECK_SECONDS,
            max_instances=2,
        )
        schedule.start()
        log.info(
            "worker started",
            url=store.url, namespace=space.name, worker=reconciler.process, http=listening,
            session_idle_timeout=policy.session_idle_timeout or "off",
        )  # fmt: skip
        work = asyncio.create_task(reconciler.run(), name="reconciler")
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            schedule.shutdown(wait=False)
            stopped.cancel()
            work.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)
            if runner is not None:
                await runner.cleanup()
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error
        with contextlib.suppress(*Unavailable):
            await store.redis.hdel(space.keys.workers, reconciler.process)
        log.info("worker stopped", worker=reconciler.process)


async def _beat(namespace: Namespace, reconciler: Reconciler) -> None:
    """Says in the namespace that the worker is there, and forgets workers that were not for long."""
    redis, key = namespace.store.redis, namespace.keys.workers
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

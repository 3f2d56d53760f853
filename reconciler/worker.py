"""The worker process: a reconciler with an HTTP side and signals around it.

`run_worker` reads as the story of its day: connect, say which policy is in force, take leases,
reconcile until told to stop, give the leases back.
"""

from __future__ import annotations

import asyncio
import signal

from reconciler.policy import Policy
from reconciler.reconciler import Reconciler
from reconciler.schedule import ARCHIVE_SECONDS, FULL_PASS_SECONDS
from reconciler.web import Access, serve
from store.connection import connect
from store.logs import get_logger
from store.tasks import end_tasks

log = get_logger("reconciler.worker")


async def run_worker(
    url: str,
    *,
    namespace: str,
    policy: Policy,
    http: Access | None = None,
    full_pass_seconds: float = FULL_PASS_SECONDS,
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
            full_pass_seconds=full_pass_seconds,
            archive_seconds=archive_seconds,
        )
        await reconciler.open()
        await reconciler.record_policy()
        runner, listening = await serve(reconciler, http) if http else (None, None)
        log.info(
            "worker started",
            url=store.url,
            namespace=reconciler.namespace.name,
            worker=reconciler.process,
            http=listening,
            session_idle_timeout=policy.session_idle_timeout or "off",
        )
        work = asyncio.create_task(reconciler.run(), name="reconciler")
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks([stopped, work])
            if runner is not None:
                await runner.cleanup()
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error
        log.info("worker stopped", worker=reconciler.process)

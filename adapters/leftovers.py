"""What earlier incarnations of a service left behind: spill files whose process is dead.

Their events keep their process and seq: they are what happened. They are sent by the next incarnation
of the same service that finds them, unless the process was declared lost meanwhile: then the log has
closed it, and an event after that would contradict it. While they are sent the lease of the dead process
is renewed, so that a worker does not close it half way.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from adapters.outbox import Outbox
from adapters.spill import NotASpillFile, SpillFile, spill_files
from store.channel import HostChannel
from store.errors import Fenced, ReconcilerError
from store.event import decode_row
from store.log import EventLog
from store.logs import get_logger
from store.refusals import Unavailable
from store.tasks import check_cancelled

log = get_logger("adapters.leftovers")

_LEASE_MS = 5000
_RETRY = 0.5


async def send_left_behind(folder: Path, name: str, event_log: EventLog) -> None:
    """Sends the spill files of dead processes of a service, oldest first, and removes them.

    Args:
        folder: where they are.
        name: of the service; files of other services are theirs.
        event_log: where to.
    """
    for path in await asyncio.to_thread(spill_files, folder):
        try:
            spill = await asyncio.to_thread(SpillFile.left_behind, path)
        except (OSError, NotASpillFile) as error:
            log.error(
                "a spill file cannot be read, it is left alone", path=str(path), error=str(error)
            )
            continue
        if spill is None:
            continue
        if spill.process.rpartition("@")[0] != name:
            spill.close()
            continue
        try:
            await _send(spill, event_log)
        finally:
            spill.close()


async def _send(spill: SpillFile, event_log: EventLog) -> None:
    while True:
        check_cancelled()
        try:
            await _send_once(spill, event_log)
        except Unavailable:
            spill.rewind()
            await asyncio.sleep(_RETRY)
            continue
        except Fenced:
            log.warning(
                "a process was declared lost before its waiting events could be sent: they are given "
                "up, the log has closed it",
                process=spill.process, path=str(spill.path), bytes=spill.size,
            )  # fmt: skip
        except ReconcilerError as error:
            log.error("a spill file is left alone", path=str(spill.path), error=str(error))
            return
        spill.remove()
        return


async def _send_once(spill: SpillFile, event_log: EventLog) -> None:
    if not spill.size:
        return
    process = spill.process
    channel = HostChannel(await event_log.namespace(), process)
    await channel.beat(_LEASE_MS)
    sent = renewed = time.monotonic()
    outbox = Outbox(process)
    first_seq = channel.last_seq
    digest = await event_log.digest_of(process, first_seq)
    outbox.resume(spill, acknowledged=first_seq, digest=digest)
    last = b""
    while True:
        await outbox.load()
        first, payloads = outbox.batch()
        if not payloads:
            if not outbox.needs_file:
                break
            continue
        await event_log.append_encoded(process, first, payloads)
        last = payloads[-1]
        outbox.acknowledge()
        if time.monotonic() > renewed + _LEASE_MS / 4000:
            await channel.beat(_LEASE_MS)
            renewed = time.monotonic()
    if last and decode_row(last).type == "process_stopped":
        await channel.leave()
    log.info(
        "sent what an earlier incarnation left behind",
        process=process, events=outbox.acknowledged - first_seq, damaged=outbox.damaged,
        seconds=round(time.monotonic() - sent, 3),
    )  # fmt: skip

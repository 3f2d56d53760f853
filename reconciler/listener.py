"""The listener: hears the notes that reach the partitions of a worker, and answers the requests in them.

A note says that an inventory changed, which wakes the reconciler, or asks for something: a forced pass,
or that history is archived now. Requests are answered side by side, each by whoever acts for its
partition; whoever asked and hears nothing asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from reconciler.housekeeping import Housekeeping
from reconciler.partitions import Partitions
from reconciler.result import Result
from store.errors import Fenced, ReconcilerError
from store.inbox import Inbox, answer
from store.logs import get_logger
from store.messages import Note, encode_message
from store.namespace import Namespace
from store.refusals import Unavailable
from store.tasks import check_cancelled

log = get_logger("reconciler.listener")


class Reconcile(Protocol):
    """As `Reconciler.reconcile`."""

    def __call__(
        self, processes: Sequence[str] | None = None, *, dry_run: bool, partition: int | None
    ) -> Awaitable[Result]: ...


class Listener:
    """Listens for a worker.

    Args:
        namespace: of the log.
        inbox: its notes.
        acting: what it holds.
        housekeeping: archives.
        now_ms: the time of Redis, in ms.
        hear_of: called with the processes whose inventories may have changed.
        reconcile: does a forced pass.
    """

    def __init__(
        self,
        namespace: Namespace,
        inbox: Inbox,
        acting: Partitions,
        housekeeping: Housekeeping,
        now_ms: Callable[[], int],
        hear_of: Callable[[set[str]], None],
        reconcile: Reconcile,
    ) -> None:
        self._namespace = namespace
        self._inbox = inbox
        self._acting = acting
        self._housekeeping = housekeeping
        self._now_ms = now_ms
        self._hear_of = hear_of
        self._reconcile = reconcile
        self._requests: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Listens until it is cancelled; what is being answered then is not answered."""
        try:
            while True:
                check_cancelled()
                try:
                    notes = await self._inbox.wait()
                except Unavailable:
                    await asyncio.sleep(0.2)
                    continue
                self._hear_of({n.process for _, n in notes if n.process and n.kind == "inventory"})
                for partition, note in notes:
                    if note.kind in {"reconcile", "archive"} and note.request is not None:
                        task = asyncio.create_task(self._answer(partition, note))
                        self._requests.add(task)
                        task.add_done_callback(self._requests.discard)
        finally:
            for request in self._requests:
                request.cancel()

    async def _answer(self, partition: int, note: Note) -> None:
        if note.deadline_ms and self._now_ms() > note.deadline_ms:
            return
        assert note.request is not None
        # Not given back while it is worked on: whoever asked would wait in vain.
        self._acting.busy[partition] += 1
        try:
            if not await self._acting.acts_for(partition):
                return
            payload = await self._do(partition, note)
        except (Fenced, *Unavailable):
            return  # Who asked sees that the lease changed hands, and asks again.
        except ReconcilerError as error:
            payload = {"error": str(error)}
        except Exception as error:
            log.exception("a request could not be answered", kind=note.kind, process=note.process)
            payload = {"error": f"the worker failed, its log says more: {error}"}
        finally:
            self._acting.busy[partition] -= 1
        with contextlib.suppress(*Unavailable):
            await answer(self._namespace, partition, note.request, encode_message(payload))

    async def _do(self, partition: int, note: Note) -> dict[str, Any]:
        if note.kind == "archive":
            return asdict(await self._housekeeping.keep(partition))
        chosen = [note.process] if note.process else None
        result = await self._reconcile(chosen, dry_run=note.dry_run, partition=partition)
        return result.as_dict()

"""A forced reconciliation, asked of the workers that hold the partitions, through Redis.

Whoever asks (the command line, the page of any worker) does not act itself: the request goes into the
inbox of the partition, and the holder of its lease carries it out and answers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from store.channel import ask
from store.errors import ReconcilerError, UnknownProcess
from store.messages import Note
from store.namespace import Namespace

ANSWER_SECONDS = 120.0
NO_ANSWER = (
    "the worker that holds the partition does not answer: see `agent-reconciler status`, "
    "restart the worker, or wait until its lease lapses and try again"
)


async def ask_workers(
    namespace: Namespace,
    processes: Sequence[str],
    chosen: Sequence[str] | None,
    dry_run: bool,
) -> list[dict[str, Any] | None]:
    """Asks the workers that hold the partitions of some processes; None for no answer."""
    notes = {
        (namespace.partition_of(p), p if chosen is not None else None): Note(
            "reconcile", p if chosen is not None else None, dry_run=dry_run
        )
        for p in processes
    }
    replies = await asyncio.gather(
        *(ask(namespace, partition, note, ANSWER_SECONDS) for (partition, _), note in notes.items())
    )
    answers: list[dict[str, Any] | None] = []
    for reply in replies:
        answer = json.loads(reply) if reply is not None else None
        if answer is not None and "error" in answer:
            raise ReconcilerError(answer["error"])
        answers.append(answer)
    return answers


async def live_hosts(namespace: Namespace) -> list[str]:
    """Host processes that hold a lease, lapsed or not, and are not closed yet."""
    pipe = namespace.store.redis.pipeline(transaction=False)
    for partition in namespace.all_partitions():
        pipe.zrange(namespace.keys.partition(partition).hosts, 0, -1)
    return sorted(name.decode() for answer in await pipe.execute() for name in answer)


def choose(alive: Sequence[str], wanted: str, namespace: Namespace) -> list[str]:
    """The live processes that are meant: by id, or by the name of the service.

    Raises:
        UnknownProcess: there is none.
    """
    found = [p for p in alive if p == wanted or p.partition("@")[0] == wanted]
    if not found:
        known = ", ".join(alive[:5]) + (" …" if len(alive) > 5 else "") if alive else "none"
        raise UnknownProcess(
            f"no process {wanted!r} is alive in namespace {namespace.name} at {namespace.store.url}; "
            f"alive: {known}"
        )
    return found

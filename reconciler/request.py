"""A forced reconciliation, asked of the workers that hold the partitions, through Redis.

Whoever asks (the command line, the page of any worker) does not act itself: the request goes into the
inbox of the partition, and the holder of its lease carries it out and answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from reconciler.result import merge
from store.errors import NoAnswer, ReconcilerError, UnknownProcess
from store.inbox import ask
from store.messages import Note
from store.namespace import Namespace

ANSWER_SECONDS = 120.0
AGAIN_SECONDS = 0.1
NO_ANSWER = (
    "the worker that holds the partition does not answer: see `agent-reconciler status`, "
    "restart the worker, or wait until its lease lapses and try again"
)


async def ask_workers(
    namespace: Namespace, processes: Mapping[int, Sequence[str]], *, all_of_it: bool, dry_run: bool
) -> dict[int, list[dict[str, Any]]]:
    """Asks the workers that hold some partitions; those of which an answer is missing are left out."""
    notes = [
        (partition, Note("reconcile", process, dry_run=dry_run))
        for partition, some in processes.items()
        for process in ([None] if all_of_it else some)
    ]
    replies = await asyncio.gather(
        *(ask(namespace, partition, note, ANSWER_SECONDS) for partition, note in notes)
    )
    answers: dict[int, list[dict[str, Any]]] = {}
    missing: set[int] = set()
    for (partition, _), reply in zip(notes, replies, strict=True):
        if reply is None:
            missing.add(partition)
            continue
        answer = json.loads(reply)
        if "error" in answer:
            raise ReconcilerError(answer["error"])
        answers.setdefault(partition, []).append(answer)
    return {partition: some for partition, some in answers.items() if partition not in missing}


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


async def reconcile_through_workers(
    namespace: Namespace, processes: Sequence[str], *, all_of_them: bool, dry_run: bool
) -> dict[str, Any]:
    """Has the workers that hold the partitions of some processes reconcile them.

    Args:
        namespace: of the log.
        processes: live ones.
        all_of_them: they are all there are, so that whole partitions may be asked for.
        dry_run: change nothing.

    Raises:
        ReconcilerError: a worker refused, or none answered.
    """
    left: dict[int, list[str]] = {}
    for process in processes:
        left.setdefault(namespace.partition_of(process), []).append(process)
    parts: list[dict[str, Any]] = []
    deadline = time.monotonic() + ANSWER_SECONDS
    while left:
        # A partition that changes hands while its worker is asked is asked for again.
        answers = await ask_workers(namespace, left, all_of_it=all_of_them, dry_run=dry_run)
        for partition, some in answers.items():
            parts += some
            del left[partition]
        if left:
            if time.monotonic() > deadline:
                raise NoAnswer(NO_ANSWER)
            await asyncio.sleep(AGAIN_SECONDS)
    return merge(parts)

"""Ending tasks for certain, although a cancellation can be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


def check_cancelled() -> None:
    """Raises CancelledError if the running task was told to end.

    On Python 3.11 `asyncio.wait_for`, which redis-py uses, can swallow a cancellation that comes in
    the same tick as a reply. A task that loops for ever asks at each turn.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended.

    It asks again when a task goes on: its cancellation can have been swallowed, see
    `check_cancelled`.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)

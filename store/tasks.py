"""Tasks around redis-py: begun for certain, and ended for certain although a cancellation can be lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any


async def under_way() -> None:
    """Lets a command that a task was just made for go out, so that Redis works while the caller does.

    The first turn of the loop begins the task; the second writes the command, which redis-py on
    Python 3.11 does in a task of its own (`asyncio.wait_for`).
    """
    for _ in range(2):
        await asyncio.sleep(0)


def meanwhile(work: Callable[[], None]) -> None:
    """Has work done while Redis works on the command that the caller sends next.

    For the caller who has nothing to do but to wait: a task for the command would cost two more turns of
    the loop, and a busy service makes each of them long.
    """
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, work)


def check_cancelled() -> None:
    """Raises CancelledError if the running task was told to end.

    On Python 3.11 `asyncio.wait_for`, which redis-py uses, can swallow a cancellation that comes in
    the same tick as a reply. A task that loops for ever asks at each turn.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], *, again: float = 1.0) -> None:
    """Cancels tasks and waits until they have ended; what they raise is left to who asks them.

    Args:
        tasks: which; those that have ended are left alone.
        again: seconds after which one that goes on is told again: its cancellation can have been
            swallowed, see `check_cancelled`.
    """
    tasks = list(tasks)
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # So that nobody is told that nobody asked.

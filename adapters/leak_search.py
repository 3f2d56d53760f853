"""The questions of the leak probe that want some thought: is it a leak, and what is left of it?

Kept apart from the probe so that each can be asked, and tested, alone. None of them changes anything,
but for `remains_closed`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from adapters import heap

# What holds a task because it runs or waits, not because somebody looks after it.
_MACHINERY = frozenset(
    {
        "TaskStepMethWrapper", "TaskWakeupMethWrapper", "_asyncio.TaskStepMethWrapper", "Handle",
        "TimerHandle", "builtin_function_or_method", "method", "Context", "FutureIter",
        "Task", "hamt", "async_generator_asend",
    }
)  # fmt: skip


_OWN_FILES = (__file__, heap.__file__)


def only_grows(samples: Sequence[int], at_least: int) -> bool:
    """Whether a count rises and never comes back.

    Noise goes up and down again; a leak lifts the floor. So the lowest of each third of the samples
    is compared: it has to rise from third to third, and by `at_least` over all.

    Args:
        samples: oldest first; fewer than six say nothing.
        at_least: the rise that counts.
    """
    third = len(samples) // 3
    if third < 2:
        return False
    values = list(samples)
    floors = [min(values[:third]), min(values[third:-third]), min(values[-third:])]
    return floors[0] < floors[1] < floors[2] and floors[2] - floors[0] >= at_least


def forsaken_tasks(
    noted: Iterable[asyncio.Task[Any]], concerns: Callable[[asyncio.Task[Any]], bool]
) -> list[asyncio.Task[Any]]:
    """Pending tasks that nobody awaits and nobody holds: fire and forget.

    asyncio itself holds a task only weakly; one that something refers to (a list, an attribute, a
    variable of a waiting coroutine) has an owner who can still await or cancel it. One that was
    cancelled is at its end, and the task that ends a generator which somebody left early is asyncio's
    own.

    Args:
        noted: tasks that are known already; those of the running loop are looked at as well.
        concerns: the others are left out, before the heap is asked who holds them.
    """
    tasks = set(noted)
    current: asyncio.Task[Any] | None = None
    try:
        tasks |= asyncio.all_tasks()
        current = asyncio.current_task()
    except RuntimeError:
        pass  # No loop runs here, as between two tests.
    # Awaiting a task, gathering it, or a task group leaves a callback on it.
    lonely = [
        task
        for task in tasks
        if task is not current
        and not task.done()
        and concerns(task)
        and not getattr(task, "_callbacks", None)
        and not task.cancelling()
        and type(task.get_coro()).__name__ != "async_generator_athrow"
    ]
    del tasks
    return [task for task in lonely if not _held(task, lonely)]


def _held(task: asyncio.Task[Any], mine: list[asyncio.Task[Any]]) -> bool:
    frames = {id(mine), id(sys._getframe()), id(sys._getframe(1))}
    for holder in heap.referrers(task):
        if id(holder) in frames or type(holder).__name__ in _MACHINERY:
            continue
        if type(holder).__name__ == "frame" and holder.f_code.co_filename in _OWN_FILES:
            continue
        return True
    return False


async def remains_closed(remains: dict[str, Any]) -> None:
    """Closes what an ADK runner held that was dropped: its toolsets, its plugins.

    The runner is gone; what it held goes into the shape of one, and that is closed by ADK's own
    method.

    Args:
        remains: the attributes that the runner had.
    """
    from google.adk.runners import Runner

    runner = object.__new__(Runner)
    vars(runner).update(remains)
    await runner.close()

"""Parts of sentences: of how many, and of lives, whether they last or have ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from reconciler.life import Life, Worker
from reconciler.moment import span

_SHOWN = 3


def counted(count: int, one: str, many: str = "") -> str:
    """How many of something there are: `1 event`, `2 events`."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def began(life: Life) -> str:
    """How a life began, and for whom."""
    first = life.began
    how = {
        "created": "created",
        "adopted": "adopted into the log",
    }.get(first.type, "first heard of")
    text = f"{how} with event {first.seq} of its process"
    if life.user:
        text += f", for user {life.user}"
    if first.trace_id:
        text += f", by the request with trace {first.trace_id}"
    if first.reason:
        text += f" ({first.reason})"
    return text


def uses_so_far(life: Life, now: int) -> str:
    """How often it was used, and when last; `now` is Redis time in ms, or its end."""
    if life.last_use is None:
        return "It was never used after that."
    at_ms, by, moment = life.last_use
    whose = f"event {moment.seq}" if by == life.ref else f"through {by}, event {moment.seq}"
    times = "once" if life.use_count == 1 else f"{life.use_count} times"
    before = "ago" if life.ended is None else "before its end"
    return f"It was used {times} after that, the last time {span(now - at_ms)} {before} ({whose})."


def worker_name(worker: Worker, *, start: bool = True) -> str:
    """A worker with the lease that it acted under; `start` is for the start of a sentence."""
    name = f"{'W' if start else 'w'}orker {worker.name}"
    if worker.epoch is None:
        return name
    return f"{name} (partition {worker.partition}, epoch {worker.epoch})"


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    shown = list(names[:_SHOWN])
    if len(names) > _SHOWN:
        return f"{', '.join(shown)} and {len(names) - _SHOWN} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]])) if shown else ""

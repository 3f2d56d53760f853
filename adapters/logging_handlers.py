"""File handlers that a service opens itself and nobody closes; and the log of an execution.

`LogHandlers` finds handlers that no logger has any more, or only the logger of an execution that has
ended, and has them closed. `execution_log` is the cure at the source; it lives in its own file.

The one thing to know: a handler is in use while any logger has it, or a MemoryHandler or QueueListener
passes records on to it. Holders outside the tree of loggers stand in no list, so they are looked for
on the heap, and only when a handler seems lost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import logging.handlers
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from adapters import heap
from adapters.entry import current_order
from adapters.execution_log import (
    ExecutionLog,
    SharedLog,
    declared,
    ended,
    execution,
    execution_log,
)
from adapters.executor import Refusal
from adapters.host import Host
from adapters.registry import Registry

__all__ = ["ExecutionLog", "LogHandlers", "SharedLog", "execution", "execution_log", "unattached"]

SWEEP_SECONDS = 1.0
ENDED_KEPT = 10_000
"""Executions that have ended, as far as a look that comes a second later has to know of them."""
_DETACHED = "logger/detached"
"""Named as the owner of what no logger has: nothing of that name is ever alive."""

_numbers = itertools.count(1)


def open_file_handlers() -> Iterator[logging.FileHandler]:
    """The file handlers of this process that have a file open, those of ours aside."""
    for weak in list(getattr(logging, "_handlerList", ())):
        handler = weak() if isinstance(weak, weakref.ref) else weak
        if (
            isinstance(handler, logging.FileHandler)
            and handler.stream is not None
            and handler not in declared
        ):
            yield handler


def loggers_of() -> dict[logging.Handler, list[logging.Logger]]:
    """Which loggers have which handler, by the tree of loggers."""
    found: dict[logging.Handler, list[logging.Logger]] = {}
    tree = list(logging.Logger.manager.loggerDict.values())
    for logger in (logging.getLogger(), *tree):
        if isinstance(logger, logging.Logger):
            for handler in logger.handlers:
                found.setdefault(handler, []).append(logger)
    return found


def holders_of(lost: set[logging.FileHandler]) -> dict[logging.Handler, object]:
    """Who holds handlers that the tree of loggers does not: other loggers, memory handlers, queues.

    Looks at the whole heap, which takes some ten ms for a million objects.
    """
    kinds: dict[type, bool] = {}
    found: dict[logging.Handler, object] = {}
    wanted = (logging.Logger, logging.handlers.MemoryHandler, logging.handlers.QueueListener)
    for thing in heap.objects():
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = any(one in kind.__mro__ for one in wanted)
        if kinds[kind]:
            found.update((handler, thing) for handler in _held_by(thing) if handler in lost)
    return found


def _held_by(holder: Any) -> list[Any]:
    """The handlers that a logger, memory handler or listener passes records on to."""
    if isinstance(holder, logging.Logger) and holder in ended:
        return []
    return [*getattr(holder, "handlers", ()), getattr(holder, "target", None)]


def unattached() -> list[logging.FileHandler]:
    """File handlers with an open file that no logger has, and nobody passes records on to."""
    attached = loggers_of()
    lost = {handler for handler in open_file_handlers() if handler not in attached}
    if not lost:
        return []
    held = holders_of(lost)
    return [handler for handler in lost if handler not in held]


def _end(id: str, handler: logging.Handler) -> None:
    loggers = loggers_of().get(handler, [])
    order = current_order.get()
    if order is not None and loggers and _DETACHED in order.reason:
        raise Refusal(f"busy: it is attached to logger {loggers[0].name} again")
    for logger in (*loggers, *ended):
        logger.removeHandler(handler)  # A closed one would open its file again.
    handler.close()


class LogHandlers:
    """Looks after the file handlers that a service opens itself: `async with LogHandlers(host):`.

    One that no logger has any more, or only the logger of an execution that has ended, is closed:
    with a host by the reconciler, as an orphan; without one by `sweep`.

    Args:
        host: that shows them to the reconciler, kind `log_handler`.
        execution_of: the reference of the execution that a logger belongs to, from the logger's name;
            None for loggers that belong to none. One that the host was never told of has not ended:
            record it, as what a registry holds is recorded, or say so with `ended`.
    """

    def __init__(
        self,
        host: Host | None = None,
        *,
        execution_of: Callable[[str], str | None] | None = None,
    ) -> None:
        self._host = host
        self._execution_of = execution_of or (lambda name: None)
        self._registry = Registry("log_handler", name="file handlers of the service", teardown=_end)
        if host is not None:
            host.add(self._registry)
            host.end_listeners.append(self._has_ended)
        self._ids: weakref.WeakKeyDictionary[logging.Handler, str] = weakref.WeakKeyDictionary()
        self._seen: weakref.WeakSet[logging.Handler] = weakref.WeakSet()
        self._held: weakref.WeakKeyDictionary[logging.Handler, weakref.ref[Any]] = (
            weakref.WeakKeyDictionary()
        )
        self._lost: dict[str, str] = {}
        self._ended: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def sweep(self) -> list[str]:
        """Looks at all file handlers of the process now.

        It takes two looks to find a handler lost: one that was just opened has not been attached yet.

        Returns:
            References of the handlers that are orphans; without a host they are closed now.
        """
        attached = loggers_of()
        handlers = set(open_file_handlers())
        self._forget_closed(handlers)
        suspects = {h for h in handlers if h not in attached and not self._is_held(h)}
        holders = holders_of(suspects) if suspects else {}
        for handler, holder in holders.items():
            self._held[handler] = weakref.ref(holder)
        found = []
        for handler in handlers:
            id = self._adopt(handler)
            owner = self._ended_owner(attached.get(handler, []))
            if handler in suspects and handler not in holders:
                owner = _DETACHED
            if owner is None:
                self._kept(handler, id)
            elif handler in self._seen:
                found.append(f"log_handler/{id}")
                self._orphan(id, handler, owner)
            self._seen.add(handler)
        return found

    def _is_held(self, handler: logging.Handler) -> bool:
        weak = self._held.get(handler)
        return weak is not None and handler in _held_by(weak())

    def _adopt(self, handler: logging.FileHandler) -> str:
        id = self._ids.get(handler)
        if id is None or id not in self._registry:
            id = self._ids[handler] = f"{Path(handler.baseFilename).name}#{next(_numbers)}"
            self._registry[id] = handler
        return id

    def _owner_of(self, logger: logging.Logger) -> str | None:
        # What is attached to the root speaks for the whole process, whatever a pattern says.
        return None if logger is logging.getLogger() else self._execution_of(logger.name)

    def _ended_owner(self, loggers: list[logging.Logger]) -> str | None:
        """The execution that all of these loggers belong to, if it has ended."""
        owners = {self._owner_of(logger) for logger in loggers}
        owner = owners.pop() if len(owners) == 1 else None
        if owner is None or self._host is None or owner in self._host.entries:
            return None
        # One that was never recorded has not ended.
        return owner if owner in self._ended else None

    def _has_ended(self, ref: str) -> None:
        self._ended.pop(ref, None)
        self._ended[ref] = None
        if len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]

    def _kept(self, handler: logging.FileHandler, id: str) -> None:
        if self._lost.pop(id, None) is not None:
            # It was attached again. Who owns a thing is not taken back: it begins anew.
            self._registry.pop(id, None)
            self._adopt(handler)

    def _orphan(self, id: str, handler: logging.FileHandler, owner: str) -> None:
        if self._host is None:
            self._close(id, handler)
        elif id not in self._lost:
            self._lost[id] = owner
            self._host.link(f"log_handler/{id}", owned_by=owner)

    def _close(self, id: str, handler: logging.Handler) -> None:
        _end(id, handler)
        self._registry.pop(id, None)

    def _forget_closed(self, open_now: set[logging.FileHandler]) -> None:
        for handler, id in list(self._ids.items()):
            if handler not in open_now:
                self._registry.pop(id, None)
                self._ids.pop(handler, None)
                self._lost.pop(id, None)

    def ended(self, owner: str) -> list[str]:
        """Says that an execution has ended; the handlers of its loggers are closed now.

        Args:
            owner: the reference, as `execution_of` gives it.

        Returns:
            References of what was closed.
        """
        closed = []
        for handler, loggers in loggers_of().items():
            if not isinstance(handler, logging.FileHandler) or handler in declared:
                continue
            if {self._owner_of(logger) for logger in loggers} == {owner}:
                id = self._adopt(handler)
                self._close(id, handler)
                closed.append(f"log_handler/{id}")
        return closed

    async def _sweep_on(self) -> None:
        while True:
            self.sweep()
            await asyncio.sleep(SWEEP_SECONDS)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._sweep_on(), name="agent-reconciler log handlers")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._ids.clear()
        if self._host is not None and self._has_ended in self._host.end_listeners:
            self._host.end_listeners.remove(self._has_ended)
        if self._host is not None and self._registry.host is self._host:
            self._host.remove(self._registry)

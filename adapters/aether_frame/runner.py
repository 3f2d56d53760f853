"""A runner that has not been closed yet: who runs on it, and closing it once.

A service that drops a runner leaves its toolsets, plugins and session service open, so the runner is
a resource of its own, owned by the entry in `runners` and ended by ADK's `Runner.close()`. `run_async`,
`run_live` and `close` of this one object are looked over: a run counts as use, and whoever closes,
it happens once.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import wraps
from typing import Any

from adapters.aether_frame.substitution import Substitutions


class OpenRunner:
    """A runner that somebody has to close.

    Args:
        key: it is known by, in its registry.
        runner: an ADK Runner, or what has its shape.
        owner: reference of the entry that holds it.
        changed: called with this and a session id when a run on that session begins or ends.

    Attributes:
        runs: session id -> how many runs are under way.
        closed: it was closed, by whomever.
    """

    def __init__(
        self, key: str, runner: Any, owner: str, changed: Callable[[OpenRunner, str], None]
    ) -> None:
        self.key = key
        self.runner = runner
        self.owner = owner
        self.runs: Counter[str] = Counter()
        self.closed = False
        self._changed = changed
        self._lock = threading.Lock()
        self._closing: asyncio.Task[None] | None = None
        self._places = Substitutions()
        for name in ("run_async", "run_live"):
            if callable(method := getattr(runner, name, None)):
                self._places.put(runner, name, self._counted(method))
        self._own_close = vars(runner).get("close")
        self._close_once = self.close
        self._places.put(runner, "close", self._close_once)

    def release(self) -> None:
        """Leaves the runner as it was found."""
        self._places.take_back()

    @property
    def running(self) -> int:
        """Runs under way."""
        return self.runs.total()

    def _counted(self, method: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        @wraps(method)
        async def run(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            session = kwargs.get("session")
            id = str(kwargs.get("session_id") or getattr(session, "id", ""))
            self._count(id, 1)
            try:
                async with aclosing(method(*args, **kwargs)) as events:
                    async for event in events:
                        yield event
            finally:
                self._count(id, -1)

        return run

    def _count(self, session_id: str, by: int) -> None:
        with self._lock:  # `Runner.run` runs in a thread of its own.
            self.runs[session_id] += by
            if not self.runs[session_id]:
                del self.runs[session_id]
        self._changed(self, session_id)

    async def close(self) -> None:
        """Closes the runner; who comes second waits for the first, and nobody closes it again.

        Whoever waits may be cancelled, the closing itself goes on.

        Raises:
            Exception: what closing it raised; it can then be tried again.
        """
        if self.closed:
            return
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="close ADK runner")
            self._closing.add_done_callback(self._settle)
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        placed = vars(self.runner).get("close")
        if placed is not None and placed is not self._close_once:
            close = placed  # The service put its own there.
        elif self._own_close is not None:
            close = self._own_close
        else:
            method = getattr(type(self.runner), "close", None)
            if method is None:
                self.closed = True  # It needs no closing.
                return
            close = method.__get__(self.runner)
        result = close()
        if inspect.isawaitable(result):
            await result
        self.closed = True

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._closing = None
        if not task.cancelled():
            task.exception()  # Whoever waits has it; nobody need wait.

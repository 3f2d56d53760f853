"""One part of a service, and its life: made, entered, waited for, closed, all in one task.

What a component opens may insist on being left in the task that entered it (anyio's cancel scopes
do); and a close that hangs in a task of its own can be left behind.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from adapters.executor import close as close_by_method
from store.errors import ReconcilerError


class ComponentError(ReconcilerError):
    """A component could not be started or closed; the cause is chained.

    Attributes:
        name: of the component.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"component {name} {what}")
        self.name = name


@dataclass(slots=True)
class Component:
    """One component: what it was declared with, and where its life stands.

    Attributes:
        name: of the component.
        make: makes it from what it needs, given by name.
        needs: names of others.
        close: ends it; None leaves that to itself.
        close_timeout: seconds that its close may take.
        ready: the component, once it has started.
        leave: set when it is to close.
        task: in which it lives.
    """

    name: str
    make: Callable[..., Any]
    needs: tuple[str, ...]
    close: Callable[[Any], Any] | None
    close_timeout: float
    ready: asyncio.Future[Any] = field(init=False)
    leave: asyncio.Event = field(init=False)
    task: asyncio.Task[None] = field(init=False)

    async def live(self, shared: Mapping[str, Any]) -> None:
        """The life of a component, in one task: start, wait, close."""
        async with AsyncExitStack() as stack:
            try:
                value = self.make(**shared)
                if inspect.isawaitable(value) and not hasattr(value, "__aenter__"):
                    value = await value
                if self.close is not None:
                    stack.push_async_callback(self._close, value)
                elif hasattr(value, "__aenter__"):
                    value = await stack.enter_async_context(value)
                elif hasattr(value, "__enter__") and not hasattr(value, "close"):
                    value = stack.enter_context(value)
                else:
                    stack.push_async_callback(close_by_method, self.name, value)
            except BaseException as error:
                if not self.ready.done():
                    self.ready.set_exception(error)
                raise
            self.ready.set_result(value)
            await self.leave.wait()

    async def _close(self, value: Any) -> None:
        assert self.close is not None
        result = self.close(value)
        if inspect.isawaitable(result):
            await result

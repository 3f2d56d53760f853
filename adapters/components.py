"""The parts of a service: started in order of dependency, closed in reverse, all of them.

The order is graphlib's, the closing contextlib's AsyncExitStack; there is no container here. Each
close has a time limit, and one that fails or hangs keeps no other part open: what went wrong is
gathered, by name, into one ExceptionGroup.

The one thing to know: each component lives in a task of its own, see `adapters/component.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from graphlib import CycleError, TopologicalSorter
from types import TracebackType
from typing import Any, Self

from adapters.component import Component, ComponentError
from adapters.host import Host
from store.logs import get_logger

__all__ = ["ComponentError", "Components"]

log = get_logger("adapters.components")

CLOSE_SECONDS = 10.0
_GRACE = 0.2
"""Seconds that a close gets to react to its cancellation."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Interrupted(SystemExit):
    """A signal came while the components were starting: there is no body yet to interrupt."""


class Components:
    """The parts of a service: `async with components:`, or `await components.serve()`.

    Args:
        host: that is told of them, kind `component`, so that they can own things; None does without.
        close_timeout: seconds that one close may take, where `add` says nothing else.
    """

    def __init__(self, host: Host | None = None, *, close_timeout: float = CLOSE_SECONDS) -> None:
        self._host = host
        self._close_timeout = close_timeout
        self._declared: dict[str, Component] = {}
        self._values: dict[str, Any] = {}
        self._stack: AsyncExitStack | None = None
        self._errors: list[Exception] = []
        self._stop = asyncio.Event()
        self._body: asyncio.Task[Any] | None = None
        self._interrupted = False
        self._signal: signal.Signals | None = None
        self._undo_signals: list[Callable[[], None]] = []

    def add(
        self,
        name: str,
        make: Callable[..., Any],
        *,
        needs: Iterable[str] = (),
        close: Callable[[Any], Any] | None = None,
        close_timeout: float | None = None,
    ) -> Self:
        """Declares a component; several can be chained.

        Args:
            name: of the component.
            make: makes it from what it needs, given by name: a function or coroutine function.
            needs: names of other components. One that several need is made once and shared.
            close: ends it, `(component)`. None enters and leaves what is a context manager, and
                calls `aclose` or `close` of what is not.
            close_timeout: seconds that its close may take.

        Raises:
            ValueError: there is a component of that name.
            RuntimeError: they have been started already.
        """
        if self._stack is not None:
            raise RuntimeError(f"component {name} comes too late: the others have been started")
        if name in self._declared:
            raise ValueError(f"there is a component {name} already")
        limit = self._close_timeout if close_timeout is None else close_timeout
        self._declared[name] = Component(name, make, tuple(needs), close, limit)
        return self

    def __getitem__(self, name: str) -> Any:
        """A component that has been started.

        Raises:
            KeyError: it is not running, or nobody added it.
        """
        try:
            return self._values[name]
        except KeyError:
            why = "is not running" if name in self._declared else "was never added"
            raise KeyError(f"component {name} {why}") from None

    def order(self) -> list[str]:
        """The names in the order of start.

        Raises:
            ValueError: something is needed that nobody declared, or things need each other.
        """
        graph = {name: component.needs for name, component in self._declared.items()}
        for name, needs in graph.items():
            for need in needs:
                if need not in graph:
                    raise ValueError(f"component {name} needs {need}, which nobody added")
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise ValueError(f"components need each other: {' -> '.join(error.args[1])}") from None

    # --- start and close ------------------------------------------------------------------------

    async def start(self) -> Self:
        """Starts all, each after what it needs.

        Raises:
            ValueError: see `order`.
            RuntimeError: they are running already.
            ExceptionGroup: one could not be started; those before it are closed again, and what
                went wrong with that is in the group too.
        """
        names = self.order()
        if self._stack is not None:
            raise RuntimeError("the components are running already: close them first")
        self._stack, self._errors = AsyncExitStack(), []
        self._stop.clear()
        try:
            for name in names:
                await self._start(self._declared[name])
        except Exception as error:
            await self._unwind()
            raise ExceptionGroup(
                "the components were not started", [error, *self._errors]
            ) from None
        except BaseException:
            await self._unwind()
            raise
        return self

    async def _start(self, component: Component) -> None:
        assert self._stack is not None
        component.ready = asyncio.get_running_loop().create_future()
        component.leave = asyncio.Event()
        shared = {need: self._values[need] for need in component.needs}
        component.task = asyncio.create_task(
            component.live(shared), name=f"component {component.name}"
        )
        try:
            value = await component.ready
        except asyncio.CancelledError:
            component.task.cancel()
            await asyncio.wait({component.task}, timeout=component.close_timeout)
            raise
        except Exception as error:
            await asyncio.gather(component.task, return_exceptions=True)
            raise ComponentError(component.name, f"did not start: {_what(error)}") from error
        self._values[component.name] = value
        self._stack.push_async_callback(self._leave, component)
        if self._host is not None:
            uses = [f"component/{need}" for need in component.needs]
            self._host.record("created", f"component/{component.name}", uses=uses)

    async def _leave(self, component: Component) -> None:
        """Closes one, in the time it has; what goes wrong is noted and stops nobody."""
        component.leave.set()
        done, _ = await asyncio.wait({component.task}, timeout=component.close_timeout)
        error: Exception | None = None
        if not done:
            component.task.cancel()
            await asyncio.wait({component.task}, timeout=_GRACE)
            component.task.add_done_callback(_let_go)
            error = ComponentError(
                component.name, f"was not closed within {component.close_timeout:g} s"
            )
        elif component.task.cancelled():
            error = ComponentError(component.name, "was cancelled while it was closed")
        elif (cause := component.task.exception()) is not None:
            error = ComponentError(component.name, f"failed to close: {_what(cause)}")
            error.__cause__ = cause
        if error is not None:
            log.error("component not closed", name=component.name, error=str(error))
            self._errors.append(error)
        self._values.pop(component.name, None)
        if self._host is not None:
            reason = "closed" if error is None else str(error)
            self._host.record("cleaned_up", f"component/{component.name}", reason=reason)

    async def _unwind(self) -> None:
        stack, self._stack = self._stack, None
        if stack is None:
            return
        # In a task of its own: whoever is cancelled while it waits does not cut the closing short.
        closing = asyncio.ensure_future(stack.aclose())
        cancelled = False
        while not closing.done():
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    async def close(self) -> None:
        """Closes all in reverse order; one that hangs or fails keeps no other open.

        Raises:
            ExceptionGroup: of `ComponentError`, one for each that was not closed.
        """
        await self._unwind()
        errors, self._errors = self._errors, []
        if errors:
            names = ", ".join(e.name for e in errors if isinstance(e, ComponentError))
            raise ExceptionGroup(f"not closed: {names}", errors)

    # --- signals --------------------------------------------------------------------------------

    def stop(self) -> None:
        """Leads through the shutdown, as a signal does: the body of `async with` is interrupted."""
        self._stop.set()
        self._give_signals_back()  # A second signal does what it did before.
        if self._body is not None and not self._interrupted:
            self._interrupted = True
            self._body.cancel()

    def _signalled(self, number: signal.Signals) -> None:
        self._signal = number
        self.stop()

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            # Outside of the main thread, and on Windows, the signals are somebody else's.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                before = signal.getsignal(number)
                loop.add_signal_handler(number, self._signalled, number)
                self._undo_signals.append(_signal_undo(loop, number, before))

    def _give_signals_back(self) -> None:
        undo, self._undo_signals = self._undo_signals, []
        for one in undo:
            one()

    async def __aenter__(self) -> Self:
        """Starts all, and takes SIGTERM and SIGINT.

        Raises:
            SystemExit: a signal came before all had started; those that had are closed again.
            ExceptionGroup: as for `start`.
        """
        body = self._body = asyncio.current_task()
        self._interrupted, self._signal = False, None
        self._take_signals()
        try:
            return await self.start()
        except BaseException as error:
            self._body = None
            self._give_signals_back()
            cancelled = isinstance(error, asyncio.CancelledError)
            if cancelled and self._signal is not None and self._was_us(body):
                raise _Interrupted(128 + self._signal) from None
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        body, self._body = self._body, None  # A signal from here on does not interrupt the closing.
        try:
            await self.close()
        finally:
            self._give_signals_back()
        # The interruption was ours: after it the program goes on behind the `async with`.
        was_us = self._was_us(body)  # Also where the body took it: nothing of it is to be left.
        return was_us and exc_type is asyncio.CancelledError

    def _was_us(self, task: asyncio.Task[Any] | None) -> bool:
        """The cancellation of a task came from `stop`, and from nobody else."""
        if task is None or not self._interrupted:
            return False
        self._interrupted = False
        return task.uncancel() == 0

    async def serve(self) -> None:
        """Starts, waits for SIGTERM, SIGINT or `stop`, and closes.

        Raises:
            ExceptionGroup: as for `start` and `close`.
        """
        try:
            async with self:
                await self._stop.wait()
        except _Interrupted:
            return
        except asyncio.CancelledError:
            if not self._was_us(asyncio.current_task()):  # Ours while it was starting.
                raise

    # --- in a web framework, which has the signals itself ------------------------------------------

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[Mapping[str, Any]]:
        """For FastAPI and Starlette: `FastAPI(lifespan=components.lifespan)`.

        The components are in `request.state`, by name.
        """
        await self.start()
        try:
            yield dict(self._values)
        finally:
            await self.close()

    async def cleanup_ctx(self, app: Any) -> AsyncIterator[None]:
        """For aiohttp: `app.cleanup_ctx.append(components.cleanup_ctx)`."""
        await self.start()
        try:
            yield
        finally:
            await self.close()


def _signal_undo(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, before: Any
) -> Callable[[], None]:
    def undo() -> None:
        loop.remove_signal_handler(number)
        if before is not None:
            signal.signal(number, before)

    return undo


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _let_go(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a component that hung failed later", name=task.get_name(), error=str(error))

"""`LifecyclePlugin`: for services that keep their own ADK `Runner`, on whatever session service.

It hears of each run from ADK's plugin callbacks and keeps session, runner and agent marked as in use
while it is on. ADK tells a plugin of a run that ends or fails, but not of one that is cancelled; those
are let go when the task that drove them ends, or when their invocation is forgotten, whichever is
first. Until then too much is marked as in use, never too little.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import itertools
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

from google.adk.agents.invocation_context import InvocationContext
from google.adk.plugins.base_plugin import BasePlugin
from google.genai import types

from adapters.adk.live_sessions import Identity, LiveSessions, session_ref
from adapters.entry import Entry
from adapters.host import Host, check_host
from adapters.registry import Teardown

_LOOK_AGAIN = 0.01
_numbers = itertools.count(1)
_session_service_of_run: ContextVar[object] = ContextVar("agent_reconciler_run", default=None)


class LifecyclePlugin(BasePlugin):
    """Records the use of sessions, runners and agents, and marks them as in use during runs.

    A runner or agent that a registry of the host holds is recognised by the object. One that no
    registry holds is recorded under a name made here; it counts as in use as long as it exists,
    because nobody has said how to end it, unless `end_runner` does.

    Args:
        host: that looks after them; None takes the host of the session service of each run.
        end_session: ends a session that is idle, `(id, identity)` with identity `(app, user, id)`.
            By default nothing needs to be done: the session service keeps the conversation.
        end_runner: ends a runner that no registry holds, `(id, None)`; the service knows it by the
            app's name, with which the id begins.
        name: of the plugin, unique within an app.
    """

    def __init__(
        self,
        host: Host | None = None,
        *,
        end_session: Callable[[str, Identity], Any] | None = None,
        end_runner: Teardown | None = None,
        name: str = "agent_reconciler",
    ) -> None:
        super().__init__(name)
        self._host = None if host is None else check_host(host)
        self._end_session = end_session
        self._end_runner = end_runner
        self._runs: dict[int, _Run] = {}
        self._made: dict[int, _Unobserved] = {}

    @property
    def runs(self) -> int:
        """Runs that are on now."""
        return len(self._runs)

    # --- what ADK calls -------------------------------------------------------------------------

    async def before_run_callback(
        self, *, invocation_context: InvocationContext
    ) -> types.Content | None:
        """A run begins."""
        host = self._host or getattr(invocation_context.session_service, "host", None)
        if not isinstance(host, Host):
            return None
        outer = _session_service_of_run.get()
        if outer is not None and outer is not invocation_context.session_service:
            # A tool runs an agent of its own, on a session that ends with the call: part of the run.
            return None
        _session_service_of_run.set(invocation_context.session_service)
        # What the host knows may only be changed in its own thread, and ADK's `Runner.run` has another.
        while True:
            begun: concurrent.futures.Future[_Run | None] = concurrent.futures.Future()
            if not host.call(self._begin, host, invocation_context, begun):
                return None  # The host has ended.
            try:
                # In the thread of the host it is done: to wait for it would be a moment in which a
                # cancellation finds a run that is held and that nobody watches.
                run = begun.result() if begun.done() else await asyncio.wrap_future(begun)
            except asyncio.CancelledError:
                begun.add_done_callback(partial(_let_go, host))
                raise
            if run is not None:
                self._watch(host, invocation_context, run)
                return None
            await asyncio.sleep(_LOOK_AGAIN)

    async def after_run_callback(self, *, invocation_context: InvocationContext) -> None:
        """A run has ended."""
        self._end(invocation_context)

    async def on_run_error_callback(
        self, *, invocation_context: InvocationContext, error: Exception
    ) -> None:
        """A run has failed."""
        self._end(invocation_context)

    async def close(self) -> None:
        """A runner is closed. If it is the only one that no registry holds, it goes."""
        if len(self._made) == 1:
            (made,) = self._made.values()
            made.host.call(made.forget, "its runner was closed")

    # --- a run ----------------------------------------------------------------------------------

    def _begin(
        self,
        host: Host,
        context: InvocationContext,
        begun: concurrent.futures.Future[_Run | None],
    ) -> None:
        """Marks what a run uses; answers None while its session is just being torn down."""
        if not begun.set_running_or_notify_cancel():
            return  # It was cancelled before it began.
        session = context.session
        identity = (session.app_name, session.user_id, session.id)
        entry = host.entries.get(session_ref(host, identity))
        if entry is not None and entry.terminating:
            begun.set_result(None)
            return
        run = _Run(host)
        try:
            for ref in self._refs(host, context, identity):
                run.hold(ref)
        except Exception as error:
            run.end()
            begun.set_exception(error)
        else:
            begun.set_result(run)

    def _watch(self, host: Host, context: InvocationContext, run: _Run) -> None:
        self._runs[id(context)] = run

        def finish(*_: object) -> None:
            self._finish(id_of_context, run)

        id_of_context = id(context)
        # The ways in which a run can end without a word.
        finalizer = weakref.finalize(context, host.call, finish, soon=True)
        finalizer.atexit = False
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(finish)

        def unwatch() -> None:
            finalizer.detach()
            task.remove_done_callback(finish)

        run.unwatch = unwatch

    def _end(self, context: InvocationContext) -> None:
        run = self._runs.get(id(context))
        if run is not None:
            self._finish(id(context), run)

    def _finish(self, key: int, run: _Run) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
        unwatch, run.unwatch = run.unwatch, None
        if unwatch is not None:
            unwatch()
        run.host.call(run.end)

    def _refs(self, host: Host, context: InvocationContext, identity: Identity) -> list[str]:
        """Session and runner of a run; what is not known yet comes alive, the agent too."""
        root = getattr(context.agent, "root_agent", context.agent)
        agent = _observed(host, "agent", lambda obj: _is_or_has(obj, "agent", root))
        manager = context.plugin_manager
        runner = _observed(host, "runner", lambda obj: _has_manager(obj, manager))
        if runner is None:
            runner = self._unobserved(host, context, agent)
        LiveSessions.of(host).note_use(identity, self._ending)
        note_uses_of = getattr(context.session_service, "note_uses_of", None)
        if note_uses_of is not None:
            note_uses_of(host)
        ref = session_ref(host, identity)
        uses = host.entries[ref].uses
        if runner not in uses:
            alive = [used for used in uses if used in host.entries]
            host.link(ref, uses=(*alive, runner))
        return [ref, runner]

    async def _ending(self, identity: Identity) -> None:
        if self._end_session is not None:
            result = self._end_session(identity[2], identity)
            if inspect.isawaitable(result):
                await result

    def _unobserved(self, host: Host, context: InvocationContext, agent: str | None) -> str:
        """The reference of a runner that no registry holds: recorded when it is first seen."""
        manager = context.plugin_manager
        made = self._made.get(id(manager))
        if made is not None and made.host is host:
            return made.ref
        name = f"{context.session.app_name}-{next(_numbers)}"
        if agent is None:
            root = getattr(context.agent, "root_agent", context.agent)
            agent = f"agent/{name}:{getattr(root, 'name', 'agent')}"
            host.record("created", agent)
        ref = f"runner/{name}"
        host.record("created", ref, uses=[agent])
        entries = [host.entries[one] for one in (ref, agent) if host.entries[one].registry is None]
        made = _Unobserved(host, ref, entries, partial(self._made.pop, id(manager), None))
        self._made[id(manager)] = made
        if self._end_runner is None:
            made.hold()
        else:
            host.handle("runner", self._end_runner)
            host.handle("agent", _nothing)
        finalizer = weakref.finalize(manager, host.call, made.forget, "it was let go", soon=True)
        finalizer.atexit = False
        return ref


class _Run:
    """What one run holds acquired; to be used in the thread of the host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.unwatch: Callable[[], object] | None = None
        self._held: list[Entry] = []

    def hold(self, ref: str) -> None:
        self._held.append(self.host.begin_use(ref))

    def end(self) -> None:
        held, self._held = self._held, []
        for entry in held:
            self.host.end_use(entry)


def _let_go(host: Host, begun: concurrent.futures.Future[_Run | None]) -> None:
    """Ends a run that began when nobody waited for it any more."""
    if begun.cancelled() or begun.exception() is not None:
        return
    if (run := begun.result()) is not None:
        host.call(run.end)


class _Unobserved:
    """A runner, and its agent, that only the plugin knows."""

    def __init__(
        self, host: Host, ref: str, entries: list[Entry], forgotten: Callable[[], object]
    ) -> None:
        self.host = host
        self.ref = ref
        self._entries = entries
        self._forgotten = forgotten
        self._held: list[Entry] = []

    def hold(self) -> None:
        self._held = [self.host.begin_use(entry.ref) for entry in self._entries]

    def forget(self, reason: str) -> None:
        self._forgotten()
        held, self._held = self._held, []
        for entry in held:
            self.host.end_use(entry)
        for entry in self._entries:
            if self.host.entries.get(entry.ref) is entry:
                self.host.forget(entry, reason=reason)


def _observed(host: Host, kind: str, matches: Callable[[Any], bool]) -> str | None:
    """The reference of what a registry of the host holds, if one does."""
    for registry in host.registries:
        if registry.kind == kind:
            for key, obj in registry.items():
                if matches(obj):
                    return registry.ref(key)
    return None


def _is_or_has(obj: Any, attribute: str, wanted: object) -> bool:
    return obj is wanted or getattr(obj, attribute, None) is wanted


def _has_manager(obj: Any, manager: object) -> bool:
    runner = getattr(obj, "runner", obj)
    return getattr(runner, "plugin_manager", None) is manager


def _nothing(_: str, __: Any) -> None:
    """What an agent needs for its end, where the service ends its runner itself."""

"""A chat of `AdkRuntime`: as the runtime keeps it, and as a request has it in hand.

`LiveChat` is the resource `session/<chat id>`: one per chat and process, in the registry of the
runtime. `Chat` is what `async with runtime.chat(...)` gives: while one is open the chat is in use, and
the runner it was opened with stays, also when another request switches the chat to another agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self

from google.adk.agents.run_config import RunConfig
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.runners import Runner
from google.adk.sessions import Session
from google.genai import types

from adapters.adk.live_sessions import Identity
from adapters.entry import Entry
from store.errors import NotAlive

if TYPE_CHECKING:
    from adapters.adk.runtime import AdkRuntime


class LiveChat:
    """A chat that this process has.

    Attributes:
        identity: app, user, chat id; the chat id is the id of the ADK session.
        ready: its ADK session is there.
        agent: the configuration used last, by name.
        runners: references of the runners of those who have it open.
        last_runner: the one attached last; it counts as used while the chat lives.
        turn: held while a message is answered: one at a time.
        opening: held while the ADK session is looked for, brought back or made.
        kept_until: somebody asked for a stay until then, monotonic.
        ending: it is to be ended as soon as nobody has it open; whether its data goes too.
    """

    __slots__ = (
        "agent", "ending", "identity", "kept_until", "last_runner", "last_used", "opening",
        "ready", "runners", "turn",
    )  # fmt: skip

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.ready = False
        self.agent: str | None = None
        self.runners: list[str] = []
        self.last_runner: str | None = None
        self.turn = asyncio.Lock()
        self.opening = asyncio.Lock()
        self.last_used = time.monotonic()
        self.kept_until = 0.0
        self.ending: bool | None = None

    def uses(self) -> tuple[str, ...]:
        """References of the runners that must stay for it."""
        last = () if self.last_runner is None else (self.last_runner,)
        return tuple(dict.fromkeys((*self.runners, *last)))


class _Run:
    """One answer on its way.

    Attributes:
        events: of the answer; `send` gives out an `_Answer` that reads them.
        sender: the task that called `send`.
        reader: the one that asked for an event last; None when nobody has yet.
        answer: what was given out; dead when nobody can read on.
        ending: closes it, where that fell to nobody else.
    """

    __slots__ = ("_loop", "answer", "ending", "events", "reader", "sender")

    def __init__(self) -> None:
        self.events: AsyncGenerator[Event, None] | None = None
        self.sender = asyncio.current_task()
        self.reader: asyncio.Task[Any] | None = None
        self.answer: weakref.ref[_Answer] | None = None
        self.ending: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def give_out(self, events: AsyncGenerator[Event, None]) -> _Answer:
        self.events = events
        answer = _Answer(self, events)
        self.answer = weakref.ref(answer, self._let_go)
        return answer

    @property
    def is_over(self) -> bool:
        return self.events is None or self.events.ag_frame is None  # type: ignore[attr-defined]

    @property
    def _is_read(self) -> bool:
        return self.events is not None and self.events.ag_running  # type: ignore[attr-defined]

    async def close(self) -> None:
        if self.ending is not None:
            await asyncio.wait([self.ending])
        elif self.events is not None:
            await self.events.aclose()

    def is_left_for(self, other: _Run) -> bool:
        """It stands at an event, and nobody reads on: who got that is about another run now, say."""
        if self.reader is None or self.is_over or self._is_read:
            return False
        if self.answer is None or self.answer() is None:
            return True
        # A reader that is done may have been a task for one event, made by one who reads on.
        return self.reader in (other.sender, other.reader) or (
            self.reader is self.sender and self.reader.done()
        )

    def _let_go(self, _: object) -> None:
        # Called by the garbage collector, on any thread.
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self.events is not None and not self.is_over and not self._is_read:
            self.ending = self._loop.create_task(self.events.aclose())


class _Answer(AsyncGenerator[Event, None]):
    """The events of a run, as the one who sent the message has them in hand.

    It sees which task asks for an event. The run itself may see another one: until Python 3.12
    `wait_for` makes a task for each event.
    """

    def __init__(self, run: _Run, events: AsyncGenerator[Event, None]) -> None:
        self._run = run
        self._events = events

    def __anext__(self) -> Coroutine[Any, Any, Event]:
        return self.asend(None)

    def asend(self, value: None) -> Coroutine[Any, Any, Event]:
        self._run.reader = asyncio.current_task()
        return self._next(self._events.asend(value))

    def athrow(self, *error: Any) -> Coroutine[Any, Any, Event]:
        self._run.reader = asyncio.current_task()
        return self._next(self._events.athrow(*error))

    async def _next(self, event: Awaitable[Event]) -> Event:
        return await event  # Who waits for an event keeps the answer.

    async def aclose(self) -> None:
        await self._events.aclose()


class Chat:
    """A chat in hand: `async with runtime.chat(...) as chat`.

    Attributes:
        chat_id: of the chat, and of its ADK session.
        user_id: whose it is.
        ref: the resource, as it stands in the log.
        runner: that answers; shared with other chats of the same agent configuration.
    """

    def __init__(self, runtime: AdkRuntime, chat_id: str, user_id: str, agent_config: Any) -> None:
        self.chat_id = chat_id
        self.user_id = user_id
        self.ref = ""
        self._runtime = runtime
        self._config = agent_config
        self._live: LiveChat | None = None
        self._entry: Entry | None = None
        self._runner: Entry | None = None
        self._runs: list[_Run] = []

    async def __aenter__(self) -> Self:
        if self._live is not None:
            raise NotAlive(f"{self.ref} is open already: call runtime.chat() for each use")
        opened = await self._runtime.open(self.chat_id, self.user_id, self._config)
        self._live, self._entry, self._runner = opened
        self.ref = self._entry.ref
        return self

    async def __aexit__(self, *exc: object) -> None:
        live, self._live = self._live, None
        entry, runner = self._entry, self._runner
        if live is None or entry is None or runner is None:
            return
        try:
            for run in self._runs:
                # One that another task is just reading ends with that task.
                with contextlib.suppress(RuntimeError):
                    await run.close()
        finally:
            self._runs = []
            await self._runtime.leave(live, entry, runner)

    @property
    def runner(self) -> Runner:
        """The ADK runner that answers.

        Raises:
            NotAlive: the chat is not open.
        """
        self._open()
        assert self._runner is not None
        runner: Runner = self._runner.obj
        return runner

    def _open(self) -> LiveChat:
        if self._live is None:
            raise NotAlive(f"chat {self.chat_id} is not open: use `async with runtime.chat(...)`")
        return self._live

    def send(
        self,
        message: str | types.Content,
        *,
        run_config: RunConfig | None = None,
        state_delta: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Says something, and yields the events of the answer as ADK's runner yields them.

        Messages of one chat are answered one after the other, whoever sends them. An answer that is not
        read to its end is closed with the chat, when nothing refers to it any more, or when the task
        that asked for its last event sends again. One that is kept, and was read by another task than
        the one that sends next, has to be closed (`aclose`): until then the next message waits.

        Args:
            message: text, or content with parts of any sort.
            run_config: for the runner.
            state_delta: changes of the session's state that come with the message.

        Raises:
            NotAlive: the chat is not open.
            Exception: what the agent, its model and its tools raise.
        """
        live = self._open()
        if isinstance(message, str):
            message = types.Content(role="user", parts=[types.Part(text=message)])
        self._runs = [run for run in self._runs if not run.is_over]
        run = _Run()
        self._runs.append(run)
        return run.give_out(self._answer(run, live, message, run_config, state_delta))

    async def _answer(
        self,
        this: _Run,
        live: LiveChat,
        message: types.Content,
        run_config: RunConfig | None,
        state_delta: dict[str, Any] | None,
    ) -> AsyncGenerator[Event, None]:
        for left in [run for run in self._runs if run is not this and run.is_left_for(this)]:
            # It has the turn, and nobody else would end it before the chat does.
            await left.close()
        async with live.turn:
            run = self.runner.run_async(
                user_id=self.user_id,
                session_id=self.chat_id,
                new_message=message,
                run_config=run_config,
                state_delta=state_delta,
            )
            try:
                async with aclosing(run):
                    async for event in run:
                        yield event
            except SessionNotFoundError:
                live.ready = False  # Deleted, or expired: who opens the chat next begins anew.
                raise

    async def session(self) -> Session:
        """The ADK session with its history and state, as the session service has it now.

        Raises:
            NotAlive: the chat is not open, or its session was deleted meanwhile.
        """
        self._open()
        session = await self._runtime.session_service.get_session(
            app_name=self._runtime.app_name, user_id=self.user_id, session_id=self.chat_id
        )
        if session is None:
            raise NotAlive(f"{self.ref}: its ADK session was deleted")
        return session

    def keep_alive(self, seconds: float) -> None:
        """Asks for a stay: the chat is not torn down for so many seconds, though it is idle.

        Raises:
            NotAlive: the chat is not open.
            ValueError: the time is not more than 0.
        """
        self._open()
        self._runtime.keep_alive(self.chat_id, seconds, user_id=self.user_id)

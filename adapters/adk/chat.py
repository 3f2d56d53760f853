"""A chat of `AdkRuntime`: as the runtime keeps it, and as a request has it in hand.

`LiveChat` is the resource `session/<chat id>`: one per chat and process, in the registry of the
runtime. `Chat` is what `async with runtime.chat(...)` gives: while one is open the chat is in use, and
the runner it was opened with stays, also when another request switches the chat to another agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
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
        events: what `send` gave out.
        sender: the task that called `send`.
        reader: the one that asked for an event last; None when nobody has yet.
    """

    __slots__ = ("events", "reader", "sender")

    def __init__(self) -> None:
        self.events: AsyncGenerator[Event, None] | None = None
        self.sender = asyncio.current_task()
        self.reader: asyncio.Task[Any] | None = None

    @property
    def is_over(self) -> bool:
        return self.events is None or self.events.ag_frame is None  # type: ignore[attr-defined]

    async def close(self) -> None:
        if self.events is not None:
            await self.events.aclose()

    def is_left_for(self, other: _Run) -> bool:
        """It stands at an event, and who got that is about another run now."""
        if self.reader is None or self.is_over or self.events.ag_running:  # type: ignore[union-attr]
            return False
        about_the_other = (other.sender, other.reader)
        if not self.reader.done():
            return self.reader in about_the_other
        # It was read under `wait_for`, which makes a task for each event, or its reader has ended.
        return self.sender is None or self.sender.done() or self.sender in about_the_other


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

        Messages of one chat are answered one after the other, whoever sends them. A run that is not
        read to its end is closed with the chat, or when the task that read it begins to read another.

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
        run.events = self._answer(run, live, message, run_config, state_delta)
        self._runs.append(run)
        return run.events

    async def _answer(
        self,
        this: _Run,
        live: LiveChat,
        message: types.Content,
        run_config: RunConfig | None,
        state_delta: dict[str, Any] | None,
    ) -> AsyncGenerator[Event, None]:
        this.reader = asyncio.current_task()
        for left in [run for run in self._runs if run.is_left_for(this)]:
            await (
                left.close()
            )  # It has the turn, and nobody else would end it before the chat does.
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
                        this.reader = asyncio.current_task()
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

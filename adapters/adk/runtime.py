"""`AdkRuntime`: chats on shared ADK runners, reused while somebody uses them and gone afterwards.

Chat → ADK session → runner → agent. Every map stands in a registry of the host, so that the reconciler
sees what lives and tears down what is idle; the runtime itself only makes room when a limit is reached.
A chat is found or made, and marked as in use, in one tick; what has to be waited for (its session, its
runner) comes after, so nothing can end it in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from google.adk.sessions import BaseSessionService

from adapters.adk.agent_config import config_id
from adapters.adk.chat import Chat, LiveChat
from adapters.adk.chat_limits import Room, Victim
from adapters.adk.conversations import Conversations
from adapters.adk.live_chats import LiveChats
from adapters.adk.live_sessions import Identity, session_ref, until_ended
from adapters.adk.shared_runners import AgentFactory, SharedRunners, llm_agent
from adapters.entry import Entry
from adapters.host import Host, check_host
from store.errors import LimitReached, NotAlive
from store.logs import get_logger
from store.recovery import RecoveryStore

log = get_logger("adapters.adk.runtime")

GRACE_SECONDS = 30.0
_TEARDOWN_SECONDS = 30.0
_BY_CLOSE, _BY_SHUTDOWN = "the service ended the chat", "the service shut down"


class AdkRuntime:
    """Chats with ADK agents: `async with runtime.chat(chat_id, user_id, agent_config) as chat`.

    Args:
        host: looks after everything; it must have started.
        session_service: keeps the conversations. With `InMemorySessionService` a chat that goes is
            saved with its transcript.
        create_agent: makes an agent, or an `App`, from an agent configuration; may be async. By
            default a configuration is an agent, or the arguments of an `LlmAgent`.
        app_name: of the ADK sessions, and of the registries.
        recovery: where chats are saved before they go; by default beside the host's log. False saves
            nothing.
        ephemeral: conversations go with their chats.
        max_chats_per_user: of this process; beyond it the least recently used that nobody has open
            goes.
        max_chats: the same for all users together.
        max_runners: of this process, and with them agents; beyond it the least recently used that no
            open chat has goes.
        runner_options: further arguments of every ADK `Runner`, such as `artifact_service`.
        hash_of: makes the short name of an agent configuration.

    Attributes:
        chats, runners, agents, creations, user_chats: the registries, for looking.

    Raises:
        TypeError: it is no host, no session service, or no function.
        PolicyError: a limit below 1, or conversations that would be lost: in memory, not ephemeral,
            and `recovery=False`.
    """

    def __init__(
        self,
        host: Host,
        session_service: BaseSessionService,
        create_agent: AgentFactory = llm_agent,
        *,
        app_name: str = "chat",
        recovery: RecoveryStore | Literal[False] | None = None,
        ephemeral: bool = False,
        max_chats_per_user: int | None = None,
        max_chats: int | None = None,
        max_runners: int | None = None,
        runner_options: Mapping[str, Any] | None = None,
        hash_of: Callable[[str], str] = config_id,
    ) -> None:
        if not isinstance(session_service, BaseSessionService):
            raise TypeError(f"a session service of ADK is wanted, not {session_service!r:.80}")
        if not callable(create_agent):
            raise TypeError(
                f"create_agent is called with a configuration; {create_agent!r:.80} cannot be"
            )
        self.app_name = app_name
        self.session_service = session_service
        self._host = check_host(host)
        self._data = Conversations(host, session_service, recovery, ephemeral=ephemeral)
        self._live = LiveChats(host, app_name, save=self._save, teardown=self._teardown)
        self.chats = self._live.chats
        self.user_chats = self._live.user_chats
        self._shared = SharedRunners(
            host,
            app_name,
            session_service,
            create_agent,
            runner_options or {},
            hash_of,
            most=max_runners,
            release=self._live.release,
        )
        self.runners = self._shared.runners
        self.agents = self._shared.agents
        self.creations = self._shared.creations
        self._room = Room(host, self._live, max_chats_per_user, max_chats, self._end, self._report)
        self._open_chats = 0
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._closing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def sizes(self) -> dict[str, int]:
        """How much is in each registry."""
        registries = (self.chats, self.runners, self.agents, self.creations, self.user_chats)
        return {registry.name: len(registry) for registry in registries}

    # --- chats ----------------------------------------------------------------------------------

    def chat(self, chat_id: str, user_id: str, agent_config: Any) -> Chat:
        """A chat, new or continued, in this process or from another: use it with `async with`.

        Args:
            chat_id: also the id of the ADK session. Two users who use the same id have two chats.
            user_id: whose it is.
            agent_config: which agent answers. Equal configurations share one agent and one runner;
                another configuration than before switches the agent, and the history stays.

        Raises:
            LimitReached: when it is entered: a limit is reached, and what it is about is all in use.
            NotAlive: when it is entered: the runtime is closed.
            Exception: when it is entered: what `create_agent` raises.
        """
        for what, id in (("chat", chat_id), ("user", user_id)):
            if not id.strip() or id != id.strip():
                raise ValueError(f"{id!r} is not a {what} id: it is empty, or has blanks around it")
        return Chat(self, chat_id, user_id, agent_config)

    async def open(
        self, chat_id: str, user_id: str, agent_config: Any
    ) -> tuple[LiveChat, Entry, Entry]:
        """What entering a chat does; `leave` is its other half. Errors as for `chat`."""
        identity = (self.app_name, user_id, chat_id)
        key = self._shared.key(agent_config)
        live, entry, victims = await self._acquire(identity)
        runner: Entry | None = None
        try:
            await self._room.make(victims)
            async with live.opening:
                if not live.ready:
                    await self._data.find(identity)
                    live.ready = True
            while runner is None:
                await self._shared.get(key)
                runner = self._shared.live(key)
            # From here to the link there is no await: the runner cannot go.
            before = live.uses()
            self._shared.attach(runner)
            live.runners.append(runner.ref)
            live.last_runner = runner.ref
            live.agent = key.id
            if live.uses() != before:
                self._host.link(entry.ref, uses=live.uses())
        except BaseException:
            await self._let_go(live, entry)
            unused = not entry.in_use and live.ending is None and self._live.has(live, entry)
            if unused and not live.ready:
                self._live.remove(live, "it could not be opened")
            raise
        return live, entry, runner

    async def _acquire(self, identity: Identity) -> tuple[LiveChat, Entry, list[Victim]]:
        """Finds or makes a chat and marks it as in use; with it those that have to make room."""
        while True:
            if self._closing is not None:
                raise NotAlive("the runtime is closed")
            ref = session_ref(self._host, identity)
            entry = self._host.entries.get(ref)
            if entry is not None and entry.terminating:
                await until_ended(self._host, entry)
                continue
            victims: list[Victim] = []
            if entry is None or entry.obj is not self.chats.get(entry.key):
                try:
                    victims = self._room.choose(identity[1])
                except LimitReached:
                    leaving = self._room.leaving(identity[1])
                    if leaving is None:
                        raise
                    await until_ended(self._host, leaving)
                    continue
                entry = self._live.add(identity, ref)
            live: LiveChat = entry.obj
            if live.ending is not None and not entry.in_use:
                # It could not be ended when its last user left; what is said now is another matter.
                if live.ending:
                    entry.terminating = _BY_CLOSE
                    await self._end(live, entry, _BY_CLOSE)
                    continue
                live.ending = None
            self._host.begin_use(ref)
            self._open_chats += 1
            self._nobody.clear()
            self._live.touch(live, entry)
            return live, entry, victims

    async def leave(self, live: LiveChat, entry: Entry, runner: Entry) -> None:
        """The other half of `open`."""
        before = live.uses()
        live.runners.remove(runner.ref)
        self._shared.detach(runner)
        live.last_used = time.monotonic()
        alive = self._live.has(live, entry)
        if alive and live.uses() != before:
            self._host.link(entry.ref, uses=live.uses())
        await self._let_go(live, entry)

    async def _let_go(self, live: LiveChat, entry: Entry) -> None:
        """One less has it open; the last one does what was put off until then."""
        self._host.end_use(entry)
        self._open_chats -= 1
        if not self._open_chats:
            self._nobody.set()
        if entry.in_use or entry.terminating or not self._live.has(live, entry):
            return
        if live.ending is not None:
            entry.terminating = _BY_CLOSE
            try:
                await self._end(live, entry, _BY_CLOSE)
            except Exception as error:
                self._report(entry, error)

    # --- the end of a chat ----------------------------------------------------------------------

    async def end_chat(
        self, chat_id: str, *, user_id: str | None = None, delete: bool = False
    ) -> bool:
        """Ends a chat: now, or as soon as nobody has it open any more.

        The conversation stays, and the next `chat` goes on with it, unless it is to be deleted or the
        runtime is ephemeral.

        Args:
            chat_id: of the chat.
            user_id: whose it is; needed where two users' chats share an id, and to delete the
                conversation of a chat that this process does not have.
            delete: the conversation and its recovery record go too.

        Returns:
            Whether this process had the chat.

        Raises:
            ValueError: it is not clear whose chat is meant.
            Exception: what saving or deleting it raises; the chat stays.
        """
        found = self._live.find(chat_id, user_id)
        if found is None:
            if delete and user_id is not None:
                await self._data.delete((self.app_name, user_id, chat_id))
            return False
        live, entry = found
        if entry.terminating:
            await until_ended(self._host, entry)
            await self.end_chat(chat_id, user_id=live.identity[1], delete=delete)
            return True
        if entry.in_use:
            live.ending = delete or bool(live.ending)
            return True
        entry.terminating = _BY_CLOSE
        await self._end(live, entry, _BY_CLOSE, delete=delete)
        return True

    def heartbeat(self, chat_id: str, *, user_id: str | None = None) -> bool:
        """Records that somebody still looks at a chat; False when this process does not have it.

        Raises:
            ValueError: it is not clear whose chat is meant.
        """
        found = self._live.find(chat_id, user_id)
        if found is None or found[1].terminating:
            return False
        live, entry = found
        self._live.touch(live, entry)
        self._host.entry_used(entry.ref)
        return True

    def keep_alive(self, chat_id: str, seconds: float, *, user_id: str | None = None) -> bool:
        """Asks for a stay of so many seconds; False when this process does not have the chat.

        Raises:
            ValueError: it is not clear whose chat is meant, or the time is not more than 0.
        """
        found = self._live.find(chat_id, user_id)
        if found is None or found[1].terminating:
            return False
        live, entry = found
        self._host.keep_alive(entry.ref, seconds)
        live.kept_until = max(live.kept_until, time.monotonic() + seconds)
        return True

    async def _end(
        self, live: LiveChat, entry: Entry, reason: str, *, delete: bool = False
    ) -> None:
        """Ends a chat that was marked as terminating; when that fails it stays.

        Its data goes too if `delete` says so, or an end that was put off.

        Raises:
            Exception: what saving or deleting it raises.
        """
        try:
            if not delete:
                await self._save(entry.key, live)
            await self._drop_data(live, delete=delete)
        except BaseException:
            if self._host.entries.get(entry.ref) is entry:
                entry.terminating = ""
            raise
        self._live.remove(live, reason)

    async def _save(self, _: str, live: LiveChat) -> None:
        if not live.ending:
            await self._data.save(live.identity, live.agent)

    async def _teardown(self, _: str, live: LiveChat) -> None:
        """What the reconciler's order does, after `_save`."""
        await self._drop_data(live)
        self._live.remove(live)

    async def _drop_data(self, live: LiveChat, *, delete: bool = False) -> None:
        # If it is cut short the chat may stay, and has to look for its data anew.
        live.ready = False
        await (self._data.delete if delete or live.ending else self._data.let_go)(live.identity)

    def _report(self, entry: Entry, error: Exception) -> None:
        reason = f"it stays: {error or type(error).__name__}"
        log.warning("a chat could not be ended", ref=entry.ref, reason=reason)
        self._host.record("cleanup_failed", entry.ref, reason=reason)

    # --- the end of the runtime -----------------------------------------------------------------

    async def close(self, grace: float = GRACE_SECONDS) -> None:
        """Ends in order: no new chats, those in use finish, then all chats, runners and agents.

        A chat that cannot be saved is reported, and goes all the same: the process ends. Who is
        cancelled while waiting for the end does not stop it; who comes later waits for the same one.

        Args:
            grace: seconds to wait for chats that are in use.
        """
        last = self._closing
        failed = last is not None and last.done() and (last.cancelled() or last.exception())
        if last is None or failed:
            last = self._closing = asyncio.create_task(self._close(grace), name="runtime closes")
        await asyncio.shield(last)

    async def _close(self, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await self._nobody.wait()
        except TimeoutError:
            log.warning("chats are still in use at the end", open=self._open_chats)
        for name, live in list(self.chats.items()):
            entry = self._host.entries.get(f"session/{name}")
            if entry is None:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TEARDOWN_SECONDS):
                    await until_ended(self._host, entry)
            if not self._live.has(live, entry):
                continue
            entry.terminating = _BY_SHUTDOWN
            try:
                await self._end(live, entry, _BY_SHUTDOWN)
            except Exception as error:
                self._report(entry, error)
                self._live.remove(live, "the service shut down; it could not be saved")
        await self._shared.close()
        for registry in (self.chats, self.user_chats, self.runners, self.agents, self.creations):
            if registry.host is not None:
                self._host.remove(registry)

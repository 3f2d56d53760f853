"""Agents and runners shared by configuration: made once however many ask, closed as ADK closes them.

A runner stands for its agent: both have the name of the configuration, and since closing a runner
closes the toolsets and plugins of its agent, the agent goes with it and is made anew when it is wanted
again. While one is being made, the task that makes it stands in a registry of its own; whoever asks
meanwhile waits for it. One who gives up waiting does not stop it for the others; when the last one does,
it is stopped, so that nothing is stuck behind a factory that hangs. A failure reaches all who waited, and
is not remembered.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.adk.agents import BaseAgent, LlmAgent
from google.adk.apps import App
from google.adk.runners import Runner
from google.adk.sessions import BaseSessionService

from adapters.adk.agent_config import canonical, config_id
from adapters.adk.chat_limits import TO_MAKE_ROOM
from adapters.adk.live_sessions import short, until_ended
from adapters.entry import Entry
from adapters.host import Host
from store.errors import LimitReached, NotAlive, PolicyError
from store.logs import get_logger

log = get_logger("adapters.adk.runtime")

_CLOSE_SECONDS = 30.0
_STOP_SECONDS = 5.0

AgentFactory = Callable[[Any], BaseAgent | App | Awaitable[BaseAgent | App]]
"""Makes an agent, or an app around one, from a configuration; may be a coroutine function."""


def llm_agent(config: Any) -> BaseAgent:
    """The factory when none is given: an agent, or the arguments of an `LlmAgent` as a mapping.

    Raises:
        TypeError: the configuration is neither.
    """
    if isinstance(config, BaseAgent):
        return config
    if isinstance(config, Mapping):
        return LlmAgent(**config)
    raise TypeError(
        f"an agent configuration of type {type(config).__name__} needs a create_agent of your own"
    )


@dataclass(frozen=True, slots=True)
class AgentKey:
    """The name of a configuration, and the configuration.

    Attributes:
        id: short, the same for agent and runner.
        text: see `canonical`.
        config: as it was given; held, because what counts by identity must stay alive.
    """

    id: str
    text: str = field(repr=False)
    config: Any = field(repr=False)


@dataclass(slots=True)
class Creation:
    """An agent that is being made.

    Attributes:
        key: of its configuration.
        task: that makes it.
        waiting: how many wait for it.
        has_room: it is the factory's turn; what had to make room for it is closed.
        stopped: nobody wanted it any more.
    """

    key: AgentKey
    task: asyncio.Task[None]
    waiting: int = 0
    has_room: bool = False
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True
        self.task.cancel()


@dataclass(slots=True)
class SharedAgent:
    """An agent, what it was made from, and how many open chats have its runner."""

    key: AgentKey
    agent: BaseAgent | App
    creation: Creation
    open: int = 0

    @property
    def wanted(self) -> bool:
        """An open chat has it, or is about to."""
        return bool(self.open or self.creation.waiting)


class SharedRunners:
    """The agents and runners of one runtime.

    Args:
        host: looks after them.
        app_name: of every runner.
        session_service: of every runner.
        create_agent: makes an agent from a configuration.
        runner_options: further arguments of every `Runner`, such as `artifact_service`.
        hash_of: a short name for a canonical text.
        most: so many runners at the most, those that are being made included; None is no limit.
        release: called with the reference of a runner that makes room: idle chats let go of it.

    Raises:
        PolicyError: a limit below 1.
    """

    def __init__(
        self,
        host: Host,
        app_name: str,
        session_service: BaseSessionService,
        create_agent: AgentFactory,
        runner_options: Mapping[str, Any],
        hash_of: Callable[[str], str] = config_id,
        *,
        most: int | None = None,
        release: Callable[[str], None] = lambda _: None,
    ) -> None:
        if most is not None and most < 1:
            raise PolicyError(f"a limit of {most} runners cannot be: give at least 1, or None")
        self._host = host
        self._app_name = app_name
        self._session_service = session_service
        self._create_agent = create_agent
        self._runner_options = dict(runner_options)
        self._hash_of = hash_of
        self._most = most
        self._release = release
        self._closed = False
        self.agents = host.registry("agent", name="agents", teardown=_nothing)
        self.runners = host.registry(
            "runner", name="runners", uses=lambda id, _: [f"agent/{id}"], teardown=self.end
        )
        self.creations = host.registry("agent_creation", name="creations", teardown=_nothing)

    def key(self, config: Any) -> AgentKey:
        """The name under which a configuration is shared; another for each configuration and app.

        Raises:
            ValueError: it contains itself.
        """
        text = canonical(config)
        name = id = f"{short(self._app_name)}-{self._hash_of(text)}"
        number = 1
        while (other := self._text_of(id)) is not None and other != text:
            number += 1
            id = f"{name}-{number}"
        return AgentKey(id, text, config)

    def _text_of(self, id: str) -> str | None:
        held = self.agents.get(id) or self.creations.get(id)
        return None if held is None else str(held.key.text)

    def live(self, key: AgentKey) -> Entry | None:
        """The runner of a configuration, if it is there and not being torn down."""
        entry = self._entry(key.id)
        return None if entry is None or entry.terminating else entry

    def _entry(self, id: str) -> Entry | None:
        entry = self._host.entries.get(f"runner/{id}")
        return entry if entry is not None and entry.registry is self.runners else None

    def attach(self, runner: Entry) -> None:
        """A chat that is open has this runner: it does not make room, and is the latest used."""
        self.agents[runner.key].open += 1
        self._touch(runner)

    def detach(self, runner: Entry) -> None:
        """The other half of `attach`."""
        if self.runners.get(runner.key) is runner.obj:  # Else it was closed with the runtime.
            self.agents[runner.key].open -= 1
            self._touch(runner)

    def _touch(self, runner: Entry) -> None:
        # To the end of the dict, the place of the most recently used; nothing else changes.
        dict.__setitem__(self.runners, runner.key, dict.pop(self.runners, runner.key))

    async def get(self, key: AgentKey) -> None:
        """Returns once the runner is there; look it up in the same tick.

        Raises:
            LimitReached: there are as many as may be, and an open chat has each of them.
            NotAlive: they are being closed.
            Exception: what `create_agent` raised.
        """
        while self.live(key) is None:
            if self._closed:
                raise NotAlive("the runtime is closed")
            if (entry := self._entry(key.id)) is not None:
                await until_ended(self._host, entry)
                continue
            creation = self.creations.get(key.id)
            if creation is None:
                victim = None
                if self._is_full():
                    victim = self._oldest_idle()
                    if victim is None:
                        await self._until_one_left()
                        continue
                task = asyncio.create_task(self._create(key, victim), name=f"create agent/{key.id}")
                creation = self.creations[key.id] = Creation(key, task)
                task.add_done_callback(lambda done: self._created(key.id, done))
            # Until all who wait have it in hand it makes room for nobody.
            creation.waiting += 1
            try:
                await asyncio.wait([creation.task])
            finally:
                creation.waiting -= 1
                if creation.has_room and not (creation.waiting or creation.task.done()):
                    creation.stop()
            if not creation.stopped:
                creation.task.result()

    def _created(self, id: str, done: asyncio.Task[None]) -> None:
        self.creations.pop(id, None)
        if not done.cancelled():
            done.exception()  # Whoever waits gets it; that nobody does is no error.

    # --- the limit --------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        """One more would be too many, not counting those that make room already."""
        if self._most is None:
            return False
        alive = {id for id in self.runners if not self._makes_room(id)} | set(self.creations)
        return len(alive) >= self._most

    def _makes_room(self, id: str) -> bool:
        entry = self._entry(id)
        return entry is not None and entry.terminating == TO_MAKE_ROOM

    def _oldest_idle(self, tried: Collection[str] = ()) -> Entry | None:
        """The runner that was not used for the longest time and that nobody has; it is marked."""
        for id in self.runners:
            entry = self._entry(id)
            if entry is None or entry.terminating or entry.holders or entry.ref in tried:
                continue
            if self.agents[id].wanted:
                continue
            entry.terminating = TO_MAKE_ROOM
            self._release(entry.ref)
            return entry
        return None

    async def _until_one_left(self) -> None:
        """Waits for a runner that is being torn down anyway, or that could not be made.

        Raises:
            LimitReached: there is none: all are in use.
        """
        for id in self.runners:
            entry = self._entry(id)
            if entry is not None and entry.terminating and entry.terminating != TO_MAKE_ROOM:
                await until_ended(self._host, entry)
                return
        raise self._full()

    def _full(self) -> LimitReached:
        return LimitReached(
            f"the process has {self._most} runners, which is the limit, and none can make room: open "
            "chats have them all, or they cannot be closed"
        )

    async def _make_room(self, victim: Entry) -> None:
        """Ends the chosen runner, or another one in its place.

        Raises:
            LimitReached: what cannot be closed stays, and nobody else can make room.
        """
        tried: set[str] = set()
        while True:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self.end(victim.key, victim.obj, TO_MAKE_ROOM)
            except Exception as error:
                victim.terminating = ""
                reason = str(error) or type(error).__name__
                log.warning("a runner could not make room", ref=victim.ref, reason=reason)
                self._host.record("cleanup_failed", victim.ref, reason=f"it stays: {reason}")
                tried.add(victim.ref)
                other = self._oldest_idle(tried)
                if other is None:
                    raise self._full() from error
                victim = other
            except BaseException:
                victim.terminating = ""
                raise
            else:
                return

    # --- making and ending ------------------------------------------------------------------------

    async def _create(self, key: AgentKey, victim: Entry | None) -> None:
        if victim is not None:
            await self._make_room(victim)
        creation = self.creations[key.id]
        if not creation.waiting:
            return
        creation.has_room = True
        made = self._create_agent(key.config)
        agent = await made if inspect.isawaitable(made) else made
        if not isinstance(agent, BaseAgent | App):
            raise TypeError(
                f"create_agent gave {agent!r:.80} for agent/{key.id}, not an agent or an app"
            )
        options: dict[str, Any] = {"app_name": self._app_name, **self._runner_options}
        options["app" if isinstance(agent, App) else "agent"] = agent
        runner = Runner(session_service=self._session_service, **options)
        if creation.stopped:
            await runner.close()  # The factory did not hear of it.
            return
        self.agents[key.id] = SharedAgent(key, agent, creation)
        self.runners[key.id] = runner

    async def end(self, id: str, runner: Runner, reason: str | None = None) -> None:
        """Closes a runner with its toolsets and plugins, and lets it and its agent go.

        Args:
            id: of the runner.
            runner: itself.
            reason: for the log, where no order says why.

        Raises:
            RuntimeError: a plugin failed to close; runner and agent stay.
        """
        await runner.close()
        if self.runners.get(id) is runner:
            if reason is not None:
                for ref in (f"runner/{id}", f"agent/{id}"):
                    if (entry := self._host.entries.get(ref)) is not None:
                        self._host.forget(entry, reason=reason)
            self.runners.pop(id)
            self.agents.pop(id, None)

    async def close(self) -> None:
        """Stops creations, then closes all runners; one that fails is reported and let go."""
        self._closed = True
        if tasks := [creation.task for creation in self.creations.values()]:
            # So that each has begun: one that is to make room has to hear of its end.
            await asyncio.sleep(0)
            for creation in list(self.creations.values()):
                creation.stop()
            _, hanging = await asyncio.wait(tasks, timeout=_STOP_SECONDS)
            for task in hanging:
                log.warning("an agent is still being made at the end", creation=task.get_name())
        for id, runner in list(self.runners.items()):
            try:
                await self.end(id, runner)
            except Exception as error:
                log.warning("a runner failed to close", ref=f"runner/{id}", reason=str(error))
                self.runners.pop(id, None)
        self.agents.clear()


def _nothing(_: str, __: Any) -> None:
    """What an agent needs for its end: its runner has closed everything."""

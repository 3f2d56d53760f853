"""Agents and runners shared by configuration: made once however many ask, closed as ADK closes them.

A runner stands for its agent: both have the name of the configuration, and since closing a runner
closes the toolsets and plugins of its agent, the agent goes with it and is made anew when it is wanted
again. While one is being made, the task that makes it stands in a registry of its own; whoever asks
meanwhile waits for it, and one who gives up waiting does not stop it for the others. A failure reaches
all who waited, and is not remembered.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.adk.agents import BaseAgent, LlmAgent
from google.adk.apps import App
from google.adk.runners import Runner
from google.adk.sessions import BaseSessionService

from adapters.adk.agent_config import canonical, config_id
from adapters.adk.live_sessions import until_ended
from adapters.entry import Entry
from adapters.host import Host
from adapters.logs import get_logger

log = get_logger("adapters.adk.runtime")

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
class SharedAgent:
    """An agent and what it was made from."""

    key: AgentKey
    agent: BaseAgent | App


@dataclass(slots=True)
class Creation:
    """An agent that is being made."""

    key: AgentKey
    task: asyncio.Task[None]


class SharedRunners:
    """The agents and runners of one runtime.

    Args:
        host: looks after them.
        app_name: of every runner.
        session_service: of every runner.
        create_agent: makes an agent from a configuration.
        runner_options: further arguments of every `Runner`, such as `artifact_service`.
        hash_of: a short name for a canonical text.
    """

    def __init__(
        self,
        host: Host,
        app_name: str,
        session_service: BaseSessionService,
        create_agent: AgentFactory,
        runner_options: Mapping[str, Any],
        hash_of: Callable[[str], str] = config_id,
    ) -> None:
        self._host = host
        self._app_name = app_name
        self._session_service = session_service
        self._create_agent = create_agent
        self._runner_options = dict(runner_options)
        self._hash_of = hash_of
        self.agents = host.registry("agent", name="agents", teardown=_nothing)
        self.runners = host.registry(
            "runner", name="runners", uses=lambda id, _: [f"agent/{id}"], teardown=self.end
        )
        self.creations = host.registry("agent_creation", name="creations", teardown=_nothing)

    def key(self, config: Any) -> AgentKey:
        """The name under which a configuration is shared; another for each configuration.

        Raises:
            ValueError: it contains itself.
        """
        text = canonical(config)
        name = id = self._hash_of(text)
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
        entry = self._host.entries.get(f"runner/{key.id}")
        return None if entry is None or entry.terminating else entry

    async def get(self, key: AgentKey) -> None:
        """Returns once the runner is there; look it up in the same tick.

        Raises:
            Exception: what `create_agent` raised.
        """
        while self.live(key) is None:
            if (entry := self._host.entries.get(f"runner/{key.id}")) is not None:
                await until_ended(self._host, entry)
                continue
            creation = self.creations.get(key.id)
            if creation is None:
                task = asyncio.create_task(self._create(key), name=f"create agent/{key.id}")
                creation = self.creations[key.id] = Creation(key, task)
                task.add_done_callback(lambda done: self._created(key.id, done))
            await asyncio.shield(creation.task)

    def _created(self, id: str, done: asyncio.Task[None]) -> None:
        self.creations.pop(id, None)
        if not done.cancelled():
            done.exception()  # Whoever waits gets it; that nobody does is no error.

    async def _create(self, key: AgentKey) -> None:
        made = self._create_agent(key.config)
        agent = await made if inspect.isawaitable(made) else made
        options: dict[str, Any] = {"app_name": self._app_name, **self._runner_options}
        options["app" if isinstance(agent, App) else "agent"] = agent
        runner = Runner(session_service=self._session_service, **options)
        self.agents[key.id] = SharedAgent(key, agent)
        self.runners[key.id] = runner

    async def end(self, id: str, runner: Runner) -> None:
        """Closes a runner with its toolsets and plugins, and lets it and its agent go.

        Raises:
            RuntimeError: a plugin failed to close; runner and agent stay.
        """
        await runner.close()
        if self.runners.get(id) is runner:
            self.runners.pop(id)
            self.agents.pop(id, None)

    async def close(self) -> None:
        """Waits for creations, then closes all runners; one that fails is reported and let go."""
        while self.creations:
            tasks = [creation.task for creation in self.creations.values()]
            await asyncio.wait(tasks)
            await asyncio.sleep(0)
        for id, runner in list(self.runners.items()):
            try:
                await self.end(id, runner)
            except Exception as error:
                log.warning("a runner failed to close", ref=f"runner/{id}", reason=str(error))
                self.runners.pop(id, None)
        self.agents.clear()


def _nothing(_: str, __: Any) -> None:
    """What an agent needs for its end: its runner has closed everything."""

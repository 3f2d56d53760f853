"""A service of aether-frame's shape, written for these tests, faithful in its faults.

Real ADK runners, agents and session services; the model is scripted and local. Each fault is marked
`FAULT`, and does what two reviews of real services found: entries stay behind, runners are never
closed, nobody ends what is idle. Nothing in here knows of the reconciler.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

from google.adk.agents import LlmAgent
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.adk.tools.base_toolset import BaseToolset
from google.genai import types

APP = "frame"


class ScriptedLlm(BaseLlm):
    """Says the same thing each time; waits for `gate` first, where there is one."""

    gate: Any = None

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        if self.gate is not None:
            await self.gate.wait()
        yield LlmResponse(content=types.Content(role="model", parts=[types.Part(text="yes")]))


class Connection(BaseToolset):
    """Stands for what a runner holds open (an MCP connection): it counts how often it was closed."""

    open = 0

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0
        self.fail_to_close = 0
        Connection.open += 1

    async def get_tools(self, readonly_context: Any = None) -> list[Any]:
        return []

    async def close(self) -> None:
        self.closed += 1
        if self.closed == 1:
            Connection.open -= 1


@dataclass
class AgentConfig:
    agent_type: str
    system_prompt: str = "Answer."
    model_config: dict[str, Any] = field(default_factory=dict)


class DomainAgent:
    """The service's own agent around an ADK agent."""

    def __init__(self, config: AgentConfig, gate: asyncio.Event | None = None) -> None:
        self.connection = Connection()
        self.cleaned = 0
        self.adk_agent = LlmAgent(
            name="agent",
            model=ScriptedLlm(model="scripted", gate=gate),
            instruction=config.system_prompt,
            tools=[self.connection],
        )

    async def cleanup(self) -> None:
        self.cleaned += 1


@dataclass
class ChatSession:
    user_id: str
    chat_session_id: str
    active_agent_id: str | None = None
    active_adk_session_id: str | None = None
    active_runner_id: str | None = None
    available_knowledge: list[Any] = field(default_factory=list)
    created_at: datetime = field(default_factory=datetime.now)
    last_activity: datetime = field(default_factory=datetime.now)


class RunnerManager:
    def __init__(self, agent_runner_mapping: dict[str, str], agent_cleanup: Any) -> None:
        self.runners: dict[str, dict[str, Any]] = {}
        self.session_to_runner: dict[str, str] = {}
        self.config_to_runner: dict[str, str] = {}
        self._config_locks: dict[str, asyncio.Lock] = {}
        self._runner_locks: dict[str, asyncio.Lock] = {}
        self._config_creation_tasks: dict[str, asyncio.Task[str]] = {}
        self.agent_runner_mapping = agent_runner_mapping
        self.agent_cleanup_callback = agent_cleanup

    def compute_config_hash(self, config: AgentConfig) -> str:
        text = json.dumps([config.agent_type, config.system_prompt, config.model_config])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    async def get_or_create_runner(
        self,
        agent_config: AgentConfig,
        task_request: Any = None,
        adk_agent: Any = None,
        engine_session_id: str | None = None,
        create_session: bool = True,
        allow_reuse: bool = True,
    ) -> tuple[str, str | None]:
        config = self.compute_config_hash(agent_config)
        async with self._config_locks.setdefault(config, asyncio.Lock()):
            runner_id = self.config_to_runner.get(config) if allow_reuse else None
            if runner_id is None:
                task = asyncio.create_task(self._create_runner(agent_config, config, adk_agent))
                self._config_creation_tasks[config] = task  # FAULT: it stays there when it is done.
                runner_id = await task
                self.config_to_runner[config] = runner_id
        # FAULT: a mapping may name a runner that is gone; then this fails, and so does the next try.
        session_id = None
        if create_session:
            session_id = await self.create_session(runner_id, "user", engine_session_id)
        return runner_id, session_id

    async def _create_runner(self, agent_config: AgentConfig, config: str, agent: Any) -> str:
        runner_id = f"runner_{uuid4().hex[:12]}"
        service = InMemorySessionService()
        self._runner_locks[runner_id] = asyncio.Lock()
        self.runners[runner_id] = {
            "runner": Runner(app_name=APP, agent=agent, session_service=service),
            "session_service": service,
            "agent_config": agent_config,
            "config_hash": config,
            "sessions": {},
            "session_user_ids": {},
            "created_at": datetime.now(),
            "last_activity": datetime.now(),
            "active_tasks": 0,
        }
        return runner_id

    async def create_session(self, runner_id: str, user: str, id: str | None = None) -> str:
        context = self.runners.get(runner_id)
        if context is None:
            raise RuntimeError(f"runner {runner_id} does not exist")
        id = id or f"adk_{uuid4().hex[:12]}"
        session = await context["session_service"].create_session(
            app_name=APP, user_id=user, session_id=id
        )
        context["sessions"][id] = session
        context["session_user_ids"][id] = user
        self.session_to_runner[id] = runner_id
        self.mark_runner_activity(runner_id)
        return id

    async def get_runner_for_agent(self, agent_id: str) -> str:
        runner_id = self.agent_runner_mapping.get(agent_id)
        if runner_id is None:
            raise RuntimeError(f"no runner found for agent {agent_id}")
        if runner_id not in self.runners:
            raise RuntimeError(f"runner {runner_id} of agent {agent_id} does not exist")
        return runner_id

    def mark_runner_activity(self, runner_id: str) -> None:
        if runner_id in self.runners:
            self.runners[runner_id]["last_activity"] = datetime.now()

    @asynccontextmanager
    async def acquire_runner(self, runner_id: str) -> AsyncIterator[dict[str, Any]]:
        context = self.runners[runner_id]
        context["active_tasks"] += 1
        try:
            yield context
        finally:
            context["active_tasks"] -= 1
            self.mark_runner_activity(runner_id)

    async def cleanup_runner(self, runner_id: str) -> bool:
        context = self.runners.get(runner_id)
        if context is None:
            return False
        for id in context["sessions"]:
            self.session_to_runner.pop(id, None)
        context["session_user_ids"].clear()
        # FAULT: ADK's Runner has no `shutdown`, so that the runner is never closed.
        if hasattr(context["runner"], "shutdown"):
            await context["runner"].shutdown()
        self.config_to_runner.pop(context["config_hash"], None)
        agents = [a for a, runner in self.agent_runner_mapping.items() if runner == runner_id]
        for agent_id in agents:
            del self.agent_runner_mapping[agent_id]
        del self.runners[runner_id]
        # FAULT: `_config_locks` and `_runner_locks` are forgotten, and all agents but the first.
        for agent_id in agents[:1]:
            await self.agent_cleanup_callback(agent_id)
        return True

    async def remove_session_from_runner(self, runner_id: str, session_id: str) -> bool:
        context = self.runners.get(runner_id)
        if context is None or session_id not in context["sessions"]:
            return False
        await context["session_service"].delete_session(
            app_name=APP, user_id=context["session_user_ids"][session_id], session_id=session_id
        )
        del context["sessions"][session_id]
        del context["session_user_ids"][session_id]
        self.session_to_runner.pop(session_id, None)
        return True  # FAULT: the lists in `_agent_sessions` only grow.


class AgentManager:
    def __init__(self) -> None:
        self._agents: dict[str, DomainAgent] = {}
        self._agent_configs: dict[str, AgentConfig] = {}
        self._agent_metadata: dict[str, dict[str, Any]] = {}

    async def create_agent(
        self, config: AgentConfig, gate: asyncio.Event | None = None
    ) -> tuple[str, DomainAgent]:
        agent_id = f"agent_{uuid4().hex[:12]}"
        self._agent_configs[agent_id] = config
        await asyncio.sleep(0)
        agent = self._agents[agent_id] = DomainAgent(config, gate)
        self._agent_metadata[agent_id] = {"last_activity": datetime.now()}
        return agent_id, agent

    async def cleanup_agent(self, agent_id: str) -> bool:
        agent = self._agents.pop(agent_id, None)
        if agent is None:
            return False
        await agent.cleanup()
        self._agent_configs.pop(agent_id, None)
        self._agent_metadata.pop(agent_id, None)
        return True  # FAULT: its runner, and everything that maps the agent, stays.


class AdkSessionManager:
    session_idle_timeout_seconds = 0  # FAULT: off by default, so nobody ends what is idle.

    def __init__(self) -> None:
        self.chat_sessions: dict[str, ChatSession] = {}
        self._cleared_sessions: dict[str, dict[str, Any]] = {}
        self._pending_recoveries: dict[str, Any] = {}
        self.archived: dict[str, str | None] = {}

    async def cleanup_chat_session(
        self, chat_session_id: str, runner_manager: RunnerManager, agent_manager: Any = None
    ) -> bool:
        """FAULT: nothing in the service calls it."""
        chat = self.chat_sessions.get(chat_session_id)
        if chat is None:
            return False
        self.archived[chat_session_id] = chat.active_agent_id
        runner_id = chat.active_runner_id
        if runner_id and chat.active_adk_session_id:
            await runner_manager.remove_session_from_runner(runner_id, chat.active_adk_session_id)
            others = (c for c in self.chat_sessions.values() if c is not chat)
            if not any(c.active_runner_id == runner_id for c in others):
                context = runner_manager.runners.get(runner_id)
                if context is not None and not context["sessions"]:
                    await runner_manager.cleanup_runner(runner_id)
        del self.chat_sessions[chat_session_id]
        # FAULT: never taken out again.
        self._cleared_sessions[chat_session_id] = {"cleared_at": datetime.now()}
        return True


class AdkFrameworkAdapter:
    def __init__(self) -> None:
        self._agent_runners: dict[str, str] = {}
        self._agent_sessions: dict[str, list[str]] = {}
        self._config_agents: dict[str, list[str]] = {}
        self._mapping_lock = asyncio.Lock()
        self.agent_manager = AgentManager()
        self.adk_session_manager = AdkSessionManager()
        self.runner_manager = RunnerManager(self._agent_runners, self._handle_agent_cleanup)

    async def create(self, config: AgentConfig, gate: asyncio.Event | None = None) -> str:
        """The request that makes an agent, with a runner of its own."""
        agent_id, agent = await self.agent_manager.create_agent(config, gate)
        runner_id, _ = await self.runner_manager.get_or_create_runner(
            config, None, agent.adk_agent, create_session=False, allow_reuse=False
        )
        async with self._mapping_lock:
            self._agent_runners[agent_id] = runner_id
            self._agent_sessions[agent_id] = []
            name = self.runner_manager.compute_config_hash(config)
            self._config_agents.setdefault(name, []).append(agent_id)
        return agent_id

    async def ask(self, config: AgentConfig, adk_agent: Any) -> str:
        """The request that names a configuration, and reuses its runner; returns the answer."""
        runner_id, session_id = await self.runner_manager.get_or_create_runner(
            config, None, adk_agent
        )
        assert session_id is not None
        return await self._run(runner_id, "user", session_id)

    async def chat(self, agent_id: str, chat_id: str, user: str = "user") -> str:
        """The request that says something to an agent; returns the answer."""
        if agent_id not in self.agent_manager._agents:
            raise RuntimeError(f"agent {agent_id} not found")
        chats = self.adk_session_manager.chat_sessions
        self.adk_session_manager._cleared_sessions.pop(chat_id, None)
        chat = chats.setdefault(chat_id, ChatSession(user, chat_id))
        chat.last_activity = datetime.now()
        runner_id = await self.runner_manager.get_runner_for_agent(agent_id)
        context = self.runner_manager.runners[runner_id]
        if chat.active_adk_session_id not in context["sessions"]:
            session_id = await self.runner_manager.create_session(runner_id, user)
            self._agent_sessions.setdefault(agent_id, []).append(session_id)
            chat.active_agent_id, chat.active_runner_id = agent_id, runner_id
            chat.active_adk_session_id = session_id
        assert chat.active_adk_session_id is not None
        return await self._run(runner_id, user, chat.active_adk_session_id)

    async def _run(self, runner_id: str, user: str, session_id: str) -> str:
        runner = self.runner_manager.runners[runner_id]["runner"]
        said = ""
        async for event in runner.run_async(
            user_id=user,
            session_id=session_id,
            new_message=types.Content(role="user", parts=[types.Part(text="Is it so?")]),
        ):
            if event.content and event.content.parts:
                said += event.content.parts[0].text or ""
        self.runner_manager.mark_runner_activity(runner_id)
        return said

    async def cleanup_chat_session(self, chat_session_id: str) -> bool:
        return await self.adk_session_manager.cleanup_chat_session(
            chat_session_id, self.runner_manager, agent_manager=self.agent_manager
        )

    async def _handle_agent_cleanup(self, agent_id: str) -> None:
        self._agent_runners.pop(agent_id, None)
        for config, agents in list(self._config_agents.items()):
            if agent_id in agents:
                self._config_agents[config] = [a for a in agents if a != agent_id]
                if not self._config_agents[config]:
                    del self._config_agents[config]
        await self.agent_manager.cleanup_agent(agent_id)
        # FAULT: `_agent_sessions` is forgotten.


def dicts(frame: AdkFrameworkAdapter) -> dict[str, dict[Any, Any]]:
    """Every dict of the shape, by its path."""
    paths = {
        "": ("_agent_runners", "_agent_sessions", "_config_agents"),
        "runner_manager": (
            "runners", "session_to_runner", "config_to_runner", "_config_locks", "_runner_locks",
            "_config_creation_tasks", "agent_runner_mapping",
        ),
        "adk_session_manager": ("chat_sessions", "_cleared_sessions", "_pending_recoveries"),
        "agent_manager": ("_agents", "_agent_configs", "_agent_metadata"),
    }  # fmt: skip
    found = {}
    for part, names in paths.items():
        owner = getattr(frame, part) if part else frame
        for name in names:
            if hasattr(owner, name):
                found[f"{part}.{name}".lstrip(".")] = getattr(owner, name)
    return found


def left(frame: AdkFrameworkAdapter) -> dict[str, int]:
    """The dicts that are not empty, and how much is in them."""
    return {path: len(content) for path, content in dicts(frame).items() if content}

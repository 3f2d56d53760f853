"""A small chat service on google-adk that leaks, as such services do. The reconciler cleans it up.

`ChatService` is written the way these services are written: runners are reused through maps, locks
are made per configuration, chats are kept until somebody ends them. And it forgets: a runner that is
destroyed stays in `_agent_runners` and is never closed, `_agent_sessions` only grows, nobody drops a
lock, most chats are never ended. Not a line of it knows of the reconciler. `look_after` is all that
is added: it tells a `Host` which dicts to watch, and how to end a chat, a runner and an agent.

Run it by hand, with a worker in another terminal:

    python examples/leaky_chat.py --url redis://127.0.0.1:6379
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from google.adk.agents import LlmAgent
from google.adk.agents.readonly_context import ReadonlyContext
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.adk.tools import BaseTool
from google.adk.tools.base_toolset import BaseToolset
from google.genai import types

from adapters import Host, Registry
from store import ReconcilerError

APP = "leaky-chat"
TOPICS = ("weather", "cooking", "travel", "music", "chess", "birds", "history", "gardens")


class ScriptedModel(BaseLlm):
    """A model that needs no network: it answers with what it was told."""

    model: str = "scripted"

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        said = llm_request.contents[-1].parts[0].text if llm_request.contents else ""
        text = f"You said: {said} ({len(llm_request.contents)} turns so far)"
        yield LlmResponse(content=types.Content(role="model", parts=[types.Part(text=text)]))


class Notebook(BaseToolset):
    """A toolset that holds a file open, as toolsets hold connections; closing the runner closes it."""

    def __init__(self) -> None:
        super().__init__()
        self.file = tempfile.TemporaryFile("w")  # noqa: SIM115 - open as long as the toolset

    async def get_tools(self, readonly_context: ReadonlyContext | None = None) -> list[BaseTool]:
        return []

    async def close(self) -> None:
        self.file.close()


@dataclass
class Chat:
    """One conversation of one user."""

    id: str
    user: str
    agent_id: str
    runner_id: str
    said: list[str] = field(default_factory=list)


class ChatService:
    """Chats with agents, one agent and one runner per topic, reused as long as they live."""

    def __init__(self) -> None:
        self.session_service = InMemorySessionService()
        self.agents: dict[str, LlmAgent] = {}
        self.runners: dict[str, Runner] = {}
        self.chats: dict[str, Chat] = {}
        self.recovery_records: dict[str, list[str]] = {}
        self._agent_runners: dict[str, str] = {}
        self._agent_sessions: dict[str, list[str]] = {}
        self._config_locks: dict[str, asyncio.Lock] = {}
        self._made = 0

    async def open_chat(self, user: str, topic: str) -> str:
        """Begins a chat about a topic; the answer is its id."""
        async with self._config_locks.setdefault(topic, asyncio.Lock()):
            agent_id = self._agent_for(topic)
            runner_id = self._agent_runners.get(agent_id)
            if runner_id not in self.runners:
                runner_id = self._new_runner(agent_id)
        session = await self.session_service.create_session(app_name=APP, user_id=user)
        self.chats[session.id] = Chat(session.id, user, agent_id, runner_id)
        self._agent_sessions.setdefault(agent_id, []).append(session.id)
        return session.id

    def _agent_for(self, topic: str) -> str:
        agent_id = f"agent-{topic}"
        if agent_id not in self.agents:
            self.agents[agent_id] = LlmAgent(
                name=topic,
                model=ScriptedModel(),
                instruction=f"Talk about {topic}.",
                tools=[Notebook()],
            )
        return agent_id

    def _new_runner(self, agent_id: str) -> str:
        self._made += 1
        runner_id = f"runner-{self._made}"
        self.runners[runner_id] = Runner(
            app_name=APP, agent=self.agents[agent_id], session_service=self.session_service
        )
        self._agent_runners[agent_id] = runner_id
        return runner_id

    async def send(self, chat_id: str, text: str) -> str:
        """Says something in a chat; the result is what the agent answers."""
        chat = self.chats[chat_id]
        chat.said.append(text)
        message = types.Content(role="user", parts=[types.Part(text=text)])
        answer = ""
        run = self.runners[chat.runner_id].run_async(
            user_id=chat.user, session_id=chat.id, new_message=message
        )
        async for event in run:
            if event.content and event.content.parts:
                answer = event.content.parts[0].text or answer
        return answer

    def save_recovery(self, chat_id: str) -> None:
        """Keeps what was said, so that the chat could be continued one day. Nobody deletes it."""
        self.recovery_records[chat_id] = list(self.chats[chat_id].said)

    def restart_agent(self, topic: str) -> None:
        """After a change of its configuration an agent gets a new agent object and a new runner."""
        agent_id = f"agent-{topic}"
        self.agents.pop(agent_id, None)
        self.runners.pop(self._agent_runners.get(agent_id, ""), None)

    async def forget_chat(self, chat_id: str) -> None:
        """Deletes a chat with its ADK session. Written for a "close" button that never came."""
        chat = self.chats.pop(chat_id)
        await self.session_service.delete_session(
            app_name=APP, user_id=chat.user, session_id=chat.id
        )


def look_after(host: Host, service: ChatService) -> list[Registry]:
    """Puts a service into the care of the reconciler: which dicts hold what, and how things end."""

    async def close_runner(id: str, runner: Runner) -> None:
        await runner.close()

    async def end_chat(id: str, chat: Chat) -> None:
        await service.forget_chat(id)

    def runner_of_topic(topic: str, lock: asyncio.Lock) -> str | None:
        runner_id = service._agent_runners.get(f"agent-{topic}")
        return f"runner/{runner_id}" if runner_id else None

    watched = [
        host.observe(service, "agents", kind="agent"),
        host.observe(
            service, "runners", kind="runner",
            uses=lambda id, runner: [f"agent/agent-{runner.agent.name}"],
            teardown=close_runner, close_removed=close_runner,
        ),
        host.observe(
            service, "chats", kind="session",
            uses=lambda id, chat: [f"runner/{chat.runner_id}"],
            user=lambda id, chat: chat.user, teardown=end_chat,
        ),
        host.observe(service, "recovery_records", kind="recovery_record"),
        host.observe(service, "_config_locks", kind="config_lock", owned_by=runner_of_topic),
    ]  # fmt: skip
    host.observe_index(service, "_agent_runners", names="runner", key_names="agent")
    host.observe_index(service, "_agent_sessions", names="session", key_names="agent")
    return watched


async def talk(service: ChatService, chats: int, seed: int) -> None:
    """Some hundred conversations, of which hardly one is ended properly."""
    chance = random.Random(seed)
    for number in range(chats):
        topic = TOPICS[number % len(TOPICS)]
        chat_id = await service.open_chat(f"user-{number % 40}", topic)
        for turn in range(chance.randint(1, 3)):
            await service.send(chat_id, f"something about {topic}, part {turn + 1}")
        if chance.random() < 0.2:
            service.save_recovery(chat_id)
        if chance.random() < 0.1:
            service.restart_agent(topic)


async def main() -> int:
    parser = argparse.ArgumentParser(description="A chat service that leaks.")
    parser.add_argument("--url", default="redis://127.0.0.1:6379")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--chats", type=int, default=300, help="conversations to begin with")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("google_adk").setLevel(logging.ERROR)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = ChatService()
    async with Host.connect(options.url, name="leaky-chat", namespace=options.namespace) as host:
        look_after(host, service)
        await talk(service, options.chats, options.seed)
        print(json.dumps({"process": host.process, "pid": os.getpid()}), flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await stop.wait()
    return 0


def run() -> Any:
    try:
        return asyncio.run(main())
    except ReconcilerError as error:
        print(f"leaky_chat: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())

"""What the tests of the ADK side share: a model that needs no network, and ways to talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from google.adk.agents import LlmAgent
from google.adk.agents.readonly_context import ReadonlyContext
from google.adk.events.event import Event
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.adk.models.base_llm import LlmCapabilities
from google.adk.tools import BaseTool
from google.adk.tools.base_toolset import BaseToolset
from google.genai import types
from pydantic import PrivateAttr


class LocalModel(BaseLlm):
    """A model without a network; what it is asked is kept."""

    @property
    def capabilities(self) -> LlmCapabilities:
        return LlmCapabilities()


def answer_of(parts: list[types.Part]) -> LlmResponse:
    """The answer of a model, complete."""
    return LlmResponse(
        content=types.Content(role="model", parts=parts),
        finish_reason=types.FinishReason.STOP,
        usage_metadata=types.GenerateContentResponseUsageMetadata(
            prompt_token_count=1, candidates_token_count=1, total_token_count=2
        ),
    )


class Scripted(LocalModel):
    """Answers from a list, streamed word by word if that is wanted; `asked` has each request as JSON."""

    model: str = "scripted"
    answers: list[list[types.Part] | str]
    _asked: list[str] = PrivateAttr(default_factory=list)

    @property
    def asked(self) -> list[str]:
        return self._asked

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        contents = llm_request.contents
        self._asked.append("\n".join(one.model_dump_json(exclude_none=True) for one in contents))
        answer = self.answers[len(self._asked) - 1]
        parts = [types.Part(text=answer)] if isinstance(answer, str) else answer
        if stream and isinstance(answer, str):
            for word in answer.split():
                piece = types.Content(role="model", parts=[types.Part(text=word)])
                yield LlmResponse(content=piece, partial=True)
        yield answer_of(parts)


def call(name: str, **args: Any) -> list[types.Part]:
    """A model's answer that calls a tool."""
    return [types.Part(function_call=types.FunctionCall(name=name, args=args))]


def message(text: str) -> types.Content:
    """What a user says."""
    return types.Content(role="user", parts=[types.Part(text=text)])


class Listener(LocalModel):
    """Answers with all that it was shown, so that a test sees what the model saw.

    `shown` keeps the texts of each request, unless it does not remember. A message `wait` is answered
    when `gate` opens, and `fail` raises.
    """

    model: str = "listener"
    remembers: bool = True
    _shown: list[list[str]] = PrivateAttr(default_factory=list)
    _gate: asyncio.Event = PrivateAttr(default_factory=asyncio.Event)
    _waiting: asyncio.Event = PrivateAttr(default_factory=asyncio.Event)

    @property
    def shown(self) -> list[list[str]]:
        return self._shown

    @property
    def gate(self) -> asyncio.Event:
        return self._gate

    @property
    def waiting(self) -> asyncio.Event:
        return self._waiting

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        texts = [
            part.text
            for content in llm_request.contents
            for part in content.parts or []
            if part.text
        ]
        if self.remembers:
            self._shown.append(texts)
        if texts[-1] == "wait":
            self._waiting.set()
            await self._gate.wait()
        if texts[-1] == "fail":
            raise RuntimeError("the model failed")
        answer = f"heard {len(texts)}: " + " | ".join(texts)
        yield answer_of([types.Part(text=answer)])


class Bag(BaseToolset):
    """A toolset that notes when it is closed."""

    def __init__(self, closed: list[str], name: str) -> None:
        super().__init__()
        self._closed = closed
        self._name = name

    async def get_tools(self, readonly_context: ReadonlyContext | None = None) -> list[BaseTool]:
        return []

    async def close(self) -> None:
        self._closed.append(self._name)


class Workshop:
    """Makes agents from `{"name": …}`, and notes what was made and what was closed.

    Attributes:
        model: of all its agents.
        made: names, in the order in which they were made.
        closed: the same for toolsets that were closed.
        before: awaited before an agent is made.
    """

    def __init__(self) -> None:
        self.model = Listener()
        self.made: list[str] = []
        self.closed: list[str] = []
        self.before: Callable[[], Any] | None = None

    async def __call__(self, config: dict[str, Any]) -> LlmAgent:
        name = config["name"]
        self.made.append(name)
        if self.before is not None:
            await self.before()
        return LlmAgent(name=name, model=self.model, tools=[Bag(self.closed, name)])


def text_of(events: list[Event]) -> str:
    """The last text in a run."""
    texts = [
        part.text
        for event in events
        if event.content
        for part in event.content.parts or []
        if part.text
    ]
    return str(texts[-1])


async def say(chat: Any, message: str) -> str:
    """Says something in a chat of the runtime; the answer."""
    return text_of([event async for event in chat.send(message)])

"""An agent for the ADK command line whose model needs no network: it tells what it was shown.

    adk api_server --session_service_uri \
        'agent-reconciler+redis://127.0.0.1:6379/0?name=echo-api' examples/adk_agents

With `?name=` the sessions of the server are resources in the log, and a worker tears idle ones down.
`LifecyclePlugin` finds the server's host by itself and marks them as in use while the agent answers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.models import BaseLlm, LlmRequest, LlmResponse
from google.genai import types

from adapters.adk import LifecyclePlugin


class EchoModel(BaseLlm):
    """Answers with every text in its context, oldest first."""

    model: str = "echo"

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        texts = [
            part.text
            for content in llm_request.contents
            if content.role == "user"
            for part in content.parts or []
            if part.text
        ]
        answer = f"You said {len(texts)} things: " + "; ".join(texts)
        yield LlmResponse(content=types.Content(role="model", parts=[types.Part(text=answer)]))


root_agent = LlmAgent(name="echo", model=EchoModel(), description="Says what was said to it.")
app = App(name="echo", root_agent=root_agent, plugins=[LifecyclePlugin()])

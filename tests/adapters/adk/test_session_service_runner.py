"""A real ADK Runner gives the same on Redis as on the in-memory service, event for event.

Every scenario is a script of turns, run on both services under a clock and ids that repeat. What the
model is asked, what the runner yields and what the session holds afterwards must be equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.adk.agents import Agent, LoopAgent, ParallelAgent, RunConfig, SequentialAgent
from google.adk.agents.base_agent import BaseAgent
from google.adk.agents.run_config import StreamingMode
from google.adk.apps import App, ResumabilityConfig
from google.adk.events.event import Event
from google.adk.runners import Runner
from google.adk.sessions import BaseSessionService, InMemorySessionService
from google.adk.tools import LongRunningFunctionTool, ToolContext
from google.genai import types

from adapters.adk import RedisSessionService
from tests.adapters.adk.talk import Scripted, call
from tests.adapters.adk.talk import message as text

# ADK marks its workflow agents as deprecated and resumability as experimental; both are in use.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

NAME = {"app_name": "app", "user_id": "user", "session_id": "s"}


def remember(fact: str, tool_context: ToolContext) -> dict[str, Any]:
    """Remembers a fact in every scope of state."""
    tool_context.state["facts"] = [*tool_context.state.get("facts", []), fact]
    tool_context.state["user:last"] = fact
    tool_context.state["app:count"] = tool_context.state.get("app:count", 0) + 1
    tool_context.state["temp:scratch"] = fact
    return {"remembered": fact, "scratch": tool_context.state["temp:scratch"]}


def ask_a_human(question: str) -> None:
    """Asks somebody who will answer later."""


Talk = Callable[..., Awaitable[list[Event]]]
Scenario = tuple[Callable[[], tuple[App, list[Scripted]]], Callable[[Talk], Awaitable[None]]]


def app_of(agent: BaseAgent, **options: Any) -> App:
    return App(name="app", root_agent=agent, **options)


def tools() -> tuple[App, list[Scripted]]:
    model = Scripted(
        answers=[call("remember", fact="blue"), "noted", "you said blue", call("remember", fact="red"),
                 call("remember", fact="green"), "both noted"]
    )  # fmt: skip
    return app_of(Agent(name="root", model=model, tools=[remember])), [model]


async def three_turns(talk: Talk) -> None:
    for message in ("my colour is blue", "what did I say?", "now red and green"):
        await talk(new_message=text(message))


def sub_agents() -> tuple[App, list[Scripted]]:
    root = Scripted(answers=[call("transfer_to_agent", agent_name="expert")])
    expert = Scripted(answers=["I am the expert", "still the expert"])
    agent = Agent(
        name="root",
        model=root,
        sub_agents=[Agent(name="expert", model=expert, description="knows")],
    )
    return app_of(agent), [root, expert]


async def two_turns(talk: Talk) -> None:
    await talk(new_message=text("help me"))
    await talk(new_message=text("and again"))


def workflow() -> tuple[App, list[Scripted]]:
    models = [Scripted(answers=[f"draft {n}", f"draft {n} again"]) for n in range(3)]
    steps = [
        Agent(name="one", model=models[0], output_key="draft"),
        Agent(name="two", model=models[1], instruction="Improve {draft}", output_key="temp:better"),
        Agent(
            name="three", model=models[2], instruction="Finish {temp:better}", output_key="user:end"
        ),
    ]
    return app_of(SequentialAgent(name="root", sub_agents=steps)), models


def parallel_in_loop() -> tuple[App, list[Scripted]]:
    models = [Scripted(answers=[f"{n}{turn}" for turn in range(2)]) for n in "ab"]
    both = ParallelAgent(
        name="both",
        sub_agents=[
            Agent(name=f"agent_{n}", model=model, output_key=f"key_{n}")
            for n, model in zip("ab", models, strict=True)
        ],
    )
    return app_of(LoopAgent(name="root", sub_agents=[both], max_iterations=2)), models


async def one_turn(talk: Talk) -> None:
    await talk(new_message=text("go"))


async def streaming(talk: Talk) -> None:
    config = RunConfig(streaming_mode=StreamingMode.SSE)
    for message in ("my colour is blue", "what did I say?"):
        await talk(new_message=text(message), run_config=config)


def long_running() -> tuple[App, list[Scripted]]:
    model = Scripted(answers=[call("ask_a_human", question="may I?"), "they said yes", "bye"])
    agent = Agent(name="root", model=model, tools=[LongRunningFunctionTool(ask_a_human)])
    return app_of(agent, resumability_config=ResumabilityConfig(is_resumable=True)), [model]


async def paused_and_resumed(talk: Talk) -> None:
    events = await talk(new_message=text("ask them"))
    asked = next(event for event in events if event.long_running_tool_ids)
    (function_call,) = asked.get_function_calls()
    answer = types.FunctionResponse(
        id=function_call.id, name=function_call.name, response={"answer": "yes"}
    )
    await talk(
        invocation_id=asked.invocation_id,
        new_message=types.Content(role="user", parts=[types.Part(function_response=answer)]),
    )
    await talk(new_message=text("thanks"))


async def with_state_delta(talk: Talk) -> None:
    await talk(new_message=text("go"), state_delta={"a": 1, "user:b": [2], "temp:c": 3})


SCENARIOS: dict[str, Scenario] = {
    "tools": (tools, three_turns),
    "sub-agents": (sub_agents, two_turns),
    "sequential workflow with output_key and temp state": (workflow, two_turns),
    "parallel agents in a loop": (parallel_in_loop, one_turn),
    "streaming": (tools, streaming),
    "resumption of a long-running tool": (long_running, paused_and_resumed),
    "a state delta with the message": (sub_agents, with_state_delta),
}


async def played(service: BaseSessionService, scenario: Scenario) -> dict[str, Any]:
    """Runs a scenario and answers with all that can be seen of it, as JSON values."""
    make_app, play = scenario
    app, models = make_app()
    await service.create_session(**NAME, state={"user:name": "Ann"})
    yielded: list[Event] = []

    async def talk(**turn: Any) -> list[Event]:
        events = [event async for event in runner.run_async(user_id="user", session_id="s", **turn)]
        yielded.extend(events)
        return events

    async with Runner(app=app, session_service=service) as runner:
        await play(talk)
    session = await service.get_session(**NAME)
    assert session is not None
    return {
        "yielded": [event.model_dump(mode="json") for event in yielded],
        "asked": [model.asked for model in models],
        "session": session.model_dump(mode="json"),
        "user state": await service.get_user_state(app_name="app", user_id="user"),
    }


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.parametrize("options", [{}, {"cache_bytes": 0}, {"share_events": True}], ids=str)
async def test_runs_as_in_memory(
    scenario: Scenario,
    options: dict[str, Any],
    make_service: Callable[..., RedisSessionService],
    steady_world: Any,
) -> None:
    """What the runner yields, what the model is asked and what is stored are the same."""
    expected = await played(InMemorySessionService(), scenario)
    steady_world.restart()
    got = await played(make_service(**options), scenario)
    assert got["asked"] == expected["asked"]
    assert got["yielded"] == expected["yielded"]
    assert got == expected
    assert len(got["session"]["events"]) >= 3
    assert not any(key.startswith("temp:") for key in got["session"]["state"])


def test_the_synchronous_runner(redis_url: str, namespace: str) -> None:
    """Runner.run, which starts a thread with a loop of its own for each call, works and leaves nothing."""
    service = RedisSessionService(redis_url, namespace)
    asyncio.run(service.create_session(**NAME))
    model = Scripted(answers=["one", "two", "three"])
    runner = Runner(app=app_of(Agent(name="root", model=model)), session_service=service)
    for message in ("a", "b", "c"):
        list(runner.run(user_id="user", session_id="s", new_message=text(message)))
    asyncio.run(runner.close())
    session = asyncio.run(service.get_session(**NAME))
    assert session is not None
    assert len(session.events) == 6
    assert '"one"' in model.asked[2]
    assert service._stores._by_loop == {}


async def test_rewind(make_service: Callable[..., RedisSessionService], steady_world: Any) -> None:
    """ADK's rewind takes state and events back to before an invocation, as in memory."""
    after = []
    for service in (InMemorySessionService(), make_service()):
        steady_world.restart()
        app, _ = tools()
        await service.create_session(**NAME)
        async with Runner(app=app, session_service=service) as runner:
            for message in ("my colour is blue", "what did I say?", "now red and green"):
                async for event in runner.run_async(
                    user_id="user", session_id="s", new_message=text(message)
                ):
                    last = event.invocation_id
            await runner.rewind_async(
                user_id="user", session_id="s", rewind_before_invocation_id=last
            )
        session = await service.get_session(**NAME)
        assert session is not None
        after.append(session.model_dump(mode="json"))
    assert after[1] == after[0]
    assert after[1]["state"]["facts"] == ["blue"]

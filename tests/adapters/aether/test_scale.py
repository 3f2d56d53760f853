"""500 runners with 500 configurations, ended in every way there is: nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapters import Host
from adapters.aether_frame import attach
from reconciler import Policy, Reconciler
from tests.adapters.aether.conftest import until
from tests.adapters.aether.frame import (
    AdkFrameworkAdapter,
    AgentConfig,
    Connection,
    DomainAgent,
    left,
)

RUNNERS = 500


async def one(frame: AdkFrameworkAdapter, number: int) -> DomainAgent:
    """Creates and uses one runner with a configuration of its own, and ends it, or does not."""
    config = AgentConfig("support", f"You are number {number}.")
    agent_id = await frame.create(config)
    agent = frame.agent_manager._agents[agent_id]
    chat = f"chat {number}"
    assert await frame.chat(agent_id, chat, user=f"user {number}") == "yes"
    runner = frame._agent_runners[agent_id]
    match number % 5:
        case 0:
            await frame.runner_manager.cleanup_runner(runner)
        case 1:
            del frame.runner_manager.runners[runner]
        case 2:
            await frame.cleanup_chat_session(chat)
        case 3:
            await frame.agent_manager.cleanup_agent(agent_id)
        case _:
            pass  # Abandoned.
    return agent


async def test_500_runners_leave_nothing_behind(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Callable[[Policy], Reconciler]
) -> None:
    """Every dict is empty and every runner closed once; what a request holds is untouched."""
    detach = attach(host, frame)
    held_agent = await frame.create(AgentConfig("held"))
    await frame.chat(held_agent, "held chat")
    held = frame._agent_runners[held_agent]
    context = frame.runner_manager.runners[held]
    sessions = dict(context["sessions"])
    before = left(frame)
    policy = Policy(session_idle_timeout=1, runner_idle_timeout=0.2, agent_idle_timeout=0.2)
    agents: list[DomainAgent] = []
    async with reconciling(policy):
        async with frame.runner_manager.acquire_runner(held):
            for first in range(0, RUNNERS, 50):
                batch = (one(frame, number) for number in range(first, first + 50))
                agents += await asyncio.gather(*batch)
            await until(
                lambda: len(frame.runner_manager.runners) == 1 and Connection.open == 1,
                "all runners but the held one gone and closed",
                seconds=30,
            )
            # The tasks that created runners are done, also that of the held one.
            before.pop("runner_manager._config_creation_tasks")
            await until(lambda: left(frame) == before, "everything but what is held gone")
            assert frame.runner_manager.runners[held] is context
            assert context["sessions"] == sessions
            assert await frame.chat(held_agent, "held chat") == "yes"
        await until(lambda: not left(frame), "the held one goes when it is let go")
        await until(lambda: Connection.open == 0, "and is closed")
    assert [agent.connection.closed for agent in agents] == [1] * RUNNERS
    assert [agent.cleaned for agent in agents] == [1] * RUNNERS
    assert not [ref for ref in host.entries if not ref.startswith("process/")]
    detach()
    assert not left(frame)

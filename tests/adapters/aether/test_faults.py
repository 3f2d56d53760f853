"""For every fault of the shape: before `attach` it leaks, after it it does not, in the same workload."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from adapters import Host
from adapters.aether_frame import attach
from adapters.leak_probe import LeakProbe
from reconciler import Policy, Reconciler
from tests.adapters.aether.conftest import PATIENT, QUICK, one_pass, until
from tests.adapters.aether.frame import (
    AdkFrameworkAdapter,
    AgentConfig,
    Connection,
    dicts,
    left,
)

Reconciling = Callable[[Policy], Reconciler]
CONFIG = AgentConfig("support")


async def cleanup_runner(frame: AdkFrameworkAdapter) -> None:
    """One agent, one chat; then the service cleans the runner up itself."""
    agent = await frame.create(CONFIG)
    assert await frame.chat(agent, "chat") == "yes"
    runner = frame._agent_runners[agent]
    assert await frame.runner_manager.cleanup_runner(runner) is True


async def shared_runner(frame: AdkFrameworkAdapter) -> None:
    """Two agents on one runner; then the runner is cleaned up, and with it but one of the agents."""
    first, second = await frame.create(CONFIG), await frame.create(CONFIG)
    frame._agent_runners[second] = frame._agent_runners[first]
    for runner in list(frame.runner_manager.runners):
        await frame.runner_manager.cleanup_runner(runner)


async def abandoned_chat(frame: AdkFrameworkAdapter) -> None:
    """A chat that nobody comes back to."""
    await frame.chat(await frame.create(CONFIG), "chat")


async def ended_chats(frame: AdkFrameworkAdapter) -> None:
    """Chats of a living agent that are ended, one after the other; another one goes on."""
    agent = await frame.create(CONFIG)
    await frame.chat(agent, "goes on")
    for number in range(5):
        await frame.chat(agent, f"chat {number}")
        await frame.cleanup_chat_session(f"chat {number}")


async def popped_runner(frame: AdkFrameworkAdapter) -> None:
    """A runner is taken out of `runners` behind everybody's back, in use by a chat."""
    agent = await frame.create(CONFIG)
    await frame.chat(agent, "chat")
    frame.runner_manager.runners.pop(frame._agent_runners[agent])


async def popped_session(frame: AdkFrameworkAdapter) -> None:
    """A chat is taken out of `chat_sessions`."""
    await frame.chat(await frame.create(CONFIG), "chat")
    frame.adk_session_manager.chat_sessions.pop("chat")


async def cleaned_agent(frame: AdkFrameworkAdapter) -> None:
    """The service cleans an agent up; its runner is of no more use."""
    agent = await frame.create(CONFIG)
    assert await frame.agent_manager.cleanup_agent(agent) is True


async def asked_by_configuration(frame: AdkFrameworkAdapter) -> None:
    """Sessions in a reused runner that belong to no chat and no agent."""
    _, agent = await frame.agent_manager.create_agent(CONFIG)
    for _ in range(3):
        assert await frame.ask(CONFIG, agent.adk_agent) == "yes"


WORKLOADS = [
    cleanup_runner, shared_runner, abandoned_chat, ended_chats, popped_runner, popped_session,
    cleaned_agent, asked_by_configuration,
]  # fmt: skip


each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.__name__)


@pytest.mark.leaks_on_purpose
@each_workload
async def test_before_attach_a_workload_leaks(
    workload: Callable[[AdkFrameworkAdapter], Awaitable[None]], frame: AdkFrameworkAdapter
) -> None:
    """Unattached the frame keeps dict entries of what is gone, and drops runners unclosed."""
    await workload(frame)
    assert left(frame)
    assert frame.runner_manager._config_locks
    assert Connection.open > 0


@each_workload
async def test_after_attach_the_same_workload_leaks_nothing(
    workload: Callable[[AdkFrameworkAdapter], Awaitable[None]],
    host: Host,
    reconciling: Reconciling,
) -> None:
    """Every entry goes and every runner is closed, the leak probe being witness."""
    Connection.open = 0
    with LeakProbe(tracing=True) as probe:
        probe.begin()
        frame = AdkFrameworkAdapter()
        detach = attach(host, frame)
        try:
            async with reconciling(QUICK):
                await workload(frame)
                await until(lambda: not left(frame), f"empty: {left(frame)}")
                await until(lambda: Connection.open == 0, "every runner closed")
        finally:
            detach()
        assert probe.look(collect=True) == []


async def test_cleanup_runner_by_the_service_is_a_closed_chain(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """Runner closed and agents gone when the call returns; entries that name them go in one pass."""
    attach(host, frame)
    agent = await frame.create(CONFIG)
    other = await frame.create(CONFIG)
    runner = frame._agent_runners[agent]
    frame._agent_runners[other] = runner
    connection = frame.agent_manager._agents[agent].connection
    await frame.runner_manager.cleanup_runner(runner)
    assert connection.closed == 1
    assert not frame.agent_manager._agents
    assert agent in frame._agent_sessions
    await one_pass(reconciling(PATIENT))
    assert not frame._agent_sessions
    assert runner not in frame.runner_manager._runner_locks


async def test_only_what_is_gone_leaves_the_lists_of_session_ids(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """`_agent_sessions` of a living agent keeps the living sessions and loses the ended ones."""
    attach(host, frame)
    await ended_chats(frame)
    ((agent, sessions),) = frame._agent_sessions.items()
    assert len(sessions) == 6
    await one_pass(reconciling(PATIENT))
    chat = frame.adk_session_manager.chat_sessions["goes on"]
    assert frame._agent_sessions == {agent: [chat.active_adk_session_id]}
    assert not frame.adk_session_manager._cleared_sessions
    assert not frame.runner_manager._config_creation_tasks
    assert list(frame.runner_manager._config_locks) == [
        frame.runner_manager.compute_config_hash(CONFIG)
    ]
    assert await frame.chat(agent, "goes on") == "yes"


async def destroyed(frame: AdkFrameworkAdapter, way: str) -> Callable[[], Awaitable[str]]:
    """Runners are destroyed behind the frame's back; returns the request that comes next."""
    agent = await frame.create(CONFIG)
    adk_agent = frame.agent_manager._agents[agent].adk_agent
    await frame.chat(agent, "chat")
    await frame.ask(CONFIG, adk_agent)
    frame.runner_manager.runners.clear()
    if way == "by agent":
        return lambda: frame.chat(agent, "chat")
    return lambda: frame.ask(CONFIG, adk_agent)


each_way = pytest.mark.parametrize("way", ["by agent", "by configuration"])


@pytest.mark.leaks_on_purpose
@each_way
async def test_before_attach_a_request_whose_runner_was_destroyed_fails(
    way: str, frame: AdkFrameworkAdapter
) -> None:
    """And so does every one after it."""
    request = await destroyed(frame, way)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not exist"):
            await request()


@each_way
async def test_after_attach_a_request_whose_runner_was_destroyed_succeeds_after_a_pass(
    way: str, frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """The first one after a pass gets its answer."""
    attach(host, frame)
    request = await destroyed(frame, way)
    result = await one_pass(reconciling(PATIENT))
    assert {"_agent_runners", "config_to_runner"} <= {d["registry"] for d in result["dangling"]}
    assert not frame._agent_runners
    assert await request() == "yes"
    await one_pass(reconciling(PATIENT))
    again = await one_pass(reconciling(PATIENT))
    assert not any(again[sort] for sort in ("orphans", "dangling", "ghosts", "untracked"))
    assert len(frame.runner_manager.runners) == 1


async def test_a_chat_that_is_used_outlives_its_idle_time(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """The frame notes use only in `last_activity`; a chat in steady use is never torn down."""
    attach(host, frame)
    agent = await frame.create(CONFIG)
    runner = frame._agent_runners[agent]
    await frame.chat(agent, "chat")
    policy = Policy(session_idle_timeout=0.3, runner_idle_timeout=0.1, agent_idle_timeout=0.1)
    async with reconciling(policy):
        ends = asyncio.get_running_loop().time() + 1.5
        while asyncio.get_running_loop().time() < ends:
            assert await frame.chat(agent, "chat") == "yes"
            assert frame._agent_runners == {agent: runner}
            await asyncio.sleep(0.05)
        await until(lambda: not left(frame), "all gone once nobody uses it")
    assert frame.adk_session_manager.archived == {"chat": agent}


async def test_marking_activity_is_use(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """A runner without sessions stays while `mark_runner_activity` is called for it."""
    attach(host, frame)
    agent = await frame.create(CONFIG)
    runner = frame._agent_runners[agent]
    policy = Policy(runner_idle_timeout=0.3, agent_idle_timeout=0.1)
    async with reconciling(policy):
        ends = asyncio.get_running_loop().time() + 1.0
        while asyncio.get_running_loop().time() < ends:
            frame.runner_manager.mark_runner_activity(runner)
            assert list(frame.runner_manager.runners) == [runner]
            await asyncio.sleep(0.05)
        await until(lambda: not any(dicts(frame).values()), "gone once nobody marks it")

"""What a request is at work in is never torn down, however idle it looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from adapters import Host
from adapters.aether_frame import attach
from reconciler import Policy, Reconciler
from tests.adapters.aether.conftest import PATIENT, QUICK, one_pass, until
from tests.adapters.aether.frame import AdkFrameworkAdapter, AgentConfig, left

Reconciling = Callable[[Policy], Reconciler]


@asynccontextmanager
async def acquired(frame: AdkFrameworkAdapter, runner: str, gate: asyncio.Event) -> Any:
    """By the frame's `acquire_runner`."""
    async with frame.runner_manager.acquire_runner(runner):
        yield


@asynccontextmanager
async def counted(frame: AdkFrameworkAdapter, runner: str, gate: asyncio.Event) -> Any:
    """By its own count, as `active_tasks`, which nobody is told of."""
    context = frame.runner_manager.runners[runner]
    context["active_tasks"] += 1
    yield
    context["active_tasks"] -= 1


@asynccontextmanager
async def running(frame: AdkFrameworkAdapter, runner: str, gate: asyncio.Event) -> Any:
    """By a run on the Runner that is under way."""
    gate.clear()
    (agent,) = frame._agent_runners
    answer = asyncio.create_task(frame.chat(agent, "chat"))
    yield
    gate.set()
    assert await answer == "yes"


@pytest.mark.parametrize("holding", [acquired, counted, running], ids=lambda way: way.__name__)
async def test_a_held_runner_is_untouched(
    holding: Any, frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """Its chat and session stay with it; an idle chat beside it on the same runner goes."""
    attach(host, frame)
    gate = asyncio.Event()
    gate.set()
    agent = await frame.create(AgentConfig("support"), gate)
    await frame.chat(agent, "idle chat")
    await frame.chat(agent, "chat")
    runner = frame._agent_runners[agent]
    chats = frame.adk_session_manager.chat_sessions
    session = chats["chat"].active_adk_session_id
    async with holding(frame, runner, gate):
        async with reconciling(QUICK) as worker:
            await until(lambda: list(chats) == ["chat"], "the idle chat gone")
            ends = time.monotonic() + 4 * (QUICK.session_idle_timeout or 0)
            while time.monotonic() < ends:  # Pass after pass, long after it looks idle.
                await worker.reconcile()
                assert list(frame.runner_manager.runners) == [runner]
        assert list(frame.runner_manager.runners[runner]["sessions"]) == [session]
        assert list(chats) == ["chat"]
        assert list(frame.agent_manager._agents) == [agent]
    async with reconciling(QUICK):
        await until(lambda: not left(frame), "gone when it is let go")


async def test_a_runner_is_not_closed_under_a_run(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """The service cleans a runner up while a run is under way: it is closed once that has ended."""
    attach(host, frame)
    gate = asyncio.Event()
    agent_id = await frame.create(AgentConfig("support"), gate)
    connection = frame.agent_manager._agents[agent_id].connection
    runner = frame._agent_runners[agent_id]
    async with reconciling(QUICK):
        answer = asyncio.create_task(frame.chat(agent_id, "chat"))
        opened = f"adk_runner/{runner}"
        await until(lambda: host.entries[opened].holders == 1, "the run under way")
        await frame.runner_manager.cleanup_runner(runner)
        await until(lambda: not frame.runner_manager._runner_locks, "a pass over what it left")
        assert connection.closed == 0
        gate.set()
        assert await answer == "yes"
        await until(lambda: connection.closed == 1, "closed after the run")


async def test_held_locks_are_never_dropped(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """A lock of a runner and of a configuration that are gone stays while it is held or waited for."""
    attach(host, frame)
    manager = frame.runner_manager
    locks = [asyncio.Lock(), asyncio.Lock()]
    manager._config_locks["gone"], manager._runner_locks["gone"] = locks
    for lock in locks:
        await lock.acquire()
    waiting = [asyncio.create_task(lock.acquire()) for lock in locks]
    await one_pass(reconciling(PATIENT))
    assert [manager._config_locks["gone"], manager._runner_locks["gone"]] == locks
    for lock in locks:
        lock.release()
    await asyncio.gather(*waiting)
    await one_pass(reconciling(PATIENT))
    assert [manager._config_locks["gone"], manager._runner_locks["gone"]] == locks
    for lock in locks:
        lock.release()
    await one_pass(reconciling(PATIENT))
    assert not manager._config_locks
    assert not manager._runner_locks


async def test_a_creation_under_way_keeps_its_entries(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """What is noted of an agent before it exists is no leak; the task goes when it is done."""
    attach(host, frame)
    gate = asyncio.Event()
    task = asyncio.create_task(gate.wait())
    frame.runner_manager._config_creation_tasks["config"] = task  # type: ignore[assignment]
    frame.agent_manager._agent_configs["agent"] = AgentConfig("support")
    await one_pass(reconciling(PATIENT))
    assert frame.runner_manager._config_creation_tasks == {"config": task}
    assert list(frame.agent_manager._agent_configs) == ["agent"]
    gate.set()
    await task
    await one_pass(reconciling(PATIENT))
    assert not frame.runner_manager._config_creation_tasks


async def test_a_request_that_is_choosing_holds_an_order_up(
    frame: AdkFrameworkAdapter, host: Host, reconciling: Reconciling
) -> None:
    """While `_mapping_lock` is held no runner goes; if the request chose it, it stays."""
    attach(host, frame)
    agent = await frame.create(AgentConfig("support"))
    runner = frame._agent_runners[agent]
    policy = QUICK.model_copy(update={"runner_idle_timeout": 0.05})
    async with reconciling(policy):
        async with frame._mapping_lock:
            entry = host.entries[f"runner/{runner}"]
            await until(lambda: bool(entry.terminating), "an order for the idle runner")
            frame.runner_manager.runners[runner]["active_tasks"] += 1
        await until(lambda: not entry.terminating, "the order given up")
        assert frame.runner_manager.runners[runner]["active_tasks"] == 1
        frame.runner_manager.runners[runner]["active_tasks"] -= 1
        await until(lambda: not left(frame), "gone in the end")


async def test_the_frame_s_own_run_events_pass_through(
    frame: AdkFrameworkAdapter, host: Host
) -> None:
    """A run that the caller ends early is ended inside too, and counts no longer."""
    attach(host, frame)
    agent = await frame.create(AgentConfig("support"))
    await frame.chat(agent, "chat")
    chat = frame.adk_session_manager.chat_sessions["chat"]
    runner = frame.runner_manager.runners[frame._agent_runners[agent]]["runner"]
    from google.genai import types

    events: AsyncIterator[Any] = runner.run_async(
        user_id="user",
        session_id=chat.active_adk_session_id,
        new_message=types.Content(role="user", parts=[types.Part(text="?")]),
    )
    entry = host.entries[f"runner/{chat.active_runner_id}"]
    await anext(events)
    assert entry.holders == 1
    await events.aclose()  # type: ignore[attr-defined]
    assert entry.holders == 0

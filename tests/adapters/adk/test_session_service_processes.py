"""Ten operating system processes append to one session at once."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from google.adk.errors import StaleSessionError
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions

from adapters.adk import RedisSessionService

PROCESSES, EACH = 10, 20
NAME = {"app_name": "app", "user_id": "user", "session_id": "s"}


def write(make: Callable[[], RedisSessionService], number: int, start: Barrier, out: Any) -> None:
    """One process: appends its events, each until it is in, then answers with what it reads."""

    async def run() -> None:
        service = make()
        session = await service.get_session(**NAME)
        start.wait(30)
        refused = 0
        for count in range(EACH):
            actions = EventActions(state_delta={f"n{number}": count, "app:last": number})
            event = Event(author=f"p{number}", id=f"{number}-{count}", actions=actions)
            while True:
                try:
                    assert session is not None
                    await service.append_event(session, event)
                    break
                except StaleSessionError:
                    refused += 1
                    session = await service.get_session(**NAME)
        start.wait(60)
        session = await service.get_session(**NAME)
        assert session is not None
        out.put((refused, [event.id for event in session.events], session.state))
        await service.close()

    asyncio.run(run())


@pytest.mark.parametrize("accept_stale", [False, True])
def test_every_event_is_there_once(
    redis_url: str, namespace: str, accept_stale: bool, make_processes: Callable[..., list[Any]]
) -> None:
    """Every event of every process is stored once, in one order, the same for every reader."""
    asyncio.run(created(redis_url, namespace))
    answers = make_processes(
        write, partial(RedisSessionService, redis_url, namespace, accept_stale=accept_stale)
    )
    (order, *others) = [ids for _, ids, _ in answers]
    assert all(other == order for other in others)
    assert sorted(order) == sorted(f"{p}-{n}" for p in range(PROCESSES) for n in range(EACH))
    for number in range(PROCESSES):
        own = [event_id for event_id in order if event_id.startswith(f"{number}-")]
        assert own == [f"{number}-{count}" for count in range(EACH)]
    last = int(order[-1].partition("-")[0])
    for refused, _, state in answers:
        assert state == {f"n{p}": EACH - 1 for p in range(PROCESSES)} | {"app:last": last}
        assert not (accept_stale and refused)
    # Without this the test would have shown nothing.
    assert accept_stale or sum(refused for refused, _, _ in answers) > 0


async def created(url: str, namespace: str) -> None:
    async with RedisSessionService(url, namespace) as service:
        await service.create_session(**NAME)


@pytest.fixture
def make_processes() -> Callable[..., list[Any]]:
    def run(target: Callable[..., None], *args: Any) -> list[Any]:
        # Forked: to import ADK ten times would take longer than the test.
        context = multiprocessing.get_context("fork")
        start, out = context.Barrier(PROCESSES), context.Queue()
        processes = [
            context.Process(target=target, args=(*args, number, start, out))
            for number in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        answers = [out.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
        return answers

    return run

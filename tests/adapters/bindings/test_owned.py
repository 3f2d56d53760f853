"""Owned things: closed once, for all who ask."""

from __future__ import annotations

import asyncio

import pytest

from adapters import Host
from adapters.owned import Owned
from reconciler import Policy, Reconciler
from store import EventLog, Store
from tests.support import eventually, story

OWNER = "component/search"


class Slow:
    """A teardown that ends when `gate` opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = 0
        self.cancelled = 0

    async def __call__(self, id: str, thing: object) -> None:
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def two_who_wait(owned: Owned[object], slow: Slow) -> list[asyncio.Task[None]]:
    waiting = [asyncio.create_task(owned.close_owned(OWNER)) for _ in range(2)]
    await eventually(lambda: [one.waiting for one in owned._ending.values()] == [2])
    assert slow.begun == 1
    return waiting


async def test_one_who_gives_up_leaves_the_close_to_the_others() -> None:
    """Whoever began it: the close goes on for whoever still waits."""
    slow = Slow()
    owned: Owned[object] = Owned("thing", teardown=slow)
    owned.add(object(), OWNER)
    first, second = await two_who_wait(owned, slow)
    first.cancel()
    await eventually(first.done)
    slow.gate.set()
    await second
    assert len(owned) == slow.cancelled == 0


async def test_a_close_that_nobody_waits_for_is_cancelled() -> None:
    """The last who gives up ends it, and the next who asks begins anew."""
    slow = Slow()
    owned: Owned[object] = Owned("thing", teardown=slow)
    owned.add(object(), OWNER)
    waiting = await two_who_wait(owned, slow)
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    slow.gate.set()
    await owned.close_owned(OWNER)
    assert (len(owned), slow.begun, slow.cancelled) == (0, 2, 1)


async def test_a_close_that_is_cancelled_from_within_is_an_error() -> None:
    """Nothing counts as closed that was not."""

    async def teardown(id: str, thing: object) -> None:
        raise asyncio.CancelledError

    owned: Owned[object] = Owned("thing", teardown=teardown)
    owned.add(object(), OWNER)
    with pytest.raises(ExceptionGroup, match="1 of 1 thing not closed"):
        await owned.close_owned(OWNER)
    assert len(owned) == 1


async def test_a_service_that_gives_up_does_not_cut_an_order_short(
    store: Store, namespace: str, host: Host, log: EventLog
) -> None:
    """The reconciler's own close of the thing goes on, and succeeds."""
    slow = Slow()
    owned: Owned[object] = Owned("thing", host=host, teardown=slow)
    host.record("created", OWNER)
    ref = f"thing/{owned.add(object(), OWNER)}"
    async with Reconciler(store, namespace=namespace, policy=Policy()):
        host.record("cleaned_up", OWNER)
        await eventually(lambda: slow.begun)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(owned.close_owned(OWNER), 0.05)
        slow.gate.set()

        async def told() -> list[str]:
            kinds = [type for type, of in await story(log) if of == ref]
            return kinds if {"cleaned_up", "cleanup_failed"} & set(kinds) else []

        assert "cleanup_failed" not in await eventually(told)
    assert slow.begun == 1

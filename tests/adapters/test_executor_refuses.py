"""Orders and their preconditions: nothing in use is ever torn down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapters import Host
from store import EventLog, NotAlive
from store.messages import Order, hash_of
from tests.adapters.orders import Closing, carried_out, order, outcome
from tests.support import entries_of, eventually


class TestPreconditions:
    """When an order is refused, and why."""

    async def refused(self, host: Host, one: Order, why: str) -> None:
        kind, reason = await outcome(host, one)
        assert kind == "cleanup_refused"
        assert reason.startswith(why)

    async def test_stale(self, host: Host):
        """Used since the worker looked: its last event is another."""
        host.registry("session", {"s": Closing()})
        one = order(host, "session/s")
        with host.acquire("session/s") as session:
            pass
        await self.refused(host, one, "stale: its last event is seq")
        assert session.closed == 0

    async def test_gone(self, host: Host):
        """No longer there."""
        registry = host.registry("session", {"s": 1})
        one = order(host, "session/s")
        del registry["s"]
        await self.refused(host, one, "gone: it is not alive")

    async def test_in_use(self, host: Host):
        """Acquired by somebody."""
        host.registry("session", {"s": 1})
        with host.acquire("session/s"):
            await self.refused(host, order(host, "session/s"), "busy: it is acquired by 1")
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_used_by_something_alive(self, host: Host):
        """Used by something that is alive, whether the worker knew of it or not."""
        host.registry("runner", {"r": 1})
        host.registry("session", {"s": 1}, uses=lambda *_: ["runner/r"])
        await self.refused(host, order(host, "runner/r"), "busy: session/s uses it")

    async def test_uses_itself(self, host: Host):
        """What uses itself is not busy because of that."""
        host.registry("session", {"s": 1}, uses=lambda *_: ["session/s"])
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_circle_goes_as_a_whole(self, host: Host):
        """What uses each other in a circle can be ended, if all of it is as the worker saw it."""
        host.registry("left", {"l": 1}, uses=lambda *_: ["right/r"])
        host.registry("right", {"r": 1}, uses=lambda *_: ["left/l"])
        await self.refused(host, order(host, "left/l"), "busy: right/r uses it")
        seqs = {ref: host.entries[ref].seq for ref in ("left/l", "right/r")}
        left = order(host, "left/l", circle={"right/r": seqs["right/r"]}, after=("right/r",))
        with host.acquire("right/r"):
            await self.refused(host, left, "busy: right/r is in a circle with it, and was used")
        await self.refused(host, left, "busy: right/r is in a circle with it, and was used")
        seqs = {ref: host.entries[ref].seq for ref in ("left/l", "right/r")}
        left = order(host, "left/l", circle={"right/r": seqs["right/r"]}, after=("right/r",))
        right = order(host, "right/r", circle={"left/l": seqs["left/l"]}, after=("left/l",))
        answers = await carried_out(host, left, right)
        assert [[type for type, _ in said] for said in answers.values()] == [["cleaned_up"]] * 2
        assert not host.entries

    async def test_something_has_to_go_first(self, host: Host):
        """What should go before it is still alive."""
        host.registry("lock", {"l": 1})
        host.registry("runner", {"r": 1})
        one = order(host, "lock/l", after=("runner/r",))
        await self.refused(host, one, "busy: runner/r has to go first")

    async def test_another_object(self, host: Host):
        """The registry holds another object under the key, put there behind the observer's back."""
        registry = host.registry("session", {"s": Closing()})
        other = Closing()
        dict.__setitem__(registry, "s", other)
        await self.refused(host, order(host, "session/s"), "gone: its registry does not hold it")
        dict.__delitem__(registry, "s")
        await self.refused(host, order(host, "session/s"), "gone: its registry does not hold it")
        assert other.closed == 0

    async def test_none_is_an_object(self, host: Host):
        """An entry with the value None that is gone is gone."""
        registry = host.registry("session", {"s": None})
        dict.__delitem__(registry, "s")
        await self.refused(host, order(host, "session/s"), "gone: its registry does not hold it")

    async def test_twice(self, host: Host):
        """While one order is ending it, another is refused, and nobody can acquire it."""
        begun, go = asyncio.Event(), asyncio.Event()

        async def end(id: str, obj: Any) -> None:
            begun.set()
            await go.wait()

        host.registry("session", {"s": 1}, teardown=end)
        first = host.execute([order(host, "session/s", id="o-1")])
        await begun.wait()
        await self.refused(host, order(host, "session/s", id="o-2"), "busy: order o-1 is ending")
        with pytest.raises(NotAlive, match="being torn down"), host.acquire("session/s"):
            pass
        go.set()
        await first
        assert host.entries == {}

    async def test_unknown_action(self, host: Host):
        """An action of a newer worker is refused, not misunderstood."""
        one = order(host, "session/s", action="explode")
        await self.refused(host, one, "gone: this host does not know the action 'explode'")


class TestNoAwaitBetweenCheckAndMark:
    """G1 under contention."""

    async def test_acquire_or_teardown_never_both(self, host: Host):
        """Whoever comes first wins: a session that was acquired is not closed while it is in use."""
        torn_in_use: list[str] = []
        sessions = host.registry("session")

        async def end(id: str, obj: Any) -> None:
            if host.entries[f"session/{id}"].in_use:
                torn_in_use.append(id)
            await asyncio.sleep(0)
            if host.entries[f"session/{id}"].in_use:
                torn_in_use.append(id)

        sessions.teardown = end
        used = 0

        async def use(ref: str) -> None:
            nonlocal used
            for _ in range(hash_of(ref) % 5):
                await asyncio.sleep(0)
            with contextlib.suppress(NotAlive):
                async with host.acquire(ref):
                    used += 1
                    await asyncio.sleep(0)

        async def tear(ref: str) -> None:
            await host.execute([order(host, ref)])

        for n in range(200):
            sessions[n] = object()
        work: list[Callable[[str], Awaitable[None]]] = [use, tear, use, tear]
        await asyncio.gather(*(do(f"session/{n}") for n in range(200) for do in work[n % 2 :]))
        assert torn_in_use == []
        assert 0 < used < 800
        assert len(sessions) < 200

    async def test_story_in_the_log(self, host: Host, log: EventLog):
        """What the host did is in the log, with the order's id."""
        host.registry("session", {"s": 1})
        await carried_out(host, order(host, "session/s"))
        await eventually(lambda: len(host.recorder) == 0)
        last = (await entries_of(log))[-1].event
        assert (last.type, last.order_id) == ("cleaned_up", "o-session/s")

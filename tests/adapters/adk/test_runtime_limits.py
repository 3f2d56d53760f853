"""The limits of `AdkRuntime`: who makes room, who never does, and what happens when nobody can."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapters import Host
from adapters.adk import AdkRuntime, get_recovery_store
from store import EventLog
from store.errors import LimitReached, PolicyError
from tests.adapters.adk.chats import COOK, is_empty
from tests.adapters.adk.talk import Workshop, say
from tests.support import entries_of, eventually


async def _raise(*_: Any) -> None:
    raise OSError("the disk is full")


class TestLimits:
    async def test_least_recently_used_makes_room(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """With room for three, the fourth takes the place of the one used longest ago."""
        runtime = make_runtime(max_chats=3)
        for id in ("a", "b", "c", "a", "d"):
            async with runtime.chat(id, f"user of {id}", COOK) as chat:
                await say(chat, f"I am {id}")
        assert list(runtime.chats) == ["c", "a", "d"]
        async with runtime.chat("b", "user of b", COOK) as chat:
            assert "I am b" in await say(chat, "who?")
        assert len(runtime.chats) == 3

    async def test_a_user_makes_room_for_themselves(
        self, make_runtime: Callable[..., AdkRuntime]
    ) -> None:
        """The limit per user takes that user's oldest chat and nobody else's."""
        runtime = make_runtime(max_chats_per_user=2)
        for id, user in (("x", "bob"), ("a", "ann"), ("b", "ann"), ("a", "ann"), ("c", "ann")):
            async with runtime.chat(id, user, COOK):
                pass
        assert sorted(runtime.chats) == ["a", "c", "x"]
        assert runtime.user_chats == {"bob": ("x",), "ann": ("a", "c")}

    async def test_what_is_in_use_does_not_make_room(
        self, make_runtime: Callable[..., AdkRuntime]
    ) -> None:
        """Of five that come at once to room for two, two get in and three are refused."""
        runtime = make_runtime(max_chats=2)
        release = asyncio.Event()

        async def stay(number: int) -> str:
            async with runtime.chat(f"c{number}", "u", COOK):
                await release.wait()
            return "in"

        tasks = [asyncio.create_task(stay(number)) for number in range(5)]
        await eventually(lambda: sum(task.done() for task in tasks) == 3)
        release.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert (
            sorted(str(a)[:31] for a in answers)
            == ["in"] * 2 + ["the process has 2 chats, which "] * 3
        )
        assert all(isinstance(a, str | LimitReached) for a in answers)
        async with runtime.chat("c9", "u", COOK):
            assert len(runtime.chats) == 2

    async def test_one_that_cannot_be_saved_does_not_make_room(
        self, make_runtime: Callable[..., AdkRuntime], host: Host
    ) -> None:
        """It stays, the next one goes instead; where there is none, the new chat is refused."""
        recovery = get_recovery_store(host)
        save = recovery.save

        async def save_but_a(record: Any) -> None:
            await (_raise() if record.session == "a" else save(record))

        recovery.save = save_but_a  # type: ignore[method-assign]
        runtime = make_runtime(max_chats=2, recovery=recovery)
        for id in ("a", "b", "c"):
            async with runtime.chat(id, "u", COOK):
                pass
        assert sorted(runtime.chats) == ["a", "c"]
        async with runtime.chat("c", "u", COOK):
            with pytest.raises(LimitReached, match="cannot be saved"):
                async with runtime.chat("d", "u", COOK):
                    pass
        assert sorted(runtime.chats) == ["a", "c"]
        recovery.save = save  # type: ignore[method-assign]

    @pytest.mark.parametrize(
        "options", [{"max_chats": 0}, {"max_chats_per_user": -1}, {"max_runners": 0}]
    )
    async def test_a_limit_that_cannot_be_meant(
        self, make_runtime: Callable[..., AdkRuntime], options: dict[str, int]
    ) -> None:
        """A limit below one is refused."""
        with pytest.raises(PolicyError, match="at least 1"):
            make_runtime(**options)

    async def test_a_place_that_is_becoming_free_is_waited_for(
        self, make_runtime: Callable[..., AdkRuntime], host: Host
    ) -> None:
        """A chat that is just being ended, by whomever, is no reason to refuse another."""
        recovery = get_recovery_store(host)
        save, saving, go_on = recovery.save, asyncio.Event(), asyncio.Event()

        async def slowly(record: Any) -> None:
            saving.set()
            await go_on.wait()
            await save(record)

        recovery.save = slowly  # type: ignore[method-assign]
        runtime = make_runtime(max_chats=1, max_chats_per_user=1, recovery=recovery)
        async with runtime.chat("a", "u", COOK):
            pass
        ending = asyncio.create_task(runtime.end_chat("a"))
        await saving.wait()

        async def come() -> list[str]:
            async with runtime.chat("b", "u", COOK):
                return list(runtime.chats)

        coming = asyncio.create_task(come())
        await asyncio.sleep(0)
        go_on.set()
        assert await coming == ["b"]
        assert await ending is True


class TestRunners:
    """`max_runners`: an idle runner makes room, one that an open chat has never does."""

    async def test_least_recently_used_makes_room(
        self,
        make_runtime: Callable[..., AdkRuntime],
        workshop: Workshop,
        host: Host,
        log: EventLog,
    ) -> None:
        """Of two, the one used longest ago is closed with its toolsets; the chats that had it stay, and go
        on with one made anew."""
        runtime = make_runtime(max_runners=2)
        for id, name in (("a", "one"), ("b", "two"), ("a", "one"), ("c", "three")):
            async with runtime.chat(id, "u", {"name": name}) as chat:
                await say(chat, f"I am {id}")
        assert (workshop.made, workshop.closed) == (["one", "two", "three"], ["two"])
        assert len(runtime.runners) == len(runtime.agents) == 2
        assert sorted(runtime.chats) == ["a", "b", "c"]
        assert host.entries["session/b"].uses == ()
        async with runtime.chat("b", "u", {"name": "two"}) as chat:
            assert "I am b" in await say(chat, "who?")
        assert (workshop.made[-1], workshop.closed) == ("two", ["two", "one"])

        async def told() -> list[str | None]:
            return [
                entry.event.reason
                for entry in await entries_of(log, process=host.process)
                if entry.event.type == "cleaned_up" and entry.event.ref.startswith("runner/")
            ]

        await eventually(lambda: _equal(told, ["to make room", "to make room"]))

    async def test_all_in_use(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """Where open chats have all runners, another configuration is refused at once, clearly; an equal
        one is not, and the chat that was refused is there without a runner."""
        runtime = make_runtime(max_runners=1)
        async with runtime.chat("a", "u", {"name": "one"}):
            with pytest.raises(LimitReached, match="1 runners, which is the limit"):
                async with runtime.chat("b", "u", {"name": "two"}):
                    pass
            async with runtime.chat("c", "u", {"name": "one"}):
                assert sorted(runtime.chats) == ["a", "b", "c"]
                assert runtime.chats["b"].uses() == ()
            with pytest.raises(LimitReached):
                async with runtime.chat("a", "u", {"name": "two"}):
                    pass
        assert workshop.made == ["one"]
        async with runtime.chat("b", "u", {"name": "two"}):
            assert workshop.closed == ["one"]

    async def test_one_that_cannot_be_closed_does_not_make_room(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """The next one goes in its place; where there is none, the new one is refused."""
        runtime = make_runtime(max_runners=2)
        for name in ("one", "two"):
            async with runtime.chat(name, "u", {"name": name}) as chat:
                if name == "one":
                    runner, close = chat.runner, chat.runner.close
        runner.close = _raise  # type: ignore[method-assign]
        async with runtime.chat("three", "u", {"name": "three"}):
            assert workshop.closed == ["two"]
            with pytest.raises(LimitReached, match="cannot be closed"):
                async with runtime.chat("four", "u", {"name": "four"}):
                    pass
        runner.close = close  # type: ignore[method-assign]

    async def test_under_load(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """However many come at once with however many configurations: there are never more runners or
        chats than may be, none is closed that somebody has, who is refused is told so, and in the end
        nothing is left."""
        limits = {"max_runners": 3, "max_chats": 6, "max_chats_per_user": 2}
        runtime = make_runtime(**limits)
        dice, refused, most = random.Random(5), 0, 0

        async def making() -> None:
            nonlocal most
            most = max(most, len(workshop.made) - len(workshop.closed))
            await asyncio.sleep(0)

        workshop.before = making

        async def visitor(number: int) -> None:
            nonlocal refused
            served = 0
            while served < 8:
                name = f"agent{dice.randrange(8)}"
                id, user = f"c{dice.randrange(12)}", f"u{number % 5}"
                try:
                    async with runtime.chat(id, user, {"name": name}) as chat:
                        closed = workshop.closed.count(name)
                        await say(chat, f"{name} for {user}")
                        await asyncio.sleep(dice.random() / 200)
                        assert workshop.closed.count(name) == closed
                        assert chat.runner in runtime.runners.values()
                        mine = [live for live in runtime.chats.values() if live.runners]
                        assert len({ref for live in mine for ref in live.runners}) <= 3
                        assert len(mine) <= 6
                        served += 1
                except LimitReached:
                    refused += 1
                    await asyncio.sleep(dice.random() / 100)

        async with asyncio.timeout(60):
            await asyncio.gather(*(visitor(number) for number in range(12)))
        assert most <= 3
        assert refused
        assert len(runtime.runners) <= 3
        assert len(runtime.chats) <= 6
        assert not any(agent.wanted for agent in runtime.agents.values())
        await runtime.close()
        assert is_empty(runtime)
        assert sorted(workshop.made) == sorted(workshop.closed)


async def _equal(told: Callable[[], Awaitable[Any]], expected: Any) -> bool:
    return bool(await told() == expected)

"""The limits of `AdkRuntime`: who makes room, who never does, and what happens when nobody can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from adapters import Host
from adapters.adk import AdkRuntime, get_recovery_store
from store.errors import LimitReached, PolicyError
from tests.adapters.adk.chats import COOK
from tests.adapters.adk.talk import Workshop, say
from tests.support import eventually


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

    @pytest.mark.parametrize("options", [{"max_chats": 0}, {"max_chats_per_user": -1}])
    async def test_a_limit_that_cannot_be_meant(
        self, make_runtime: Callable[..., AdkRuntime], options: dict[str, int]
    ) -> None:
        """A limit below one is refused."""
        with pytest.raises(PolicyError, match="at least 1"):
            make_runtime(**options)

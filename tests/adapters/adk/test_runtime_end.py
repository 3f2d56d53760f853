"""The end of a chat of `AdkRuntime`, and of the runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from google.adk.sessions import BaseSessionService

from adapters import Host
from adapters.adk import AdkRuntime, get_recovery_store
from store import EventLog, Store
from store.errors import NotAlive
from store.recovery import RecoveryStore
from tests.adapters.adk.chats import CLERK, COOK, is_empty, reconciling
from tests.adapters.adk.talk import Workshop, say
from tests.support import eventually, story


async def away(*_: object, **__: object) -> None:
    raise ConnectionError("Redis is away")


class TestEnd:
    async def test_end_chat_keeps_the_conversation(self, runtime: AdkRuntime, host: Host) -> None:
        """The close button ends what lives; what was said is there when the user comes back."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "I will be back")
        assert await runtime.end_chat("c")
        assert not await runtime.end_chat("c")
        assert not runtime.chats
        assert not runtime.user_chats
        assert "session/c" not in host.entries
        async with runtime.chat("c", "u", COOK) as chat:
            assert "I will be back" in await say(chat, "hello")

    async def test_end_chat_can_delete(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host
    ) -> None:
        """With delete=True nothing is left of it, also of one that this process does not have."""
        for live in (True, False):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "my secret")
            if not live:
                await runtime.end_chat("c")
            await runtime.end_chat("c", user_id="u", delete=True)
            assert await get_recovery_store(host).load("chat", "u", "c") is None
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "hello")
            assert workshop.model.shown[-1] == ["hello"]
            await runtime.end_chat("c", delete=True)

    async def test_end_chat_of_one_in_use_waits_for_its_end(self, runtime: AdkRuntime) -> None:
        """It ends as soon as nobody has it open, and not before."""
        async with runtime.chat("c", "u", COOK) as chat:
            assert await runtime.end_chat("c")
            assert "still here" in await say(chat, "still here")
        assert not runtime.chats

    @pytest.mark.parametrize("delete", [False, True])
    async def test_end_chat_while_an_opening_fails(
        self, runtime: AdkRuntime, workshop: Workshop, sessions: BaseSessionService, delete: bool
    ) -> None:
        """It takes effect when the opening has failed, and not on what is said after that."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "one")
        asked, gate = asyncio.Event(), asyncio.Event()

        async def refuse() -> None:
            asked.set()
            await gate.wait()
            raise RuntimeError("no agent today")

        workshop.before = refuse

        async def open_it() -> None:
            async with runtime.chat("c", "u", CLERK):
                pass

        opening = asyncio.create_task(open_it())
        await asked.wait()
        assert await runtime.end_chat("c", delete=delete)
        gate.set()
        with pytest.raises(RuntimeError, match="no agent today"):
            await opening
        assert not runtime.chats
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "two")
        assert workshop.model.shown[-1][0] == ("two" if delete else "one")
        assert len((await sessions.list_sessions(app_name="chat")).sessions) == 1

    async def test_end_chat_can_delete_one_that_is_being_ended(
        self, runtime: AdkRuntime, sessions: BaseSessionService
    ) -> None:
        """Whose chat it is need not be said again: it was known when it was asked for."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "my secret")
        answers = await asyncio.gather(runtime.end_chat("c"), runtime.end_chat("c", delete=True))
        assert all(answers)
        assert not (await sessions.list_sessions(app_name="chat")).sessions

    async def test_a_deletion_that_fails(
        self, runtime: AdkRuntime, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The chat stays and can be used, though half of it is gone."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "my secret")
        monkeypatch.setattr(RecoveryStore, "purge", away)
        with pytest.raises(ConnectionError):
            await runtime.end_chat("c", delete=True)
        assert len(runtime.chats) == 1
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "hello")
        assert workshop.model.shown[-1] == ["hello"]

    @pytest.mark.parametrize("next", ["opened", "ended", "idle"])
    async def test_a_deletion_that_was_put_off_and_fails(
        self, runtime: AdkRuntime, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, host: Host,
        store: Store, namespace: str, sessions: BaseSessionService, next: str,
    ) -> None:  # fmt: skip
        """It is done before anything else comes of the chat, and only once."""
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "my secret")
            monkeypatch.setattr(type(sessions), "delete_session", away)
            await runtime.end_chat("c", delete=True)
        assert len(runtime.chats) == 1
        monkeypatch.undo()
        if next == "ended":
            await runtime.end_chat("c")
        if next == "idle":
            async with reconciling(store, namespace, host):
                await eventually(lambda: not runtime.chats)
        for text in ("hello", "again"):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, text)
        assert workshop.model.shown[-1][0] == "hello"

    async def test_ephemeral_conversations_go_with_their_chats(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop,
        sessions: BaseSessionService,
    ) -> None:  # fmt: skip
        """An ephemeral runtime leaves no data."""
        runtime = make_runtime(ephemeral=True, recovery=False)
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "forget me")
        await runtime.end_chat("c")
        assert not (await sessions.list_sessions(app_name="chat")).sessions
        async with runtime.chat("c", "u", COOK) as chat:
            await say(chat, "hello")
        assert workshop.model.shown[-1] == ["hello"]

    async def test_shutdown_order(
        self, make_runtime: Callable[..., AdkRuntime], host: Host, workshop: Workshop, store: Store,
        namespace: str, log: EventLog,
    ) -> None:  # fmt: skip
        """No new chats, those in use finish, then sessions, then runners, then agents; all is empty."""
        runtime = make_runtime()
        for number in range(3):
            async with runtime.chat(f"c{number}", "u", (COOK, CLERK)[number % 2]) as chat:
                await say(chat, "hello")

        async def last_words() -> str:
            async with runtime.chat("c0", "u", COOK) as chat:
                return await say(chat, "wait")

        talking = asyncio.create_task(last_words())
        await workshop.model.waiting.wait()
        closing = asyncio.create_task(runtime.close())
        await asyncio.sleep(0)
        with pytest.raises(NotAlive, match="closed"):
            async with runtime.chat("c9", "u", COOK):
                pass
        assert len(runtime.chats) == 3
        workshop.model.gate.set()
        assert "wait" in await talking
        await closing
        assert is_empty(runtime)
        assert sorted(workshop.closed) == ["clerk", "cook"]
        await eventually(lambda: not len(host.recorder))
        ends = [ref.partition("/")[0] for type, ref in await story(log) if type == "cleaned_up"]
        ends = [kind for kind in ends if kind != "agent_creation"]
        assert ends == ["session"] * 3 + ["runner", "agent"] * 2
        assert not host.registries
        assert not host.indexes

    async def test_closing_is_not_stopped_by_who_gives_up_waiting(
        self, make_runtime: Callable[..., AdkRuntime], host: Host, sessions: BaseSessionService
    ) -> None:
        """A cancelled `close` refuses new chats from then on, and the next one waits for the same end."""
        runtime = make_runtime()
        async with runtime.chat("idle", "u", COOK) as chat:
            await say(chat, "remember me")
        async with runtime.chat("busy", "u", COOK):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await runtime.close()
            with pytest.raises(NotAlive, match="closed"):
                async with runtime.chat("new", "u", COOK):
                    pass
            assert len(runtime.chats) == 2
        await runtime.close()
        assert is_empty(runtime)
        assert not host.registries
        assert await get_recovery_store(host).load("chat", "u", "idle") is not None

    async def test_closing_does_not_wait_for_an_agent_that_is_never_made(
        self, make_runtime: Callable[..., AdkRuntime], workshop: Workshop
    ) -> None:
        """Whoever still waits for it when the grace is over is told that the runtime is closed."""
        runtime = make_runtime()
        workshop.before = asyncio.Event().wait

        async def begin() -> None:
            async with runtime.chat("c", "u", COOK):
                pass

        beginning = asyncio.create_task(begin())
        await eventually(lambda: workshop.made)
        async with asyncio.timeout(5):
            await runtime.close(grace=0.01)
            with pytest.raises(NotAlive, match="closed"):
                await beginning
        assert is_empty(runtime)

    async def test_it_can_be_made_again(self, make_runtime: Callable[..., AdkRuntime]) -> None:
        """A closed runtime leaves the host free for another."""
        for _ in range(2):
            runtime = make_runtime()
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "hello")
            await runtime.close()

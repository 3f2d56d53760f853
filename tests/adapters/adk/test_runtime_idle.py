"""Chats of `AdkRuntime` that nobody uses: they are saved, go, and continue where they are wanted again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.adk.sessions import BaseSessionService, InMemorySessionService

from adapters import Host
from adapters.adk import AdkRuntime, RedisSessionService, get_recovery_store
from store import EventLog, Store
from tests.adapters.adk.chats import CLERK, COOK, is_empty, reconciling
from tests.adapters.adk.talk import Workshop, say
from tests.support import entries_of, eventually, story


class TestIdle:
    async def test_everything_goes_and_the_chat_continues(
        self, runtime: AdkRuntime, workshop: Workshop, host: Host, store: Store, namespace: str,
        log: EventLog,
    ) -> None:  # fmt: skip
        """Idle: session, runner and agent go in that order; who returns is remembered."""
        async with reconciling(store, namespace, host):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "my cat is called Mia")
            await eventually(lambda: is_empty(runtime))
            assert workshop.closed == ["cook"]
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "what is it called?")
            assert "my cat is called Mia" in workshop.model.shown[-1]
            await eventually(lambda: is_empty(runtime))
        ends = [ref.partition("/")[0] for type, ref in await story(log) if type == "cleaned_up"]
        ends = [kind for kind in ends if kind in {"session", "runner", "agent"}]
        assert ends == ["session", "runner", "agent"] * 2

    async def test_another_process_continues(
        self, runtime: AdkRuntime, workshop: Workshop, sessions: BaseSessionService,
        host: Host, store: Store, namespace: str, make_service: Callable[..., RedisSessionService],
    ) -> None:  # fmt: skip
        """The next message may land anywhere: history and state come along."""
        async with runtime.chat("c", "u", COOK) as chat:
            state = {"cats": 1, "user:name": "Ann", "temp:x": 1}
            async for _ in chat.send("my cat is called Mia", state_delta=state):
                pass
        await runtime.end_chat("c")
        elsewhere = (
            InMemorySessionService()
            if isinstance(sessions, InMemorySessionService)
            else make_service()
        )
        async with (
            Host.connect(store, name="other", namespace=namespace) as other,
            AdkRuntime(other, elsewhere, workshop) as second,
            second.chat("c", "u", CLERK) as chat,
        ):
            await say(chat, "what is it called?")
            assert (await chat.session()).state == {"cats": 1, "user:name": "Ann"}
        assert "my cat is called Mia" in workshop.model.shown[-1]

    async def test_two_processes_begin_one_chat(
        self, host: Host, store: Store, namespace: str, workshop: Workshop,
        make_service: Callable[..., RedisSessionService],
    ) -> None:  # fmt: skip
        """Both are served, whichever of them makes the session."""

        async def begin(runtime: AdkRuntime, number: int) -> str:
            async with runtime.chat(f"c{number}", "u", COOK) as chat:
                return (await chat.session()).id

        async with (
            Host.connect(store, name="other", namespace=namespace) as other,
            AdkRuntime(host, make_service(), workshop) as one,
            AdkRuntime(other, make_service(), workshop) as two,
        ):
            for number in range(10):
                ids = await asyncio.gather(begin(one, number), begin(two, number))
                assert ids == [f"c{number}"] * 2

    async def test_a_failed_save_keeps_the_session(
        self, make_runtime: Callable[..., AdkRuntime], host: Host, store: Store, namespace: str,
        log: EventLog, workshop: Workshop,
    ) -> None:  # fmt: skip
        """What cannot be saved stays alive, with its history, and the failure is in the log."""
        recovery = get_recovery_store(host)
        save = recovery.save
        recovery.save = _raise  # type: ignore[method-assign]
        runtime = make_runtime(recovery=recovery)
        async with reconciling(store, namespace, host):
            async with runtime.chat("c", "u", COOK) as chat:
                await say(chat, "remember this")

            async def reported() -> list[str]:
                return [
                    str(entry.event.reason)
                    for entry in await entries_of(log)
                    if entry.event.type == "cleanup_failed"
                ]

            (reason, *_) = await eventually(reported)
            assert "was not saved: the disk is full" in reason
            assert len(runtime.chats) == len(runtime.runners) == 1
            recovery.save = save  # type: ignore[method-assign]
            await eventually(lambda: is_empty(runtime))
        async with runtime.chat("c", "u", COOK) as chat:
            assert "remember this" in await say(chat, "?")

    async def test_keep_alive_and_heartbeat(
        self, runtime: AdkRuntime, host: Host, store: Store, namespace: str
    ) -> None:
        """A chat somebody asked to keep stays while others go; one nobody has answers False."""
        for id in ("kept", "other"):
            async with runtime.chat(id, "u", COOK) as chat:
                if id == "kept":
                    chat.keep_alive(60)
        assert runtime.heartbeat("other")
        assert not runtime.heartbeat("nobody")
        assert not runtime.keep_alive("nobody", 1)
        async with reconciling(store, namespace, host) as worker:
            await eventually(lambda: list(runtime.chats) == ["kept"])
            await worker.reconcile()
            assert list(runtime.chats) == ["kept"]

    async def test_one_that_is_open_is_not_torn_down(
        self, runtime: AdkRuntime, host: Host, store: Store, namespace: str, workshop: Workshop
    ) -> None:
        """However long an answer takes, and however short the idle time is."""
        async with reconciling(store, namespace, host, session_idle_timeout=0.01) as worker:
            async with runtime.chat("c", "u", COOK) as chat:
                talking = asyncio.create_task(say(chat, "wait"))
                await workshop.model.waiting.wait()
                for _ in range(3):
                    await worker.reconcile()
                assert list(runtime.chats) == ["c"]
                workshop.model.gate.set()
                await talking
            await eventually(lambda: is_empty(runtime))

    async def test_reopening_races_with_teardown(
        self, runtime: AdkRuntime, host: Host, store: Store, namespace: str, workshop: Workshop
    ) -> None:
        """Chats that are opened while they are torn down come up whole, every time."""
        async with reconciling(store, namespace, host, session_idle_timeout=0.003):

            async def talk(user: str) -> None:
                for turn in range(10):
                    async with runtime.chat(f"c{user}", user, COOK) as chat:
                        await say(chat, f"{user}.{turn}")
                    await asyncio.sleep(0.001 * (int(user) % 4) * (turn % 3))

            await asyncio.gather(*(talk(str(number)) for number in range(6)))
            await eventually(lambda: is_empty(runtime))
        for number in range(6):
            mine = [t for t in workshop.model.shown if t[-1].startswith(f"{number}.")]
            assert [len(texts) for texts in mine] == [2 * turn + 1 for turn in range(10)]


async def _raise(*_: Any) -> None:
    raise OSError("the disk is full")

"""The sessions of RedisSessionService are resources of a host, with nothing but an argument for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.events.event import Event
from google.adk.runners import Runner
from google.genai import types

from adapters import Host
from adapters.adk import AdkRuntime, LifecyclePlugin, RedisSessionService
from reconciler import Policy, Reconciler
from store import EventLog, Store
from tests.adapters.adk.talk import Listener, Workshop, say, text_of
from tests.support import eventually, story

Make = Callable[..., RedisSessionService]
NAME = {"app_name": "app", "user_id": "u", "session_id": "s"}


def event(text: str) -> Event:
    return Event(author="user", content=types.Content(role="user", parts=[types.Part(text=text)]))


class TestGivenHost:
    async def test_sessions_are_in_the_log(
        self, make_service: Make, host: Host, log: EventLog
    ) -> None:
        """Created, reused and cleaned up, with whose they are; nothing was written for it."""
        service = make_service(host=host)
        await service.create_session(**NAME)
        session = await service.get_session(**NAME)
        assert session is not None
        await service.append_event(session, event("hello"))
        assert host.entries["session/s"].registry is not None
        await service.delete_session(**NAME)
        await eventually(lambda: not len(host.recorder))
        assert await story(log) == [
            ("created", "session/s"), ("reused", "session/s"), ("cleaned_up", "session/s"),
        ]  # fmt: skip
        assert not host.entries

    async def test_a_session_that_failed_to_be_created_is_none(
        self, make_service: Make, host: Host
    ) -> None:
        """What raised, or was not found, is no resource."""
        service = make_service(host=host)
        await service.create_session(**NAME)
        await service.delete_session(**NAME)
        assert await service.get_session(**NAME) is None
        await service.create_session(**NAME)
        with pytest.raises(AlreadyExistsError):
            await service.create_session(**NAME)
        assert list(host.entries) == ["session/s"]

    async def test_teardown_keeps_the_conversation(
        self, make_service: Make, host: Host, store: Store, namespace: str
    ) -> None:
        """An idle session goes from the process and its memory; the data is as it was."""
        service = make_service(host=host)
        session = await service.create_session(**NAME)
        await service.append_event(session, event("hello"))
        policy = Policy(session_idle_timeout=0.05)
        async with Reconciler(store, namespace=namespace, policy=policy, hosts=[host]):
            await eventually(lambda: not host.entries)
        assert len(service._cache) == 0
        opened = await service.get_session(**NAME)
        assert opened is not None
        assert text_of(opened.events) == "hello"
        assert list(host.entries) == ["session/s"]

    @pytest.mark.parametrize("ephemeral", [True, ["app"]])
    async def test_ephemeral_conversations_go(
        self, make_service: Make, host: Host, store: Store, namespace: str, ephemeral: Any,
        log: EventLog,
    ) -> None:  # fmt: skip
        """Where the app is ephemeral, the teardown deletes the conversation."""
        service = make_service(host=host, ephemeral=ephemeral)
        await service.create_session(**NAME)
        policy = Policy(session_idle_timeout=0.05)
        async with Reconciler(store, namespace=namespace, policy=policy, hosts=[host]):
            await eventually(lambda: not host.entries)
        assert await service.get_session(**NAME) is None
        await eventually(lambda: not len(host.recorder))
        assert (await story(log)).count(("cleaned_up", "session/s")) == 1

    async def test_ids_that_two_users_share(self, make_service: Make, host: Host) -> None:
        """Two sessions of one id are two resources, each deleted for itself."""
        service = make_service(host=host)
        for user in ("ann", "bob"):
            await service.create_session(app_name="app", user_id=user, session_id="s")
        assert sorted(host.entries) == ["session/s", "session/s@bob@app"]
        await service.delete_session(app_name="app", user_id="ann", session_id="s")
        assert sorted(host.entries) == ["session/s@bob@app"]
        await service.get_session(app_name="app", user_id="bob", session_id="s")
        assert sorted(host.entries) == ["session/s@bob@app"]
        await service.delete_session(app_name="app", user_id="bob", session_id="s")
        assert not host.entries

    async def test_with_the_runtime_and_the_plugin(
        self, make_service: Make, host: Host, store: Store, namespace: str
    ) -> None:
        """All three on one host speak of one session, which the runtime holds."""
        service = make_service(host=host)
        await service.create_session(app_name="chat", user_id="u", session_id="s")
        async with AdkRuntime(host, service, Workshop()) as runtime:
            async with runtime.chat("s", "u", {"name": "cook"}) as chat:
                await say(chat, "hello")
            sessions = [ref for ref in host.entries if ref.startswith("session/")]
            assert sessions == ["session/s"]
            assert host.entries["session/s"].obj is runtime.chats["s"]
            policy = Policy(session_idle_timeout=0.05, runner_idle_timeout=0.05)
            async with Reconciler(store, namespace=namespace, policy=policy, hosts=[host]):
                await eventually(lambda: not host.entries)

    async def test_the_plugin_finds_the_host_of_the_service(
        self, make_service: Make, host: Host
    ) -> None:
        """`LifecyclePlugin()` needs no argument where the session service has a host."""
        service = make_service(host=host)
        agent = LlmAgent(name="cook", model=Listener())
        app = App(name="app", root_agent=agent, plugins=[LifecyclePlugin()])
        runner = Runner(app=app, session_service=service, auto_create_session=True)
        content = types.Content(role="user", parts=[types.Part(text="hello")])
        run = runner.run_async(user_id="u", session_id="s", new_message=content)
        assert "hello" in text_of([event async for event in run])
        assert host.entries["session/s"].uses
        await runner.close()


class TestOwnHost:
    async def test_it_starts_with_the_first_use(
        self, redis_url: str, namespace: str, log: EventLog
    ) -> None:
        """`?name=` in the address is all: the service brings a host, and ends it in good order."""
        service = RedisSessionService(f"{redis_url}?name=chat-api&namespace={namespace}")
        assert service.host is None
        await service.create_session(**NAME)
        host = service.host
        assert host is not None
        assert host.name == "chat-api"
        await service.close()
        assert service.host is None
        types = [str(entry.event.type) async for entry in log.read()]
        assert types == ["process_started", "created", "process_stopped"]
        await service.get_session(**NAME)
        assert service.host is not None
        await service.close()

    def test_it_ends_with_its_loop(self, redis_url: str, namespace: str) -> None:
        """Who only ends the event loop, as the ADK command line does, has ended the process properly."""
        service = RedisSessionService(redis_url, namespace, name="chat-api")

        async def use() -> None:
            for number in range(3):
                await service.create_session(app_name="app", user_id="u", session_id=str(number))
            await service.delete_session(app_name="app", user_id="u", session_id="0")

        async def look() -> list[tuple[str, str]]:
            from store import connect

            async with connect(redis_url) as store:
                entries = [entry async for entry in EventLog(store, namespace).read()]
            return [(str(e.event.type), e.event.ref.partition(":")[0]) for e in entries]

        asyncio.run(use())
        types = [type for type, _ in asyncio.run(look())]
        assert types == ["process_started", *["created"] * 3, "cleaned_up", "process_stopped"]

    async def test_many_first_uses_at_once_start_one(
        self, redis_url: str, namespace: str, log: EventLog
    ) -> None:
        """However many requests come first, there is one host."""
        async with RedisSessionService(redis_url, namespace, name="chat-api") as service:
            await asyncio.gather(
                *(service.create_session(app_name="app", user_id="u") for _ in range(20))
            )
            assert service.host is not None
            assert len(service.host.entries) == 20
        starts = [e async for e in log.read() if e.event.type == "process_started"]
        assert len(starts) == 1

    async def test_conversations_go_on_without_it(
        self, redis_url: str, namespace: str, store: Store
    ) -> None:
        """When the log cannot be used, sessions are served all the same."""
        await store.redis.hset(f"ar:{{{namespace}}}:meta", "schema", "999")
        async with RedisSessionService(redis_url, namespace, name="chat-api") as service:
            await service.create_session(**NAME)
            assert await service.get_session(**NAME) is not None
            assert service.host is None

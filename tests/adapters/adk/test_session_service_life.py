"""How long things live around `RedisSessionService`: connections with their loops, sessions with a ttl.

And what is told of them.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
from google.adk.errors.already_exists_error import AlreadyExistsError

from adapters.adk import RedisSessionService
from store.connection import connect
from tests.adapters.adk.sessions import (
    NAME,
    MakeService,
    filled,
    said,
    texts,
    until,
)


class TestLoops:
    def test_one_loop_after_another(self, redis_url: str, namespace: str) -> None:
        """A service goes from loop to loop, and leaves no connection behind."""
        service = RedisSessionService(redis_url, namespace)

        async def turn() -> int:
            session = await service.get_session(**NAME) or await service.create_session(**NAME)
            await service.append_event(session, said("x"))
            return len(session.events)

        assert [asyncio.run(turn()) for _ in range(5)] == [1, 2, 3, 4, 5]
        assert service._stores._by_loop == {}

    def test_several_loops_at_once(self, redis_url: str, namespace: str) -> None:
        """Threads with loops of their own use one service at once, and no event is lost."""
        service = RedisSessionService(redis_url, namespace, accept_stale=True)
        asyncio.run(service.create_session(**NAME))

        async def turns(name: str) -> None:
            for number in range(25):
                session = await service.get_session(**NAME)
                assert session is not None
                await service.append_event(session, said(f"{name}{number}"))

        threads = [threading.Thread(target=lambda n=n: asyncio.run(turns(n))) for n in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got = texts(asyncio.run(service.get_session(**NAME)))
        assert sorted(got) == sorted(f"{name}{number}" for name in "abcd" for number in range(25))
        assert service._stores._by_loop == {}

    def test_a_loop_that_was_not_shut_down(self, redis_url: str, namespace: str) -> None:
        """A loop closed without ceremony is forgotten when the next one comes."""
        service = RedisSessionService(redis_url, namespace)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(service.create_session(**NAME))
        held = service._stores._by_loop[loop]
        assert held.store is not None
        loop.run_until_complete(held.store.close())
        loop.close()
        assert asyncio.run(service.get_session(**NAME)) is not None
        assert service._stores._by_loop == {}

    async def test_closed_and_used_again(self, service: RedisSessionService) -> None:
        """After close, the next call connects anew."""
        await service.create_session(**NAME)
        await service.close()
        await service.close()
        assert await service.get_session(**NAME) is not None


class TestTimeToLive:
    async def keys(self, redis_url: str, namespace: str) -> dict[str, int]:
        async with connect(redis_url) as store:
            found = [key async for key in store.redis.scan_iter(f"ar:{{{namespace}/*", count=1000)]
            return {
                key.decode().partition("}:")[2]: await store.redis.pttl(key)
                for key in sorted(found)
            }

    async def test_every_use_starts_it_afresh(
        self, make_service: MakeService, redis_url: str, namespace: str
    ) -> None:
        """All of a session expires together, ttl after its last use, and shared state never."""
        service = make_service(ttl={"app": 100.0})
        session = await service.create_session(**NAME, state={"app:a": 1, "user:b": 1})
        for use in ("create", "append", "open", "run"):
            if use == "append":
                await service.append_event(session, said("x"))
            if use in ("open", "run"):
                # As if nearly all of the time had passed.
                async with connect(redis_url) as store:
                    await store.redis.pexpire(f"ar:{{{namespace}/adk/app}}:session:user/s", 5000)
            if use == "open":
                assert await service.get_session(**NAME) is not None
            if use == "run":
                # What the look at the sessions in use does, see test_session_retention_races.py.
                await service._still_used([("app", "user", "s"), ("app", "user", "gone")])
            ttls = await self.keys(redis_url, namespace)
            assert ttls.pop("state") == ttls.pop("user:user:state") == -1
            # What a worker needs to tell of the end stays a week longer, for the worker to come.
            week = 7 * 86400_000
            assert 90_000 < ttls.pop("sessions") - week <= 100_000
            assert 90_000 < ttls.pop("used") - week <= 100_000
            assert len(ttls) == (2 if use == "create" else 4)
            assert all(90_000 < ttl <= 100_000 for ttl in ttls.values()), ttls

    async def test_other_apps_keep_theirs(
        self, make_service: MakeService, redis_url: str, namespace: str
    ) -> None:
        """An app without a ttl keeps its sessions for ever."""
        await filled(make_service(ttl={"other": 100.0}), 1)
        assert set((await self.keys(redis_url, namespace)).values()) == {-1}

    async def test_an_expired_session_is_gone_from_everywhere(
        self, make_service: MakeService, redis_url: str, namespace: str
    ) -> None:
        """Once expired, a session is not found, not listed, and can be made anew; of it, its name stays
        for a week, so that a worker can tell."""
        service = make_service(ttl=0.05)
        await filled(service, 2)

        async def nothing_left() -> bool:
            return set(await self.keys(redis_url, namespace)) == {"sessions", "used"}

        await until(nothing_left)
        assert await service.get_session(**NAME) is None
        assert (await service.list_sessions(app_name="app")).sessions == []
        assert (await make_service().create_session(**NAME)).events == []

    async def test_lists_forget_what_expired(
        self, make_service: MakeService, redis_url: str, namespace: str
    ) -> None:
        """A session that stays does not make the lists keep the names of those that went."""
        stays, goes = make_service(), make_service(ttl=0.05)
        await stays.create_session(**NAME)
        for number in range(5):
            await goes.create_session(**(NAME | {"session_id": f"g{number}"}))

        async def one_left() -> bool:
            return len((await stays.list_sessions(app_name="app")).sessions) == 1

        await until(one_left)
        async with connect(redis_url) as store:
            tag = f"ar:{{{namespace}/adk/app}}"

            async def forgotten() -> bool:
                await stays.create_session(**(NAME | {"session_id": "t"}))
                await stays.delete_session(**(NAME | {"session_id": "t"}))
                return bool(await store.redis.zcard(f"{tag}:sessions") == 1)

            await until(forgotten)
            assert await store.redis.zcard(f"{tag}:used") == 1
            assert await store.redis.zcard(f"{tag}:user:user:sessions") == 1
            assert await store.redis.zcard(f"{tag}:ended") == 5

    async def test_it_can_be_taken_back(
        self, make_service: MakeService, redis_url: str, namespace: str
    ) -> None:
        """A session that is used by a service without ttl is kept for ever again."""
        await filled(make_service(ttl=100.0), 1)
        await make_service().get_session(**NAME)
        assert set((await self.keys(redis_url, namespace)).values()) == {-1}


class TestLifecycle:
    async def test_what_is_told(self, make_service: MakeService) -> None:
        """Creating, opening and deleting a session are told; what finds nothing is not."""
        told: list[tuple[str, str, dict[str, str]]] = []
        service = make_service(on_lifecycle=lambda *what: told.append(what))
        session = await service.create_session(**NAME)
        with pytest.raises(AlreadyExistsError):
            await service.create_session(**NAME)
        await service.append_event(session, said("x"))
        await service.get_session(**NAME)
        await service.get_session(**(NAME | {"session_id": "none"}))
        await service.delete_session(**NAME)
        await service.delete_session(**NAME)
        about = {"app": "app", "user": "user"}
        assert told == [(kind, "session/s", about) for kind in ("created", "reused", "cleaned_up")]

    async def test_a_listener_that_fails(
        self, make_service: MakeService, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A callback that raises is logged and does not hurt the conversation."""

        def fails(*_: object) -> None:
            raise RuntimeError("no")

        await make_service(on_lifecycle=fails).create_session(**NAME)
        assert "on_lifecycle failed for created of session/s" in caplog.text

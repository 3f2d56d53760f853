"""What `RedisSessionService` promises beyond ADK's in-memory service: reading, copies, cache, writers.

See also the differential test.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.adk.errors import StaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.sessions import Session
from google.adk.sessions.base_session_service import GetSessionConfig

from adapters.adk import RedisSessionService
from store.connection import Store, connect
from store.errors import (
    MalformedEntry,
    RedisUnavailable,
)
from tests.adapters.adk.sessions import (
    NAME,
    CountedCommands,
    MakeService,
    filled,
    said,
    texts,
)


class TestReading:
    async def test_another_process_reads_what_was_written(self, make_service: MakeService) -> None:
        """A session written by one process is the same session in another."""
        writer, reader = make_service(), make_service()
        session = await writer.create_session(
            **NAME, state={"a": [1], "user:b": None, "app:c": {"d": 1.5}, "temp:e": 1}
        )
        await writer.append_event(session, said("hello", state={"a": 2, "temp:f": 3}))
        again = await reader.get_session(**NAME)
        assert again is not None
        assert again.events == session.events
        assert again.state == {"a": 2, "user:b": None, "app:c": {"d": 1.5}}
        assert session.state == again.state | {"temp:f": 3}
        assert again.last_update_time == session.events[0].timestamp

    @pytest.mark.parametrize("count", [0, 1, 7, 100, 5000])
    async def test_recent_events_are_read_from_the_end(
        self, service: RedisSessionService, make_service: MakeService, count: int
    ) -> None:
        """num_recent_events gives the last events, whether the process has seen the session or not."""
        await filled(service, 40)
        for reader in (service, make_service()):
            for _ in range(2):
                session = await reader.get_session(
                    **NAME, config=GetSessionConfig(num_recent_events=count)
                )
                assert texts(session) == [str(n) for n in range(40)][40 - min(count, 40) :]

    @pytest.mark.parametrize("after", [0.0, 99.0, 100.0, 139.0, 139.5, 500.0])
    async def test_events_after_a_time(
        self, service: RedisSessionService, make_service: MakeService, after: float
    ) -> None:
        """after_timestamp gives the events from that time on."""
        await filled(service, 140)
        config = GetSessionConfig(after_timestamp=after)
        for reader in (service, make_service()):
            session = await reader.get_session(**NAME, config=config)
            assert texts(session) == [str(n) for n in range(140) if 100.0 + n >= after]

    async def test_a_limited_read_does_not_spoil_a_full_one(
        self, service: RedisSessionService, make_service: MakeService
    ) -> None:
        """After any limited reads, a full read gives every event once and in order."""
        session = await filled(service, 30)
        reader = make_service()
        for step, recent in enumerate([0, 3, 1, 10, 2]):
            await reader.get_session(**NAME, config=GetSessionConfig(num_recent_events=recent))
            await service.append_event(session, said(str(30 + step)))
            got = await reader.get_session(**NAME, config=GetSessionConfig(num_recent_events=4))
            assert texts(got) == [str(n) for n in range(27 + step, 31 + step)]
        assert texts(await reader.get_session(**NAME)) == [str(n) for n in range(35)]

    async def test_a_long_session_is_read_in_pages(
        self, service: RedisSessionService, make_service: MakeService
    ) -> None:
        """A session longer than one answer of Redis is read whole, forwards and backwards."""
        await filled(service, 2300)
        everything = [str(n) for n in range(2300)]
        assert texts(await make_service().get_session(**NAME)) == everything
        recent = GetSessionConfig(num_recent_events=2200)
        assert texts(await make_service().get_session(**NAME, config=recent)) == everything[100:]
        since = GetSessionConfig(after_timestamp=200.0)
        assert texts(await make_service().get_session(**NAME, config=since)) == everything[100:]

    async def test_a_known_session_costs_one_call_and_what_is_new(
        self, make_service: MakeService, redis_url: str
    ) -> None:
        """Opening a session this process has seen is one script call that sends only new events."""
        writer, reader = make_service(), make_service()
        session = await filled(writer, 500)
        assert len(texts(await reader.get_session(**NAME))) == 500
        await writer.append_event(session, said("new"))
        async with connect(redis_url) as store:
            count = CountedCommands(store)
            await count.look()  # the first look pays for itself
            calls, sent = await count.look()
            got = await reader.get_session(**NAME)
            calls_after, sent_after = await count.look()
        assert texts(got)[-1] == "new"
        assert len(texts(got)) == 501
        assert calls_after - calls == 1
        # Most of these bytes are the answer to the second look.
        assert sent_after - sent < 40_000

    async def test_what_is_not_wanted_is_not_read(
        self, service: RedisSessionService, make_service: MakeService, redis_url: str
    ) -> None:
        """Of a session of 2 MB, a limited read and a list move little; by bytes that Redis sends."""
        session = await service.create_session(**NAME)
        for number in range(500):
            await service.append_event(session, said("x" * 4000, timestamp=float(number)))

        async def listed(reader: RedisSessionService) -> None:
            assert len((await reader.list_sessions(app_name="app")).sessions) == 1

        async def read(reader: RedisSessionService, **limits: Any) -> None:
            got = await reader.get_session(**NAME, config=GetSessionConfig(**limits))
            assert got is not None
            assert 0 < len(got.events) + (limits == {"num_recent_events": 0}) < 500 or not limits

        async with connect(redis_url) as store:
            count = CountedCommands(store)
            await count.look()

            async def sent(look: Callable[[RedisSessionService], Awaitable[None]]) -> int:
                reader = make_service()
                async with reader:
                    _, before = await count.look()
                    await look(reader)
                    return (await count.look())[1] - before

            whole = await sent(read)
            assert whole > 2_000_000
            assert await sent(lambda r: read(r, num_recent_events=0)) < whole / 50
            assert await sent(lambda r: read(r, num_recent_events=3)) < whole / 50
            assert await sent(lambda r: read(r, after_timestamp=497.0)) < whole / 5
            assert await sent(listed) < whole / 50

    async def test_an_unreadable_event_is_named(
        self, service: RedisSessionService, namespace: str, redis_url: str
    ) -> None:
        """An event that ADK cannot decode is an error with the session and the entry."""
        await service.create_session(**NAME)
        async with connect(redis_url) as store:
            key = f"ar:{{{namespace}/adk/app}}:session:user/s"
            await store.redis.xadd(f"{key}:events", {"e": b'{"actions":{"x":1}}', "t": "1"}, "9-1")
            await store.redis.hset(key, mapping={"last": "9-1", "bytes": "10"})
        with pytest.raises(MalformedEntry, match="session/s, entry 9-1"):
            await service.get_session(**NAME)


class TestIsolation:
    async def test_returned_events_are_private(self, service: RedisSessionService) -> None:
        """Whatever a caller does to a returned session, the next one gets what is stored."""
        await filled(service, 3)
        await service.get_session(**NAME)
        for spoil in (
            lambda events: setattr(events[0], "author", "x"),
            lambda events: events[-1].content.parts.clear(),
            lambda events: next(iter(events)).actions.state_delta.update(x=1),
            lambda events: next(reversed(events)).content.parts.clear(),
            lambda events: [event.content.parts.clear() for event in events[:2]],
            lambda events: events.pop().content.parts.clear(),
            lambda events: (events + [])[1].content.parts.clear(),  # noqa: RUF005
            lambda events: ([] + events)[1].content.parts.clear(),  # noqa: RUF005
            lambda events: (events * 1)[1].content.parts.clear(),
            lambda events: sorted(events, key=id)[1].content.parts.clear(),
            lambda events: copy.copy(events)[1].content.parts.clear(),
            lambda events: events.copy()[1].content.parts.clear(),
            lambda events: list(events)[1].content.parts.clear(),
            lambda events: (events.reverse(), events[0].content.parts.clear()),
        ):
            session = await service.get_session(**NAME)
            assert session is not None
            spoil(session.events)  # type: ignore[no-untyped-call]
            session.state["x"] = 1
            again = await service.get_session(**NAME)
            assert texts(again) == ["0", "1", "2"]
            assert again is not None
            assert again.events[0].author == "user"
            assert not again.events[0].actions.state_delta
            assert again.state == {}

    async def test_the_list_of_events_is_a_list(self, service: RedisSessionService) -> None:
        """A returned session's events serialize, compare, copy and grow like those of any list."""
        session = await filled(service, 3)
        got = await service.get_session(**NAME)
        assert got is not None
        assert got.events == session.events
        assert isinstance(got.events, list)
        assert got.events[0] is got.events[0]
        assert got.model_dump_json() == session.model_dump_json()
        assert copy.deepcopy(got).events == got.events
        assert type(copy.deepcopy(got.events)) is list
        own = said("mine")
        got.events.append(own)
        assert got.events[-1] is own
        with pytest.raises(IndexError):
            got.events[4]

    async def test_shared_events_are_the_cached_ones(self, make_service: MakeService) -> None:
        """With share_events, two reads give the same event objects, in lists of their own."""
        service = make_service(share_events=True)
        await filled(service, 2)
        one, two = await service.get_session(**NAME), await service.get_session(**NAME)
        assert one is not None
        assert two is not None
        assert one.events[0] is two.events[0]
        one.events.clear()
        assert len(two.events) == 2


class TestCache:
    async def test_it_is_bounded(self, make_service: MakeService) -> None:
        """The cache forgets the least recently used sessions, and what it takes stays in its bound."""
        service = make_service(cache_bytes=100_000)
        for number in range(20):
            await filled(service, 4, session_id=f"s{number}")
            await service.get_session(**(NAME | {"session_id": f"s{number}"}))
            assert service._cache.size <= 100_000
        assert 0 < len(service._cache) < 20
        for number in range(20):
            got = await service.get_session(**(NAME | {"session_id": f"s{number}"}))
            assert texts(got) == ["0", "1", "2", "3"]

    @pytest.mark.parametrize("cache_bytes", [0, 10_000, 50_000])
    async def test_a_small_cache_changes_no_answer(
        self, make_service: MakeService, cache_bytes: int
    ) -> None:
        """A session that does not fit into the cache is read from Redis each time, and is private."""
        service = make_service(cache_bytes=cache_bytes)
        session = await service.create_session(**NAME)
        held = []
        for number in range(12):
            await service.append_event(session, said(str(number)))
            got = await service.get_session(**NAME)
            assert texts(got) == [str(n) for n in range(number + 1)]
            held.append(got)
        for got in held:
            assert got is not None
            got.events[0].content.parts.clear()  # type: ignore[union-attr]
        assert texts(await service.get_session(**NAME))[0] == "0"

    async def test_a_session_made_anew_is_not_the_old_one(self, make_service: MakeService) -> None:
        """A process that knew a session sees nothing of it after another made it anew."""
        here, there = make_service(), make_service()
        await filled(here, 3)
        assert len(texts(await here.get_session(**NAME))) == 3
        await there.delete_session(**NAME)
        again = await there.create_session(**NAME)
        await there.append_event(again, said("new"))
        assert texts(await here.get_session(**NAME)) == ["new"]
        recent = GetSessionConfig(num_recent_events=5)
        assert texts(await here.get_session(**NAME, config=recent)) == ["new"]


class TestWriters:
    async def test_a_stale_copy_is_refused(self, make_service: MakeService) -> None:
        """An append through a copy that lacks an event raises StaleSessionError and changes nothing."""
        one, two = make_service(), make_service()
        session = await one.create_session(**NAME)
        stale = await two.get_session(**NAME)
        assert stale is not None
        await one.append_event(session, said("first"))
        event = said("second", state={"x": 1, "temp:y": 2})
        before, event_before = stale.model_copy(deep=True), event.model_copy(deep=True)
        with pytest.raises(StaleSessionError, match="get_session"):
            await two.append_event(stale, event)
        assert stale.model_dump() == before.model_dump()
        assert event == event_before
        fresh = await two.get_session(**NAME)
        assert fresh is not None
        await two.append_event(fresh, event)
        assert texts(await one.get_session(**NAME)) == ["first", "second"]
        assert fresh.state == {"x": 1, "temp:y": 2}

    async def test_a_stale_copy_can_be_accepted(self, make_service: MakeService) -> None:
        """With accept_stale, an append through an old copy goes through, as ADK in memory does it."""
        service = make_service(accept_stale=True)
        session = await service.create_session(**NAME)
        stale = await service.get_session(**NAME)
        assert stale is not None
        await service.append_event(session, said("first"))
        await service.append_event(stale, said("second"))
        assert texts(stale) == ["second"]
        assert texts(await service.get_session(**NAME)) == ["first", "second"]

    async def test_a_session_without_marker(self, service: RedisSessionService) -> None:
        """A session object that went through JSON is stale only if storage has moved on."""
        session = await filled(service, 2)
        copied = Session.model_validate_json(session.model_dump_json())
        await service.append_event(copied, said("2", timestamp=200.0))
        old = Session.model_validate_json(session.model_dump_json())
        with pytest.raises(StaleSessionError):
            await service.append_event(old, said("3"))
        assert texts(await service.get_session(**NAME)) == ["0", "1", "2"]

    async def test_tasks_may_share_a_session_object(self, service: RedisSessionService) -> None:
        """Tasks that append through one object at once are served one after the other."""
        session = await service.create_session(**NAME)
        events = [said(str(n), state={"n": n, f"k{n}": n}) for n in range(50)]
        await asyncio.gather(*(service.append_event(session, event) for event in events))
        got = await service.get_session(**NAME)
        assert got is not None
        assert got.events == session.events
        assert got.state == session.state
        assert sorted(map(int, texts(got))) == list(range(50))
        assert not service._stores.of_this_loop().locks

    async def test_an_equal_event_again_changes_nothing(self, make_service: MakeService) -> None:
        """An event delivered again, by this process or another, is not doubled."""
        service = make_service()
        session = await service.create_session(**NAME)
        event = said("once", state={"n": 1})
        await service.append_event(session, event)
        await service.append_event(session, said("later", state={"n": 2}))
        await service.append_event(session, event.model_copy(deep=True))
        other = make_service()
        got = await other.get_session(**NAME)
        assert got is not None
        await other.append_event(got, Event.model_validate_json(event.model_dump_json()))
        assert texts(got) == ["once", "later"]
        assert texts(session) == ["once", "later"]
        assert (await other.get_session(**NAME)).state == {"n": 2}  # type: ignore[union-attr]

    async def test_events_that_share_an_id_are_kept(self, service: RedisSessionService) -> None:
        """Different events with one id are all stored, and each of them only once."""
        session = await service.create_session(**NAME)
        events = [said(text, id="same") for text in ("a", "b", "c")]
        for event in [*events, *events]:
            await service.append_event(session, event.model_copy(deep=True))
        assert texts(await service.get_session(**NAME)) == ["a", "b", "c"]

    async def test_a_lost_answer_is_made_good(
        self, service: RedisSessionService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the answer to an append is lost, appending again completes it without doubling."""
        session = await service.create_session(**NAME)
        script = Store.script

        async def lost(self: Store, *args: Any) -> Any:
            await script(self, *args)
            raise ConnectionResetError("lost")

        event = said("once", state={"n": 1, "temp:t": 2})
        monkeypatch.setattr(Store, "script", lost)
        with pytest.raises(RedisUnavailable, match="again is safe"):
            await service.append_event(session, event)
        assert session.events == []
        monkeypatch.setattr(Store, "script", script)
        await service.append_event(session, event)
        await service.append_event(session, said("next"))
        assert texts(session) == ["once", "next"]
        assert session.state == {"n": 1, "temp:t": 2}
        assert texts(await service.get_session(**NAME)) == ["once", "next"]

    async def test_a_partial_event_is_not_stored(self, service: RedisSessionService) -> None:
        """A partial event comes back as it is and is not stored."""
        session = await service.create_session(**NAME)
        event = said("…", partial=True, state={"x": 1})
        assert await service.append_event(session, event) is event
        got = await service.get_session(**NAME)
        assert got is not None
        assert (got.events, got.state, session.events) == ([], {}, [])

    async def test_a_deleted_session_takes_no_events(self, service: RedisSessionService) -> None:
        """Appending to a session that was deleted raises SessionNotFoundError."""
        session = await service.create_session(**NAME)
        await service.delete_session(**NAME)
        with pytest.raises(SessionNotFoundError, match="Session s not found"):
            await service.append_event(session, said("x"))
        assert session.events == []

    async def test_one_of_two_creates(self, make_service: MakeService) -> None:
        """Of many who create one session at once, one does, and the others get AlreadyExistsError."""
        answers = await asyncio.gather(
            *(make_service().create_session(**NAME, state={"n": n}) for n in range(8)),
            return_exceptions=True,
        )
        made = [answer for answer in answers if isinstance(answer, Session)]
        assert len(made) == 1
        assert sum(isinstance(answer, AlreadyExistsError) for answer in answers) == 7
        got = await make_service().get_session(**NAME)
        assert got is not None
        assert got.state == made[0].state

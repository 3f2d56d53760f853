"""What `RedisSessionService` promises beyond ADK's in-memory service; see also the differential test."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.adk.cli.service_registry import ServiceRegistry, _register_services_from_yaml_config
from google.adk.errors import StaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.sessions import Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types
from pydantic import BaseModel

from adapters.adk import RedisSessionService
from store.connection import Store, connect
from store.errors import (
    BadAddress,
    MalformedEntry,
    NamespaceError,
    NotJson,
    PolicyError,
    RedisUnavailable,
    TooLarge,
)

MakeService = Callable[..., RedisSessionService]
NAME: dict[str, str] = {"app_name": "app", "user_id": "user", "session_id": "s"}


def said(text: str, **more: Any) -> Event:
    state = more.pop("state", {})
    return Event(
        author="user",
        content=types.Content(role="user", parts=[types.Part(text=text)]),
        actions=EventActions(state_delta=state),
        **more,
    )


def texts(session: Session | None) -> list[str]:
    assert session is not None
    return [event.content.parts[0].text for event in session.events]  # type: ignore[union-attr,index,misc]


async def filled(service: RedisSessionService, count: int, **name: str) -> Session:
    session = await service.create_session(**(NAME | name))
    for number in range(count):
        await service.append_event(session, said(str(number), timestamp=100.0 + number))
    return session


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    """Waits until it holds: Redis expires keys by its own clock and tells nobody."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class CountedCommands:
    """How many commands Redis served, and how many bytes it sent, between two looks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def look(self) -> tuple[int, int]:
        info = await self._store.redis.info("all")
        scripts = info.get("cmdstat_evalsha", {}).get("calls", 0)
        return int(scripts), int(info["total_net_output_bytes"])


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


NAMES = [
    "a/b", "{tag}", "a:b:c", "line\nbreak", "nul\0", "ünï/😀", "%2F", "#", "..", "*?[x]", "\ud800",
    "x" * 5000, "x" * 5001, "=", "-", '"quoted"', "a b",
]  # fmt: skip


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


class TestBadInput:
    async def test_any_name_is_a_name(self, service: RedisSessionService) -> None:
        """App, user and session ids may hold any character and never meet each other."""
        sessions = []
        for name in NAMES:
            for place in ("app_name", "user_id", "session_id"):
                session = await service.create_session(**(NAME | {place: name}))
                await service.append_event(session, said(f"{place} {name!r}", state={"user:n": 1}))
                sessions.append(session)
        for session in sessions:
            got = await service.get_session(
                app_name=session.app_name, user_id=session.user_id, session_id=session.id
            )
            assert texts(got) == texts(session)
        listed = (await service.list_sessions(app_name="app")).sessions
        ids = {(session.user_id, session.id) for session in listed}
        assert ids == {("user", name) for name in NAMES} | {(name, "s") for name in NAMES}
        for session in sessions:
            await service.delete_session(
                app_name=session.app_name, user_id=session.user_id, session_id=session.id
            )
        assert not (await service.list_sessions(app_name="app")).sessions

    async def test_parts_of_a_name_do_not_run_together(self, service: RedisSessionService) -> None:
        """(a, b/c) and (a/b, c) are two sessions."""
        await service.create_session(app_name="x", user_id="a", session_id="b/c")
        await service.create_session(app_name="x", user_id="a/b", session_id="c")
        await service.create_session(app_name="x", user_id="a:b", session_id="c")
        assert len((await service.list_sessions(app_name="x")).sessions) == 3

    @pytest.mark.parametrize(
        ("value", "named"),
        [
            (object(), "is a object"),
            ({1, 2}, "is a set"),
            (b"bytes", "is a bytes"),
            (lambda: 0, "is a function"),
            (float("nan"), "is nan"),
            ({"deep": [0, {"er": float("inf")}]}, r"bad\['deep'\]\[1\]\['er'\] is inf"),
            ({1: "one"}, "has the key 1"),
            ("\ud800", "not valid Unicode"),
            (CIRCLE, "contains itself"),
        ],
    )
    async def test_state_that_is_not_json(
        self, service: RedisSessionService, value: Any, named: str
    ) -> None:
        """A state value that JSON cannot hold is an error that names the key; nothing is stored."""
        with pytest.raises(NotJson, match=f"state key 'bad'.*{named}"):
            await service.create_session(**NAME, state={"app:good": 1, "bad": value})
        session = await service.create_session(**NAME)
        assert session.state == {}
        for key in ("bad", "app:bad", "user:bad"):
            event = said("x", state={"app:good": 1, key: value, "temp:t": value})
            with pytest.raises(NotJson, match=f"state key '{key}'.*"):
                await service.append_event(session, event)
        assert (session.events, session.state) == ([], {})
        got = await service.get_session(**NAME)
        assert got is not None
        assert (got.events, got.state) == ([], {})
        await service.append_event(session, said("good"))

    async def test_state_that_has_a_json_form(self, service: RedisSessionService) -> None:
        """Tuples are stored as lists and pydantic models as dicts."""

        class Model(BaseModel):
            name: str
            nothing: int | None = None

        session = await service.create_session(**NAME, state={"t": (1, [2], (3,))})
        await service.append_event(session, said("x", state={"m": [Model(name="n")]}))
        got = await service.get_session(**NAME)
        assert got is not None
        assert got.state == {"t": [1, [2], [3]], "m": [{"name": "n"}]}

    async def test_temp_state_need_not_be_json(self, service: RedisSessionService) -> None:
        """What is temp: goes to the session object only, whatever it is."""
        session = await service.create_session(**NAME)
        thing = object()
        event = await service.append_event(session, said("x", state={"temp:t": thing, "a": 1}))
        assert session.state == {"temp:t": thing, "a": 1}
        assert event.actions.state_delta == {"a": 1}
        got = await service.get_session(**NAME)
        assert got is not None
        assert got.state == {"a": 1}
        assert got.events == session.events

    async def test_an_event_that_is_not_json(self, service: RedisSessionService) -> None:
        """An event with content that has no JSON form is an error that names the event."""
        session = await service.create_session(**NAME)
        for event in (said("\ud800", id="e1"), Event(author="a", id="e1", output=object())):
            with pytest.raises(NotJson, match="event 'e1'"):
                await service.append_event(session, event)
        assert session.events == []
        assert texts(await service.get_session(**NAME)) == []

    async def test_an_event_of_50_mb(self, service: RedisSessionService) -> None:
        """An event above the limit is one error, and the session stays as it was."""
        session = await filled(service, 1)
        with pytest.raises(TooLarge, match=r"50\.\d MB, the limit is 16\.8 MB"):
            await service.append_event(session, said("x" * 50_000_000, state={"n": 1}))
        with pytest.raises(TooLarge, match="the state takes"):
            await service.append_event(session, said("x", state={"n": "x" * 50_000_000}))
        with pytest.raises(TooLarge, match="the state takes"):
            await service.create_session(
                **(NAME | {"session_id": "t"}), state={"n": "x" * 50_000_000}
            )
        assert texts(session) == ["0"]
        got = await service.get_session(**NAME)
        assert texts(got) == ["0"]
        await service.append_event(session, said("1"))
        assert len((await service.list_sessions(app_name="app")).sessions) == 1

    async def test_large_events_below_the_limit(self, make_service: MakeService) -> None:
        """Events of megabytes are stored, and read page by page."""
        session = await filled(make_service(), 0)
        writer = make_service()
        big = "x" * 3_000_000
        got = await writer.get_session(**NAME)
        assert got is not None
        for _ in range(5):
            await writer.append_event(got, said(big))
        assert len(texts(await make_service().get_session(**NAME))) == 5
        assert session.events == []

    @pytest.mark.parametrize(
        "url", ["ftp://x", "sqlite:///x", "nothing", "", "agent-reconciler+ftp://x", "embedded://",
                "redis://h?ttl=soon", "redis://h?share_events=perhaps"],
    )  # fmt: skip
    def test_an_address_that_cannot_be(self, url: str) -> None:
        """An unknown scheme or option is refused when the service is made."""
        with pytest.raises(BadAddress):
            RedisSessionService(url)

    def test_other_arguments_that_cannot_be(self) -> None:
        """A missing address, a bad namespace and a ttl of zero are refused when the service is made."""
        with pytest.raises(BadAddress, match="one address"):
            RedisSessionService()
        with pytest.raises(BadAddress, match="one address"):
            RedisSessionService("redis://a", uri="redis://b")
        with pytest.raises(NamespaceError):
            RedisSessionService("redis://a", "a/b")
        for ttl in (0, -1, {"app": 0}, float("nan")):
            with pytest.raises(PolicyError, match="ttl"):
                RedisSessionService("redis://a", ttl=ttl)

    def test_a_password_is_not_shown(self) -> None:
        """No message shows the password of an address."""
        assert "secret" not in RedisSessionService("redis://me:secret@host/0?ttl=5").url
        with pytest.raises(BadAddress) as refused:
            RedisSessionService("ftp://me:secret@host/0")
        assert "secret" not in str(refused.value)

    async def test_nobody_answers(self, tmp_path: Path) -> None:
        """With no Redis at the address, the first call says so."""
        service = RedisSessionService(f"unix://{tmp_path}/none.sock")
        with pytest.raises(RedisUnavailable, match=r"none\.sock"):
            await service.create_session(**NAME)


class TestAddress:
    def test_options_in_the_address(self) -> None:
        """Options may stand in the query; an argument wins; the rest is left for the client."""
        service = RedisSessionService(
            uri="agent-reconciler+redis://h:1/0?namespace=n&ttl=5&cache_bytes=7&share_events=yes"
            "&accept_stale=1&max_event_bytes=9&protocol=2",
            cache_bytes=8,
            agents_dir="ignored",
        )
        assert service.url == "redis://h:1/0?protocol=2"
        assert (service.namespace, service._ttl, service._limit) == ("n", 5.0, 9)
        assert (service._share, service._accept_stale, service._cache._limit) == (True, True, 8)

    async def test_adks_service_registry(self, redis_url: str, namespace: str) -> None:
        """ADK's registry makes the service from a services.yaml entry and a URI."""
        registry = ServiceRegistry()
        entry = {
            "scheme": "agent-reconciler+unix",
            "type": "session",
            "class": "adapters.adk.RedisSessionService",
        }
        _register_services_from_yaml_config({"services": [entry]}, registry)
        service = registry.create_session_service(
            f"agent-reconciler+{redis_url}?namespace={namespace}", agents_dir="agents"
        )
        assert isinstance(service, RedisSessionService)
        async with service:
            await service.create_session(**NAME)
            assert await service.get_session(**NAME) is not None

    async def test_an_embedded_server(self, tmp_path: Path) -> None:
        """embedded://PATH starts a server, and keeps what it holds for the next one."""
        for texts_before in ([], ["hello"]):
            async with RedisSessionService(f"embedded://{tmp_path}/data") as service:
                session = await service.get_session(**NAME) or await service.create_session(**NAME)
                assert texts(session) == texts_before
                await service.append_event(session, said("hello"))


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
        for use in ("create", "append", "open"):
            if use == "append":
                await service.append_event(session, said("x"))
            if use == "open":
                # As if nearly all of the time had passed.
                async with connect(redis_url) as store:
                    await store.redis.pexpire(f"ar:{{{namespace}/adk/app}}:session:user/s", 5000)
                assert await service.get_session(**NAME) is not None
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

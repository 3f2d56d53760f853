"""What `RedisSessionService` is given: names, values and addresses, as they are or refused with one line.

After a refusal the session is as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.adk.cli.service_registry import ServiceRegistry, _register_services_from_yaml_config
from google.adk.events.event import Event
from google.genai import types
from pydantic import BaseModel

from adapters.adk import RedisSessionService
from store.errors import (
    BadAddress,
    NamespaceError,
    NotJson,
    PolicyError,
    RedisUnavailable,
    TooLarge,
)
from tests.adapters.adk.sessions import (
    NAME,
    MakeService,
    filled,
    said,
    texts,
)
from tests.adapters.adk.talk import call

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

    async def test_an_event_with_a_number_that_json_has_not(
        self, service: RedisSessionService
    ) -> None:
        """It is refused by its place in the event, as in state; None beside it is no reason to."""

        def calls(**args: Any) -> Event:
            content = types.Content(role="model", parts=call("f", n=None, **args))
            return Event(author="a", content=content)

        session = await service.create_session(**NAME)
        for bad in (float("inf"), float("nan")):
            place = r"\['args'\]\['deep'\]\[0\]\['x'\]"
            with pytest.raises(NotJson, match=rf"{place} is {bad}, and JSON has no such number"):
                await service.append_event(session, calls(deep=[{"x": bad}]))
        await service.append_event(session, calls(deep=[None, 2**70]))
        got = await service.get_session(**NAME)
        assert got is not None
        assert got.events == session.events
        assert got.events[0].get_function_calls()[0].args == {"n": None, "deep": [None, 2**70]}

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
                "redis://h?ttl=soon", "redis://h?share_events=perhaps", "redis://h/0?nmae=x", "redis://h/abc"],
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
            "&accept_stale=1&max_event_bytes=9&socket_timeout=5",
            cache_bytes=8,
            agents_dir="ignored",
        )
        assert service.url == "redis://h:1/0?socket_timeout=5"
        options = service._options
        assert (service.namespace, options.ttl, options.max_event_bytes) == ("n", 5.0, 9)
        assert (options.share_events, options.accept_stale, service._cache._limit) == (
            True,
            True,
            8,
        )

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
